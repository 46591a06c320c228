"""The language model: one past for pieces and steps, documents kept apart, generation that repeats."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace

import pytest
import torch

from parashoot.errors import ArgumentError, ArgumentTypeError
from parashoot.lm import Cache, ParaRNNConfig, ParaRNNForCausalLM, generate, generate_text
from parashoot.lm.conv import CausalConv
from parashoot.lm.presets import PRESETS
from parashoot.lm.speed import layer_speed, plain_loop

sampling = importlib.import_module("parashoot.lm.generate")  # the package's attribute of this name is the function
TINY = ParaRNNConfig(vocab_size=256, hidden_size=16, num_hidden_layers=2, num_heads=2, intermediate_size=32)


@pytest.fixture
def model() -> ParaRNNForCausalLM:
    torch.manual_seed(0)
    made = ParaRNNForCausalLM(replace(TINY, initializer_range=0.3)).double()
    for name, p in made.named_parameters():
        if name.endswith(("weight_hh_l0", "bias_l0", "conv.bias")):
            torch.nn.init.normal_(p, std=0.5)
    return made


def tokens(batch: int, time: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (batch, time), generator=torch.Generator().manual_seed(seed))


# The past


@pytest.mark.parametrize("cuts", [(1, 2, 3, 20), (16,), tuple(range(1, 32))])
@pytest.mark.parametrize("with_reset", [False, True])
def test_pieces_equal_the_whole(model, cuts, with_reset):
    ids = tokens(2, 32)
    reset = torch.rand(2, 32, generator=torch.Generator().manual_seed(2)) < 0.15 if with_reset else None
    whole = model(ids, reset=reset)
    pieces: list[torch.Tensor] = []
    cache: Cache | None = None
    for a, b in zip((0, *cuts), (*cuts, 32), strict=True):
        out = model(ids[:, a:b], cache=cache, reset=None if reset is None else reset[:, a:b])
        pieces.append(out.logits)
        cache = out.cache
    torch.testing.assert_close(torch.cat(pieces, 1), whole.logits, rtol=0, atol=1e-9)
    assert cache is not None
    for mine, its in zip([*cache.conv, *cache.state], [*whole.cache.conv, *whole.cache.state], strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-9)


@pytest.mark.parametrize("cell", ["gru", "lstm", "slstm", "mingru", "headgru", "elman"])
def test_steps_equal_the_parallel_pass(cell):
    torch.manual_seed(0)
    model = ParaRNNForCausalLM(replace(TINY, cell=cell)).double()
    ids = tokens(2, 12)
    whole = model(ids)
    cache = model(ids[:, :4]).cache
    for t in range(4, 12):
        logits, cache = model.step(ids[:, t], cache)
        torch.testing.assert_close(logits, whole.logits[:, t], rtol=0, atol=1e-9)


def test_the_cache_does_not_grow(model):
    short, long = model(tokens(1, 2)).cache, model(tokens(1, 40)).cache
    assert [t.shape for t in short.conv] == [t.shape for t in long.conv] == [(1, 3, 16)] * 2
    assert [t.shape for t in short.state] == [t.shape for t in long.state] == [(1, 1, 1, 16)] * 2
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in long.conv)


def test_a_reset_keeps_documents_apart(model):
    ids, reset = tokens(1, 30), torch.zeros(1, 30, dtype=torch.bool)
    reset[0, [11, 13]] = True  # the second document is shorter than the convolution's reach
    packed = model(ids, reset=reset).logits
    alone = torch.cat([model(ids[:, a:b]).logits for a, b in ((0, 11), (11, 13), (13, 30))], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-9)


def test_no_gradient_crosses_a_reset(model):
    x = torch.randn(1, 12, 16, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(1, 12, dtype=torch.bool)
    reset[0, 6] = True
    y, _, _ = model.blocks[0](x, None, None, reset)
    (grad,) = torch.autograd.grad(y[:, 6:].square().sum(), x)
    assert bool((grad[:, :6] == 0).all())
    assert bool((grad[:, 6:] != 0).any())


def test_the_convolution_is_causal_and_isolates_nan():
    conv = CausalConv(3, 4)
    reference = torch.nn.Conv1d(3, 3, 4, groups=3, padding=3)
    reference.load_state_dict({"weight": conv.weight.flip(0).T[:, None], "bias": conv.bias})
    u = torch.randn(2, 9, 3)
    expected = reference(u.mT)[..., :9].mT
    torch.testing.assert_close(conv(u)[0], expected)
    u[:, 4] = math.nan
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 5] = True
    y, past = conv(u, None, reset)
    assert bool(torch.isfinite(y[:, 5:]).all())
    assert bool(torch.isfinite(past).all())


def test_labels_are_shifted_and_masked(model):
    ids = tokens(2, 9)
    out = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    labels = ids.clone()
    labels[:, 5:] = -100
    torch.testing.assert_close(model(ids, labels=labels).loss, model(ids[:, :5], labels=ids[:, :5]).loss)


def test_detached_caches_carry_no_gradient(model):
    cache = model(tokens(1, 5)).cache.detach()
    assert isinstance(cache, Cache)
    assert not any(t.requires_grad for t in [*cache.conv, *cache.state])


# Configuration


def test_configurations_survive_a_round_trip():
    for config in PRESETS.values():
        assert ParaRNNConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("name", "millions"), [("400M", 406), ("1B", 1420), ("2.9B", 2900), ("7B", 6760)])
def test_presets_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        count = ParaRNNForCausalLM(PRESETS[name]).num_parameters()
    assert abs(count / (millions * 1e6) - 1) < 0.005


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("vocab_size", 0, "vocab_size"),
        ("hidden_size", 15, "num_heads = 2"),
        ("cell", "gruu", "elman"),
        ("recurrent_clip", -1.0, "recurrent_clip"),
        ("eos_token_id", 256, "below vocab_size"),
        ("conv_kernel", 2.5, "conv_kernel"),
    ],
)
def test_bad_model_configurations_name_the_field(field, value, words):
    with pytest.raises(ArgumentError, match=words):
        replace(TINY, **{field: value})


def test_unknown_and_missing_fields_are_named():
    with pytest.raises(ArgumentError, match=r"'heads'.*num_heads"):
        ParaRNNConfig.from_dict({"vocab_size": 1, "hidden_size": 1, "num_hidden_layers": 1, "heads": 2})
    with pytest.raises(ArgumentError, match="no hidden_size"):
        ParaRNNConfig.from_dict({"vocab_size": 1, "num_hidden_layers": 1})


def test_a_cell_by_import_path():
    config = replace(TINY, cell="parashoot.cells.mingru:mingru")
    assert ParaRNNForCausalLM(config).recurrent_layers()[0].cell.name == "mingru"
    with pytest.raises(ArgumentError, match="Its cells: mingru"):
        ParaRNNForCausalLM(replace(TINY, cell="parashoot.cells.mingru:gru"))
    with pytest.raises(ArgumentError, match="importable module"):
        ParaRNNForCausalLM(replace(TINY, cell="no_such_module:cell"))
    with pytest.raises(ArgumentTypeError, match=r"@ps\.cell"):
        ParaRNNForCausalLM(replace(TINY, cell="math:pi"))


def test_tied_embeddings_share_one_matrix():
    tied = ParaRNNForCausalLM(replace(TINY, tie_word_embeddings=True))
    assert tied.num_parameters() == ParaRNNForCausalLM(TINY).num_parameters() - 256 * 16
    assert tied.head.weight is tied.embedding.weight


def test_misuse_of_the_model_is_explained(model):
    with pytest.raises(ArgumentTypeError, match="input_ids"):
        model(torch.rand(1, 3))
    with pytest.raises(ArgumentError, match="labels"):
        model(tokens(1, 3), labels=tokens(1, 2))
    with pytest.raises(ArgumentError, match="at least two tokens"):
        model(tokens(1, 1), labels=tokens(1, 1))
    with pytest.raises(ArgumentError, match="cache"):
        model(tokens(2, 3), cache=model(tokens(1, 3)).cache)


# Generation


def test_generation_repeats_with_its_seed(model):
    options = {"temperature": 0.9, "top_k": 50}
    first = generate_text(model, "abc", 12, seed=3, **options)
    assert first == generate_text(model, "abc", 12, seed=3, **options)
    assert first != generate_text(model, "abc", 12, seed=4, **options)


def test_greedy_generation_follows_the_parallel_pass(model):
    prompt = tokens(1, 5)[0]
    made = generate(model, prompt, 8, temperature=0.0)
    logits = model(torch.cat([prompt, torch.tensor(made)])[None]).logits[0]
    assert logits[4:-1].argmax(-1).tolist() == made


def test_top_k_1_and_tiny_temperatures_are_greedy(model):
    prompt = tokens(1, 5)[0]
    greedy = generate(model, prompt, 8, temperature=0.0)
    assert generate(model, prompt, 8, top_k=1, seed=9) == greedy
    assert generate(model, prompt, 8, temperature=1e-300, seed=9) == greedy


def test_generation_streams_stops_and_replaces_broken_bytes(model, monkeypatch):
    produced = iter([0xC3, 0xA9, 0xFF, ord("e"), ord("n"), ord("d"), ord("x")])
    monkeypatch.setattr(sampling, "_sample", lambda *_: next(produced))
    pieces: list[str] = []
    assert generate_text(model, "?", 20, stop="end", on_text=pieces.append) == "é\ufffdend"
    assert pieces[0] == "é"
    assert "".join(pieces) == "é\ufffdend"


def test_generation_ends_at_the_eos_token(model, monkeypatch):
    model.config = replace(model.config, eos_token_id=7)
    produced = iter([1, 2, 7, 3])
    monkeypatch.setattr(sampling, "_sample", lambda *_: next(produced))
    assert generate(model, tokens(1, 2)[0], 20) == [1, 2, 7]


def test_bad_generation_arguments_are_named(model):
    with pytest.raises(ArgumentError, match="temperature"):
        generate_text(model, "a", 3, temperature=-1.0)
    with pytest.raises(ArgumentError, match="top_k"):
        generate_text(model, "a", 3, top_k=0)
    with pytest.raises(ArgumentError, match="prompt"):
        generate_text(model, "", 3)


@pytest.mark.parametrize("cell", ["gru", "slstm", "headgru"])
def test_the_timed_loop_computes_the_same(cell):
    torch.manual_seed(0)
    model = ParaRNNForCausalLM(replace(TINY, cell=cell))
    layer, x = model.recurrent_layers()[0], torch.randn(1, 20, 16)
    torch.testing.assert_close(plain_loop(layer, x), layer(x)[0])
    speed = layer_speed(model, tokens(1, 40)[0], repeats=1)
    assert speed.error < 1e-5
    assert layer.solver is None
