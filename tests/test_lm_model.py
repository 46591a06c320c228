"""The language model: one past for pieces and steps, documents and padding kept apart, its loss, its files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import chain
from typing import Any

import pytest
import torch

from lm_models import TINY, Largest, logits_by_loop, tiny_model, tokens, transformers
from parashoot.errors import ArgumentError, ArgumentTypeError
from parashoot.lm import Cache, ParaRNNConfig, ParaRNNForCausalLM, ParaRNNModel
from parashoot.lm import loss as losses
from parashoot.lm.loss import next_token_loss
from parashoot.lm.presets import PRESETS, preset


def in_dtype(dtype: torch.dtype) -> dict[str, Any]:
    """The option of `from_pretrained`, whose name depends on the library's version."""
    return {"dtype" if "dtype" in transformers.PretrainedConfig().to_dict() else "torch_dtype": dtype}


@pytest.fixture
def model() -> ParaRNNForCausalLM:
    return tiny_model()


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


# The past


@pytest.mark.parametrize("changes", [{"cell": "lstm"}, {"cell": "slstm"}, {"cell": "mingru"}, {"state_expansion": 3}, {"conv_kernel": 1}, {}])  # fmt: skip
def test_the_parallel_pass_equals_the_loop(changes):
    model, ids = tiny_model(**changes), tokens(2, 20)
    got = model(ids).logits
    for row in range(2):
        close(got[row], logits_by_loop(model, ids[row]))


@pytest.mark.parametrize("asked", [{"output_hidden_states": True}, {}], ids=["asked", "configured"])
def test_hidden_states_are_what_enters_each_block_and_the_head(model, asked):
    seen: list[torch.Tensor] = []
    for module in (*model.model.layers, model.lm_head):
        module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    assert model(tokens(2, 12)).hidden_states is None
    seen.clear()
    model.config.output_hidden_states = not asked
    out = model(tokens(2, 12), **asked)
    assert len(out.hidden_states) == len(seen) == model.config.num_hidden_layers + 1
    assert all(torch.equal(got, want) for got, want in zip(out.hidden_states, seen, strict=True))
    assert torch.equal(model.model(tokens(2, 12), **asked).hidden_states[-1], out.hidden_states[-1])


@pytest.mark.parametrize("cuts", [(1, 2, 3, 20), (16,), tuple(range(1, 32))])
@pytest.mark.parametrize("with_reset", [False, True])
def test_pieces_equal_the_whole(model, cuts, with_reset):
    ids = tokens(2, 32)
    reset = torch.rand(2, 32, generator=torch.Generator().manual_seed(2)) < 0.15 if with_reset else None
    all_at_once, cache = Cache(), Cache()
    whole = model(ids, reset=reset, past_key_values=all_at_once).logits
    pieces: list[torch.Tensor] = []
    for a, b in zip((0, *cuts), (*cuts, 32), strict=True):
        part = None if reset is None else reset[:, a:b]
        pieces.append(model(ids[:, a:b], past_key_values=cache, reset=part).logits)
    close(torch.cat(pieces, 1), whole)
    assert cache.length == all_at_once.length == 32
    for mine, its in zip(chain(*cache.blocks), chain(*all_at_once.blocks), strict=True):
        close(mine, its)


@pytest.mark.parametrize("cell", ["gru", "lstm", "slstm", "mingru", "headgru", "elman"])
def test_steps_equal_the_parallel_pass(cell):
    model, ids, cache = tiny_model(cell=cell), tokens(2, 12), Cache()
    whole = model(ids).logits
    model(ids[:, :4], past_key_values=cache)
    for t in range(4, 12):
        close(model(ids[:, t : t + 1], past_key_values=cache).logits[:, 0], whole[:, t])


def test_the_cache_does_not_grow(model):
    short, long = Cache(), Cache()
    model(tokens(1, 2), past_key_values=short)
    model(tokens(1, 40), past_key_values=long)
    for cache in (short, long):
        assert [[t.shape for t in block] for block in cache.blocks] == [[(1, 3, 16), (1, 1, 16)]] * 2
    assert all(conv.untyped_storage().nbytes() == conv.numel() * conv.element_size() for conv, _ in long.blocks)


