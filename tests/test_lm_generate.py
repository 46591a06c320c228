"""Generation: `transformers`' own, the decoder with its fixed buffers, and text in and out."""

from __future__ import annotations

import itertools
import json
import math
import runpy
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lm_models import tiny_model, tokens, transformers
from parashoot.errors import ArgumentError, ArgumentTypeError
from parashoot.lm import Cache, Decoder, ParaRNNForCausalLM, generate, generate_text
from parashoot.lm.checkpoint import load_model
from parashoot.lm.decode import BURST, advance, draw

PAD = 0


@pytest.fixture
def model() -> ParaRNNForCausalLM:
    return tiny_model(pad_token_id=PAD)


def greedy(model: ParaRNNForCausalLM, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The likeliest continuation of each row, from the parallel pass over everything, again for each token."""
    start = ids.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[:, start:]


def left_padded(lengths: tuple[int, ...]) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Texts of those lengths (each a batch of one), the same padded to one batch, and its mask."""
    texts = [tokens(1, n, seed=n) for n in lengths]
    ids = torch.full((len(lengths), max(lengths)), PAD)
    for row, text in zip(ids, texts, strict=True):
        row[len(row) - text.shape[1] :] = text[0]
    return texts, ids, (ids != PAD).long()


# transformers' generate


def test_greedy_generation_follows_the_parallel_pass(model):
    ids = tokens(3, 9)
    assert torch.equal(model.generate(ids, max_new_tokens=7, do_sample=False)[:, 9:], greedy(model, ids, 7))


@pytest.mark.parametrize("cell", ["lstm", "headgru"])
def test_left_padded_texts_continue_as_if_alone(cell):
    model = tiny_model(pad_token_id=PAD, cell=cell)
    texts, ids, mask = left_padded((12, 5, 1))
    got = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 12:]
    assert torch.equal(got, torch.cat([greedy(model, text, 6) for text in texts]))


def test_generation_without_a_cache_gives_the_same(model):
    ids = tokens(2, 6)
    got = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(got[:, 6:], greedy(model, ids, 5))


def test_sampling_repeats_with_its_seed_and_stays_among_the_likeliest(model):
    ids, made = tokens(2, 6), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        made.append(model.generate(ids, max_new_tokens=12, do_sample=True, top_k=5))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    likeliest = model(made[0]).logits[:, 5:-1].topk(5).indices
    assert bool((likeliest == made[0][:, 6:, None]).any(-1).all())


def test_beam_search_finds_the_likeliest_pair():
    model = tiny_model(vocab_size=8, pad_token_id=PAD)
    ids = tokens(2, 6) % 7 + 1
    got = model.generate(ids, max_new_tokens=2, do_sample=False, num_beams=8)[:, 6:]
    for row in range(2):
        pairs = torch.tensor(list(itertools.product(range(8), repeat=2)))
        texts = torch.cat([ids[row].expand(64, -1), pairs], 1)
        scores = model(texts).logits[:, 5:-1].log_softmax(-1).gather(2, pairs[:, :, None]).sum((1, 2))
        assert got[row].tolist() == pairs[scores.argmax()].tolist()


def test_beams_take_their_past_along(model):
    ids = tokens(2, 6)
    got = model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=3)
    assert torch.equal(got, model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=3, use_cache=False))


def test_generation_from_embeddings(model):
    ids = tokens(2, 6)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embedded, max_new_tokens=5, do_sample=False), greedy(model, ids, 5))


