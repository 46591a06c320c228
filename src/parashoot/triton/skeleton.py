"""The kernel text: multiple shooting over chunks x channels, for the forward pass and for its adjoint alike.

A sweep carries S numbers a channel through positions LO..L-1: the states or, backward, the gradients by the states. Time is cut
into `chunks` of CL positions. Two launches:

SHOOT, a program for each chunk and BD channels, does RUN. `lead`: run into the chunk's start over the `run` positions before it, from
    zero, or over all that there are, from i, with the Jacobian m of that run: where the cell forgets, m says that the start is known;
    else run from further back.
    `write`: run through the chunk from there, storing results. Starts, of chunks and of every `snap` positions, and ends are recorded.
CORRECT, a program for each BD channels; its NC rows are chunks of its own. Reads all starts and ends; where they agree it ends.
    Else Newton: run through each row from its start, storing results, with the Jacobian m; compare its end v with the start t of
    the next row; a scan over rows gives the corrections, t <- v + m delta. What PATIENCE passes have not brought together (steps that
    jump, states that latch: there Jacobians say little) does RUN in one chunk, which is the loop: the last pass, whatever the step.

Names: i the carry that enters the sequence, v a running carry. `fill` puts lines in place of {markers}; `$...$` is repeated for
every slot {i}, `$$...$$` for every pair {i}, {k}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

PLACE = "T0, DIR, LO, L, C"  # position q lies at time T0 + q DIR
PATIENCE = 3  # passes before a program goes through its channels in order
NEARER = 0.25  # what a pass without Jacobians may leave of the defects before another; as in solve/shooting.py

_HEAD = """
    tile = program % tiles
    row = tl.arange(0, NC)[:, None]
    col = (tile * BD + tl.arange(0, BD))[None, :]
    col = col.to(tl.int64) if WIDE else col
    inside = col < C
    zero = tl.zeros([NC, BD], tl.float32)
    {setup}
"""

RUN = (
    """
