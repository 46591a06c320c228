"""Decoding speed of a language model with random weights: tokens a second, the share of what reading the weights costs, memory.

A step must read every weight but the input embedding once; "weights" is the time that takes at the bandwidth of a large copy, over
the time measured. Each row carries the largest distance of the decoder's logits from those of the parallel pass over the same
tokens, relative to the largest logit. Memory is what is allocated after that many tokens.

    python benchmarks/decode.py [--preset 1B] [--batch 1 64] [--compile no yes] [--tokens 100000] [--out decode.jsonl]
    python benchmarks/decode.py --device cpu --preset demo --tokens 2000
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from parashoot.bench.results import facts
from parashoot.bench.trial import copy_bandwidth
from parashoot.lm import Decoder, ParaRNNForCausalLM
from parashoot.lm.presets import preset

PROMPT, ROUND = 32, 64  # tokens read before the clock starts, tokens in one sample of the time


def build(options: argparse.Namespace, device: torch.device) -> ParaRNNForCausalLM:
    with device:
        model = ParaRNNForCausalLM(preset(options.preset, cell=options.cell))
    return model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()  # type: ignore[call-arg]


def weight_bytes(model: ParaRNNForCausalLM) -> int:
    """What one step reads of the weights: all but the input embedding, unless that is the head's matrix too."""
    read = [p for p in model.parameters() if p is not model.model.embed_tokens.weight or p is model.lm_head.weight]
    return sum(p.numel() * p.element_size() for p in read)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device) -> float:
    """MiB: allocated on the GPU, or the process's largest size so far on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@torch.no_grad()
def error(model: ParaRNNForCausalLM, decoder: Decoder, prompt: torch.Tensor) -> float:
    """Distance of the decoder's logits after `ROUND` tokens of its own from the parallel pass, relative to the largest logit."""
    decoder.prefill(prompt)
    made = decoder.sample(ROUND)
    logits = model(torch.cat([prompt, made], 1), logits_to_keep=1).logits[:, -1].float()
    return float((decoder.logits - logits).abs().max() / logits.abs().max())


def speed(decoder: Decoder, repeats: int) -> dict[str, float]:
    """Milliseconds a step: median, p20 and p80 of `repeats` rounds."""
    times = []
    for _ in range(repeats):
        wait(decoder.device)
        start = time.perf_counter()
        decoder.sample(ROUND)
        wait(decoder.device)
        times.append((time.perf_counter() - start) / ROUND * 1e3)
    low, *_, high = statistics.quantiles(times, n=5)
    return {"ms": statistics.median(times), "p20": low, "p80": high}


def growth(decoder: Decoder, prompt: torch.Tensor, tokens: int) -> dict[str, float]:
    """MiB after 1, 10, 100, ... and `tokens` tokens."""
    decoder.prefill(prompt[:, :1])
    marks = [10**k for k in range(len(str(tokens))) if 10**k < tokens] + [tokens]
    seen, found = 0, {}
    for mark in marks:
        while seen < mark:
            piece = min(1024, mark - seen)
            decoder.sample(piece)
            seen += piece
        wait(decoder.device)
        found[str(mark)] = memory(decoder.device)
    return found


def measure(options: argparse.Namespace, device: torch.device, bandwidth: float) -> Iterator[dict[str, Any]]:
    model = build(options, device)
    read = weight_bytes(model)
    for batch in options.batch:
        prompt = torch.randint(0, model.config.vocab_size, (batch, PROMPT), device=device)
        for compiled in options.compile:
            begun = time.perf_counter()
            decoder = Decoder(model, batch, temperature=1.0, compile=compiled == "yes")
            wrong = error(model, decoder, prompt)
            ready = time.perf_counter() - begun
            row = {"preset": options.preset, "cell": options.cell, "batch": batch, "compile": compiled == "yes"}
            row |= {"error": wrong, "ready_s": ready, "weight_bytes": read, **speed(decoder, options.repeats)}
            row["tokens_per_s"] = batch * 1e3 / row["ms"]
            row["weights"] = read / bandwidth * 1e3 / row["ms"]
            if batch == min(options.batch) and compiled == options.compile[-1]:
                row["memory_mib"] = growth(decoder, prompt, options.tokens)
            yield row
            del decoder


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding speed and memory of a language model.")
    parser.add_argument("--preset", default="1B")
    parser.add_argument("--cell", default="gru")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--compile", nargs="+", choices=("no", "yes"), help="default: both on a GPU, no on the CPU")
    parser.add_argument("--tokens", type=int, default=100_000, help="how far memory is followed")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--commit", metavar="HASH", help="what the rows call this version (default: git's)")
    parser.add_argument("--out", type=Path, help="rows are added to this file, one JSON object a line")
    options = parser.parse_args()
    device = torch.device(options.device)
    options.compile = options.compile or (["no", "yes"] if device.type == "cuda" else ["no"])
    bandwidth = copy_bandwidth(device)
    where = {"copy_gb_s": bandwidth / 1e9, **facts(device, options.commit)}
    print(
        f"{where['device']}, commit {where['commit']}, copies at {where['copy_gb_s']:.0f} GB/s; preset {options.preset}, {options.cell}"
    )
    print(
        f"{'batch':>5} {'compile':>7} {'ms/step':>8} {'p20':>7} {'p80':>7} {'tokens/s':>9} {'weights':>7} {'error':>8} {'ready':>6}"
    )
    for row in measure(options, device, bandwidth):
        print(
            f"{row['batch']:5} {'yes' if row['compile'] else 'no':>7} {row['ms']:8.3f} {row['p20']:7.3f} {row['p80']:7.3f} "
            f"{row['tokens_per_s']:9.1f} {row['weights']:7.1%} {row['error']:8.1e} {row['ready_s']:5.1f}s",
            flush=True,
        )
        for tokens, mib in row.get("memory_mib", {}).items():
            print(f"{'':13} {mib:10.1f} MiB after {int(tokens):,} tokens", flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps({**row, **where}) + "\n")


if __name__ == "__main__":
    main()
