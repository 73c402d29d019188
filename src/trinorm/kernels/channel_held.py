"""Channel norms by programs that hold their statistics' elements in registers: x is read once. For channels first, as
channel_whole.py, where a statistic is RUNS runs of S elements; a run is a row of the program's only tile
``[ROWS, POSITIONS]``.

With APART the rows are statistics of their own (RUNS is 1), a tile of them to a program. Few elements are summed, so all is
in the accumulator's dtype.
"""

import triton
import triton.language as tl

from .activation import activated, before_activation
from .affine import NO_BIAS, NO_WEIGHT, affine_backward
from .channel_backward import gradient_again, gradient_of
from .channel_combine import update_running
from .channel_tiles import centered_moments, in_units
from .index import first_program, load, load_once, load_or, store_once, widened
from .overlap import let_next_launch, wait_for_previous
from .row_backward import dx_of
from .stats import power_of_two_below, row_sums, trusted


@triton.jit
def held_tile(
    C,
    SETS,
    RUNS,
    S,
    OVER_SAMPLES: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    APART: tl.constexpr,
    RAGGED: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """(the tile's statistics, which exist; its runs, which exist, where their parameters are; element offsets, their mask).
    Statistics are ``[ROWS, 1]`` APART, else ``[1, 1]``; so are the parameters of runs that share theirs (OVER_SAMPLES).
    """
    rows = tl.arange(0, ROWS)[:, None]
    positions = tl.arange(0, POSITIONS)[None, :]
    program = first_program()
    if APART:
        runs = program * ROWS + rows
        live = runs < SETS
        sets, exist = runs, live
        # (program·ROWS + rows) % C, in 32 bits.
        parameters = ((program % C).to(tl.int32) * ROWS + rows) % C
    else:
        sets, exist = program + tl.zeros([1, 1], tl.int64), tl.full([1, 1], True, tl.int1)
        live = rows < RUNS
        if OVER_SAMPLES:
            runs = program + rows.to(tl.int64) * C
            parameters = program.to(tl.int32) + tl.zeros([1, 1], tl.int32)
        else:
            runs = program * RUNS + rows
            parameters = (program % (C // RUNS)).to(tl.int32) * RUNS + rows
    if PER_SAMPLE:
        parameters = runs
    offsets = runs * S + positions
    if RAGGED:
        return sets, exist, runs, live, parameters, offsets, live & (positions < S)
    else:
        everywhere = tl.full(offsets.shape, True, tl.int1)
        return sets, exist, runs, tl.full(rows.shape, True, tl.int1), parameters, offsets, everywhere


@triton.jit
def over_rows(of_row, APART: tl.constexpr):
    """A statistic's sum of its rows', as statistics are."""
    if APART:
        return of_row
    else:
        return tl.sum(of_row, axis=0, keep_dims=True)


@triton.jit
def statistics_apart(x, APART: tl.constexpr):
    """A tile with a row for each statistic: a sum for each run would go through the warps (1850 instructions a thread of
    GroupNorm 32x512x16x16, and so 1400).
    """
    if APART:
        return x
    else:
        return tl.reshape(x, [1, x.numel])


@triton.jit
def held_statistic(x, mask, share, APART: tl.constexpr):
    """(mean, variance) of the elements where ``mask`` is; share: 1 over how many they are."""
    center, moved, variance = centered_moments(statistics_apart(x, APART), statistics_apart(mask, APART), share)
    return center + moved, variance


@triton.jit
def rescued_statistic(x, mask, share, eps, APART: tl.constexpr):
    """(mean, variance, rstd) where squares leave fp32's range: of x over a power of two that eps has a say in."""
    largest = tl.max(tl.abs(x), axis=1, keep_dims=True)
    if not APART:
        largest = tl.max(largest, axis=0, keep_dims=True)
    unit = power_of_two_below(tl.maximum(largest, tl.sqrt(eps)))
    scale = 1.0 / unit
    mean, variance = held_statistic(x * scale, mask, share, APART)
    # Where nothing deviates eps alone is left, and its share of the scaled sum may be below fp32.
    rstd = tl.where(variance == 0.0, tl.rsqrt(eps), tl.rsqrt(variance + eps * scale * scale) * scale)
    return mean * unit, variance * unit * unit, rstd


@triton.jit(do_not_specialize=["C", "SETS", "RUNS", "S"])
def held_forward(
    Y,
    MEAN,
    RSTD,
    VAR,
    RUNNING_MEAN,
    RUNNING_VAR,
    X,
    W,
    B,
    RESIDUAL,
    C,
    SETS,
    RUNS,
    S,
    eps: tl.float64,
    momentum: tl.float64,
    OVER_SAMPLES: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    APART: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    RAGGED: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """VAR (unbiased) and running statistics, of each statistic's number, where they are given."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    S = in_units(S, UNIT)
    sets, exist, _, live, parameters, offsets, mask = held_tile(
        C, SETS, RUNS, S, OVER_SAMPLES, PER_SAMPLE, APART, RAGGED, ROWS, POSITIONS
    )
    stored = load_once(X + offsets, mask, STREAM)
    owners = exist if OVER_SAMPLES else live
    w = load_or(W, parameters, owners, NO_WEIGHT, False)
    b = load_or(B, parameters, owners, NO_BIAS, False)
    n = RUNS * S
    share = 1.0 / (tl.zeros([1, 1], ACC) + n.to(ACC))
    small = tl.full([1, 1], eps, ACC)
    x = widened(stored, ACC)
    mean, variance = held_statistic(x, mask, share, APART)
    rstd = tl.rsqrt(variance + small)
    if RESCUE:
        good = trusted(variance + small) | ~exist
        if tl.min(good.to(tl.int32)) == 0:
            mean_again, variance_again, rstd_again = rescued_statistic(x, mask, share, small, APART)
            mean = tl.where(good, mean, mean_again)
            variance = tl.where(good, variance, variance_again)
            rstd = tl.where(good, rstd, rstd_again)
    tl.store(MEAN + sets, mean.to(MEAN.dtype.element_ty), mask=exist)
    tl.store(RSTD + sets, rstd.to(RSTD.dtype.element_ty), mask=exist)
    if VAR is not None or RUNNING_VAR is not None:
        unbiased = variance.to(tl.float64) * (n.to(tl.float64) / (n.to(tl.float64) - 1.0))
        if VAR is not None:
            tl.store(VAR + sets, unbiased, mask=exist)
        update_running(RUNNING_MEAN, sets, mean.to(tl.float64), momentum, exist)
        update_running(RUNNING_VAR, sets, unbiased, momentum, exist)
    z = before_activation((widened(stored, ACC) - mean) * rstd, w, b, RESIDUAL, offsets, mask)
    y = activated(z, ACTIVATION)
    store_once(Y + offsets, y, mask, STREAM)


@triton.jit(do_not_specialize=["C", "SETS", "RUNS", "S"])
def held_backward(
    DX,
    DW,
    DB,
    DZ,
    DY_XHAT,
    DY_SUM,
    DY,
    X,
    MEAN,
    RSTD,
    W,
    B,
    RESIDUAL,
    C,
    SETS,
    RUNS,
    S,
    OVER_SAMPLES: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    APART: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    RAGGED: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """DY_XHAT, DY_SUM: each run's sums, for dw and db; DW and DB: a statistic's; DZ: a residual's gradient. Each of them
    may be None.
    """
    wait_for_previous(PDL)
    let_next_launch(PDL)
    S = in_units(S, UNIT)
    sets, exist, runs, live, parameters, offsets, mask = held_tile(
        C, SETS, RUNS, S, OVER_SAMPLES, PER_SAMPLE, APART, RAGGED, ROWS, POSITIONS
    )
    dy = load_once(DY + offsets, mask, STREAM)
    x = load_once(X + offsets, mask, STREAM)
    mean, rstd = load(MEAN + sets, exist).to(ACC), load(RSTD + sets, exist).to(ACC)
    owners = exist if OVER_SAMPLES else live
    w = load_or(W, parameters, owners, NO_WEIGHT, False)
    b = load_or(B, parameters, owners, NO_BIAS, False)
    dz, xhat = gradient_of(dy, x, RESIDUAL, DZ, offsets, mask, mean, rstd, w, b, ACTIVATION, RAGGED, ACC)
    of_x, of_1 = row_sums(dz * xhat, dz)
    if DY_XHAT is not None:
        tl.store(DY_XHAT + runs, of_x, mask=live)
    if DY_SUM is not None:
        tl.store(DY_SUM + runs, of_1, mask=live)
    if DW is not None:
        tl.store(DW + sets, over_rows(of_x, APART).to(DW.dtype.element_ty), mask=exist)
    if DB is not None:
        tl.store(DB + sets, over_rows(of_1, APART).to(DB.dtype.element_ty), mask=exist)
    share = 1.0 / (tl.zeros([1, 1], ACC) + (RUNS * S).to(ACC))
    c1 = over_rows(affine_backward(of_x, w, 0.0), APART) * share
    c2 = over_rows(affine_backward(of_1, w, 0.0), APART) * share
    dz, xhat = gradient_again(dy, x, dz, mean, rstd, ACTIVATION, ACC)
    dx = dx_of(affine_backward(dz, w, 0.0), xhat, rstd, c1, c2, True)
    store_once(DX + offsets, dx, mask, STREAM)