def test_a_cache_is_returned_where_it_is_used(model):
    ids = tokens(1, 4)
    assert len(model(ids, return_dict=False)) == len(model.train()(ids, use_cache=True, return_dict=False)) == 2
    assert len(model(ids, return_dict=False)) == len(model.eval()(ids, use_cache=False, return_dict=False)) == 1


def test_detached_caches_carry_no_gradient(model):
    cache = Cache()
    model(tokens(1, 5), past_key_values=cache)
    assert all(t.requires_grad for t in chain(*cache.blocks))
    assert not any(t.requires_grad for t in chain(*cache.detach().blocks))


# Documents and padding


def test_a_reset_keeps_documents_apart(model):
    ids, reset = tokens(1, 30), torch.zeros(1, 30, dtype=torch.bool)
    reset[0, [11, 13]] = True  # the second document is shorter than the convolution's reach
    packed = model(ids, reset=reset).logits
    alone = torch.cat([model(ids[:, a:b]).logits for a, b in ((0, 11), (11, 13), (13, 30))], 1)
    close(packed, alone)


def test_no_gradient_crosses_a_reset(model):
    x = torch.randn(1, 12, 16, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(1, 12, dtype=torch.bool)
    reset[0, 6] = True
    y, _ = model.model.layers[0](x, None, reset)
    (grad,) = torch.autograd.grad(y[:, 6:].square().sum(), x)
    assert bool((grad[:, :6] == 0).all())
    assert bool((grad[:, 6:] != 0).any())


@pytest.mark.parametrize("cell", ["gru", "headgru"])
@pytest.mark.parametrize("cut", [None, 1, 5, 9])
def test_left_padding_changes_nothing(cell, cut):
    """For texts of 1 to 12 tokens in one batch, read at once or in two pieces, where padding ends in either."""
    model, lengths = tiny_model(cell=cell), (12, 11, 7, 1)
    ids, mask = tokens(4, 12), torch.zeros(4, 12, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, 12 - length :] = 1
    cache = Cache()
    parts = [(0, 12)] if cut is None else [(0, cut), (cut, 12)]
    got = torch.cat([model(ids[:, a:b], mask[:, :b], cache).logits for a, b in parts], 1)
    for row, length in enumerate(lengths):
        alone = Cache()
        close(got[row, 12 - length :], model(ids[row : row + 1, 12 - length :], past_key_values=alone).logits[0])
        for mine, its in zip(chain(*cache.blocks), chain(*alone.blocks), strict=True):
            close(mine[row], its[0])


# The loss


def plain_loss(logits: torch.Tensor, labels: torch.Tensor, z: float = 0.0) -> torch.Tensor:
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    squares = logits.logsumexp(-1).square()[labels != -100]
    return torch.nn.functional.cross_entropy(logits, labels) + z * squares.mean()


def test_labels_are_shifted_and_masked(model):
    ids = tokens(2, 9)
    out = model(ids, labels=ids)
    close(out.loss, plain_loss(out.logits, ids))
    labels = ids.clone()
    labels[:, 5:] = -100
    close(model(ids, labels=labels).loss, model(ids[:, :5], labels=ids[:, :5]).loss)
    close(model(ids, labels=ids, num_items_in_batch=4).loss, out.loss * 16 / 4)
    assert model(ids, labels=torch.full_like(ids, -100)).loss.item() == 0.0


@pytest.mark.parametrize("rows", [3, 7, 4096])
def test_the_loss_in_pieces_has_the_gradients_of_the_whole(rows, monkeypatch):
    monkeypatch.setattr(losses, "ROWS", rows)
    hidden = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (3, 7)).masked_fill(torch.rand(3, 7) < 0.3, -100)
    (got, z_part), want = (
        next_token_loss(hidden, weight, labels, z_loss=0.3),
        plain_loss(hidden @ weight.T, labels, 0.3),
    )
    close(got, want)
    close(got - z_part, plain_loss(hidden @ weight.T, labels))
    assert not z_part.requires_grad
    for g, w in zip(
        torch.autograd.grad(2 * got, (hidden, weight)), torch.autograd.grad(2 * want, (hidden, weight)), strict=True
    ):
        close(g, w)


