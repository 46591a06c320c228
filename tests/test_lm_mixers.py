"""Models that differ in the mixer alone: attention and Gated DeltaNet against loops written from their equations, and their pasts."""

from __future__ import annotations

import cmath
import importlib.util
import json
import math
import shutil
import subprocess
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn import functional as F

from lm_models import TINY, Largest, tiny_model, tokens, transformers
from parashoot.cli import main
from parashoot.errors import ArgumentError, MissingPackageError
from parashoot.lm import Cache, Decoder, ParaRNNConfig, ParaRNNForCausalLM, checkpoint, gated_delta, generate
from parashoot.lm import loss as losses
from parashoot.lm.attention import Attention
from parashoot.lm.data import Tokens
from parashoot.lm.decode import advance
from parashoot.lm.evaluate import evaluate
from parashoot.lm.gated_delta import GatedDelta, delta_rule
from parashoot.lm.log import read_log
from parashoot.lm.models import build_model, model_config, parameter_groups
from parashoot.lm.presets import PRESETS, preset
from parashoot.lm.processes import Processes, place
from parashoot.lm.train import Run, train
from parashoot.lm.train_config import TrainConfig

ALONE = Processes(0, 1, torch.device("cpu"))
MIXERS: dict[str, dict[str, Any]] = {
    "rnn": {"mixer": "rnn"},
    "attention": {"mixer": "attention", "num_heads": 4, "head_dim": 8},
    "gated_delta": {"mixer": "gated_delta", "num_heads": 4, "head_dim": 4},
}
OTHERS = [name for name in MIXERS if name != "rnn"]


@pytest.fixture(params=OTHERS)
def model(request) -> ParaRNNForCausalLM:
    return tiny_model(pad_token_id=0, **MIXERS[request.param])


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


# The equations