@triton.jit
def {name}_run(
    program, {arguments},
    {place}, starts_ptr, ends_ptr, CL, tiles, chunks, parts, snap, records, tol, burn, furthest,
    BD: tl.constexpr, FAST: tl.constexpr, MASKED: tl.constexpr, ALONE: tl.constexpr, WIDE: tl.constexpr,
):
    NC: tl.constexpr = 1
    part = program // tiles % chunks
    b = (program // tiles // chunks).to(tl.int64)
    chunk = part + 0 * tl.arange(0, 1)[:, None]
"""
    + _HEAD
    + """
    live = inside
    base = chunk * CL
    $s{i} = i{i}$
    settled = part >= 0  # true, and a tensor as a loop's variable has to be
    if not ALONE:
        run = burn + 0 * part
        goal = 0.125 * tol  # what is led in is compared with the tolerance itself
        leading = part > 0
        while leading:
            n = tl.minimum(run, part * CL)
            clipped = base - n <= LO
            $v{i} = tl.where(clipped, i{i}, zero)$
            $$m{i}{k} = tl.where(clipped, zero, {unit})$$
            origin = base - n
            {lead}
            $s{i} = v{i}$
            $$j{i}{k} = clamped(m{i}{k})$$
            left = tl.max(tl.max(tl.where(live, {weight}, 0.0), 1), 0)
            settled = left <= goal
            # where m shrinks: how far back it would be within the goal, and a quarter more; a few steps alone say little about that
            needed = tl.where(left < 0.9, tl.log(goal) / tl.log(tl.minimum(left, 0.9)) * 1.25, 1e6)
            needed = tl.where(n < 32, tl.minimum(needed, 4.0), needed)
            run = tl.minimum(needed * n, 1e9).to(tl.int32) // {U} * {U} + {U}
            leading = (settled == 0) & (run <= furthest)
    n = CL
    $v{i} = s{i}$
    {clear}
    origin = base
    recorded = 0
    {write}
    final = live & (chunk == chunks - 1)
    {finish}
    if not ALONE:
        mark = (b * {S} * chunks + chunk) * C + col
        $tl.store(ends_ptr + mark + {i} * chunks * C, v{i}, mask=inside)$
    return settled


{name}_in_order = triton.jit({name}_run.fn, noinline=True)  # compiled apart: one large function takes far longer than two
"""
)

SHOOT = """
@triton.jit(do_not_specialize={fixed})
def {name}_shoot(
    {arguments},
    {place}, starts_ptr, ends_ptr, facts_ptr, CL, tiles, chunks, snap, records, tol, burn, furthest,
    BD: tl.constexpr, FAST: tl.constexpr, MASKED: tl.constexpr, ALONE: tl.constexpr, WIDE: tl.constexpr,
):
    program = tl.program_id(0)  # channels first, then chunks, then sequences: one grid axis, for only the first may be long
    settled = {name}_run(
        program, {arguments},
        {place}, starts_ptr, ends_ptr, CL, tiles, chunks, chunks, snap, records, tol, burn, furthest,
        BD, FAST, MASKED, ALONE, WIDE,
    )
    fact = facts_ptr + program.to(tl.int64) * 3
    tl.store(fact, 1.0)
    tl.store(fact + 1, 0.0)
    tl.store(fact + 2, (settled == 0).to(tl.float32))
"""

CORRECT = (
    """
@triton.jit(do_not_specialize={fixed})
def {name}_correct(
    {arguments},
    {place}, starts_ptr, ends_ptr, facts_ptr, report_ptr, CL, tiles, chunks, parts, records, ratio, sub, tol, floor, most,
    NC: tl.constexpr, SPAN: tl.constexpr, BD: tl.constexpr, FAST: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):
    program = tl.program_id(0)
    b = (program // tiles).to(tl.int64)
    part = 0
    chunk = tl.arange(0, NC)[:, None]
"""
    + _HEAD
    + """
    live = (chunk < chunks) & inside
    first = chunk == 0
    base = chunk * CL
    # what the first launch recorded: starts of `sub` pieces of each of its chunks, of which a row has `ratio`; the chunks' ends
    mark = (b * {S} * records + chunk * ratio) * C + col
    fact = facts_ptr + (b * parts * ((tiles + SPAN - 1) // SPAN) + tile // SPAN) * 3 + 2
    unsettled = zero
    {unmoved}
    $z{i} = tl.abs(finite(i{i}, 1e30))$
    $r{i} = zero$
    for k in range(ratio):
        at = chunk * ratio + k + 1
        there = live & (at <= records) & (at % sub == 0)
        joined = there & (at < records)
        end = (b * {S} * parts + at // sub - 1) * C + col
        $o{i} = tl.load(ends_ptr + end + {i} * parts * C, mask=there, other=0.0)$
        $s{i} = tl.load(starts_ptr + mark + ({i} * records + k + 1) * C, mask=live & (at < records), other=0.0)$
        flag = tl.load(fact + (at // sub - 1) * ((tiles + SPAN - 1) // SPAN) * 3 + 0 * col, mask=there, other=0.0)
        unsettled = tl.maximum(unsettled, flag)
        {still}
        $d{i} = tl.where(joined, tl.abs(difference(o{i}, s{i})), 0.0)$
        $r{i} = tl.maximum(r{i}, tl.where(d{i} < 1e38, d{i}, 1e38))$
        $z{i} = tl.maximum(z{i}, tl.maximum(tl.abs(finite(o{i}, 1e30)), tl.abs(finite(s{i}, 1e30))))$
    $z{i} = tl.maximum(tl.max(z{i}, 0)[None, :], floor)$
    bad = {apart}
    defect = tl.max(tl.max({largest_r}, 1), 0)
    going = tl.max(tl.max(((bad & inside) | (unsettled > 0.0)).to(tl.int32), 1), 0) > 0
    unsolved = going & (most < 2)
    going = going & (most > 1)
    ran = going  # where the first launch was right nothing is loaded, and nothing is left to do
    # s: the start of a row; t: the start of the next, which the row's end has to meet
    joined = inside & (chunk + 1 < chunks)
    $s{i} = tl.load(starts_ptr + mark + {i} * records * C, mask=live & ran, other=0.0)$
    $s{i} = tl.where(first, i{i}, finite(s{i}, 1e30))$
    $t{i} = finite(tl.load(starts_ptr + mark + ({i} * records + ratio) * C, mask=joined & ran, other=0.0), 1e30)$
    $v{i} = s{i}$
    {clear}
    passes = 1 + 0 * tile
    n = CL
    origin = base
    while going:
        $v{i} = s{i}$
        $$m{i}{k} = {unit} + zero$$
        {clear}
        {both}
        $z{i} = tl.maximum(tl.max(tl.where(live, tl.abs(finite(v{i}, 1e30)), 0.0), 0)[None, :], floor)$
        $d{i} = tl.where(joined, difference(v{i}, t{i}), 0.0)$
        $r{i} = finite(d{i}, 1e30)$
        # delta of the next row, m delta + d; less d, the correction of this row's end: zero where all before is exact
        {scan}
        $c{i} = finite(o{i} - r{i}, 1e30)$
        bad = {outside}
        {stuck}
        fine = tl.max(tl.max((bad & joined).to(tl.int32), 1), 0) == 0
        defect = tl.max(tl.max({largest}, 1), 0)
        unsolved = (fine == 0) & (passes < chunks)
        passes += 1
        going = unsolved & (passes < most) & (passes < {patience})
        $t{i} = v{i} + c{i}$
        $s{i} = tl.where(first, i{i}, above(t{i}, starts_ptr + mark + {i} * records * C, ratio * C, live, first))$
    if ran:
        final = live & (chunk == chunks - 1)
        {finish}
        again = unsolved & (passes < most)
        if again:
            tl.debug_barrier()  # other threads wrote what is now written again
            {name}_in_order(
                program, {arguments},
                {place}, starts_ptr, ends_ptr, L, tiles, 1, parts, L, 1, tol, 0, 0, BD, FAST, MASKED, True, WIDE,
            )
        passes += again.to(tl.int32)
        unsolved = unsolved & (again == 0)
        defect = tl.where(again, 0.0, defect)
    report = report_ptr + (b * tiles + tile) * 3
    tl.store(report, passes.to(tl.float32))
    tl.store(report + 1, defect)
    tl.store(report + 2, unsolved.to(tl.float32))
"""
)

LOOP = """
for t in tl.range(0, n, {U}, num_stages={stages}):
    {loads}
    {steps}
"""


def fill(template: str, slots: int, blocks: Mapping[str, str | float | Sequence[str]]) -> str:
    """The template with its repetitions written out and its markers replaced; a marker alone on a line takes several lines."""
    out = []
    for line in template.strip("\n").split("\n"):
        text = line.strip()
        indent = line[: len(line) - len(line.lstrip())]
        if not text:
            continue
        whole = blocks.get(text[1:-1]) if text[0] == "{" else None
        if isinstance(whole, list):
            out += [indent + given for given in whole]
            continue
        pairs, single = re.fullmatch(r"\$\$(.*)\$\$", text), re.fullmatch(r"\$(.*)\$", text)
        if pairs:
            unit = lambda i, k: "1.0" if i == k else "0.0"
            copies = [
                pairs[1].replace("{i}", str(i)).replace("{k}", str(k)).replace("{unit}", unit(i, k))
                for i in range(slots)
                for k in range(slots)
            ]
        else:
            copies = [single[1].replace("{i}", str(i)) for i in range(slots)] if single else [text]
        for copy in copies:
            for key, value in blocks.items():
                copy = copy.replace("{" + key + "}", str(value)) if isinstance(value, str | int | float) else copy
            out.append(indent + copy)
    return "\n".join(out) + "\n\n"
