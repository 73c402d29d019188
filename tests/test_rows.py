"""Every kernel path of the row family, forced, over the sizes at its edges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest
import torch

from paths import PATHS, SPECS, SPLIT, WIDE
from trinorm import reference
from trinorm.compare import assert_no_worse
from trinorm.ops.hosts import rows
from trinorm.spec import LAYER_NORM, RMS_NORM, RowNorm
from trinorm.tuning import (
    RowBackward,
    RowBackwardFew,
    RowBackwardWide,
)

ON_GPU = torch.cuda.is_available()
EDGES = [1, 2, 3, 5, 17, 127, 128, 129, 768, 1000, 1024, 4095, 4096, 4097]
EDGES += [5120, 8192, 12288, 65536, 100003]
HELD = [n for n in EDGES if n <= 12288]
TUNED = [n for n in EDGES if ON_GPU or n not in (4095, 4096)]

# Draws of a small problem, and in how many of them the kernels run and not only torch: the interpreter takes long.
DRAWS = 12
OURS = DRAWS if ON_GPU else 2


def _check(spec: RowNorm, m: int, n: int, device: str, dtype: torch.dtype = torch.float32) -> None:
    """Forward and backward against the oracle, with weight and bias.

    Small problems are drawn several times and compared together: of a handful of sums torch's own error is chance.
    """
    results: defaultdict[str, list[tuple[torch.Tensor, ...]]] = defaultdict(list)
    for draw in range(min(DRAWS, 1 + (1 << 13 if ON_GPU else 256) // (m * n))):
        for what, *tensors in _results(spec, m, n, device, dtype, ours=draw < OURS):
            results[what].append(tuple(t.flatten() for t in tensors))
    for what, draws in results.items():
        actual, exact, by_torch = (torch.cat(tensors) for tensors in zip(*draws, strict=True))
        assert_no_worse(what, actual, exact, by_torch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_one_element(dtype: torch.dtype, device: torch.device) -> None:
    """With an eps of the size of x² dx, which is ``rstd·g·(1 - x̂²)``, is hardly a difference of equals."""
    x, dy, weight = (torch.randn(m, 1, device=device).to(dtype) for m in (200, 200, 1))
    _, _, rstd = rows.forward(RMS_NORM, x, 1, weight[0], None, 1.0, save=True)
    assert rstd is not None
    dx, _, _ = rows.backward(RMS_NORM, dy, x, 1, weight[0], None, rstd, dx=True, dw=None, db=None)
    exact = dy.double() * weight.double() * (1 + x.double() ** 2) ** -1.5
    lost = torch.finfo(torch.float32).eps * (1 + x.double() ** 2)  # where 1 - x̂² is small
    assert ((dx.double() - exact).abs() <= (4 * lost + torch.finfo(dtype).eps) * exact.abs()).all()


def _results(
    spec: RowNorm, m: int, n: int, device: str, dtype: torch.dtype, ours: bool
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(name, ours or the exact one rounded, the oracle's, torch's) for y and every gradient of one draw."""
    x, dy = (torch.randn(m, n, device=device).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(n, device=device).to(dtype) for _ in range(2))
    inputs = [x, weight, bias] if spec.center else [x, weight]
    arguments = (x, (n,), weight, bias if spec.center else None, 1e-5)

    for t in inputs:
        t.requires_grad_()
    by_torch = reference.composite(spec, *arguments)
    gradients_by_torch = torch.autograd.grad(by_torch, inputs, dy)
    for t in inputs:
        t.requires_grad_(False)

    exact = reference.oracle(spec, *arguments).y, *reference.oracle_gradients(spec, *arguments, dy)
    found = tuple(None if t is None else t.to(dtype) for t in exact)
    if ours:
        y, mean, rstd = rows.forward(spec, x, 1, *arguments[2:], save=True)
        assert rstd is not None
        db = dtype if spec.center else None
        found = y, *rows.backward(spec, dy, x, 1, weight, mean, rstd, dx=True, dw=dtype, db=db)
    theirs = by_torch.detach(), *gradients_by_torch
    for what, got, want, torchs in zip(("y", "dx", "dw", "db"), found, exact, theirs, strict=False):
        assert got is not None
        assert want is not None
        yield what, got, want, torchs


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", HELD)
@pytest.mark.parametrize("path", PATHS)
def test_held(spec: RowNorm, n: int, path: str, device: str, force: Callable[[object, object], None]) -> None:
    force(*PATHS[path])
    _check(spec, 7, n, device)


