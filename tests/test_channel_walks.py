"""channel.py, channel_combine.py, channel_tiles.py: pivots that are unlike the rest, long sums, and sizes past 32 bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from paths import forget_channel_choices
from test_channels import check, draw, groups_of
from trinorm import functional
from trinorm.compare import assert_no_worse
from trinorm.kernels.channel_tiles import lanes_there, walk_of_program, walked_count
from trinorm.launch import describe
from trinorm.ops.hosts import channels
from trinorm.reference import channel as reference
from trinorm.spec import BATCH_NORM, GROUP_NORM, INSTANCE_NORM, ChannelNorm
from trinorm.tuning import channel as tuning
from trinorm.tuning import choose_apply, choose_sums


@pytest.fixture(autouse=True)
def _walks(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[None]:
    """Small tiles, of which each program has some."""
    monkeypatch.setattr(tuning, "_LEAST_SHARE", 0)
    monkeypatch.setattr(tuning, "_SPLIT", (*tuning._SPLIT[:3], 1 << 60))
    for table in (tuning._SUMS, tuning._APPLY):
        for key, (_, warps, stages, _) in table.items():
            monkeypatch.setitem(table, key, (512, warps, max(2, stages), 0.1 / describe(device).multiprocessors))
    forget_channel_choices()
    yield
    forget_channel_choices()


def of_channels(values: Tensor, spec: ChannelNorm) -> Tensor:
    """A view with all elements of each statistic in a row, in the order of memory with channels first."""
    return values.transpose(0, 1).flatten(1) if spec is BATCH_NORM else values.view(values.shape[0] * 2, -1)


def statistics(spec: ChannelNorm, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """torch's own, in fp32 of 16-bit numbers."""
    x = x.float() if x.itemsize == 2 else x
    if spec is BATCH_NORM:
        return torch.native_batch_norm(x, None, None, None, None, True, 0.0, eps)[1:]  # type: ignore[return-value]
    n, c, *positions = x.shape
    _, mean, rstd = torch.native_group_norm(x.contiguous(), None, None, n, c, positions[0] * positions[1], 2, eps)
    return mean.flatten(), rstd.flatten()


def check_statistics(spec: ChannelNorm, x: Tensor, eps: float = 1e-5) -> None:
    groups = x.shape[1] if spec is BATCH_NORM else 2
    _, mean, rstd = channels.forward(channels.Problem(spec, groups, eps), x, None, None)
    exact, (torchs_mean, torchs_rstd) = reference.oracle(spec, x, groups, None, None, eps), statistics(spec, x, eps)
    assert mean is not None and rstd is not None
    size = of_channels(x.double().contiguous(), spec).square().mean(1).sqrt()
    assert_no_worse("mean", mean.flatten(), exact.mean.flatten(), torchs_mean, size)
    # Of a handful of statistics torch's own error is chance: two roundings.
    spread = torchs_rstd.double() + 2 * exact.rstd.flatten() * torch.finfo(rstd.dtype).eps
    assert_no_worse("rstd", rstd.flatten(), exact.rstd.flatten(), spread)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("spec", [GROUP_NORM, BATCH_NORM], ids=lambda spec: spec.name)
