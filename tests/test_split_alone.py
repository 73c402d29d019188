"""The teams' backward in the interpreter, by teams of one, whose word is there before it is asked for."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from paths import SPECS
from trinorm import reference
from trinorm.compare import assert_no_worse
from trinorm.kernels import row_split
from trinorm.ops.hosts import rows
from trinorm.spec import RowNorm

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs teams as they are: tests/test_rows.py")

N, CHUNK = 256, 128
LEFT = 4  # rows past the last, which nothing may touch


@triton.jit
def _there(WORDS, asked, TEAM: tl.constexpr, LANES: tl.constexpr):
    lanes = tl.arange(0, LANES)
    words = tl.reshape(tl.load(WORDS + lanes + tl.zeros([LANES], tl.int64), mask=(lanes < TEAM) & asked, other=0), [LANES])
    low = (words & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    return low, (words >> 32).to(tl.int32).to(tl.float32, bitcast=True)


def _untouched(*size: int) -> Tensor:
    return torch.full(size, torch.nan)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("m", "teams"), [(1, 1), (1, 4), (5, 5), (5, 2), (6, 3), (7, 3), (3, 9)])
@pytest.mark.parametrize("from_output", [False, True])
@pytest.mark.parametrize("wanted", ["dx dw", "dx", "dw"])
@pytest.mark.parametrize("strided", [False, True])
def test_the_last_step(
    spec: RowNorm, m: int, teams: int, from_output: bool, wanted: str, strided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one step more than rows: what it has no row for it neither reads into a sum nor writes."""
    monkeypatch.setattr(row_split, "awaited", _there)
    x, dy = torch.randn(m, N), torch.randn(m, N)
    weight = torch.rand(N) + 0.5
    bias = torch.rand(N) * 0.4 if spec.center else None
    y, mean, rstd = rows.forward(spec, x, 1, weight, bias, 1e-5, save=True)
    given, strides = dy, (N,)
    if strided:
        wide = _untouched(m, N + 16)
        wide[:, :N] = dy
        given, strides = wide[:, :N], (N + 16,)
    dx = _untouched(m + LEFT, N) if "dx" in wanted else None
    dw = _untouched(teams, N) if "dw" in wanted else None
    db = _untouched(teams, N) if "dw" in wanted and spec.center else None
    words = torch.full((m + LEFT, 1), -1) if "dx" in wanted else None
    kept = (y, weight, bias, None) if from_output else (x, weight, None, mean)
    row_split.row_backward_split[(teams,)](
        *(dx, None, dw, db, words, given, None, None, None, *kept, rstd, m, (), (N,), (), strides),
        N=N,
        CENTER=spec.center,
        OFFSET=0.0,
        ROUND=False,
        FROM_OUTPUT=from_output,
        ALPHA=1.0,
        DROP=0.0,
        ACC=tl.float32,
        BLOCK=N,
        CHUNK=CHUNK,
        LANES=32,
        STAGES=3,
        PDL=False,
    )
    problem = spec, x, (N,), weight, bias, 1e-5
    exact, by_torch = reference.oracle_gradients(*problem, dy), reference.torch_gradients(*problem, dy)
    wanted_of = exact
    if from_output:
        b = None if bias is None else bias.double()
        bias_dtype = None if bias is None else torch.float64
        wanted_of = reference.gradients_of_output(spec, y.double(), 1, weight.double(), b, bias_dtype, rstd, dy)
    found = (None if dx is None else dx[:m], None if dw is None else dw.sum(0), None if db is None else db.sum(0))
    for what, got, want, of_x, torchs in zip(("dx", "dw", "db"), found, wanted_of, exact, by_torch, strict=True):
        if got is not None:
            assert_no_worse(what, got, want, want + (torchs.double() - of_x))
    if dx is not None:
        assert dx[m:].isnan().all()
        assert (words[m:] == -1).all()
