"""What `parashoot train` reports of speed."""

from __future__ import annotations

import pytest
import torch

from lm_models import TINY, tokens
from parashoot.lm import ParaRNNForCausalLM
from parashoot.lm.speed import layer_speed, plain_loop


@pytest.mark.parametrize("cell", ["gru", "slstm", "headgru"])
def test_the_timed_loop_computes_the_same(cell):
    torch.manual_seed(0)
    model = ParaRNNForCausalLM(TINY.replace(cell=cell))
    layer, x = model.recurrent_layers()[0], torch.randn(1, 20, 16)
    torch.testing.assert_close(plain_loop(layer, x), layer(x)[0])
    speed = layer_speed(model, tokens(1, 40)[0], repeats=1)
    assert speed.error < 1e-5
    assert layer.solver is None