def attention_by_loop(mixer: Attention, x: Tensor) -> Tensor:
    """y (T, d) for x (T, d): pairs of channels as complex numbers, turned by position, then softmax for each query."""
    n, half = mixer.head_dim, mixer.head_dim // 2
    q, k, v = ((w @ x.T).T for w in mixer.qkv_proj.weight.chunk(3))
    rows = []
    for i in range(len(x)):
        heads = []
        for h in range(x.shape[1] // n):
            turned = lambda u, t, at=h * n: [
                complex(u[t, at + m], u[t, at + m + half]) * cmath.exp(1j * t * 10000 ** (-2 * m / n))
                for m in range(half)
            ]
            mine = turned(q, i)
            scores = [
                sum((a * b.conjugate()).real for a, b in zip(mine, turned(k, j), strict=True)) / math.sqrt(n)
                for j in range(i + 1)
            ]
            weights = torch.tensor(scores, dtype=x.dtype).softmax(0)
            heads.append(weights @ v[: i + 1, h * n : (h + 1) * n])
        rows.append(mixer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows)


def delta_by_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> Tensor:
    """o (T, H, m), as the paper writes it: S <- a S (I - b k k^T) + b v k^T, o = S q, for one sequence."""
    outputs = []
    for h in range(q.shape[1]):
        state = q.new_zeros(v.shape[-1], q.shape[-1])
        for t in range(len(q)):
            erase = torch.eye(q.shape[-1], dtype=q.dtype) - b[t, h] * torch.outer(k[t, h], k[t, h])
            state = g[t, h].exp() * state @ erase + b[t, h] * torch.outer(v[t, h], k[t, h])
            outputs.append(state @ q[t, h])
    return torch.stack(outputs).view(q.shape[1], len(q), -1).transpose(0, 1)


def gated_delta_by_loop(mixer: GatedDelta, x: Tensor) -> Tensor:
    """y (T, d) for x (T, d)."""
    (time, d), n = x.shape, mixer.head_dim
    u, gate = (x @ mixer.in_proj.weight.T).split((2 * d, d), -1)
    w = mixer.conv.weight
    taps = [sum(w[j] * u[t - j] for j in range(len(w)) if t >= j) + mixer.conv.bias for t in range(time)]
    q, k, v = F.silu(torch.stack(taps)).split((d // 2, d // 2, d), -1)
    q, k = (F.normalize(z.view(time, -1, n), dim=-1) for z in (q, k))
    a, b = (x @ mixer.rate_proj.weight.T).chunk(2, -1)
    g = -mixer.A_log.exp() * torch.log1p((a + mixer.dt_bias).exp())
    o = delta_by_loop(q / math.sqrt(n), k, v.reshape(time, -1, 2 * n), g, torch.sigmoid(b))
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
    return (o.flatten(1) * F.silu(gate)) @ mixer.out_proj.weight.T


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_the_mixer_equals_the_loop(name):
    mixer: Any = tiny_model(**MIXERS[name]).model.layers[0].mixer
    x = torch.randn(2, 14, 16, dtype=torch.float64)
    by_loop: Any = attention_by_loop if name == "attention" else gated_delta_by_loop
    tolerance = 1e-9 if name == "attention" else 1e-4  # vectors have length one up to the 1e-6 in fla's norm
    for row, got in zip(x, mixer(x, None, None)[0], strict=True):
        torch.testing.assert_close(got, by_loop(mixer, row), rtol=0, atol=tolerance)


def random_rule(batch: int, time: int, heads: int = 2, n: int = 64) -> list[Tensor]:
    """q, k, v, g, b as a trained layer has them, in float64 and rounded to bfloat16."""
    q, k = (F.normalize(torch.randn(batch, time, heads, n, dtype=torch.float64), dim=-1) for _ in range(2))
    v, g = torch.randn(batch, time, heads, 2 * n, dtype=torch.float64), -torch.rand(batch, time, heads).double()
    return [z.bfloat16().double() for z in (q, k, v, g, torch.rand(batch, time, heads).double())]


def test_the_reference_rule_equals_the_loop():
    given = random_rule(2, 9, n=4)
    got, _ = delta_rule(*given, None, None)  # type: ignore[misc]
    for row in range(2):
        close(got[row], delta_by_loop(*(z[row] for z in given)))  # type: ignore[misc]


def need_kernels() -> None:
    """Skip without fla, and where its backward pass refuses to run: its issue 640, of Triton 3.4 to 3.7.0 on Hopper."""
    pytest.importorskip("fla")
    triton = tuple(int(n) for n in pytest.importorskip("triton").__version__.split(".")[:3])
    broken = (3, 4, 0) <= triton < (3, 7, 1) and torch.cuda.get_device_capability()[0] == 9
    if broken and importlib.util.find_spec("tilelang") is None:
        pytest.skip("fla's gated delta rule has no backward pass with this Triton on Hopper")


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("time", [1, 70, 300], ids=lambda t: f"T{t}")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_kernel_equals_the_reference(time, with_state, with_reset):
    need_kernels()
    given = [z.requires_grad_() for z in random_rule(3, time)]
    state = torch.randn(3, 2, 64, 128, dtype=torch.float64) if with_state else None
    reset = torch.rand(3, time) < 0.05 if with_reset else None
    if reset is not None:
        reset[1, 0], reset[2, -1] = True, True
    want = delta_rule(*given, state, reset)  # type: ignore[misc]
    dy = torch.randn_like(want[0])
    wanted = torch.autograd.grad((want[0] * dy).sum(), given)
    low = [
        z.detach().cuda().to(torch.float32 if k > 2 else torch.bfloat16).requires_grad_() for k, z in enumerate(given)
    ]
    on_gpu = (None if state is None else state.float().cuda(), None if reset is None else reset.cuda())
    got = delta_rule(*low, *on_gpu)  # type: ignore[misc]
    grads = torch.autograd.grad((got[0] * dy.cuda()).sum(), low)
    for mine, its in zip((*got, *grads), (*want, *wanted), strict=True):
        assert float((mine.cpu().double() - its).norm() / its.norm()) < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_flash_attention_runs(weights):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    made: Any = tiny_model(**MIXERS["attention"]).to("cuda", weights).train()
    ids = tokens(2, 64).cuda()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast("cuda", torch.bfloat16, weights == torch.float32):
        made(ids, labels=ids).loss.backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("documents", [False, True])
def test_a_compiled_model_trains_on_a_gpu(name, documents):
    if name == "gated_delta":
        need_kernels()
    ids, reset = tokens(2, 200).cuda(), torch.rand(2, 200).cuda() < 0.05 if documents else None
    found = []
    for compiled in (False, True):
        made = build_model(TINY.replace(hidden_size=128, **MIXERS[name] | {"head_dim": 32})).train()
        place(made, Processes(0, 1, torch.device("cuda")), seed=0, bf16=True, compiled=compiled, checkpointed=False)
        with torch.autocast("cuda", torch.bfloat16):
            loss = made(ids, labels=ids, reset=reset).loss
        found.append([loss.detach(), *torch.autograd.grad(loss, list(made.parameters()))])
    for g, w in zip(*found, strict=True):
        assert float((g - w).norm()) <= 0.1 * float(w.norm()) + 1e-4


def test_missing_kernels_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
    gated_delta._fla.cache_clear()
    with pytest.raises(MissingPackageError, match=r"gated_delta.*needs fla.*pip install 'parashoot\[baselines\]'"):
        gated_delta._fla()


def test_documents_lie_one_after_the_other():
    reset = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 1]], dtype=torch.bool)
    bounds, first, last = gated_delta.documents(reset)
    assert bounds.tolist() == [0, 2, 4, 8, 9, 11, 12]
    assert first.tolist() == [0, 2, 3]
    assert last.tolist() == [1, 2, 5]