def test_z_loss_is_part_of_training_only():
    model, ids = tiny_model(z_loss=0.1), tokens(2, 9)
    logits = model(ids).logits
    close(model(ids, labels=ids).loss, plain_loss(logits, ids))
    trained = model.train()(ids, labels=ids)
    close(trained.loss, plain_loss(logits, ids, 0.1))
    close(trained.loss - trained.z_loss, plain_loss(logits, ids))
    assert trained.logits is None


def test_the_logits_of_a_batch_never_exist_at_once(model, monkeypatch):
    monkeypatch.setattr(losses, "ROWS", 16)
    ids = tokens(4, 32)
    with Largest() as largest:
        model.train()(ids, labels=ids).loss.backward()
    assert 16 * 256 <= largest.numel < 4 * 32 * 256 / 2


def test_logits_to_keep(model):
    ids = tokens(2, 9)
    every = model(ids).logits
    close(model(ids, logits_to_keep=2).logits, every[:, -2:])
    close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, every[:, [0, 5]])


def test_embeddings_instead_of_tokens(model):
    ids = tokens(2, 9)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


# PyTorch's machinery


def gradients(model: ParaRNNForCausalLM, ids: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters())))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_checkpointing_keeps_the_gradients(model):
    ids = tokens(2, 12)
    want = gradients(model.train(), ids)
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for g, w in zip(gradients(model, ids), want, strict=True):
        close(g, w)
    assert len(calls) == 2  # once more in the backward pass


def test_autocast_computes_low_and_keeps_gradients_high():
    model = tiny_model().float().train()
    ids = tokens(4, 16)
    want = gradients(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
        logits = model.eval()(ids).logits
    assert loss.dtype == torch.float32 and logits.dtype == torch.bfloat16
    for g, w in zip(torch.autograd.grad(loss, list(model.parameters())), want, strict=True):
        assert g.dtype == torch.float32
        assert float((g - w).norm()) <= 0.1 * float(w.norm()) + 1e-4


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def test_a_block_compiles_as_one_graph(model, compiled):
    block, x = model.model.layers[0], torch.randn(2, 12, 16, dtype=torch.float64, requires_grad=True)
    reset = torch.rand(2, 12) < 0.2
    for arguments in ((x,), (x, None, reset)):
        got, want = compiled(block)(*arguments), block(*arguments)
        for g, w in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
            close(g, w)
        for g, w in zip(torch.autograd.grad(got[0].sum(), x), torch.autograd.grad(want[0].sum(), x), strict=True):
            close(g, w)


def test_the_whole_training_pass_compiles_as_one_graph(model, compiled):
    ids, reset = tokens(2, 12), torch.rand(2, 12) < 0.2
    loss = lambda: model.train()(ids, labels=ids, reset=reset).loss
    parameters = list(model.parameters())
    got, want = compiled(loss)(), loss()
    close(got, want)
    for g, w in zip(torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters), strict=True):
        close(g, w)


# Files


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied, cell="lstm", state_expansion=2, eos_token_id=7, recurrent_clip=None)
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    torch.manual_seed(1)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **in_dtype(torch.float64))
    assert type(loaded) is ParaRNNForCausalLM and not loaded.training
    assert loaded.config == model.config == transformers.AutoConfig.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.generation_config.eos_token_id == 7
    mine, its = loaded.state_dict(), model.state_dict()
    assert mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) for k in its)
    base = transformers.AutoModel.from_pretrained(tmp_path, **in_dtype(torch.float64))
    assert type(base) is ParaRNNModel
    close(base(tokens(1, 5))[0], model.model(tokens(1, 5))[0])