def test_generation_returns_a_cache_of_constant_size(model):
    out = model.generate(tokens(2, 6), max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
    cache = out["past_key_values"]
    assert isinstance(cache, Cache) and cache.length == 35
    assert sum(t.numel() for t in itertools.chain(*cache.blocks)) == 2 * 2 * 16 * (3 + 1)


def test_hidden_states_while_generating_are_those_of_one_pass(model):
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_hidden_states": True}
    out = model.generate(tokens(2, 6), **options)
    steps = [torch.cat(layer, 1) for layer in zip(*out.hidden_states, strict=True)]
    whole = model(out.sequences[:, :-1], output_hidden_states=True).hidden_states
    assert len(steps) == len(whole) == model.config.num_hidden_layers + 1
    for got, want in zip(steps, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


class ByteTokenizer:
    """What a streamer asks of a tokenizer."""

    def decode(self, ids, **options) -> str:
        return bytes(int(i) for i in ids).decode("latin-1")


def test_generation_streams(model):
    ids = tokens(1, 6)
    streamer = transformers.TextIteratorStreamer(ByteTokenizer(), skip_prompt=True, timeout=30.0)  # type: ignore[arg-type]
    options = {"max_new_tokens": 9, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert list(text.encode("latin-1")) == greedy(model, ids, 9)[0].tolist()


# The decoder


def test_the_decoder_follows_the_parallel_pass(model):
    texts, ids, mask = left_padded((12, 5, 1))
    decoder = Decoder(model, batch_size=3, temperature=0.0)
    first = decoder.prefill(ids, mask).argmax(-1)
    got = decoder.sample(2 * BURST + 3)
    assert torch.equal(first, got[:, 0])
    assert torch.equal(got, torch.cat([greedy(model, text, 2 * BURST + 3) for text in texts]))


def test_steps_and_draws_can_be_mixed(model):
    ids, decoder = tokens(2, 6), Decoder(model, batch_size=2, temperature=0.0)
    for t in range(6):
        decoder.step(ids[:, t])
    made = [decoder.sample(1)]
    logits = decoder.step(made[0][:, 0] * 0 + 9)
    torch.testing.assert_close(logits, model(torch.cat([ids, *made, torch.full((2, 1), 9)], 1)).logits[:, -1].float())
    assert decoder.cache.length == 8


def test_the_decoder_writes_where_it_wrote_before(model):
    decoder = Decoder(model, seed=1)
    places = lambda: [t.data_ptr() for t in (*itertools.chain(*decoder.cache.blocks), decoder.logits)]
    before = places()
    decoder.prefill(tokens(1, 5))
    decoder.sample(40)
    assert places() == before
    decoder.restart()
    assert torch.equal(decoder.prefill(tokens(1, 5)), Decoder(model).prefill(tokens(1, 5)))


def test_all_blocks_share_one_compiled_step():
    model = tiny_model(num_hidden_layers=12)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    decoder = Decoder(model, temperature=0.0)
    decoder._advance = torch.compile(advance, fullgraph=True, dynamic=False, backend=counter)
    ids = tokens(1, 5)
    decoder.prefill(ids)
    assert torch.equal(decoder.sample(4), greedy(model, ids, 4))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_draws_have_the_probabilities_of_softmax():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 3.0, 2.0, -math.inf])
    drawn = draw(logits.expand(20000, -1), 1.5, None, generator).bincount(minlength=5) / 20000
    torch.testing.assert_close(drawn, (logits / 1.5).softmax(0), rtol=0, atol=0.01)
    drawn = draw(logits.expand(20000, -1), 1.0, 2, generator).bincount(minlength=5) / 20000
    torch.testing.assert_close(drawn[2:4], logits[2:4].softmax(0), rtol=0, atol=0.01)
    assert drawn[[0, 1, 4]].tolist() == [0, 0, 0]


def test_misuse_of_the_decoder_is_explained(model):
    with pytest.raises(ArgumentTypeError, match="ParaRNNForCausalLM"):
        Decoder(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="batch_size"):
        Decoder(model, 0)
    decoder = Decoder(model, 2)
    with pytest.raises(ArgumentError, match="batch_size = 2"):
        decoder.prefill(tokens(1, 3))
    with pytest.raises(ArgumentError, match="token"):
        decoder.step(tokens(1, 2))
    with pytest.raises(ArgumentError, match="count"):
        decoder.sample(0)


def test_the_benchmark_runs(monkeypatch, tmp_path):
    script, out = Path(__file__).parents[1] / "benchmarks" / "decode.py", tmp_path / "out.jsonl"
    arguments = "--device cpu --preset demo --batch 1 3 --compile no --tokens 20 --repeats 2 --out"
    monkeypatch.setattr(sys, "argv", [str(script), *arguments.split(), str(out)])
    monkeypatch.setattr("parashoot.bench.trial.copy_bandwidth", lambda device: 1e10)
    runpy.run_path(str(script), run_name="__main__")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["batch"] for row in rows] == [1, 3]
    assert all(row["error"] < 1e-4 and row["tokens_per_s"] > 0 for row in rows)
    assert list(rows[0]["memory_mib"]) == ["1", "10", "20"]


# Text


def test_generation_repeats_with_its_seed(model):
    options = {"temperature": 0.9, "top_k": 50}
    first = generate_text(model, "abc", 12, seed=3, **options)
    assert first == generate_text(model, "abc", 12, seed=3, **options)
    assert first != generate_text(model, "abc", 12, seed=4, **options)


def test_top_k_1_and_tiny_temperatures_are_greedy(model):
    ids = tokens(1, 5)
    want = greedy(model, ids, 8)[0].tolist()
    assert generate(model, ids[0], 8, temperature=0.0) == want
    assert generate(model, ids[0], 8, top_k=1, seed=9) == want
    assert generate(model, ids[0], 8, temperature=1e-300, seed=9) == want