def _raised(x: torch.Tensor, value: float, every: int) -> torch.Tensor:
    """x, and of so many columns and so many again the former with this added."""
    return x + value * (torch.arange(x.shape[1], device=x.device) // every % 2 == 0)


# Rows of 16-bit numbers by what their merged moments depend on: what the parts that are merged have between them.
ROWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal": lambda x: x,
    "far from 0": lambda x: x / 64 + 100,
    "equal": lambda x: torch.full_like(x, 3.14159),
    "equal and large": lambda x: torch.full_like(x, 1e36),
    "neighbours apart": lambda x: _raised(x, 100.0, 1),
    "groups apart": lambda x: _raised(x, 100.0, 8),
    "warps apart": lambda x: _raised(x, 100.0, 256),
    "halves apart": lambda x: _raised(x, -100.0, -(-x.shape[1] // 2)),
    "one far": lambda x: torch.cat([x[:, :-1], x[:, -1:] + 1000], 1),
    "a wave": lambda x: torch.cos(torch.arange(x.shape[1], device=x.device) * (32 * torch.pi / x.shape[1])) + 0.01 * x,
    "large": lambda x: x * 1e4,
    "too large to merge": lambda x: x * 1e17,
    "small": lambda x: x * 1e-7,
    "infinite": lambda x: torch.cat([x[:1] / 0, x[1:]]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 17, 1100, 4096])
@pytest.mark.parametrize("case", ROWS)
def test_merged_moments(
    case: str, n: int, dtype: torch.dtype, device: str, force: Callable[[object, object], None]
) -> None:
    force(*PATHS["few"])
    x = ROWS[case](torch.randn(5, n, device=device)).to(dtype)
    y, mean, rstd = rows.forward(LAYER_NORM, x, 1, None, None, 1e-5, save=True)
    assert mean is not None and rstd is not None
    exact = reference.oracle(LAYER_NORM, x, (n,), None, None, 1e-5)
    by_torch, torchs_mean, torchs_rstd = torch.native_layer_norm(x.float(), (n,), None, None, 1e-5)
    if case == "equal and large" and dtype == torch.bfloat16:  # of which torch's own are not finite
        assert not y.any()
        by_torch, torchs_mean, torchs_rstd = exact.y, exact.mean, exact.rstd
    assert_no_worse("y", y, exact.y, by_torch.to(dtype))
    assert_no_worse("mean", mean, exact.mean, torchs_mean.flatten(), x.double().abs().mean(1))
    assert_no_worse("rstd", rstd, exact.rstd, torchs_rstd.flatten())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", EDGES)
def test_wide(spec: RowNorm, n: int, device: str, force: Callable[[object, object], None]) -> None:
    force(*WIDE)
    _check(spec, 3, n, device)


@pytest.mark.skipif(not ON_GPU, reason="programs wait for each other, which the interpreter runs one after the other")
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", [2048, 3072, 5120, 12288, 32768, 65536, 98304])
@pytest.mark.parametrize("m", [1, 7, 90])
def test_split(spec: RowNorm, m: int, n: int, device: str, force: Callable[[object, object], None]) -> None:
    force(*SPLIT)
    _check(spec, m, n, device)


@pytest.mark.skipif(not ON_GPU, reason="programs wait for each other, which the interpreter runs one after the other")
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_split_rows_beyond_the_range_of_squares(
    spec: RowNorm, scale: float, device: str, force: Callable[[object, object], None]
) -> None:
    """Rows to rescue among others: the others' bits are those that they have alone."""
    force(*SPLIT)
    x = torch.randn(9, 65536, device=device)
    alone = rows.forward(spec, x, 1, None, None, 0.0, save=True)
    mixed = x.clone()
    mixed[::2] *= scale
    y, _, rstd = rows.forward(spec, mixed, 1, None, None, 0.0, save=True)
    exact = reference.oracle(spec, mixed, (65536,), None, None, 0.0)
    by_torch = reference.oracle(spec, x, (65536,), None, None, 0.0).y.float()  # what fp32 can show of the unscaled rows
    assert_no_worse("y", y, exact.y, torch.where(torch.arange(9, device=device)[:, None] % 2 == 0, by_torch, alone.y))
    assert torch.equal(y[1::2], alone.y[1::2])
    assert rstd is not None
    assert torch.isfinite(rstd).all()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", TUNED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_as_tuned(spec: RowNorm, n: int, dtype: torch.dtype, device: str) -> None:
    """The launches that users get; on a GPU with enough rows for the persistent programs to loop."""
    m = max(5, min(600, (1 << 22) // n)) if ON_GPU else 3
    _check(spec, m, n, device, dtype)


@pytest.mark.skipif(not ON_GPU, reason="the largest rows and tensors need a GPU")
@pytest.mark.parametrize("spec", SPECS)
def test_a_million_columns(spec: RowNorm, device: str) -> None:
    _check(spec, 3, 1 << 20, device)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 31, 33])
def test_row_counts_that_are_no_multiple_of_the_tile(spec: RowNorm, m: int, device: str) -> None:
    _check(spec, m, 64, device)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "plan", [*(backward for _, backward in PATHS.values()), WIDE[1]], ids=lambda plan: type(plan).__name__
)
@pytest.mark.parametrize("want", ["dx", "dw", "db", "dw db", "dx dw", "dx db"])
def test_only_what_is_asked_for(
    spec: RowNorm,
    plan: RowBackward | RowBackwardFew | RowBackwardWide,
    want: str,
    device: str,
    force: Callable[[object, object], None],
) -> None:
    """Any subset of the gradients, each equal to the bit to its value when all are asked for."""
    force(WIDE[0], plan)
    x, dy = torch.randn(5, 96, device=device), torch.randn(5, 96, device=device)
    weight = torch.randn(96, device=device)
    _, mean, rstd = rows.forward(spec, x, 1, weight, None, 1e-5, save=True)
    assert rstd is not None

    def ask(names: str) -> dict[str, torch.Tensor | None]:
        dtypes = {name: torch.float32 if name in names else None for name in ("dw", "db")}
        found = rows.backward(spec, dy, x, 1, weight, mean, rstd, dx="dx" in names, **dtypes)
        return dict(zip(("dx", "dw", "db"), found, strict=True))

    everything, some = ask("dx dw db"), ask(want)
    for name in ("dx", "dw", "db"):
        if name in want.split():
            assert torch.equal(some[name], everything[name]), name  # type: ignore[arg-type]
        else:
            assert some[name] is None


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_bits_on_every_run(spec: RowNorm, device: str) -> None:
    x = torch.randn(12 if not ON_GPU else 5000, 300, device=device)
    dy, weight = torch.randn_like(x), torch.randn(300, device=device)

    def run() -> list[torch.Tensor]:
        y, mean, rstd = rows.forward(spec, x, 1, weight, None, 1e-5, save=True)
        assert rstd is not None
        found = rows.backward(spec, dy, x, 1, weight, mean, rstd, dx=True, dw=x.dtype, db=x.dtype)
        return [y, *(t for t in found if t is not None)]

    first = run()
    for _ in range(3 if ON_GPU else 1):
        for a, b in zip(first, run(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(not ON_GPU, reason="a tensor over 2^31 elements needs a GPU")
@pytest.mark.parametrize("spec", SPECS)
def test_over_two_billion_elements(spec: RowNorm, device: str) -> None:
    """The rows past 2^31 elements are computed as the same rows alone are."""
    m, n = (1 << 31) // 4096 + 9, 4096
    x = torch.randn(m, n, device=device, dtype=torch.bfloat16)
    weight = torch.randn(n, device=device, dtype=torch.bfloat16)
    y, mean, rstd = rows.forward(spec, x, 1, weight, None, 1e-5, save=True)
    tail = x[-16:].clone()
    alone = rows.forward(spec, tail, 1, weight, None, 1e-5, save=True, batch_invariant=True)  # by the launch of many rows
    assert torch.equal(y[-16:], alone.y)
    assert rstd is not None and alone.rstd is not None
    assert torch.equal(rstd[-16:], alone.rstd)
    # Only the last rows have a gradient, so that dw is theirs, summed by programs that walked all rows.
    dy = torch.zeros_like(x)
    dy[-16:] = tail
    dx, dw, _ = rows.backward(spec, dy, x, 1, weight, mean, rstd, dx=True, dw=weight.dtype, db=None)
    leaves = [tail.requires_grad_(), weight.requires_grad_()]
    by_torch = reference.composite(spec, leaves[0], (n,), leaves[1], None, 1e-5)
    dx_by_torch, dw_by_torch = torch.autograd.grad(by_torch, leaves, tail.detach())
    tail, weight = (t.detach() for t in leaves)
    assert_no_worse("y", y[-16:], reference.oracle(spec, tail, (n,), weight, None, 1e-5).y, by_torch.detach())
    exact = reference.oracle_gradients(spec, tail, (n,), weight, None, 1e-5, tail)
    assert dx is not None
    assert dw is not None
    assert exact.dx is not None
    assert exact.dw is not None
    assert_no_worse("dx", dx[-16:], exact.dx, dx_by_torch)
    assert_no_worse("dw", dw, exact.dw, dw_by_torch)
