"""``trinorm check``: every op against the float64 oracle, beside torch's own error."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import math
import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import functional
from ..cases import DTYPES, GPU, INTERPRETED, QUICK, Case, Inputs, Sizes, times
from ..cli import device, names, positive, refuse, wide_console
from ..compare import Comparison, compare
from ..norms import NORMS, VARIANTS, Norm, as_tuple
from ..ops import road
from ..reference.channel import Given

if TYPE_CHECKING:
    from rich.table import Table


# By name: each norm, and its variants.
OPS = NORMS | VARIANTS

# Of a handful of numbers, torch's largest error is chance: torch does a case again, on other draws, until each of its
# results has had this many elements.
SAMPLES = 32


@dataclass(frozen=True)
class Result:
    """One comparison. weight_dtype: None where the case has no weight."""

    op: str
    dtype: torch.dtype
    weight_dtype: torch.dtype | None
    case: str
    comparison: Comparison

    def __str__(self) -> str:
        return f"{self.op} {_name(self.dtype)}, weight {_name(self.weight_dtype)}, {self.case}: {self.comparison}"


# Some of a run's work, done when it is called.
Step = Callable[[], list[Result]]


def steps_of(ops: Iterable[str], dtypes: Iterable[torch.dtype], device: torch.device, sizes: Sizes) -> list[Step]:
    """Check ``ops`` over ``dtypes`` and ``sizes`` on ``device``; with float64 among the dtypes, gradients numerically too.

    The cases of one width are one step: they share kernels, which compile once. A variant, which changes what happens to an
    element, not where it is, meets QUICK's shapes only. Without Triton what is checked is torch's own operators, which
    extreme values are beyond.
    """
    steps: list[Step] = []
    for op, dtype in itertools.product(ops, dtypes):
        norm, by_width = OPS[op], defaultdict[tuple[int, ...], list[Case]](list)
        asked = sizes if op in NORMS else QUICK
        for case in asked.of(norm).cases(dtype):
            known = road.HAS_TRITON or not case.values.extreme
            known = known and not (norm.weighted and case.weight == "absent")
            known = known and (norm.smooth or case.values.numbers)
            known = known and norm.takes(case.shape) and norm.serves(case.shape, dtype)
            if known and (norm.follows_scale or not case.values.scaled):
                by_width[case.shape[1:]].append(case)
        steps += [functools.partial(check_op, op, dtype, device, cases) for cases in by_width.values()]
        if dtype == torch.float64 and norm.smooth:
            steps.append(functools.partial(check_numerically, op, device))
    return steps


def check_op(op: str, dtype: torch.dtype, device: torch.device, cases: Iterable[Case]) -> list[Result]:
    """Results, mean, rstd, every gradient and running statistics of each case, as far as the case and the op have them.

    mean and rstd are what a kernel saves for the backward; without Triton nothing is, and they are not checked.
    A case whose call raises is wrong, with the error for a reason.
    """
    norm, results = OPS[op], list[Result]()
    for case in cases:
        of_case = functools.partial(case.inputs, norm, dtype, device)
        inputs = of_case()
        fewest = min(t.numel() for t in norm.parts(inputs.of, "rstd", norm.rows(inputs.of.x)[:, 0]).values())
        few = norm.parameter_shape(case.shape)[-1], norm.bias_shape(case.shape)[-1], *[1] * bool(norm.numbers)
        draws = -(-SAMPLES // min(fewest, *few))
        exact = _oracle(norm, inputs)
        distance = _distance_of_torch(norm, inputs, exact)
        for seed in range(1, draws):
            other = of_case(seed)
            again = _distance_of_torch(norm, other, _oracle(norm, other))
            distance = {what: torch.maximum(so_far, again[what]) for what, so_far in distance.items()}
        weight_dtype = None if inputs.of.weight is None else inputs.of.weight.dtype
        try:
            ours = _ours(norm, inputs, exact["mean"])
        except Exception as error:  # a kernel that cannot be compiled or started here, say; the other cases are still asked
            raised = Comparison("raised", float("nan"), float("nan"), False, f"{type(error).__name__}: {error}")
            results.append(Result(op, dtype, weight_dtype, str(case), raised))
            continue
        results += [
            Result(op, dtype, weight_dtype, str(case), compare(name, *of_part))
            for what, value in ours.items()
            for terms in [_terms(norm, inputs, what)]
            for name, of_part in _apart(norm, inputs, what, value, exact[what], exact[what] + distance[what], terms)
        ]
    return results


def check_numerically(op: str, device: torch.device) -> list[Result]:
    """The backward against finite differences of the forward, in float64: torch.autograd.gradcheck, with its tolerances."""
    norm = OPS[op]
    case = Case(norm.smallest)
    of = case.inputs(norm, torch.float64, device).of
    leaves = [t.requires_grad_() for t in of.differentiable.values()]

    def call(*leaves: Tensor) -> Tensor:
        """The results as one: gradcheck asks each for its gradient alone, and those of a model come together."""
        results = norm.call(functional, of.with_these(*leaves), norm.running(of.x))
        return torch.stack(results[: len(norm.differentiated)])

    worst = ""
    try:
        torch.autograd.gradcheck(call, leaves, fast_mode=True)
    except Exception as error:  # the Jacobians differ, or, as above, the call raised
        worst = f"{type(error).__name__}: {error}"
    comparison = Comparison("gradcheck", float("nan"), float("nan"), not worst, worst)
    return [Result(op, torch.float64, torch.float64, str(case), comparison)]


def _apart(
    norm: Norm, inputs: Inputs, what: str, actual: Tensor, *others: Tensor | None
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """These as the norm reports them."""
    parts = [None if t is None else norm.parts(inputs.of, what, t) for t in (actual, *others)]
    return ((name, tuple(None if of is None else of[name] for of in parts)) for name in norm.parts(inputs.of, what, actual))


def _ours(norm: Norm, inputs: Inputs, exact_mean: Tensor) -> dict[str, Tensor]:
    """The op's results, each row's power of two taken out again (exactly)."""
    of, scale = inputs.of, inputs.scale
    leaves = {name: t.requires_grad_() for name, t in of.differentiable.items()}
    running = norm.running(of.x)
    results = dict(zip(norm.results, norm.call(functional, of, running), strict=True))
    differentiated = [results[name] for name in norm.differentiated]
    found = torch.autograd.grad(differentiated, list(leaves.values()), _settled(norm, inputs))
    gradients = dict(zip(leaves, found, strict=True))
    mean = rstd = None
    if road.HAS_TRITON:
        with torch.no_grad():
            mean, rstd = (None if t is None else t.flatten() for t in norm.forward(of, save=True)[1:])
    of_row = norm.rows(scale)[:, 0]
    if mean is not None:
        # Of a row with an infinity the mean may be NaN, as that of torch's own group_norm and layer_norm is.
        mean = torch.where(mean.isnan() & exact_mean.isinf(), exact_mean.to(mean.dtype), mean)
    scaled = dict(sum=1 / scale, dx=scale, **dict(dr=scale) if norm.of_sum else {})
    return _present(
        mean=None if mean is None else (mean / of_row).to(mean.dtype),
        rstd=None if rstd is None else (rstd * of_row).to(rstd.dtype),
        **{what: times(t, scaled[what]) if what in scaled else t.detach() for what, t in (results | gradients).items()},
        **_named(running),
    )


def _oracle(norm: Norm, inputs: Inputs) -> dict[str, Tensor]:
    of = inputs.unscaled().of
    running = norm.running(of.x)
    return _present(
        **norm.oracle(of)._asdict(),
        sum=norm.oracle_sum(of),
        **norm.oracle_gradients(of, *_settled(norm, inputs.unscaled()))._asdict(),
        **_named(None if running is None else norm.running_after(of.x, running) or running),
    )


def _by_torch(norm: Norm, inputs: Inputs) -> dict[str, Tensor]:
    inputs = inputs.unscaled()
    of, gradients = inputs.of, _settled(norm, inputs)
    normalized = norm.normalized(of)
    # Statistics are saved in the accumulator's dtype; torch on CPU would round them to x's.
    wide = normalized if normalized.dtype == torch.float64 else normalized.float()
    mean, rstd = norm.torch_statistics(wide, of.eps)
    running = norm.running(of.x)
    results = dict(zip(norm.results, as_tuple(norm.composite(of, running)), strict=True))
    whole = norm.torch_gradients(of, *gradients)
    # A NaN or Inf in one row can be in all of torch's sums, also where the oracle's is finite: the other rows' sums then.
    rows = norm.rows(normalized)
    unsound = norm.of_rows(~norm.counted(rows).isfinite().all(-1, keepdim=True).expand_as(rows), of.x.shape)
    sound = [t.masked_fill(unsound[:, :1] if norm.outputs else unsound, 0) for t in gradients]
    others = of.zero_where(unsound, shared=bool(norm.numbers or norm.outputs))
    of_rows = dict(dx=whole.dx) if norm.outputs else dict(dx=whole.dx, dr=whole.dr)
    sums = norm.torch_gradients(others, *sound)._replace(**of_rows)
    return _present(**results, mean=mean, rstd=rstd, **sums._asdict(), **_named(running))


def _settled(norm: Norm, inputs: Inputs) -> tuple[Tensor, ...]:
    """The results' gradients, as settled as Norm has them."""
    dy, *dsum = inputs.gradients
    return norm.settled(inputs.unscaled().of, dy), *dsum


