"""Channel norms by teams: a statistic is split over programs that hold a tile of it each, and tell each other their share
of its sums (team.py). So x (and dy) are read once where no program can hold a statistic. For channels first, with the runs
and tiles of channel_whole.py: what is a program's turn there is a member of the team here.

``split_forward``   mean, rstd, running statistics and y
``split_backward``  dx, and each run's Σ dz·x̂ and Σ dz, in parts; over_samples dw and db themselves

A program tells two fp64 numbers at a time, in words that lie ``[statistics, exchanges, team, 2]``. A forward has EXCHANGES,
of which all but the first are for a statistic whose squares leave fp32's range.
"""

import triton
import triton.language as tl

from .activation import activated, before_activation
from .affine import affine_backward
from .channel_backward import gradient_again, gradient_of
from .channel_combine import update_running
from .channel_tiles import centered_moments, in_units
from .channel_whole import load_parameters_of_runs, pivot_of_run, runs_of, tile_of_turn, turns_of
from .index import first_program, load_once, store_once, widened
from .overlap import let_next_launch, wait_for_previous
from .row_backward import dx_of, normalized
from .stats import power_of_two_below, row_sums, trusted
from .team import awaited_wide, publish_wide, team_sum

EXCHANGES: tl.constexpr = tl.constexpr(3)


