"""The sweep behind tuning/'s tables: every launch worth trying for one case, compiled, checked, timed and ranked."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args, get_type_hints

import torch

from .. import tuning
from ..forced import forced
from ..inspection import compile_call
from ..launch import describe
from ..norms import OfConditioned, OfDynamic, OfGatedSums, OfHeads, OfPoly, OfQuantized, OfRows, Shape
from ..ops.hosts import dynamic_rows, gated_sum_rows, heads
from ..tuning import Heads, RowBackwardSplit, RowBackwardWide, RowForwardSplit, RowForwardWide, Tile
from .cases import OPS, Case, Inputs
from .measure import TimedCall, ceiling_calls, compared, expect, reason
from .predict import launches
from .records import Provenance
from .timing import device_time, sets_past_l2

# One of tuning's frozen dataclasses.
Launch = Any

# What each field besides the tiles may be. A new field needs a line here to be swept.
_VALUES: dict[str, Sequence[Any]] = {
    "stages": (1, 2, 3, 4),
    "per_sm": (1, 2, 3, 4, 5, 6),
    "stream": (False, True),
    "preload": (False, True),
    "early": (False, True),
    "pairwise": (False, True),
    "many": (0, 64),
    "tiles": (1, 2, 4),
    "block": (1024, 2048, 4096, 8192),
    "registers": (None, 80, 96, 128, 168),
    "heads": (1, 2, 4, 8, 16),
}

# What kernels of other norms of rows than LayerNorm and RMSNorm know of a launch.
_OF_OTHERS = ("tile", "stages", "per_sm", "stream")

# Launches that go through a row in steps, and do not hold it.
_STEPPING = (RowForwardWide, RowForwardSplit, RowBackwardWide, RowBackwardSplit)

# Bounds of a tile, wide around every launch that has been the best of some sweep. Elements that a thread loads of a
# chunk, that it holds altogether, and that a tile of several rows has: wider rows keep a program busy alone.
_LOADED = (4, 32)
_HELD = 64
_SHARED_TILE = 16384
_CHUNKS = (256, 8192)
_MOST_ROWS, _MOST_WARPS = 64, 32
# Of programs that have columns of their own: a chunk, and warps.
_COLUMNS, _WARPS_OF_COLUMNS = (128, 2048), (2, 8)

# How many of the best so far the next field is varied for.
_KEPT = 4

# Rows that a launch is checked on: enough for persistent programs to take several tiles, few enough for the oracle.
_CHECKED_ROWS, _CHECKED_ELEMENTS = 600, 1 << 22
# Of QK-norm and of conditioned norms so many elements, whatever the tokens: a tile is of several, of one head or sample.
_CHECKED_OF_HEADS = 1 << 24


@dataclass(frozen=True)
class Trial:
    """One launch, and what became of it.

    outcome: "compiled", and not yet run; "timed"; "spills", and so not run (today's launch is, whatever it spills); "wrong"
    beside the oracle, or "failed", with why. device_us, device_us_std: median and deviation of a call. registers, spills:
    how many, and how many bytes, of a thread; of the kernel with the most of them.
    """

    launch: Launch
    outcome: str
    device_us: float | None = None
    device_us_std: float | None = None
    registers: int | None = None
    spills: int | None = None
    why: str | None = None

    def to_json(self, case: Case, ceiling_us: float, today: Launch, provenance: Provenance) -> str:
        """One line."""
        found = asdict(self) | dict(
            op=case.op,
            shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."),
            kind=type(self.launch).__name__,
            today=self.launch == today,
            ceiling_us=ceiling_us,
            ceiling_ratio=None if self.device_us is None else ceiling_us / self.device_us,
            **asdict(provenance),
        )
        return json.dumps({"pass": case.pass_, **found})


def choice(op: str, pass_: str) -> str:
    """Which of tuning's choices is an op's, by the name that ``forced`` knows."""
    return OPS[op].norm.choice(pass_)


def _choose(op: str, pass_: str) -> Callable[..., Launch]:
    found: Callable[..., Launch] = getattr(tuning, f"choose_{choice(op, pass_)}")
    return found


def kinds(op: str, pass_: str) -> dict[str, type]:
    """The kinds of launch that tuning may choose for a pass of an op, by name."""
    hint = get_type_hints(_choose(op, pass_))["return"]
    return {kind.__name__: kind for kind in get_args(hint) or (hint,)}


def chosen(case: Case, device: torch.device) -> Launch:
    """What tuning chooses for the case."""
    itemsize = 8 if torch.float64 in (case.dtype, case.weight_dtype) else case.dtype.itemsize
    norm, choose = OPS[case.op].norm, _choose(case.op, case.pass_)
    if isinstance(norm, OfHeads):
        *tokens, queries, keys, n = case.shape
        return choose(math.prod(tokens), (queries, keys), n, itemsize, describe(device))
    if isinstance(norm, OfConditioned):
        members, sets, n = norm.sets(case.shape)
        if case.backward:
            gated = () if norm.of_gated_sum else (norm.gated,)
            return choose(members, sets, n, itemsize, describe(device), *gated, False)
        return choose(members * sets, n, itemsize, describe(device))
    if isinstance(norm, OfDynamic | OfPoly):
        return choose(*case.shape, itemsize, describe(device))
    assert isinstance(norm, OfRows)
    if isinstance(norm, OfQuantized):
        return choose(norm.spec, *case.shape, norm.held_bytes(case.dtype), describe(device), norm.form.block)
    return choose(norm.spec, *case.shape, itemsize, describe(device))


def start(case: Case, kind: type, device: torch.device) -> Launch:
    """A launch of this kind to begin with: the case's own, or that of the nearest problem that has one."""
    if isinstance(today := chosen(case, device), kind):
        return today
    *lead, n = case.shape
    rows = [lead] if isinstance(OPS[case.op].norm, OfConditioned) else [[m] for m in (*lead, 1, 128, 1 << 15)]
    sizes = itertools.product((n, *(1 << k for k in range(6, 20)), _NO_BLOCKS), rows)
    return next(found for n, m in sizes if isinstance(found := chosen(replace(case, shape=(*m, n)), device), kind))


# Rows that no block divides, nor any program holds.
_NO_BLOCKS = 66001


def tiles(n: int, held: bool = True) -> Iterator[Tile]:
    """Tiles worth trying for rows of n elements, ``held`` by their programs or gone through in steps."""
    row = 1 << (n - 1).bit_length()
    most_rows = min(_MOST_ROWS, max(1, _SHARED_TILE // n)) if held else 1
    for chunk in _powers(*(min(row, bound) for bound in _CHUNKS)):
        for rows_, warps in itertools.product(_powers(1, most_rows), _powers(1, _MOST_WARPS)):
            loaded = rows_ * chunk / (32 * warps)
            if _LOADED[0] <= loaded <= _LOADED[1] and (not held or loaded * -(-n // chunk) <= _HELD):
                yield Tile(rows_, chunk, warps)


def tiles_of_heads(n: int) -> Iterator[Tile]:
    """Tiles worth trying for heads of n elements: so many tokens of one head, which their programs hold."""
    chunk = 1 << (n - 1).bit_length()
    for rows_, warps in itertools.product(_powers(1, _MOST_ROWS), _powers(1, _MOST_WARPS)):
        # A narrow head, too, gets a tile that has a few elements for each thread.
        if _LOADED[0] <= rows_ * chunk / (32 * warps) <= _LOADED[1]:
            yield Tile(rows_, chunk, warps)


def tiles_of_columns(n: int) -> Iterator[Tile]:
    """Tiles worth trying where a program has some of the columns of rows of n elements, and needs no others."""
    row = 1 << (n - 1).bit_length()
    sizes = (_powers(*(min(row, bound) for bound in _COLUMNS)), _powers(1, _MOST_ROWS), _powers(*_WARPS_OF_COLUMNS))
    for chunk, rows_, warps in itertools.product(*sizes):
        if _LOADED[0] <= rows_ * chunk / (32 * warps) <= _LOADED[1]:
            yield Tile(rows_, chunk, warps)


def _powers(least: int, most: int) -> list[int]:
    """The powers of two between two numbers."""
    return [1 << k for k in range(most.bit_length()) if least <= 1 << k]


def variants(launch: Launch, field: str, case: Case) -> Iterator[Launch]:
    """The launch with one field changed to each value worth trying."""
    norm, n = OPS[case.op].norm, case.shape[-1]
    if isinstance(norm, OfConditioned):
        *_, n = norm.sets(case.shape)
    if isinstance(launch, Heads):
        yield from _variants_of_heads(launch, field, case)
    elif choice(case.op, case.pass_) != case.pass_ and field not in _OF_OTHERS:
        return
    elif field == "tile" and isinstance(norm, OfDynamic):
        # The launch's own is of few columns where rows are few.
        yield from (replace(launch, tile=tile) for tile in dict.fromkeys((launch.tile, *tiles_of_columns(n))))
    elif field == "tile":
        for tile in tiles(n, held=not isinstance(launch, _STEPPING)):
            # The columns' tile of a launch that has one goes by the same warps.
            same_warps = {"sums": replace(launch.sums, warps=tile.warps)} if hasattr(launch, "sums") else {}
            if _possible(found := replace(launch, tile=tile, **same_warps), n):
                yield found
    elif field == "sums":
        for rows_, chunk in itertools.product((32, 64, 128, 256), (16, 32, 64, 128)):
            yield replace(launch, sums=Tile(rows_, chunk, launch.tile.warps))
    else:
        for value in _VALUES.get(field, ()):
            if _possible(found := replace(launch, **{field: value}), n):
                yield found


def _variants_of_heads(launch: Heads, field: str, case: Case) -> Iterator[Launch]:
    if field == "tile":
        for tile in tiles_of_heads(case.shape[-1]):
            # Programs of fewer warps are more of them, so that as many warps are at work.
            per_sm = max(1, launch.per_sm * launch.tile.warps // tile.warps) if case.backward else launch.per_sm
            yield replace(launch, tile=tile, per_sm=per_sm)
    elif field == "heads" or case.backward:  # forward no program walks
        more = (8, 16) if field == "per_sm" else ()
        yield from (replace(launch, **{field: value}) for value in (*_VALUES[field], *more))


def _possible(launch: Launch, n: int) -> bool:
    """Whether a launch that splits rows of n splits them into whole blocks, for a team that any device has room for."""
    if not hasattr(launch, "block"):
        return True
    team = n / launch.block
    return team.is_integer() and launch.block % launch.tile.chunk == 0 and team <= min(32 * launch.tile.warps, 128)


def search(begin: Launch, today: Launch, case: Case, evaluate: Callable[[list[Launch]], Iterable[Trial]]) -> list[Trial]:
    """Vary one field of ``begin`` after the other, each for the fastest few so far.

    All trials, those of ``begin`` and ``today`` among them; the timed first, the fastest first.
    """
    trials = {trial.launch: trial for trial in evaluate(list(dict.fromkeys([begin, today])))}
    for field in fields(begin):
        fastest = [trial.launch for trial in _ranked(trials.values()) if type(trial.launch) is type(begin)][:_KEPT]
        fresh = dict.fromkeys(found for launch in fastest for found in variants(launch, field.name, case))
        trials |= {trial.launch: trial for trial in evaluate([launch for launch in fresh if launch not in trials])}
    return _ranked(trials.values())


def _ranked(trials: Iterable[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: float("inf") if trial.device_us is None else trial.device_us)


def compiled(case: Case, launch: Launch, target: str) -> Trial:
    """The launch with what its kernels take when they are compiled for ``target``; "compiled" or "failed". Needs no GPU."""
    try:
        with forced(**{choice(case.op, case.pass_): launch}):
            calls = launches(case)
        found = [compile_call(call.kernel, call.args, call.options, target) for call in calls]
    except Exception as error:  # said in words, since not every exception can travel between processes
        return Trial(launch, "failed", why=reason(error))
    return Trial(launch, "compiled", registers=max(one.registers for one in found), spills=max(one.spills for one in found))


def direct(case: Case, inputs: Inputs) -> TimedCall:
    """One call past autograd and past what is remembered of calls, so that what is forced is what runs."""
    op = OPS[case.op]
    if isinstance(op.norm, OfHeads):
        return _direct_of_heads(op.norm, op.eps, inputs)
    if isinstance(op.norm, OfDynamic):
        return _direct_of_dynamic(op.norm, inputs)
    if isinstance(op.norm, OfGatedSums):
        return _direct_of_gated_sum(op.norm, op.eps, inputs)
    of = inputs.of(op.eps)
    if inputs.dy is None:
        return lambda: op.norm.forward(of, save=False).y
    dy = inputs.dy
    _, mean, rstd = op.norm.forward(of, save=True)
    rstd = dy.new_empty(0) if rstd is None else rstd  # of a norm that keeps none

    def backward() -> tuple[torch.Tensor, ...]:
        dx, dw, db, *of_gate = op.norm.backward(dy, of, mean, rstd)
        return tuple(gradient for gradient in (dx, *of_gate, dw, db) if gradient is not None)

    return backward


def _direct_of_heads(norm: OfHeads, eps: float, inputs: Inputs) -> TimedCall:
    assert inputs.key is not None and inputs.weight is not None
    query, key = heads.Side(inputs.x, inputs.weight), heads.Side(inputs.key, inputs.key_weight)
    cos, sin = inputs.angles or (None, None)
    turn = heads.Rotation(cos, sin, norm.interleaved)
    if inputs.dy is None:
        return lambda: heads.forward(norm.spec, query, key, eps, turn, save=False)[:2]
    *_, query_rstd, key_rstd = heads.forward(norm.spec, query, key, eps, turn, save=True)
    of_query = heads.Wanted(inputs.dy, query_rstd, dx=True, dw=True)
    of_key = heads.Wanted(inputs.dkey, key_rstd, dx=True, dw=True)

    def backward() -> tuple[torch.Tensor, ...]:
        found = heads.backward(norm.spec, query, key, of_query, of_key, turn)
        return tuple(gradient for gradient in found if gradient is not None)

    return backward


def _direct_of_dynamic(norm: OfDynamic, inputs: Inputs) -> TimedCall:
    """Alpha and shift are tensors of their own, as a caller has them."""
    alpha, shift = (*inputs.numbers, None)[:2]
    assert alpha is not None
    given = dynamic_rows.Inputs(inputs.x, alpha, shift, inputs.weight, inputs.bias)
    if inputs.dy is None:
        return lambda: dynamic_rows.forward(norm.spec, 1, given)
    dy, wanted = inputs.dy, (True,) * len(given)

    def backward() -> tuple[torch.Tensor, ...]:
        found = dynamic_rows.backward(norm.spec, 1, given, dy, wanted)
        return tuple(gradient for gradient in found if gradient is not None)

    return backward


def _direct_of_gated_sum(norm: OfGatedSums, eps: float, inputs: Inputs) -> TimedCall:
    """Of the sum that a forward kept, and with a gradient of its own."""
    problem, *tensors = norm.of_launch(inputs.of(eps))
    if inputs.dy is None:
        return lambda: gated_sum_rows.forward(problem, *tensors, save=False)[:2]
    _, *kept = gated_sum_rows.forward(problem, *tensors, save=True)
    x, _, *parameters = tensors
    saved: Any = inputs.dy, x, *parameters, *kept, inputs.dsum
    return lambda: gated_sum_rows.backward(problem, (True,) * 5, *saved)


class Bench:
    """Where the launches of one case are tried: its inputs, what is right, and the ceiling of the run.

    ``stream`` is the current stream. ``pool`` compiles for ``target``, in processes that never touch the GPU.
    """

    def __init__(
        self, case: Case, today: Launch, device: torch.device, stream: torch.cuda.Stream, pool: Executor, target: str
    ) -> None:
        self._case, self._today, self._stream, self._pool, self._target = case, today, stream, pool, target
        self._check = Check(case, device)
        count = sets_past_l2(case.bytes, torch.cuda.get_device_properties(device).L2_cache_size)
        sets = [case.draw(device) for _ in range(count)]
        self.ceiling_us = device_time(ceiling_calls(case, sets), stream).median
        self._calls = [direct(case, inputs) for inputs in sets]

    def evaluate(self, launches: list[Launch]) -> Iterator[Trial]:
        """Compile all of them at once; then check and time those that do not spill, one by one."""
        compile_one = functools.partial(compiled, self._case, target=self._target)
        for trial in self._pool.map(compile_one, launches):
            if trial.spills and trial.launch != self._today:
                yield replace(trial, outcome="spills")
            elif trial.outcome == "compiled":
                yield self._run(trial)
            else:
                yield trial

    def _run(self, trial: Trial) -> Trial:
        try:
            with forced(**{choice(self._case.op, self._case.pass_): trial.launch}):
                if wrong := self._check():
                    return replace(trial, outcome="wrong", why=wrong)
                found = device_time(self._calls, self._stream)
        except Exception as error:  # what asks for more than the GPU has is an answer too
            return replace(trial, outcome="failed", why=reason(error))
        return replace(trial, outcome="timed", device_us=found.median, device_us_std=found.std)


def _few(case: Case) -> Shape:
    """The shape of fewer rows, or tokens, where the case has more than are checked."""
    if isinstance(OPS[case.op].norm, OfHeads):
        *tokens, queries, keys, n = case.shape
        return max(1, min(math.prod(tokens), _CHECKED_OF_HEADS // ((queries + keys) * n))), queries, keys, n
    if isinstance(OPS[case.op].norm, OfConditioned):
        samples, *rest = case.shape
        return max(1, min(samples, _CHECKED_OF_HEADS // math.prod(rest))), *rest
    m, n = case.shape
    return max(1, min(m, _CHECKED_ROWS, _CHECKED_ELEMENTS // n)), n


class Check:
    """Whether the case's launch of the moment is right on a few rows: what is wrong, or nothing."""

    def __init__(self, case: Case, device: torch.device) -> None:
        few = replace(case, shape=_few(case))
        self._expected = expect(few, few.draw(device, torch.Generator(device).manual_seed(0)))
        self._call = direct(few, self._expected.inputs)

    def __call__(self) -> str | None:
        """What is wrong first, in words."""
        found = compared(self._call(), self._expected)
        return next((str(comparison) for comparison in found if not comparison.ok), None)