# The past, documents, padding


@pytest.mark.parametrize("cuts", [(1, 2, 3, 20), (16,), tuple(range(1, 24))])
@pytest.mark.parametrize("with_reset", [False, True])
def test_pieces_equal_the_whole(model, cuts, with_reset):
    ids, cache = tokens(2, 24), Cache()
    reset = torch.rand(2, 24, generator=torch.Generator().manual_seed(2)) < 0.15 if with_reset else None
    whole = model(ids, reset=reset).logits
    pieces = []
    for a, b in zip((0, *cuts), (*cuts, 24), strict=True):
        part = None if reset is None or not bool(reset[:, a:b].any()) else reset[:, a:b]
        pieces.append(model(ids[:, a:b], past_key_values=cache, reset=part).logits)
    close(torch.cat(pieces, 1), whole)
    assert cache.length == 24


def test_documents_equal_separate_runs(model):
    ids, reset = tokens(1, 30), torch.zeros(1, 30, dtype=torch.bool)
    reset[0, [11, 13]] = True
    alone = torch.cat([model(ids[:, a:b]).logits for a, b in ((0, 11), (11, 13), (13, 30))], 1)
    close(model(ids, reset=reset).logits, alone)


@pytest.mark.parametrize("cut", [None, 1, 5, 9])
def test_left_padding_changes_nothing(model, cut):
    lengths = (12, 11, 7, 1)
    ids, mask, cache = tokens(4, 12), torch.zeros(4, 12, dtype=torch.int64), Cache()
    for row, length in enumerate(lengths):
        mask[row, 12 - length :] = 1
    parts = [(0, 12)] if cut is None else [(0, cut), (cut, 12)]
    got = torch.cat([model(ids[:, a:b], mask[:, :b], cache).logits for a, b in parts], 1)
    for row, length in enumerate(lengths):
        close(got[row, 12 - length :], model(ids[row : row + 1, 12 - length :]).logits[0])


def test_attention_has_no_mask_where_none_is_needed(monkeypatch):
    """So that PyTorch can choose flash attention; and it sees the dtype that matrix products have."""
    model, seen = tiny_model(**MIXERS["attention"]).float(), []
    attend = F.scaled_dot_product_attention

    def spied(*heads, **options):
        seen.append(([t.dtype for t in heads], options["attn_mask"] is None, options["is_causal"]))
        return attend(*heads, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
    cache = Cache()
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens(2, 5), past_key_values=cache)
        model(tokens(2, 1), past_key_values=cache)
    model.bfloat16()(tokens(2, 5))
    assert seen == [([torch.bfloat16] * 3, True, causal) for causal in (True, True, False, False, True, True)]


# Generation


def greedy(model: ParaRNNForCausalLM, ids: Tensor, count: int) -> Tensor:
    start = ids.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[:, start:]


def test_batches_generate_what_each_text_does_alone(model):
    texts = [tokens(1, n, seed=n) for n in (9, 5, 1)]
    ids = torch.cat([F.pad(text, (9 - text.shape[1], 0)) for text in texts])
    got = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=6, do_sample=False)[:, 9:]
    assert torch.equal(got, torch.cat([greedy(model, text, 6) for text in texts]))