def test_loading_in_bfloat16(tmp_path):
    model = tiny_model().float()
    model.save_pretrained(tmp_path)
    loaded = ParaRNNForCausalLM.from_pretrained(tmp_path, **in_dtype(torch.bfloat16))
    mine, its = loaded.state_dict(), model.state_dict()
    assert all(mine[k].dtype == torch.bfloat16 and torch.equal(mine[k], its[k].bfloat16()) for k in its)
    cache = Cache()
    assert loaded(tokens(1, 9), past_key_values=cache).logits.dtype == torch.bfloat16
    assert cache.blocks[0][1].dtype == torch.float32


def test_only_what_a_file_lacks_is_drawn(tmp_path):
    from safetensors.torch import load_file, save_file

    model, path = tiny_model(), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    missing = {f"model.layers.1.mixer.{name}" for name in ("out_proj.weight", "rnn.weight_hh_l0", "conv.bias")}
    save_file({k: v for k, v in load_file(path).items() if k not in missing}, path, {"format": "pt"})
    loaded = ParaRNNForCausalLM.from_pretrained(tmp_path, **in_dtype(torch.float64))
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]) == (name not in missing), name
        assert bool(value.isfinite().all())


def assert_freshly_drawn(model: ParaRNNForCausalLM) -> None:
    """The distributions that the paper's models begin with."""
    d, r = 256, model.config.initializer_range
    block: Any = model.model.layers[0]
    deviations = {
        model.model.embed_tokens.weight: r, model.lm_head.weight: r, block.mixer.in_proj.weight: r, block.mlp.up_proj.weight: r,
        block.mixer.out_proj.weight: r / 2, block.mlp.down_proj.weight: r / 2,  # two blocks write twice each
        block.mixer.rnn.weight_ih_l0: (d / 4) ** -0.5, block.mixer.rnn.weight_hh_l0: (2 / (3 + d)) ** 0.5,
        block.mixer.conv.weight: (1 / 12) ** 0.5,
    }  # fmt: skip
    for p, deviation in deviations.items():
        assert p.std().item() == pytest.approx(deviation, rel=0.1)
    assert bool((block.mixer.rnn.bias_l0 == 0).all() and (block.mixer.conv.bias == 0).all())
    for p in (block.residual_scale, block.mixer.norm.weight, block.mlp_norm.weight, model.model.norm.weight):
        assert bool((p == 1).all())


def test_biases_of_a_language_model_begin_where_its_configuration_says(tmp_path):
    tiny_model(num_heads=1, initial_bias={"z": [-2, 0]}).save_pretrained(tmp_path)
    config = ParaRNNConfig.from_pretrained(tmp_path)
    rnn = ParaRNNForCausalLM(config).recurrent_layers()[-1]
    bias: Any = rnn.bias_l0
    assert torch.equal(bias[0], torch.linspace(-2, 0, rnn.hidden_size)) and not bias[1:].any()


def test_models_begin_as_the_paper_says():
    config = TINY.replace(hidden_size=256, num_heads=4)
    assert_freshly_drawn(ParaRNNForCausalLM(config))
    with torch.device("meta"):
        model = ParaRNNForCausalLM(config)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.constant_(p, math.nan)
    model.reset_parameters()
    assert_freshly_drawn(model)


# Configuration


def test_configurations_survive_a_round_trip():
    for config in PRESETS.values():
        assert ParaRNNConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    values = TINY.to_dict()
    ParaRNNForCausalLM(TINY)
    ParaRNNConfig.from_dict(values)
    assert values == TINY.to_dict()  # neither a model nor loading adds to it


def count(name: str, **changes) -> int:
    with torch.device("meta"):
        return ParaRNNForCausalLM(preset(name, **changes)).num_parameters()


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize(("name", "millions"), [("400M", 406), ("1B", 1420), ("2.9B", 2900), ("7B", 6760)])
def test_presets_have_the_published_sizes(name, millions, cell):
    assert abs(count(name, cell=cell) / (millions * 1e6) - 1) < 0.005


