"""The kernel text for headwise steps: as skeleton.py, with a zero Jacobian, on tiles of rows x channels.

A row is one chunk of one sequence, so that the product of a head's matrix with all of them is one matrix product. A tile of BD channels
holds as many whole heads of WIDTH as fit; matrices lie in it block-diagonally. `per` rows, a power of two, belong to each sequence.

SHOOT, a program for each NC rows and a tile: lead into each chunk over `burn` positions from zero, run through it, storing results;
    record starts and ends.
CORRECT, a program for all rows of some sequences: where each end agrees with the next start, or a chunk is ALONE, it ends. Else each row
    starts from the end before it, and so on: after k passes k chunks are exact. To agree is to be within the tolerance and to show that
    the cell forgets, for what is small may grow: the lead from zero has come far nearer to the end than zero is, or else (such a row is vague)
    the next pass brings those rows nearer. What PATIENCE passes have not brought together, or a
    pass hardly nearer (the cell does not forget), runs in order, from where it is exact if nothing is summed up over all of time; with
    heads APART, which takes several times as long, where a step is not finite: in a block-diagonal product that would spread to other
    heads.
"""

from __future__ import annotations

_ROWS = """
    row = tl.arange(0, NC)[:, None]
    lane = tl.arange(0, BD)[None, :]
    USED: tl.constexpr = BD // WIDTH * WIDTH
    col = tile * USED + lane
    col = col.to(tl.int64) if WIDE else col
    b = (first + row) // per
    chunk = (first + row) % per + skip
    live = (b < batch) & (chunk < chunks) & (row < bound)
    b = tl.where(live, b, 0).to(tl.int64)
    inside = (col < C) & (lane < USED) & (row >= 0)
    zero = tl.zeros([NC, BD], tl.float32)
    k = tl.arange(0, BD)[:, None]
    same = (k // WIDTH == lane // WIDTH) & (k < USED) & (lane < USED)
    mark = (b * {S} * chunks + chunk) * C + col
"""

RUN = (
    """
@triton.jit
def {name}_run(
    first, bound, tile, slot, parts, skip, steps, {arguments},
    {place}, starts_ptr, ends_ptr, CL, per, chunks, batch, burn,
    NC: tl.constexpr, BD: tl.constexpr, WIDTH: tl.constexpr, FAST: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    LEAD: tl.constexpr, ALONE: tl.constexpr, APART: tl.constexpr,
):
"""
    + _ROWS
    + """
    {setup}
    base = tl.where(live, chunk * CL, L)
    $v{i} = i{i}$
    if LEAD:
        clipped = base - burn <= LO
        $v{i} = tl.where(clipped, i{i}, zero)$
        n = burn
        origin = base - burn
        {lead}
    if not ALONE:
        if not LEAD:
            $v{i} = tl.load(ends_ptr + mark + ({i} * chunks - 1) * C, mask=live & inside & (chunk > 0), other=0.0)$
            $v{i} = tl.where(chunk > 0, v{i}, i{i})$
            tl.debug_barrier()  # before another row replaces its end
        $tl.store(starts_ptr + mark + {i} * chunks * C, v{i}, mask=live & inside)$
    n = steps
    origin = base
    far = zero
    {clear}
    {write}
    if not ALONE:
        $tl.store(ends_ptr + mark + {i} * chunks * C, v{i}, mask=live & inside)$
    final = live & inside & (base + steps >= L)
    {finish}
    return 1.0 - tl.min(tl.min((far < float("inf")).to(tl.float32), 1), 0)


{name}_again = triton.jit({name}_run.fn, noinline=True)
"""
)

SHOOT = """
@triton.jit(do_not_specialize={fixed})
def {name}_shoot(
    {arguments},
    {place}, starts_ptr, ends_ptr, facts_ptr, CL, per, chunks, batch, burn, tiles,
    NC: tl.constexpr, BD: tl.constexpr, WIDTH: tl.constexpr, FAST: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    ALONE: tl.constexpr,
):
    program = tl.program_id(0)
    block = program // tiles
    odd = {name}_run(
        block * NC, NC, program % tiles, block, 1, 0, CL, {arguments},
        {place}, starts_ptr, ends_ptr, CL, per, chunks, batch, burn,
        NC, BD, WIDTH, FAST, MASKED, WIDE, not ALONE, ALONE, False,
    )
    tl.store(facts_ptr + program, odd)
"""

