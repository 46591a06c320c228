"""Evaluation against plain sums over cross entropies: every token scored once, the state carried, positions counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from parashoot.lm import ParaRNNConfig, ParaRNNForCausalLM
from parashoot.lm.data import Tokens
from parashoot.lm.evaluate import evaluate

CONFIG = ParaRNNConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=2, num_heads=2, intermediate_size=32, initializer_range=0.3
)


@pytest.fixture
def model() -> ParaRNNForCausalLM:
    return ParaRNNForCausalLM(CONFIG).double()


def split(count: int, starts: tuple[int, ...] = (0,)) -> Tokens:
    drawn = np.random.default_rng(1).integers(0, 50, count).astype(np.uint8)
    return Tokens("made up", np.split(drawn, [count // 3]), np.array(starts, np.uint64), 2 * count)


def nats(model: ParaRNNForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """-ln p of each token of one stream after its first, in one pass without a past."""
    logits = model(ids[None, :-1]).logits[0]
    return F.cross_entropy(logits.float(), ids[1:], reduction="none").double()


@pytest.mark.parametrize("window", [1, 13, 100, 1000])
def test_one_stream_equals_one_pass(model, window):
    tokens = split(101)
    found = evaluate(model, tokens, batch=1, window=window)
    expected = nats(model, torch.from_numpy(tokens.read(0, 101)))
    assert found.scored == 100
    assert found.nats == pytest.approx(expected.sum().item(), rel=1e-6)
    assert found.loss == pytest.approx(expected.mean().item(), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(expected.mean().item()), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(expected.sum().item() / math.log(2) / 200, rel=1e-6)
    for first, last, count, value in found.by_position:  # the k-th target is predicted from k tokens
        part = expected[first - 1 : last - 1]
        assert count == len(part)
        assert value == pytest.approx(part.sum().item(), rel=1e-6)


@pytest.mark.parametrize(("stream", "batch"), [(34, 3), (34, 1), (7, 4), (200, 2)])
def test_streams_score_every_token_once(model, stream, batch):
    tokens = split(101)
    ids = torch.from_numpy(tokens.read(0, 101))
    pieces = [ids[a : min(a + stream, 100) + 1] for a in range(0, 100, stream)]
    found = evaluate(model, tokens, stream=stream, batch=batch, window=5)
    assert found.scored == 100
    assert found.nats == pytest.approx(sum(nats(model, p).sum().item() for p in pieces), rel=1e-6)
    assert max(last for _, last, _, _ in found.by_position) <= 2 * stream
    assert evaluate(model, tokens, stream=stream, batch=batch, window=64).nats == pytest.approx(found.nats, rel=1e-6)


def test_documents_are_kept_apart(model):
    starts = (0, 20, 21, 60)
    ids = torch.from_numpy(split(101).read(0, 101))
    found = evaluate(model, split(101, starts), batch=1, window=8)
    expected = torch.cat([nats(model, ids[a : b + 1]) for a, b in ((0, 20), (20, 21), (21, 60), (60, 100))])
    assert found.nats == pytest.approx(expected.sum().item(), rel=1e-6)
    seen = torch.cat([torch.arange(1, n + 1) for n in (20, 1, 39, 40)])
    for first, last, count, value in found.by_position:
        chosen = (seen >= first) & (seen < last)
        assert count == int(chosen.sum())
        assert value == pytest.approx(expected[chosen].sum().item(), rel=1e-6)


def test_a_model_that_knows_nothing_takes_the_logarithm_of_the_vocabulary(model):
    torch.nn.init.zeros_(model.lm_head.weight)
    found = evaluate(model, split(101), stream=10, batch=4)
    assert found.loss == pytest.approx(math.log(50), rel=1e-6)
    assert model.training
