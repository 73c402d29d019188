"""Channel norms by programs that have a whole statistic each: one reads its elements, and reads them again for y or dx,
mostly while L2, or L1, still has them. For channels first, where a statistic is RUNS runs of S elements:

- a group's channels, one after the other (GroupNorm, InstanceNorm), or
- a channel's images, C runs apart (BatchNorm, ``over_samples``).

``channel_forward``   mean, rstd, running statistics and y
``channel_backward``  dx, and each run's Σ dy·x̂ and Σ dy; over_samples dw and db themselves

Formulas are channel.py's and channel_backward.py's. A program's turn is a tile ``[ROWS, POSITIONS]`` of runs by positions.
"""

import triton
import triton.language as tl

from .activation import activated, before_activation
from .affine import NO_BIAS, NO_WEIGHT, affine_backward
from .channel import merged_positions, scaled_back
from .channel_backward import gradient_of
from .channel_combine import update_running
from .channel_tiles import in_units, load_pivot
from .index import first_program, load, load_once, load_or, store_once, widened
from .overlap import let_next_launch, wait_for_previous
from .row_backward import dx_of, normalized
from .stats import power_of_two_below, row_sum, row_sums, trusted


@triton.jit
def runs_of(statistic, C, RUNS, OVER_SAMPLES: tl.constexpr, PER_SAMPLE: tl.constexpr):
    """(first run of a statistic, runs to the next; where the first one's parameters are, how many on)."""
    if OVER_SAMPLES:
        return statistic, C, statistic.to(tl.int32), 0
    elif PER_SAMPLE:
        return statistic * RUNS, 1, statistic * RUNS, 1
    else:  # statistic·RUNS % C, in 32 bits
        return statistic * RUNS, 1, statistic.to(tl.int32) % (C // RUNS) * RUNS, 1


@triton.jit
def tile_of_turn(turn, first, stride, RUNS, S, columns, RAGGED: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr):
    """(runs ``[ROWS, 1]``, which exist, element offsets ``[ROWS, POSITIONS]``, their mask) of a turn. RAGGED: some tiles
    have fewer elements than lanes.
    """
    runs = turn // columns * ROWS + tl.arange(0, ROWS)[:, None]
    positions = turn % columns * POSITIONS + tl.arange(0, POSITIONS)[None, :]
    offsets = (first + runs.to(tl.int64) * stride) * S + positions
    if RAGGED:
        live = runs < RUNS
        return runs, live, offsets, live & (positions < S)
    else:
        return runs, tl.full(runs.shape, True, tl.int1), offsets, tl.full(offsets.shape, True, tl.int1)


@triton.jit
def turns_of(RUNS, S, ROWS: tl.constexpr, POSITIONS: tl.constexpr):
    """(how many turns a run's positions take, how many the statistic)."""
    columns = tl.cdiv(S, POSITIONS)
    return columns, tl.cdiv(RUNS, ROWS) * columns


@triton.jit
def pivot_of_run(X, run, S, ACC: tl.constexpr, POSITIONS: tl.constexpr):
    """channel_tiles.load_pivot of the statistic whose first run this is, ``[1, 1]``."""
    begin = tl.zeros([1, 1], tl.int64) + run * S
    positions = tl.arange(0, POSITIONS)[None, :]
    return load_pivot(X, begin, positions, tl.full([1, 1], True, tl.int1), positions < S, ACC)


@triton.jit
def moments_of_runs(
    X,
    first,
    stride,
    RUNS,
    S,
    RAGGED: tl.constexpr,
    UNEVEN: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(mean, sum of squares about it), each ``[1, 1]`` and fp64.

    Each lane runs Welford's recurrence over its own elements; lanes are merged once, at the end. UNEVEN: a lane may have no
    element in a turn and one in a later turn, so that each counts its own.
    """
    columns, turns = turns_of(RUNS, S, ROWS, POSITIONS)
    pivot = pivot_of_run(X, first, S, ACC, POSITIONS)
    mean = tl.zeros([ROWS, POSITIONS], ACC)
    squares = tl.zeros([ROWS, POSITIONS], ACC)
    count = tl.zeros([ROWS, POSITIONS] if RAGGED else [1, 1], ACC)
    done = tl.zeros([1, 1], ACC)
    for turn in tl.range(0, turns, num_stages=STAGES):
        _, _, offsets, mask = tile_of_turn(turn, first, stride, RUNS, S, columns, RAGGED, ROWS, POSITIONS)
        x = widened(load(X + offsets, mask), ACC) - pivot
        if RAGGED:
            x = tl.where(mask, x, mean)  # so that a lane without an element has no distance
            count += mask.to(ACC)
        else:
            count += 1.0
        done += 1.0
        share = 1.0 / (tl.maximum(count, 1.0) if UNEVEN else done)
        delta = x - mean
        mean += delta * share
        squares += delta * (x - mean)
    of_row = tl.maximum(tl.cdiv(RUNS - tl.arange(0, ROWS)[:, None], ROWS), 0).to(tl.float64) * S
    mean, squares = merged_positions(mean, squares, count, of_row)
    # The same over rows, by Chan's rule.
    center = tl.sum(mean * of_row, axis=0, keep_dims=True) / tl.sum(of_row, axis=0, keep_dims=True)
    shift = mean - center
    return center + pivot.to(tl.float64), tl.sum(squares + shift * shift * of_row, axis=0, keep_dims=True)


@triton.jit
def rescued_runs(
    X, first, stride, RUNS, S, n, RAGGED: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr
):
    """The same where squares leave fp32's range, as channel.rescued_walk."""
    columns, turns = turns_of(RUNS, S, ROWS, POSITIONS)
    largest = tl.zeros([ROWS, POSITIONS], ACC)
    for turn in tl.range(0, turns):
        _, _, offsets, mask = tile_of_turn(turn, first, stride, RUNS, S, columns, RAGGED, ROWS, POSITIONS)
        largest = tl.maximum(largest, tl.abs(widened(load(X + offsets, mask), ACC)))
    unit = power_of_two_below(tl.max(tl.max(largest, axis=1, keep_dims=True), axis=0, keep_dims=True))
    total = tl.zeros([ROWS, POSITIONS], ACC)
    for turn in tl.range(0, turns):
        _, _, offsets, mask = tile_of_turn(turn, first, stride, RUNS, S, columns, RAGGED, ROWS, POSITIONS)
        total += widened(load(X + offsets, mask), ACC) * (1.0 / unit)
    mean = whole_sum(total) / n
    center = mean.to(ACC)
    squares = tl.zeros([ROWS, POSITIONS], ACC)
    for turn in tl.range(0, turns):
        _, _, offsets, mask = tile_of_turn(turn, first, stride, RUNS, S, columns, RAGGED, ROWS, POSITIONS)
        distance = tl.where(mask, widened(load(X + offsets, mask), ACC) * (1.0 / unit) - center, 0.0)
        squares += distance * distance
    return scaled_back(mean, center, whole_sum(squares), n, unit)


@triton.jit
def whole_sum(x):
    """The sum of a tile, ``[1, 1]`` and fp64; over positions in x's dtype."""
    return tl.sum(row_sum(x).to(tl.float64), axis=0, keep_dims=True)


@triton.jit
def load_parameters_of_runs(W, B, which, C, live, PER_SAMPLE: tl.constexpr):
    """(weight, bias) of a turn's runs; identities where None."""
    if not PER_SAMPLE:
        which = which % C
    return load_or(W, which, live, NO_WEIGHT, False), load_or(B, which, live, NO_BIAS, False)


@triton.jit(do_not_specialize=["C", "RUNS", "S"])
def channel_forward(
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
    RUNS,
    S,
    eps: tl.float64,
    momentum: tl.float64,
    OVER_SAMPLES: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    RAGGED: tl.constexpr,
    UNEVEN: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STAGES: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A statistic a program. VAR (unbiased) and running statistics, of each program's number, where they are given."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    S = in_units(S, UNIT)
    first, stride, parameters, step = runs_of(first_program(), C, RUNS, OVER_SAMPLES, PER_SAMPLE)
    count = tl.zeros([1, 1], tl.float64) + RUNS.to(tl.float64) * S.to(tl.float64)
    mean, squares = moments_of_runs(X, first, stride, RUNS, S, RAGGED, UNEVEN, ACC, ROWS, POSITIONS, STAGES)
    if RESCUE:
        if tl.sum(trusted(squares / count + eps).to(tl.int32)) == 0:
            mean, squares = rescued_runs(X, first, stride, RUNS, S, count, RAGGED, ACC, ROWS, POSITIONS)
    rstd = tl.rsqrt(squares / count + eps)
    unbiased = squares / (count - 1.0)
    here = first_program() + tl.zeros([1, 1], tl.int64)
    there = tl.full([1, 1], True, tl.int1)
    tl.store(MEAN + here, mean.to(MEAN.dtype.element_ty))
    tl.store(RSTD + here, rstd.to(RSTD.dtype.element_ty))
    if VAR is not None:
        tl.store(VAR + here, unbiased)
    update_running(RUNNING_MEAN, here, mean, momentum, there)
    update_running(RUNNING_VAR, here, unbiased, momentum, there)

    mean, rstd = mean.to(ACC), rstd.to(ACC)
    columns, turns = turns_of(RUNS, S, ROWS, POSITIONS)
    for turn in tl.range(0, turns, num_stages=STAGES):
        # The last ones first: of what is larger than L2 they are what it still has.
        runs, live, offsets, mask = tile_of_turn(turns - 1 - turn, first, stride, RUNS, S, columns, RAGGED, ROWS, POSITIONS)
        w, b = load_parameters_of_runs(W, B, parameters + runs * step, C, live, PER_SAMPLE)
        xhat = normalized(load_once(X + offsets, mask, STREAM), mean, rstd, ACC)
        z = before_activation(xhat, w, b, RESIDUAL, offsets, mask)
        store_once(Y + offsets, activated(z, ACTIVATION), mask, STREAM)


@triton.jit(do_not_specialize=["C", "RUNS", "S"])
def channel_backward(
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
    RUNS,
    S,
    OVER_SAMPLES: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    RAGGED: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STAGES: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A statistic a program. DY_XHAT, DY_SUM: each run's sums, for dw and db; OVER_SAMPLES those are DW and DB. DZ: a
    residual's gradient. Each of them may be None.
    """
    wait_for_previous(PDL)
    let_next_launch(PDL)
    S = in_units(S, UNIT)
    first, stride, parameters, step = runs_of(first_program(), C, RUNS, OVER_SAMPLES, PER_SAMPLE)
    here = first_program() + tl.zeros([1, 1], tl.int64)
    mean, rstd = tl.load(MEAN + here).to(ACC), tl.load(RSTD + here).to(ACC)
    columns, turns = turns_of(RUNS, S, ROWS, POSITIONS)
    c1 = tl.zeros([ROWS, 1], tl.float64)
    c2 = tl.zeros([ROWS, 1], tl.float64)
    if OVER_SAMPLES:
        of_channel, b_of_channel = load_parameters_of_runs(W, B, here, C, here < C, PER_SAMPLE)
        dz_xhat = tl.zeros([ROWS, POSITIONS], ACC)
        dz_sum = tl.zeros([ROWS, POSITIONS], ACC)
        for turn in tl.range(0, turns, num_stages=STAGES):
            _, _, offsets, mask = tile_of_turn(turn, first, stride, RUNS, S, columns, RAGGED, ROWS, POSITIONS)
            dy, x = load(DY + offsets, mask), load(X + offsets, mask)
            w, b = of_channel, b_of_channel
            dz, xhat = gradient_of(dy, x, RESIDUAL, None, offsets, mask, mean, rstd, w, b, ACTIVATION, RAGGED, ACC)
            dz_xhat += dz * xhat
            dz_sum += dz
        of_x, of_1 = row_sums(dz_xhat, dz_sum)
        of_x = tl.sum(of_x.to(tl.float64), axis=0, keep_dims=True)
        of_1 = tl.sum(of_1.to(tl.float64), axis=0, keep_dims=True)
        if DW is not None:
            tl.store(DW + here, of_x.to(DW.dtype.element_ty))
        if DB is not None:
            tl.store(DB + here, of_1.to(DB.dtype.element_ty))
        c1 += of_x * of_channel.to(tl.float64) / ROWS
        c2 += of_1 * of_channel.to(tl.float64) / ROWS
    else:
        run_xhat = tl.zeros([ROWS, 1], ACC)
        run_sum = tl.zeros([ROWS, 1], ACC)
        for turn in tl.range(0, turns, num_stages=STAGES):
            runs, live, offsets, mask = tile_of_turn(turn, first, stride, RUNS, S, columns, RAGGED, ROWS, POSITIONS)
            w, b = load_parameters_of_runs(W, B, parameters + runs, C, live, PER_SAMPLE)
            dy, x = load(DY + offsets, mask), load(X + offsets, mask)
            dz, xhat = gradient_of(dy, x, RESIDUAL, None, offsets, mask, mean, rstd, w, b, ACTIVATION, RAGGED, ACC)
            of_x, of_1 = row_sums(dz * xhat, dz)
            begun = turn % columns != 0
            run_xhat = tl.where(begun, run_xhat, 0.0) + of_x
            run_sum = tl.where(begun, run_sum, 0.0) + of_1
            done = live & ((turn + 1) % columns == 0)
            if DY_XHAT is not None:
                tl.store(DY_XHAT + first + runs, run_xhat, mask=done)
            if DY_SUM is not None:
                tl.store(DY_SUM + first + runs, run_sum, mask=done)
            c1 += tl.where(done, run_xhat.to(tl.float64) * w.to(tl.float64), 0.0)
            c2 += tl.where(done, run_sum.to(tl.float64) * w.to(tl.float64), 0.0)
    size = RUNS.to(tl.float64) * S.to(tl.float64)
    c1 = (tl.sum(c1, axis=0, keep_dims=True) / size).to(ACC)
    c2 = (tl.sum(c2, axis=0, keep_dims=True) / size).to(ACC)
    for turn in tl.range(0, turns, num_stages=STAGES):
        runs, live, offsets, mask = tile_of_turn(turns - 1 - turn, first, stride, RUNS, S, columns, RAGGED, ROWS, POSITIONS)
        w, b = load_parameters_of_runs(W, B, parameters + runs * step, C, live, PER_SAMPLE)
        dy, x = load_once(DY + offsets, mask, STREAM), load_once(X + offsets, mask, STREAM)
        dz, xhat = gradient_of(dy, x, RESIDUAL, DZ, offsets, mask, mean, rstd, w, b, ACTIVATION, RAGGED, ACC)
        dx = dx_of(affine_backward(dz, w, 0.0), xhat, rstd, c1, c2, True)
        store_once(DX + offsets, dx, mask, STREAM)