def test_beams_take_their_past_along(model):
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    ids = tokens(2, 6)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_text_is_continued_without_a_decoder(model):
    ids = tokens(1, 6)
    assert generate(model, ids[0], 8, temperature=0.0) == greedy(model, ids, 8)[0].tolist()
    sampled = [generate(model, ids[0], 20, top_k=5, seed=seed) for seed in (3, 3, 4)]
    assert sampled[0] == sampled[1] != sampled[2]
    with pytest.raises(ArgumentError, match="temperature"):
        generate(model, ids[0], 2, temperature=-1.0)


def test_the_decoder_takes_a_state_and_refuses_a_growing_cache():
    with pytest.raises(ArgumentError, match=r"mixer = 'attention'.*model\.generate"):
        Decoder(tiny_model(**MIXERS["attention"]))
    model, ids = tiny_model(**MIXERS["gated_delta"]), tokens(2, 6)
    decoder = Decoder(model, 2, temperature=0.0)
    decoder.prefill(ids)
    assert torch.equal(decoder.sample(12), greedy(model, ids, 12))


def test_a_step_of_gated_delta_compiles_as_one_graph():
    model, ids = tiny_model(**MIXERS["gated_delta"]), tokens(1, 5)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    decoder = Decoder(model, temperature=0.0)
    decoder._advance = torch.compile(advance, fullgraph=True, dynamic=False, backend=counter)
    decoder.prefill(ids)
    assert torch.equal(decoder.sample(4), greedy(model, ids, 4))
    assert counter.frame_count == 1
    torch._dynamo.reset()


# Training


def test_a_saved_model_comes_back(model, tmp_path):
    model.save_pretrained(tmp_path)
    name = "dtype" if "dtype" in transformers.PretrainedConfig().to_dict() else "torch_dtype"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **{name: torch.float64})
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens(1, 5)).logits, model(tokens(1, 5)).logits)


def test_decay_rates_are_drawn_anew_where_a_file_lacks_them(tmp_path):
    from safetensors.torch import load_file, save_file

    model, path = tiny_model(**MIXERS["gated_delta"]), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    save_file({k: v for k, v in load_file(path).items() if not k.endswith("0.mixer.A_log")}, path, {"format": "pt"})
    loaded: Any = [ParaRNNForCausalLM.from_pretrained(tmp_path).model.layers[0] for _ in range(2)]
    one, other = (block.mixer for block in loaded)
    assert bool(((one.A_log >= 0) & (one.A_log <= math.log(16))).all())
    assert not torch.equal(one.A_log, other.A_log)
    assert torch.equal(one.dt_bias, other.dt_bias)


def run_config(name: str, **changes: Any) -> TrainConfig:
    base = {"steps": 4, "batch_size": 2, "sequence_length": 24, "learning_rate": 3e-3, "checkpoint_every": 2}
    return TrainConfig(**{"model": TINY.replace(**MIXERS[name]), **base, **changes})


def facts(run: Run) -> tuple[list[float], dict[str, Tensor]]:
    return [line["loss"] for line in read_log(run.directory)], run.model.state_dict()


@pytest.mark.parametrize("name", MIXERS)
def test_a_resumed_run_has_the_same_bits(name, tmp_path):
    """Also from a checkpoint written before there were other mixers."""
    straight = train(run_config(name), tmp_path / "straight", ALONE)
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    (tmp_path / "run" / "latest").write_text("step-000002\n")
    where = tmp_path / "run" / "step-000002" / checkpoint.FACTS
    saved = json.loads(where.read_text())
    if name == "rnn":
        del saved["config"]["model"]["mixer"], saved["config"]["model"]["head_dim"]
    where.write_text(json.dumps(saved))
    torch.manual_seed(99)
    resumed = train(run_config(name), tmp_path / "run", ALONE, resume=True)
    assert facts(resumed)[0] == facts(straight)[0]
    assert all(torch.equal(v, facts(straight)[1][k]) for k, v in facts(resumed)[1].items())
    assert [len(line.get("solver", [])) for line in read_log(straight.directory)] == [2 * (name == "rnn"), 0, 0, 0]


