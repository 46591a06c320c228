"""Affine maps and their scan: each operation against matrix algebra, `corrections` against a plain fp64 loop."""

import pytest
import torch

from parashoot.solve.linear import LIMIT, Algebra, corrections, finite_or_zero, guard

LAYOUTS = {
    "1 slot": Algebra(1, (5,), False), "3 slots": Algebra(3, (4,), False), "dense": Algebra(1, (4,), True),
    "dense, 2 slots": Algebra(2, (3,), True), "heads": Algebra(1, (2, 3), True), "heads, 2 slots": Algebra(2, (3, 2), True),
}  # fmt: skip
layouts = pytest.mark.parametrize("algebra", LAYOUTS.values(), ids=LAYOUTS)
BATCH = 2


def random_maps(algebra, chunks, scale=1.0, seed=0):
    """(matrices, vectors) of `chunks` chunks in the layout of `algebra`, fp64."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    slots, feature = algebra.slots, algebra.feature
    width, heads = slots * feature[-1], feature[0] if len(feature) == 2 else 1
    matrices = draw(BATCH, chunks, heads, width, width) if algebra.full else draw(slots, slots, BATCH, chunks, *feature)
    return matrices, draw(slots, BATCH, chunks, *feature)


def block(algebra, matrices, b, c):
    """The whole matrix of sequence b, chunk c over the flat state (S, F): the definition of both layouts, entry by entry."""
    slots, feature = algebra.slots, algebra.feature
    heads, width = (feature[0] if len(feature) == 2 else 1), feature[-1]
    out = matrices.new_zeros(slots, heads, width, slots, heads, width)
    for i in range(slots):
        for j in range(slots):
            for h in range(heads):
                for p in range(width):
                    if algebra.full:
                        out[i, h, p, j, h] = matrices[b, c, h, i * width + p, j * width : (j + 1) * width]
                    else:
                        out[i, h, p, j, h, p] = matrices[i, j, b, c, p]
    return out.view(slots * heads * width, -1)


def whole(algebra, matrices, c):
    return torch.stack([block(algebra, matrices, b, c) for b in range(BATCH)])


def flat(v):
    """(S, B, F) -> (B, S F)."""
    return v.movedim(1, 0).flatten(1)


@layouts
def test_operations_are_matrix_algebra(algebra):
    a, v = random_maps(algebra, 2)
    one, two = algebra.at(a, 0), algebra.at(a, 1)
    first, second, vector = whole(algebra, a, 0), whole(algebra, a, 1), flat(v[:, :, 0])
    times = lambda m, u: (m @ u.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(flat(algebra.apply(one, v[:, :, 0])), times(first, vector))
    torch.testing.assert_close(flat(algebra.apply_t(one, v[:, :, 0])), times(first.mT, vector))
    product = algebra.compose(one, two)
    chunk_axis = 1 if algebra.full else 3
    torch.testing.assert_close(whole(algebra, product.unsqueeze(chunk_axis), 0), first @ second)
    lead = (BATCH, 2)
    torch.testing.assert_close(
        whole(algebra, algebra.identity(lead, a), 1), torch.eye(first.shape[-1]).double().expand_as(first)
    )
    diagonal = torch.diag_embed(first.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(whole(algebra, algebra.diagonal(a), 0), diagonal)


def plain_corrections(algebra, a, defects):
    """A_c delta_c with delta_{c+1} = A_c delta_c + defect_c, one chunk after the other on whole matrices."""
    delta, out = torch.zeros_like(flat(defects[:, :, 0])), []
    for c in range(defects.shape[2]):
        moved = (whole(algebra, a, c) @ delta.unsqueeze(-1)).squeeze(-1)
        out.append(moved)
        delta = moved + flat(defects[:, :, c])
    return torch.stack(out, 1)


@layouts
@pytest.mark.parametrize("chunks", [2, 3, 9, 10, 50])
@pytest.mark.parametrize("in_block", [64, 2], ids=["in order", "two levels"])
@pytest.mark.parametrize("maps_for_last", [True, False], ids=["n maps", "n-1 maps"])
def test_corrections_equal_the_plain_recurrence(algebra, chunks, in_block, maps_for_last):
    a, v = random_maps(algebra, chunks, 0.5)
    a = a if maps_for_last else algebra.at(a, slice(0, chunks - 1))
    defects = v[:, :, : chunks - 1].contiguous()
    got = corrections(algebra, a, defects, in_block)
    assert got.shape == defects.shape
    wanted = plain_corrections(algebra, a, defects)
    torch.testing.assert_close(got.movedim(0, 2).flatten(2), wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max()))


@layouts
def test_the_default_takes_two_levels_beyond_64_chunks(algebra):
    a, v = random_maps(algebra, 101, 0.4)
    wanted = plain_corrections(algebra, a, v[:, :, :100])
    got = corrections(algebra, a, v[:, :, :100].contiguous()).movedim(0, 2).flatten(2)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max()))


@layouts
@pytest.mark.parametrize("in_block", [64, 2], ids=["in order", "two levels"])
@pytest.mark.parametrize("good", [0, 1, 7, 16, 29])
@pytest.mark.parametrize("huge", [False, True], ids=["moderate maps", "clamped maps"])
def test_zero_defects_before_a_chunk_give_corrections_of_exactly_zero(algebra, in_block, good, huge):
    """What finite termination rests on: whatever the finite maps."""
    a, v = random_maps(algebra, 30, 1e200 if huge else 1.0)
    defects = v[:, :, :29].clone()
    defects[:, :, :good] = 0.0
    got = corrections(algebra, guard(a), defects, in_block)
    assert bool((got[:, :, : good + 1] == 0).all())
    assert bool(torch.isfinite(got).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guard_removes_nan_and_clamps(dtype):
    limit = LIMIT[dtype]
    a = torch.tensor([float("nan"), float("inf"), -float("inf"), 2 * limit, -2 * limit, 1.5, 0.0], dtype=dtype)
    assert guard(a).tolist() == pytest.approx([0.0, limit, -limit, limit, -limit, 1.5, 0.0])
    assert a.isnan()[0], "the argument stays as it was"
    products = guard(a).abs().max() ** 2 * 16
    assert bool(torch.isfinite(products)), "a product of two guarded matrices is finite"


def test_finite_or_zero_drops_what_cannot_be_trusted():
    v = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.0])
    assert finite_or_zero(v).tolist() == [0.0, 0.0, 0.0, 3.0]
