"""How generated kernels cut a problem: chunks of time, tiles of channels, what is loaded ahead, and why."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Tiling:
    """A program takes `columns` channels of one chunk with `warps` warps; `unroll` steps a loop trip, `stages` trips loaded ahead;
    time is cut into `chunks`, each led into by `burn` steps. A correction takes `rows` chunks of its own at once, longer or shorter
    ones, of `narrow` channels. Of heads, a program takes `columns` channels of 16 chunks; a correction takes them as they are. `roomy`:
    threads may take all registers; which is faster, `ps.tune` finds out."""

    columns: int
    warps: int
    unroll: int
    stages: int
    chunks: int
    burn: int = 32
    rows: int = 16
    narrow: int = 64
    roomy: bool = False

    @property
    def pieces(self) -> int:
        """Into how many pieces a chunk is cut, where a correction may begin."""
        return 1 if self.chunks == 1 else max(1, self.rows // self.chunks)

    def cut(self, length: int) -> tuple[int, int]:
        """(chunk length, chunks) for a number of positions; a piece of a chunk is a multiple of `unroll`."""
        multiple = self.unroll * self.pieces
        each = -(-length // self.chunks)
        each = -(-each // multiple) * multiple
        return each, -(-length // each)


def unroll_for(slots: int, heads: bool = False) -> int:
    """Steps a loop trip; cells of several slots store their states once a trip."""
    if heads:
        return 1 if slots == 1 else 2
    return 4 if slots <= 2 else 2


def stages_for(slots: int, heads: bool = False) -> int:
    """Loop trips whose loads are in flight."""
    return 4 if slots == 1 and not heads else 3


_BURN = {2: 32, 4: 48}  # steps led in at first, by the bytes of a number: float32 has to forget more exactly
_PROBE = 16  # the same where steps or Jacobians are long: most cells have forgotten by then, of others it says how far back to begin
_LEAD = 128  # steps led in at first, at most
_AHEAD = 6  # loop trips whose loads are in flight, where `stages_for` is too few to keep the memory busy
WIDEST = 128  # channels of a program, at most
_SHORTEST = 128  # steps of a chunk: leading in costs a fraction
_STEP = 0.15e-6  # seconds a dependent step takes, whatever the width, as long as the device is not full
_LAUNCH = 6e-6  # of the second launch and of reading what the first recorded
_LONG = (100, 200)  # instructions of the adjoint from which on, up to two states and with more, steps are long
_SLOW = 48  # steps of a lead from which on more chunks cost more than they bring, up to two states
_QUICK = 20  # steps of a lead up to which many states begin with a probe
_CROWD = 320  # threads of a multiprocessor up to which each may take all registers
_ELEMENTS = 512  # carries that a multiprocessor advances at once: enough loads in flight to keep the memory busy


def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU, 1 of anything else."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def lead_for(memory: float, goal: float) -> int:
    """Steps after which a state at rest is forgotten up to `goal`, with some to spare, where `memory` of it is left by one; 0 if too many."""
    if not (0.0 < memory < 1.0 and 0.0 < goal < 1.0):
        return 0
    steps = math.ceil(math.log(goal) / math.log(memory)) + 8
    return steps if steps <= _LEAD else 0


def choose(
    batch: int,
    time: int,
    channels: int,
    itemsize: int,
    slots: int,
    instructions: tuple[int, int],
    processors: int,
    chunk_length: int | None,
    backward: bool = False,
    lead: int = 0,
) -> tuple[Tiling, tuple[str, ...]]:
    """The tiling for x (B, T, G, C) of numbers of `itemsize` bytes on a device of so many multiprocessors, and the reasons.

    `instructions` of the step and of its adjoint tell whether bytes or arithmetic take the time; `chunk_length` as asked for or None;
    `lead`: steps that a chunk wants to be led in over at least.
    """
    unroll, short, many = unroll_for(slots), itemsize == 2, slots > 2
    long = instructions[1] >= _LONG[many]
    light = not many and not long
    spare = _spare(slots, instructions, backward)
    # Long steps want more carries at once, four to a thread: while one waits for its operands another goes on. Adjoints want registers.
    deep = short and not light and spare and (many or not (backward or lead >= _SLOW))
    pairs = light or (short and not many and backward and spare)  # two to a thread
    full = processors * _ELEMENTS
    wide = (pairs or deep) and batch * channels * 8 >= full and channels >= WIDEST
    full *= 2 if deep or (not short and not light and not many) else 1
    columns = WIDEST if wide else max(16, min(64 if short else 32, 1 << (channels - 1).bit_length()))
    probing = short and (long or (many and 0 < lead <= _QUICK))
    burn = max(_PROBE if probing else _BURN[itemsize], -(-lead // unroll) * unroll)
    ahead = short and (light if slots == 2 else many and not wide)
    stages = _AHEAD if ahead else stages_for(slots)
    if chunk_length is not None:
        chunks, reasons = -(-time // chunk_length), ["chunk length asked for"]
    else:
        chunks, reasons = _chunks(batch * channels, "channels", time, unroll, full, burn)
    narrow = min(columns, 32 if many else 64)
    warps = 2 if wide and pairs else 1
    threads = -(-channels // columns) * chunks * batch * 32 * warps
    roomy = (light if backward else short and not light and not many) and threads <= _CROWD * processors
    return Tiling(columns, warps, unroll, stages, chunks, burn, 16, narrow, roomy), tuple(reasons)


def _spare(slots: int, instructions: tuple[int, int], backward: bool) -> bool:
    """Whether the step or, backward, its adjoint is short enough that enough elements of it fit in the registers."""
    step, adjoint = instructions
    if slots > 2:
        return adjoint < (500 if backward else 400)
    if backward:
        return adjoint < 200
    return step < 200 if slots == 1 else adjoint < 220


def _chunks(width: int, unit: str, time: int, unroll: int, full: int, burn: int) -> tuple[int, list[str]]:
    """How many chunks: enough to fill the device, few enough that leading into them costs little."""
    if width * 1.5 >= full:
        return 1, [f"one chunk: {width} {unit} fill the device"]
    most = max(1, min(round(full / width), time // _SHORTEST))
    alone, cut = time * _STEP, (time / most + burn) * _STEP + _LAUNCH
    if most == 1 or alone <= cut:
        return 1, [f"one chunk: {time} steps take {alone * 1e6:.0f} us, cutting them {cut * 1e6:.0f} us"]
    even = [n for n in range(most, max(1, most * 2 // 3), -1) if time % (n * unroll * max(1, 16 // n)) == 0]
    chunks = even[0] if even else most
    return chunks, [f"{chunks} chunks of {width} {unit}: {chunks * width} carries at once, the device takes {full}"]


HEAD_ROWS = 16  # the least that a matrix product takes, of columns too
# No Jacobian tells whether a lead was long enough, and a correction costs more than a longer lead.
_HEAD_BURN = {2: 48, 4: 64}
MOST_ROWS = 128  # chunks of a sequence of heads, which a correction holds at once
_HEAD_FULL = 8 * HEAD_ROWS  # rows of a tile that a multiprocessor advances at once


def choose_heads(
    batch: int, time: int, channels: int, itemsize: int, slots: int, width: int, processors: int, chunk_length: int | None,
    turns: bool = False,
) -> tuple[Tiling, tuple[str, ...]]:  # fmt: skip
    """The same for heads of `width` channels: a program takes 16 rows (chunks of sequences) of as many heads as fit in a tile.

    A state that the step `turns` is not known from where it began a while ago: no lead into a chunk is long enough.
    """
    unroll, stages = unroll_for(slots, True), stages_for(slots, True)
    columns = max(HEAD_ROWS, 1 << (width - 1).bit_length())
    tiles = -(-channels // (columns // width * width))
    burn = _HEAD_BURN[itemsize]
    if chunk_length is not None:
        chunks, reasons = -(-time // chunk_length), ["chunk length asked for"]
    elif turns:
        chunks, reasons = 1, ["one chunk: the step turns the states of its heads, which forget nothing"]
    else:
        chunks, reasons = _chunks(batch * tiles, "tiles of heads", time, unroll, processors * _HEAD_FULL, burn)
    if chunks > MOST_ROWS:
        chunks, reasons = MOST_ROWS, [*reasons, f"of which a correction holds {MOST_ROWS} at most"]
    return Tiling(columns, columns // HEAD_ROWS, unroll, stages, chunks, burn, 1, columns), tuple(reasons)


# What `ps.tune` found: for each kind of device, tilings forward and backward by cell, dtype and shape.

Pair = tuple[Tiling, Tiling]


def _store() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parashoot" / "tilings.json"


@functools.cache
def _tuned(device: str) -> dict[str, Pair]:
    pairs = {}
    try:
        found = list(json.loads(_store().read_text()).get(device, {}).items())
    except (OSError, ValueError, AttributeError):  # none yet, or not a file that this wrote
        found = []
    for key, pair in found:
        with contextlib.suppress(TypeError, KeyError):  # of another version: measured again when asked
            pairs[key] = Tiling(**pair["forward"]), Tiling(**pair["backward"])
    return pairs


def tuned(device: torch.device) -> dict[str, Pair]:
    """Tilings measured on this kind of device, by key."""
    return _tuned(torch.cuda.get_device_name(device)) if device.type == "cuda" else {}


def remember(device: torch.device, key: str, pair: Pair) -> None:
    """Keep tilings, in this process and on disk; the file is replaced whole, so a crash loses nothing."""
    tuned(device)[key] = pair
    path, name = _store(), torch.cuda.get_device_name(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict) or not isinstance(known.get(name, {}), dict):  # not a file that this wrote
        known = {}
    known.setdefault(name, {})[key] = {"forward": asdict(pair[0]), "backward": asdict(pair[1])}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(known, file, indent=1)
    os.replace(file.name, path)