COMPARE = (
    """
@triton.jit
def {name}_compare(
    first, tile, starts_ptr, ends_ptr, C, per, chunks, batch, tol, floor,
    NC: tl.constexpr, BD: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):
    bound = NC
    skip = 0
"""
    + _ROWS
    + """
    joined = live & inside & (chunk > 0)
    $z{i} = tl.abs(finite(tl.load(ends_ptr + mark + {i} * chunks * C, mask=live & inside, other=0.0), 1e30))$
    $s{i} = zero$
    for k in range(tl.where(chunks > 1, NC // per, 0)):  # the largest of each sequence and head
        mine = row // per == k
        $o{i} = tl.max(tl.where(mine, z{i}, 0.0), 0)[None, :]$
        $s{i} = tl.where(mine, tl.max(tl.where(same, o{i}, 0.0), 1)[None, :], s{i})$
    $z{i} = s{i}$
    $o{i} = tl.load(ends_ptr + mark + ({i} * chunks - 1) * C, mask=joined, other=0.0)$
    $s{i} = tl.load(starts_ptr + mark + {i} * chunks * C, mask=joined, other=0.0)$
    $r{i} = tl.abs(difference(o{i}, s{i}))$
    bad = {apart}
    $r{i} = tl.where(r{i} < 1e38, r{i}, 1e38)$
    largest = {largest_r}
    $o{i} = tl.abs(finite(o{i}, 1e30))$
    whole = {largest_o}
    size = tl.max(whole, 1)[:, None]
    if WIDTH * 2 <= BD:  # several heads, of which none hides another: the mean over each
        size = tl.dot(whole, same.to(tl.float32), input_precision="tf32") / WIDTH
    vague = largest > {forgotten} * size
    unmet = tl.max(tl.max(tl.where(bad, largest, 0.0), 1), 0)
    blur = tl.max(tl.max(tl.where(vague, largest, 0.0), 1), 0)
    return tl.max(tl.max(bad.to(tl.int32), 1), 0), tl.max(tl.max(largest, 1), 0), unmet, blur
"""
)

CORRECT = """
@triton.jit(do_not_specialize={fixed})
def {name}_correct(
    {arguments},
    {place}, starts_ptr, ends_ptr, facts_ptr, report_ptr, CL, per, chunks, batch, tiles, parts, tol, floor, most,
    NC: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, WIDTH: tl.constexpr, FAST: tl.constexpr, WIDE: tl.constexpr,
    ALONE: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % tiles
    group = program // tiles
    odd = 0.0
    for part in range(parts):
        odd = tl.maximum(odd, tl.load(facts_ptr + (group * parts + part) * tiles + tile))
    bad = 0 * tile
    vague = 0 * tile
    defect = 0.0
    passes = 1 + 0 * tile
    skip = 0 * tile  # zero, and no constant: one compiled function serves corrections and the pass in order
    if not ALONE:
        bad, defect, unmet, blur = {name}_compare(group * NC, tile, starts_ptr, ends_ptr, C, per, chunks, batch, tol, floor, NC, BD, WIDTH, WIDE)
        vague = (blur > 0.0).to(tl.int32)
        going = (bad + vague > 0) & (odd == 0.0) & (most > 1)
        while going:
            before = unmet
            last = tl.maximum(unmet, blur)
            tl.debug_barrier()  # other threads wrote what is now read, and written again
            odd = {name}_again(
                group * NC, NC + skip, tile, group * parts, parts, skip, CL, {arguments},
                {place}, starts_ptr, ends_ptr, CL, per, chunks, batch, 0,
                NC, BD, WIDTH, FAST, True, WIDE, False, False, False,
            )
            tl.debug_barrier()
            bad, defect, unmet, blur = {name}_compare(group * NC, tile, starts_ptr, ends_ptr, C, per, chunks, batch, tol, floor, NC, BD, WIDTH, WIDE)
            vague = (blur > {nearer} * last).to(tl.int32)
            passes += 1
            going = (bad > 0) & (odd == 0.0) & (passes < most) & (passes < {patience}) & (unmet < {nearer} * before)
    unsolved = (bad + vague > 0) | (odd > 0.0)
    again = unsolved & (passes < most)
    rows = NC // per + skip
    if not ALONE:
        if again & (odd == 0.0):
            known = {known}
            tl.debug_barrier()
            odd = {name}_again(
                group * rows, rows, tile, group * parts, parts, known, L - known * CL, {arguments},
                {place}, starts_ptr, ends_ptr, CL, 1 + skip, chunks, batch, 0,
                ROWS, BD, WIDTH, FAST, True, WIDE, False, False, False,
            )
    if again & (odd > 0.0):
        tl.debug_barrier()
        {name}_again(
            group * rows, rows, tile, group * parts, parts, 0, L, {arguments},
            {place}, starts_ptr, ends_ptr, CL, 1, chunks, batch, 0,
            ROWS, BD, WIDTH, FAST, True, WIDE, False, True, True,
        )
    passes += again.to(tl.int32)
    unsolved = unsolved & (again == 0)
    report = report_ptr + program * 3
    tl.store(report, passes.to(tl.float32))
    tl.store(report + 1, tl.where(again, 0.0, defect))
    tl.store(report + 2, unsolved.to(tl.float32))
"""

TEXTS = (RUN, SHOOT, COMPARE, CORRECT)