def test_a_saved_directory_is_a_checkpoint(model, tmp_path):
    model.float().save_pretrained(tmp_path)
    assert generate_text(load_model(tmp_path), "abc", 6, seed=3) == generate_text(model, "abc", 6, seed=3)


def test_text_streams_stops_and_replaces_broken_bytes(model, monkeypatch):
    produced = iter([0xC3, 0xA9, 0xFF, ord("e"), ord("n"), ord("d"), ord("x")])
    monkeypatch.setattr(Decoder, "sample", lambda *_: torch.tensor([[next(produced)]]))
    pieces: list[str] = []
    assert generate_text(model, "?", 20, stop="end", on_text=pieces.append) == "é\ufffdend"
    assert pieces[0] == "é"
    assert "".join(pieces) == "é\ufffdend"


def test_generation_ends_at_the_eos_token(monkeypatch):
    produced = iter([1, 2, 7, 3])
    monkeypatch.setattr(Decoder, "sample", lambda *_: torch.tensor([[next(produced)]]))
    assert generate(tiny_model(eos_token_id=7), tokens(1, 2)[0], 20) == [1, 2, 7]


def test_bad_generation_arguments_are_named(model):
    with pytest.raises(ArgumentError, match="temperature"):
        generate_text(model, "a", 3, temperature=-1.0)
    with pytest.raises(ArgumentError, match="top_k"):
        generate_text(model, "a", 3, top_k=0)
    with pytest.raises(ArgumentError, match="prompt"):
        generate_text(model, "", 3)


# A cache given to transformers' generate


@pytest.mark.parametrize("mixer", ["rnn", "attention"])
@pytest.mark.parametrize("chunk", [1, 3, 4, 9])
def test_a_prompt_read_in_chunks_continues_alike(mixer, chunk):
    model = tiny_model(mixer=mixer, num_heads=4, **({"head_dim": 4} if mixer == "attention" else {}))
    ids = tokens(2, 9)
    options = {"max_new_tokens": 6, "do_sample": False, "past_key_values": Cache()}
    got = model.generate(ids, prefill_chunk_size=chunk, **options)
    assert torch.equal(got[:, 9:], greedy(model, ids, 6))


@pytest.mark.parametrize("chunk", [3, 6])
def test_a_padded_prompt_read_in_chunks_continues_alike(model, chunk):
    texts, ids, mask = left_padded((12, 5, 7))
    options = {"max_new_tokens": 6, "do_sample": False, "past_key_values": Cache()}
    got = model.generate(ids, attention_mask=mask, prefill_chunk_size=chunk, **options)[:, 12:]
    assert torch.equal(got, torch.cat([greedy(model, text, 6) for text in texts]))


@pytest.mark.parametrize("mixer", ["rnn", "attention"])
@pytest.mark.parametrize("seen", [1, 5, 8])
def test_a_cache_is_continued_by_the_whole_text_or_by_what_it_lacks(mixer, seen):
    model = tiny_model(mixer=mixer, num_heads=4, **({"head_dim": 4} if mixer == "attention" else {}))
    ids = tokens(2, 9)
    want, options = greedy(model, ids, 6), {"max_new_tokens": 6, "do_sample": False}

    def past() -> Cache:
        cache = Cache()
        with torch.no_grad():
            model(ids[:, :seen], past_key_values=cache)
        return cache

    assert torch.equal(model.generate(ids, past_key_values=past(), **options)[:, 9:], want)
    rest, mask = ids[:, seen:], torch.ones(2, 9, dtype=torch.int64)
    got = model.generate(rest, past_key_values=past(), attention_mask=mask, **options)
    assert torch.equal(got[:, 9 - seen :], want)
    if seen >= 9 - seen:
        with pytest.raises(ArgumentError, match=f"a past of {seen} tokens before a text of {9 - seen}"):
            model.generate(rest, past_key_values=past(), **options)


def test_a_cache_that_has_seen_the_whole_text_is_refused(model):
    ids, cache = tokens(2, 9), Cache()
    model(ids, past_key_values=cache)
    with pytest.raises(ArgumentError, match="a past of 9 tokens before a text of 9"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)


def test_embeddings_beside_a_cache_are_those_of_the_whole_text(model):
    ids, cache = tokens(2, 9), Cache()
    embedded = model.get_input_embeddings()(ids)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(inputs_embeds=embedded, **options), greedy(model, ids, 4))
    model(ids[:, :6], past_key_values=cache)
    with pytest.raises(ArgumentError, match="a past of 6 tokens"):
        model.generate(inputs_embeds=embedded[:, 6:], past_key_values=cache, **options)