@pytest.mark.parametrize("name", ["5M", "15M", "30M", "60M", "125M"])
def test_small_presets_have_the_sizes_of_their_names(name):
    assert abs(count(name) / (float(name[:-1]) * 1e6) - 1) < 0.04
    assert count(name, vocab_size=8192) - count(name) == 2 * (8192 - 256) * preset(name).hidden_size


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("vocab_size", 0, "vocab_size"),
        ("hidden_size", 15, "num_heads = 2"),
        ("cell", "gruu", "elman"),
        ("recurrent_clip", -1.0, "recurrent_clip"),
        ("eos_token_id", 256, "below vocab_size"),
        ("conv_kernel", 2.5, "conv_kernel"),
        ("state_expansion", 1.5, "state_expansion"),
        ("z_loss", -1.0, "z_loss"),
        ("mixer", ["rnn"], "mixer"),
    ],
)
def test_bad_model_configurations_name_the_field(field, value, words):
    with pytest.raises(ArgumentError, match=words):
        TINY.replace(**{field: value})


def test_unknown_and_missing_fields_are_named():
    with pytest.raises(ArgumentError, match=r"'heads'.*num_heads"):
        ParaRNNConfig.from_dict({"vocab_size": 1, "hidden_size": 1, "num_hidden_layers": 1, "heads": 2})
    with pytest.raises(ArgumentError, match="no hidden_size"):
        ParaRNNConfig.from_dict({"vocab_size": 1, "num_hidden_layers": 1})
    with pytest.raises(ArgumentError, match=r"'3M'.*5M"):
        preset("3M")


def test_a_cell_by_import_path():
    config = TINY.replace(cell="parashoot.cells.mingru:mingru")
    assert ParaRNNForCausalLM(config).recurrent_layers()[0].cell.name == "mingru"
    with pytest.raises(ArgumentError, match="Its cells: mingru"):
        ParaRNNForCausalLM(TINY.replace(cell="parashoot.cells.mingru:gru"))
    with pytest.raises(ArgumentError, match="importable module"):
        ParaRNNForCausalLM(TINY.replace(cell="no_such_module:cell"))
    with pytest.raises(ArgumentTypeError, match=r"@ps\.cell"):
        ParaRNNForCausalLM(TINY.replace(cell="math:pi"))


def test_a_bias_that_is_no_number_is_refused_by_the_layer_of_an_imported_cell():
    config = TINY.replace(cell="parashoot.cells:gru", initial_bias={"z": "1"})
    with pytest.raises(ArgumentError, match="initial_bias of z: got '1'"):
        ParaRNNForCausalLM(config)


def test_tied_embeddings_share_one_matrix():
    tied = ParaRNNForCausalLM(TINY.replace(tie_word_embeddings=True))
    assert tied.num_parameters() == ParaRNNForCausalLM(TINY).num_parameters() - 256 * 16
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_misuse_of_the_model_is_explained(model):
    with pytest.raises(ArgumentTypeError, match="input_ids"):
        model(torch.rand(1, 3))
    with pytest.raises(ArgumentError, match="neither"):
        model()
    with pytest.raises(ArgumentError, match="inputs_embeds"):
        model(inputs_embeds=torch.rand(1, 3, 4))
    with pytest.raises(ArgumentError, match="labels"):
        model(tokens(1, 3), labels=tokens(1, 2))
    with pytest.raises(ArgumentError, match="at least two tokens"):
        model(tokens(1, 1), labels=tokens(1, 1))
    with pytest.raises(ArgumentError, match="reset"):
        model(tokens(1, 3), reset=torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="attention_mask"):
        model(tokens(1, 3), torch.ones(1, 2))
    cache = Cache()
    model(tokens(1, 3), past_key_values=cache)
    with pytest.raises(ArgumentError, match="past_key_values"):
        model(tokens(2, 3), past_key_values=cache)
    with pytest.raises(ArgumentTypeError, match=r"parashoot\.lm\.Cache"):
        model(tokens(1, 3), past_key_values=((1, 2),))
    with pytest.raises(ArgumentTypeError, match="ParaRNNConfig"):
        ParaRNNForCausalLM(transformers.PretrainedConfig())