@pytest.mark.parametrize("first", [0.0, 2000.0, torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_firsts_unlike_the_rest(
    dtype: torch.dtype, first: float, spec: ChannelNorm, last: bool, device: torch.device
) -> None:
    """What distances are taken from is of a channel's first elements; others at 1000 and a bit lose nothing by it."""
    x = 1000 + (torch.rand((2, 4, 64, 64), device=device) < 0.5).double()
    x[:, :, 0, :4] = first
    x = x.to(dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    if first == torch.inf:  # which is of no use as a pivot; a statistic that has none of it is as good as ever
        x[1], x[0, 2:] = 3.0, x[0, 2:].nan_to_num(posinf=1000.0)
        groups = 4 if spec is BATCH_NORM else 2
        _, mean, rstd = channels.forward(channels.Problem(spec, groups, 1e-5), x, None, None)
        exact = reference.oracle(spec, x, groups, None, None, 1e-5)
        assert rstd is not None and mean is not None
        usual = exact.rstd.isfinite()
        torch.testing.assert_close(rstd.flatten()[usual].double(), exact.rstd[usual], rtol=1e-6, atol=0)
        return
    check_statistics(spec, x)


@pytest.mark.parametrize("of", ["weight", "bias"])
def test_what_a_long_sum_of_fp32_loses_is_kept(of: str, device: torch.device) -> None:
    """dw and db of terms of one sign, of which the first are so large that a plain sum has nothing of those that follow."""
    x = torch.ones((2, 4, 64, 64), device=device).contiguous(memory_format=torch.channels_last)
    x[..., ::2] = -1.0
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)  # so that no term is rounded
    terms = torch.ones_like(x)
    terms[0, :, :4] = 2.0**24
    weight, bias = (torch.zeros(4, device=device, requires_grad=True) for _ in range(2))
    y = functional.batch_norm(x, mean, var, weight, bias, eps=0.0)
    (found,) = torch.autograd.grad(y, weight if of == "weight" else bias, terms * x if of == "weight" else terms)
    assert torch.equal(found, terms.double().sum((0, 2, 3)).float())


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("value", [0.0, 1e-30, 0.5, 1e9, 1e30], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-31, 1e-5])
def test_constants_beside_an_eps_that_fp32_hardly_has(value: float, eps: float, last: bool, device: torch.device) -> None:
    """Distances of 0 are not lifted into infinities: not where all is constant, nor in one channel of a group."""
    x = torch.randn((2, 4, 16, 17), device=device) * max(value, 1.0)
    x[:, 1] = value
    x = x.bfloat16().to(memory_format=torch.channels_last) if last else x.bfloat16()
    for spec, groups in ((GROUP_NORM, 2), (BATCH_NORM, 4)):
        y, mean, rstd = channels.forward(channels.Problem(spec, groups, eps), x, None, None)
        exact = reference.oracle(spec, x, groups, None, None, eps)
        assert mean is not None and rstd is not None
        torch.testing.assert_close(mean.flatten().double(), exact.mean.flatten(), rtol=1e-6, atol=1e-6 * max(value, 1.0))
        usual = exact.rstd.flatten() < 1e30  # fp32 has no larger ones to spare
        torch.testing.assert_close(rstd.flatten().double()[usual], exact.rstd.flatten()[usual], rtol=1e-6, atol=0)
        if bool(usual.all()):
            assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spec", [GROUP_NORM, INSTANCE_NORM, BATCH_NORM], ids=lambda spec: spec.name)
def test_more_partials_than_a_program_holds(
    spec: ChannelNorm, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are combined in turns: of statistics, those of 5 channels where there is room for 8 too, and of dw and db."""
    monkeypatch.setattr(tuning, "_COMBINED", 64)
    for key, (_, warps, stages, _) in tuning._SUMS.items():
        monkeypatch.setitem(tuning._SUMS, key, (256, warps, stages, 96 / describe(device).multiprocessors))
    forget_channel_choices()
    plans = []
    monkeypatch.setattr(channels, "choose_combine", lambda *of: plans.append(tuning.choose_combine(*of)) or plans[-1])
    drawn, dy = draw((2, 10, 23, 29), dtype, dtype, True, device)
    check(spec, groups_of(spec, (2, 10), 2), drawn, dy)
    assert [plan.once for plan in plans] == [False, False, False]


@triton.jit(do_not_specialize=["program", "A", "width", "S", "shares"])
def last_tile(LANES, FOUND, program, A, width, S, shares, LAST: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr):
    """Which lanes the last turn of a program has; its turns, its elements of a row, and where the tile begins."""
    program = program.to(tl.int32)
    _, _, _, _, walk = walk_of_program(program, A, width, S, shares, LAST, 1, False, 1, ROWS, POSITIONS)
    first, step, steps, left, pace = walk
    here = lanes_there(steps - 1, left, pace, False, POSITIONS)
    tl.store(LANES + tl.arange(0, POSITIONS)[None, :], here.to(tl.int32))
    tl.store(FOUND, steps.to(tl.int64))
    tl.store(FOUND + 1, tl.sum(walked_count(steps, left, pace, 1, POSITIONS)).to(tl.int64))
    tl.store(FOUND + 2, tl.min(tl.min(first + (steps - 1) * step, axis=1), axis=0))


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("choose", ["sums", "apply"])
@pytest.mark.parametrize("s", [77, 2**31 - 5, 2**31 - 1025, 2**31 + 5, 2**31 + 2**27 + 5, 3 * 2**30 + 77, 2**33 + 3])
def test_sizes_beyond_32_bits(
    s: int, choose: str, last: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No turn is skipped, no lane is past the end, and all are counted."""
    monkeypatch.undo()  # the launches of the tables
    forget_channel_choices()
    width = 3 if last else 1
    plan = (
        choose_sums(1, width, s, 2, 1, last, False, describe(device))
        if choose == "sums"
        else choose_apply(1, width, s, 2, 2, last, describe(device))
    )
    tile = plan.tile.chunk
    tiles = -(-s // tile)
    share = (tiles - 1) % plan.shares  # has the last tile
    lanes = torch.zeros(tile, dtype=torch.int32, device=device)
    found = torch.zeros(3, dtype=torch.int64, device=device)
    last_tile[(1,)](lanes, found, share, 1, width, s, plan.shares, last, plan.tile.rows, tile)
    there, turns = s - (tiles - 1) * tile, -(-(tiles - share) // plan.shares)
    assert lanes.tolist() == [1] * there + [0] * (tile - there)
    assert found.tolist() == [turns, (turns - 1) * tile + there, (tiles - 1) * tile * (width if last else 1)]


def test_a_batch_norm_has_no_parameters_of_samples(device: torch.device) -> None:
    x, of_samples = torch.randn((4, 12, 5, 3), device=device), torch.ones((4, 12), device=device)
    with pytest.raises(RuntimeError, match="does not fit"):
        torch.ops.trinorm.batch_norm(x, of_samples, of_samples, None, 1e-5, None)