@pytest.mark.parametrize("name", OTHERS)
def test_checkpointing_and_compiling_change_nothing(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    ids, reset, gradients, graphs = tokens(2, 20), torch.rand(2, 20) < 0.1, [], 0
    for compiled, checkpointed, library in (
        (False, False, False),
        (False, False, True),
        (True, False, False),
        (True, True, False),
    ):
        torch._dynamo.reset()
        counters.clear()
        model = build_model(TINY.replace(**MIXERS[name])).double().train()
        place(model, ALONE, seed=None, bf16=False, compiled=compiled, checkpointed=checkpointed)
        model.load_state_dict(tiny_model(**MIXERS[name]).state_dict())
        if library:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for step in range(3):
            gradients.append(
                torch.autograd.grad(
                    model(ids, labels=ids, reset=reset if step % 2 else None).loss, list(model.parameters())
                )
            )
            if compiled and step == 1:
                graphs = counters["stats"]["unique_graphs"]
        if compiled:
            assert counters["stats"]["unique_graphs"] == graphs  # the third step compiles nothing
            assert bool(counters["graph_break"]) == (
                name == "gated_delta"
            )  # the rule of fla, or its reference, stays outside
    torch._dynamo.reset()
    for run in range(3, len(gradients)):
        for g, w in zip(gradients[run], gradients[run % 3], strict=True):
            close(g, w)


def test_the_command_line_trains_and_continues_a_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("small.json").write_text(json.dumps(run_config("attention", steps=2).to_dict()))
    assert main(["train", "small.json", "--device", "cpu"]) == 0
    assert "mixer attention" in capsys.readouterr().out
    assert main(["eval", "runs/small", "--split", "validation", "--context", "64", "--streams", "64"]) == 0
    assert main(["generate", "--checkpoint", "runs/small", "--prompt", "A", "--tokens", "4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("A")


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_two_processes_equal_one(name, tmp_path):
    (tmp_path / "small.json").write_text(json.dumps(run_config(name).to_dict()))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "parashoot", "train", "small.json", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    straight = train(run_config(name), tmp_path / "straight", ALONE)
    found = [line["loss"] for line in read_log(tmp_path / "runs" / "small")]
    assert found == pytest.approx(facts(straight)[0], rel=1e-6)


# Evaluation


def split(count: int, starts: tuple[int, ...] = (0,)) -> Tokens:
    drawn = np.random.default_rng(1).integers(0, 256, count).astype(np.uint8)
    return Tokens("made up", [drawn], np.array(starts, np.uint64), count)


@torch.no_grad()
def nats_one_by_one(model: ParaRNNForCausalLM, tokens: Tokens, window: int, context: int, stream: int) -> float:
    """-ln p of each token, from a run of its own over what the windows let it see."""
    ids, total = torch.from_numpy(tokens.read(0, len(tokens))), 0.0
    for target in range(1, len(tokens)):
        head = (target - 1) // stream * stream
        at = head + (target - 1 - head) // window * window
        first = max(head, at - context, *(s for s in tokens.starts.tolist() if s < target))
        total -= float(model(ids[None, first:target]).logits[0, -1].log_softmax(-1)[ids[target]])
    return total


@pytest.mark.parametrize("starts", [(0,), (0, 7, 8, 30)])
@pytest.mark.parametrize(
    ("window", "context", "stream"), [(8, None, 60), (8, 3, 60), (5, 12, 26), (100, None, 60), (8, 0, 60)]
)
def test_a_transformer_scores_each_token_once_with_its_context(window, context, stream, starts):
    model, text = tiny_model(**MIXERS["attention"]), split(61, starts)
    found = evaluate(model, text, window=window, context=context, stream=stream, batch=2)
    wanted = nats_one_by_one(model, text, window, window if context is None else context, stream)
    assert found.scored == 60
    assert found.nats == pytest.approx(wanted, rel=1e-9)


def test_gated_delta_carries_its_state_from_window_to_window():
    model, text = tiny_model(**MIXERS["gated_delta"]), split(61)
    found = evaluate(model, text, window=7, batch=1)
    assert found.nats == pytest.approx(nats_one_by_one(model, text, 60, 0, 60), rel=1e-9)
    with pytest.raises(ArgumentError, match=r"context: got 9; expected None.*state"):
        evaluate(model, text, context=9)
    with pytest.raises(ArgumentError, match="context: got -1"):
        evaluate(tiny_model(**MIXERS["attention"]), text, context=-1)


def test_evaluation_forms_logits_in_pieces(monkeypatch):
    monkeypatch.setattr(losses, "ROWS", 16)
    with Largest() as largest:
        evaluate(tiny_model(), split(400), window=64, batch=4)
    assert 16 * 256 <= largest.numel < 4 * 64 * 256 / 2


# Configuration


def count(config: ParaRNNConfig) -> int:
    with torch.device("meta"):
        return ParaRNNForCausalLM(config).num_parameters()


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("demo", "15M")])
def test_models_of_a_preset_have_nearly_the_same_size_with_any_mixer(name):
    for mixer in OTHERS:
        assert 0.96 < count(preset(name, mixer=mixer)) / count(PRESETS[name]) < 1.035


def test_only_matrices_decay():
    model = ParaRNNForCausalLM(TINY.replace(**MIXERS["gated_delta"]))
    names = {id(p): n.removeprefix("model.layers.0.mixer.") for n, p in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1))
    assert decayed >= {"in_proj.weight", "rate_proj.weight", "out_proj.weight"}
    assert kept >= {"A_log", "dt_bias", "conv.weight", "conv.bias", "norm.weight"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixer": "mamba"}, "mixer: got 'mamba'; expected one of rnn, attention, gated_delta"),
        ({"mixer": "attention", "cell": "lstm"}, "cell: got 'lstm'; expected 'gru' with mixer = 'attention'"),
        ({"mixer": "attention", "conv_kernel": 3}, "conv_kernel: got 3"),
        ({"mixer": "attention", "num_heads": 2}, "num_heads: got 2; expected 4"),
        ({"mixer": "gated_delta", "recurrent_clip": None}, "recurrent_clip: got None; expected 0.5"),
        ({"mixer": "attention", "initial_bias": {"z": 1}}, "initial_bias: got {'z': 1}; expected None"),
        ({"initial_bias": {"f": 1}}, "initial_bias: got 'f'; expected one of z, r, c"),
        ({"mixer": "gated_delta", "state_expansion": 2}, "state_expansion: got 2"),
        ({"head_dim": 32}, "head_dim: got 32; expected 64 with mixer = 'rnn'"),
        ({"mixer": "attention", "head_dim": 5}, "head_dim: got 5; expected an even number"),
        ({"mixer": "attention"}, "hidden_size: got 16; expected a multiple of head_dim = 64"),
        ({"mixer": "gated_delta", "head_dim": 16}, "hidden_size: got 16; expected a multiple of 2 head_dim = 32"),
    ],
)
def test_settings_of_another_mixer_are_refused(changes, words):
    with pytest.raises(ArgumentError, match=words):
        TINY.replace(**{"num_heads": 4, **changes})