def _terms(norm: Norm, inputs: Inputs, what: str) -> Tensor | None:
    """What ``compare`` is told of their size."""
    if what == "mean":
        return _row_size(norm, inputs)
    plain = inputs.unscaled()
    return norm.terms(plain.of, what, _settled(norm, plain)[0])


def _row_size(norm: Norm, inputs: Inputs) -> Tensor:
    """The root mean square of each row: the size of the terms of its mean."""
    rows = norm.rows(norm.normalized(inputs.unscaled().of))
    return rows.double().square().mean(-1).sqrt().nan_to_num(0.0, posinf=0.0)


def _distance_of_torch(norm: Norm, inputs: Inputs, exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far torch's results lie from the oracle's, element by element; 0 where either is not finite."""
    return {
        what: (value.detach().double() - exact[what]).abs().nan_to_num(0.0, posinf=0.0)
        for what, value in _by_torch(norm, inputs).items()
    }


def _named(running: Given | None) -> dict[str, Tensor]:
    return {} if running is None else dict(run_mean=running.mean, run_var=running.var)


def _present(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {what: tensor for what, tensor in tensors.items() if tensor is not None}


def _name(dtype: torch.dtype | None) -> str:
    return "absent" if dtype is None else next(name for name, known in DTYPES.items() if known == dtype)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``check`` to the ``trinorm`` command's subparsers."""
    parser = subparsers.add_parser(
        "check",
        help="compare every op with float64, beside torch's own error",
        description=(
            "Values, saved statistics and gradients of every op against the definition in float64, over dtypes, sizes and "
            "nasty values. A result is right when it is within twice torch's own error plus one unit in the last place. "
            "The exit status is 1 when any is not. With no GPU the kernels run in Triton's interpreter."
        ),
    )
    parser.add_argument("--op", type=names(OPS), default=list(OPS), help=f"comma-separated: {', '.join(OPS)}")
    parser.add_argument("--dtype", type=names(DTYPES), default=list(DTYPES), help=f"comma-separated: {', '.join(DTYPES)}")
    parser.add_argument("--device", type=device, help="cpu, cuda, cuda:1, ...; the first GPU when there is one")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller sizes")
    most = min(_cores(), _MOST_WORKERS)
    parser.add_argument(
        "--workers", type=positive, default=most, help="how many processes share the work; %(default)s here"
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; its exit status: 0, 1 where a result is wrong, 2 where it cannot run here."""
    if importlib.util.find_spec("rich") is None:
        return refuse("check", "rich is not installed; pip install 'trinorm[bench]'")
    on_gpu = torch.cuda.is_available() and not road.INTERPRETED
    place: torch.device = args.device or torch.device("cuda" if on_gpu else "cpu")
    where = f"on {torch.cuda.get_device_name(place)}" if place.type == "cuda" else "on the CPU"
    if not road.HAS_TRITON:
        how = "Triton is not installed: torch's own operators run"
    elif place.type == "cpu":
        if importlib.util.find_spec("numpy") is None:
            return refuse("check", "the kernels run in Triton's interpreter here, which needs numpy; pip install numpy")
        how = "The Triton kernels run in Triton's interpreter"
    else:
        how = "The Triton kernels run"

    from rich.progress import Progress, TimeElapsedColumn

    console = wide_console()
    console.print(f"{how}, {where}.")
    sizes = QUICK if args.quick else GPU if place.type == "cuda" else INTERPRETED
    plan = args.op, [DTYPES[name] for name in args.dtype], place, sizes
    start = time.monotonic()
    try:
        with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
            steps = progress.track(_done(plan, args.workers), total=len(steps_of(*plan)), description="check")
            results = [result for step in steps for result in step]
    except BrokenProcessPool:
        return refuse("check", "a worker died, of memory perhaps; --workers 1 shows where")
    console.print(_table(results))
    wrong = [result for result in results if not result.comparison.ok]
    for result in wrong:
        console.print(str(result), style="red", markup=False, soft_wrap=True)
    verdict = f"{len(wrong)} WRONG" if wrong else "all within twice torch's own error plus one unit in the last place"
    console.print(f"{len(results)} comparisons in {time.monotonic() - start:.0f} s: {verdict}.")
    return int(bool(wrong))


# Compiling takes most of the time (H200: 206 s of one process), and the GPU is one.
_MOST_WORKERS = 8

Plan = tuple[list[str], list[torch.dtype], torch.device, Sizes]

# A worker's steps, the same list in each: they hold functions that draw values, which do not travel.
_steps: list[Step] = []


def _done(plan: Plan, workers: int) -> Iterator[list[Result]]:
    """What each of the plan's steps finds, in their order: by so many processes; 1 is this one."""
    if workers == 1:
        _start_worker(*plan, torch.get_num_threads())
        yield from (step() for step in _steps)
        return
    started = (*plan, max(1, _cores() // workers))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, started) as pool:
        yield from pool.map(_step, range(len(steps_of(*plan))))


def _start_worker(ops: list[str], dtypes: list[torch.dtype], device: torch.device, sizes: Sizes, threads: int) -> None:
    torch.set_num_threads(threads)
    if device.type == "cpu" and road.HAS_TRITON:
        from .. import interpreter

        interpreter.install()
    _steps[:] = steps_of(ops, dtypes, device, sizes)


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _step(number: int) -> list[Result]:
    return _steps[number]()


def _table(results: Iterable[Result]) -> Table:
    """A row for each op, dtype, weight's dtype and quantity: its cases together, with the largest errors among them."""
    from rich import box
    from rich.table import Table

    groups: defaultdict[tuple[str, str, str, str], list[Comparison]] = defaultdict(list)
    for r in results:
        groups[r.op, _name(r.dtype), _name(r.weight_dtype), r.comparison.what].append(r.comparison)
    # Narrow enough for 80 columns, in which the longest names are folded.
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("op", overflow="fold")
    for heading in ("dtype", "weight", "what"):
        table.add_column(heading)
    for heading in ("cases", "error", "torch's", "ratio"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    previous: tuple[str, ...] = ()
    for key, comparisons in groups.items():
        if key[:2] != previous:
            table.add_section()
        previous = key[:2]
        ours, torchs = max(c.error for c in comparisons), max(c.torch_error for c in comparisons)
        measured = (f"{ours:.1e}", f"{torchs:.1e}", f"{ours / torchs:.2f}" if torchs else "")
        ok = all(c.ok for c in comparisons)
        table.add_row(
            *key,
            str(len(comparisons)),
            *(("", "", "") if math.isnan(ours) else measured),
            "ok" if ok else "WRONG",
            style="" if ok else "red",
        )
    return table