@triton.jit
def member_of_program(RUNS, S, ROWS: tl.constexpr, POSITIONS: tl.constexpr):
    """(this program's statistic, its number in the team; members to a run, to the team)."""
    columns, team = turns_of(RUNS, S, ROWS, POSITIONS)
    program = first_program().to(tl.int32)
    return (program // team).to(tl.int64), program % team, columns, team


@triton.jit
def elements_of(member, team, RUNS, S, columns, RAGGED: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr):
    """How many elements a member has, fp32; 0 past the team."""
    if RAGGED:
        runs = tl.maximum(tl.minimum(RUNS - member // columns * ROWS, ROWS), 0)
        return (runs * tl.minimum(S - member % columns * POSITIONS, POSITIONS)).to(tl.float32)
    else:
        return tl.where(member < team, ROWS * POSITIONS, 0).to(tl.float32)


@triton.jit
def tile_moments(x, mask, n):
    """(mean, sum of squares about it) of n elements, each ``[1, 1]`` and fp64, of sums in x's dtype."""
    center, moved, variance = centered_moments(
        tl.reshape(x, [1, x.numel]), tl.reshape(mask, [1, x.numel]), 1.0 / n.to(x.dtype)
    )
    return center.to(tl.float64) + moved.to(tl.float64), variance.to(tl.float64) * n


@triton.jit
def merged_members(means, squares, counts, share):
    """Chan's rule: (mean, sum of squares about it), each ``[1, 1]``, from those of each member. share: 1/Σ counts."""
    counts = counts.to(tl.float64)
    mean = team_sum(means * counts) * share
    shift = means - tl.sum(mean)
    return mean, team_sum(squares + shift * shift * counts)


@triton.jit
def merged_moments(WORDS, x, mask, member, team, n, counts, share, LANES: tl.constexpr):
    """Those of the team: this program's are published at WORDS, and the others' awaited."""
    mean, squares = tile_moments(x, mask, n)
    publish_wide(WORDS + 2 * member, mean, squares)
    means, squares = awaited_wide(WORDS, team, LANES)
    return merged_members(means, squares, counts, share)


@triton.jit(do_not_specialize=["C", "RUNS", "S"])
def split_forward(
    Y,
    MEAN,
    RSTD,
    VAR,
    RUNNING_MEAN,
    RUNNING_VAR,
    WORDS,
    X,
    W,
    B,
    RESIDUAL,
    C,
    RUNS,
    S,
    share: tl.float64,
    eps: tl.float64,
    momentum: tl.float64,
    OVER_SAMPLES: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    RAGGED: tl.constexpr,
    ACC: tl.constexpr,
    RESCUE: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    LANES: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """VAR (unbiased) and running statistics, of each statistic's number, where they are given. share: 1 over the elements
    of a statistic.
    """
    wait_for_previous(PDL)
    let_next_launch(PDL)
    S = in_units(S, UNIT)
    statistic, member, columns, team = member_of_program(RUNS, S, ROWS, POSITIONS)
    first, stride, parameters, step = runs_of(statistic, C, RUNS, OVER_SAMPLES, PER_SAMPLE)
    runs, live, offsets, mask = tile_of_turn(member, first, stride, RUNS, S, columns, RAGGED, ROWS, POSITIONS)
    stored = load_once(X + offsets, mask, STREAM)
    w, b = load_parameters_of_runs(W, B, parameters + runs * step, C, live, PER_SAMPLE)

    n = elements_of(member, team, RUNS, S, columns, RAGGED, ROWS, POSITIONS)
    counts = elements_of(tl.arange(0, LANES), team, RUNS, S, columns, RAGGED, ROWS, POSITIONS)

    words = WORDS + statistic * (2 * EXCHANGES) * team
    x = widened(stored, ACC)
    pivot = tl.zeros([1, 1], tl.float64)
    if tl.float64 == ACC:  # in which what members tell has no digits to spare
        pivot += pivot_of_run(X, first, S, ACC, POSITIONS)
        x = tl.where(mask, x - pivot, 0.0)
    mean, squares = merged_moments(words, x, mask, member, team, n, counts, share, LANES)
    mean += pivot
    rstd = tl.rsqrt((squares * share + eps).to(ACC))
    if RESCUE:
        if tl.sum(trusted(squares * share + eps).to(tl.int32)) == 0:
            # Of x over a power of two; widened anew, so that it is not held.
            x = stored.to(ACC)
            largest = tl.max(tl.reshape(tl.abs(x), [1, x.numel]), axis=1, keep_dims=True).to(tl.float64)
            words += 2 * team
            publish_wide(words + 2 * member, largest, largest)
            largest, _ = awaited_wide(words, team, LANES)
            unit = power_of_two_below((tl.zeros([1, 1], tl.float64) + tl.max(largest, axis=0)).to(tl.float32))
            words += 2 * team
            x = x * (1.0 / unit)
            mean, squares = merged_moments(words, x, mask, member, team, n, counts, share, LANES)
            unit = unit.to(tl.float64)
            mean, squares = mean * unit, squares * unit * unit
            rstd = tl.rsqrt(squares * share + eps).to(ACC)
    here = statistic + tl.zeros([1, 1], tl.int64)
    teller = tl.full([1, 1], member == 0, tl.int1)
    tl.store(MEAN + here, mean.to(MEAN.dtype.element_ty), mask=teller)
    tl.store(RSTD + here, rstd.to(RSTD.dtype.element_ty), mask=teller)
    if VAR is not None or RUNNING_VAR is not None:
        unbiased = squares / (RUNS.to(tl.float64) * S.to(tl.float64) - 1.0)
        if VAR is not None:
            tl.store(VAR + here, unbiased, mask=teller)
        update_running(RUNNING_MEAN, here, mean, momentum, teller)
        update_running(RUNNING_VAR, here, unbiased, momentum, teller)

    xhat = normalized(stored, mean.to(ACC), rstd, ACC)
    y = activated(before_activation(xhat, w, b, RESIDUAL, offsets, mask), ACTIVATION)
    store_once(Y + offsets, y, mask, STREAM)


@triton.jit(do_not_specialize=["C", "RUNS", "S"])
def split_backward(
    DX,
    DW,
    DB,
    DZ,
    DY_XHAT,
    DY_SUM,
    WORDS,
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
    share: tl.float64,
    OVER_SAMPLES: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    RAGGED: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    LANES: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """DY_XHAT, DY_SUM: ``[samples, members to a run, C]``, for dw and db; OVER_SAMPLES those are DW and DB. DZ: a
    residual's gradient. Each of them may be None.
    """
    wait_for_previous(PDL)
    let_next_launch(PDL)
    S = in_units(S, UNIT)
    statistic, member, columns, team = member_of_program(RUNS, S, ROWS, POSITIONS)
    first, stride, parameters, step = runs_of(statistic, C, RUNS, OVER_SAMPLES, PER_SAMPLE)
    runs, live, offsets, mask = tile_of_turn(member, first, stride, RUNS, S, columns, RAGGED, ROWS, POSITIONS)
    here = statistic + tl.zeros([1, 1], tl.int64)
    mean, rstd = tl.load(MEAN + here).to(ACC), tl.load(RSTD + here).to(ACC)
    w, b = load_parameters_of_runs(W, B, parameters + runs * step, C, live, PER_SAMPLE)
    dy, x = load_once(DY + offsets, mask, STREAM), load_once(X + offsets, mask, STREAM)
    dz, xhat = gradient_of(dy, x, RESIDUAL, DZ, offsets, mask, mean, rstd, w, b, ACTIVATION, RAGGED, ACC)

    of_x, of_1 = row_sums(dz * xhat, dz)
    if not OVER_SAMPLES:
        sample = statistic.to(tl.int32) // (C // RUNS)
        part = (sample.to(tl.int64) * columns + member % columns) * C + (first - sample.to(tl.int64) * C) + runs
        if DY_XHAT is not None:
            tl.store(DY_XHAT + part, of_x, mask=live)
        if DY_SUM is not None:
            tl.store(DY_SUM + part, of_1, mask=live)
        of_x, of_1 = affine_backward(of_x, w, 0.0), affine_backward(of_1, w, 0.0)
    words = WORDS + statistic * 2 * team
    of_x = tl.sum(of_x.to(tl.float64), axis=0, keep_dims=True)
    of_1 = tl.sum(of_1.to(tl.float64), axis=0, keep_dims=True)
    publish_wide(words + 2 * member, of_x, of_1)
    of_x, of_1 = awaited_wide(words, team, LANES)
    of_x, of_1 = team_sum(of_x), team_sum(of_1)
    if OVER_SAMPLES:
        teller = tl.full([1, 1], member == 0, tl.int1)
        if DW is not None:
            tl.store(DW + here, of_x.to(DW.dtype.element_ty), mask=teller)
        if DB is not None:
            tl.store(DB + here, of_1.to(DB.dtype.element_ty), mask=teller)
    c1, c2 = (of_x * share).to(ACC), (of_1 * share).to(ACC)
    if OVER_SAMPLES:  # the weight is one
        of_channel, _ = load_parameters_of_runs(W, None, here, C, here < C, PER_SAMPLE)
        c1, c2 = affine_backward(c1, of_channel, 0.0), affine_backward(c2, of_channel, 0.0)
    dz, xhat = gradient_again(dy, x, dz, mean, rstd, ACTIVATION, ACC)
    dx = dx_of(affine_backward(dz, w, 0.0), xhat, rstd, c1, c2, True)
    store_once(DX + offsets, dx, mask, STREAM)