def test_configurations_of_before_are_those_of_the_rnn():
    values = {k: v for k, v in TINY.to_dict().items() if k not in ("mixer", "head_dim")}
    assert model_config(values) == TINY
    assert TINY.mixer == "rnn"


def test_the_past_of_a_transformer_grows_and_a_state_does_not():
    sizes = {}
    for name in MIXERS:
        for time in (4, 8):
            cache = Cache()
            tiny_model(**MIXERS[name])(tokens(1, time), past_key_values=cache)
            sizes[name, time] = sum(t.numel() for t in chain(*cache.blocks))
    assert [sizes[name, 8] / sizes[name, 4] for name in MIXERS] == [1, 2, 1]


def test_a_step_is_made_by_calling_the_layer_where_a_hook_brings_its_weights():
    """As accelerate does when weights are kept on a disk: they are there while a module is called, and not for its other methods."""
    model, ids, past, called = tiny_model(), tokens(2, 5), Cache(), []
    want = model(ids).logits[:, -1:]
    model(ids[:, :-1], past_key_values=past)
    for layer in model.recurrent_layers():
        layer._hf_hook = object()
        layer.register_forward_pre_hook(lambda *_: called.append(1))
    torch.testing.assert_close(model(ids[:, -1:], past_key_values=past).logits, want, rtol=1e-9, atol=1e-9)
    assert len(called) == len(model.recurrent_layers())