def test_without_transformers_the_rest_works():
    code = """
import sys, parashoot, parashoot.cli
assert "transformers" not in sys.modules
sys.modules["transformers"] = None
assert parashoot.cli.main(["explain", "gru"]) == 0
assert parashoot.cli.main(["train", "demo"]) == 2
import parashoot.lm
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "parashoot train: parashoot.lm needs transformers: pip install 'parashoot[lm]'." in done.stderr
    assert done.stderr.strip().endswith("parashoot.lm needs transformers: pip install 'parashoot[lm]'.")


def test_a_mask_over_the_new_tokens_alone_is_refused(model):
    ids, cache = tokens(2, 8), Cache()
    model(ids[:, :4], torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]), cache)
    with pytest.raises(ArgumentError, match=r"\(2, 8 or more\)"):
        model(ids[:, 4:], torch.ones(2, 4, dtype=torch.int64), cache)


@pytest.mark.parametrize("training", [False, True])
def test_what_padding_would_predict_is_not_scored(model, training):
    model.train(training)
    ids, text = tokens(1, 12), tokens(1, 12)[:, 5:]
    mask, labels = torch.ones(1, 12, dtype=torch.int64), ids.clone()
    mask[:, :5] = 0
    labels[:, :5] = -100
    close(model(ids, mask, labels=labels).loss, model(text, labels=text).loss)


@pytest.mark.parametrize("head", [torch.nn.Linear(16, 256), torch.nn.Sequential(torch.nn.Linear(16, 256, bias=False))])
def test_the_loss_of_another_head_is_refused(model, head):
    model.lm_head, ids = head.double(), tokens(1, 6)
    assert model(ids).logits.shape == (1, 6, 256)
    with pytest.raises(ArgumentTypeError, match="lm_head"):
        model(ids, labels=ids)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [({"cell": "headgru", "num_heads": 2}, "bias_l0"), ({"initial_bias": {"z": -3}}, "weight_hh_l0"), ({"cell": "slstm"}, "weight_ih_l0")],
)  # fmt: skip
def test_what_a_file_holds_is_not_drawn_anew_for_what_it_lacks(tmp_path, changes, missing):
    from safetensors.torch import load_file, save_file

    tiny_model(**changes).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = {k: v for k, v in load_file(file).items() if not k.endswith(missing)}
    save_file(state, file, {"format": "pt"})
    loaded = ParaRNNForCausalLM.from_pretrained(tmp_path, **in_dtype(torch.float64))
    found = loaded.state_dict()
    assert len(state) < len(found) and all(torch.equal(found[k], v) for k, v in state.items())
    loaded.reset_parameters()  # draws all
    names = [k for k in state if "weight_hh" in k or "weight_ih" in k]
    assert all(not torch.equal(loaded.state_dict()[k], state[k]) for k in names)


@pytest.mark.parametrize("given", [{"z": (-6, 0)}, {"z": [-6, 0]}, {"z": -2, "r": 1.5}])
def test_biases_survive_a_round_trip(tmp_path, given):
    config = TINY.replace(initial_bias=given)
    config.save_pretrained(tmp_path)
    assert ParaRNNConfig.from_pretrained(tmp_path) == config
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


def test_checkpointing_of_either_kind_keeps_gradients_through_a_past(model):
    ids, found = tokens(2, 12), []
    model.train()
    for kind in (None, False, True):
        if kind is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind})
        cache = Cache()
        model(ids[:, :5], past_key_values=cache, use_cache=True)
        loss = model(ids[:, 5:], past_key_values=cache, labels=ids[:, 5:]).loss
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for grads in found[1:]:
        for one, other in zip(grads, found[0], strict=True):
            close(one, other)


def test_what_wrappers_of_models_ask_for(model):
    """PEFT passes output_attentions; Trainer.evaluate adds a list to the keys that are no results."""
    ids = tokens(1, 5)
    assert torch.equal(model(ids, output_attentions=False).logits, model(ids).logits)
    with pytest.raises(ArgumentError, match="output_attentions: got True; expected None or False"):
        model(ids, output_attentions=True)
    kept = set(model(ids, labels=ids)) - set(model.config.keys_to_ignore_at_inference + ["loss"])  # noqa: RUF005
    assert kept == {"logits"}
