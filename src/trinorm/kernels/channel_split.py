"""Channel norms by teams: a statistic is split over programs that hold a tile of it each, and tell each other their share
of its sums (team.py). So x (and dy) are read once where no program can hold a statistic. For channels first, with the runs
and tiles of channel_whole.py: what is a program's turn there is a member of the team here.

``split_forward``   mean, rstd, running statistics and y
``split_backward``  dx, and each run's Σ dz·x̂ and Σ dz, in parts; over_samples dw and db themselves

A program tells two fp64 numbers, in words that lie ``[statistics, 2, team]``.
"""

import triton
import triton.language as tl

from .activation import activated, before_activation
from .affine import affine_backward
from .channel import update_running
from .channel_tiles import in_units
from .channel_whole import (
    gradient_of_turn,
    load_parameters_of_runs,
    rescued_runs,
    runs_of,
    tile_of_turn,
    turns_of,
    whole_sum,
)
from .index import first_program, load, widened
from .overlap import let_next_launch, wait_for_previous
from .row_backward import dx_of, normalized
from .stats import row_sums, trusted
from .team import awaited_wide, publish_wide, team_sum


@triton.jit
def member_of_program(RUNS, S, ROWS: tl.constexpr, POSITIONS: tl.constexpr):
    """(this program's statistic, its number in the team; members to a run, to the team)."""
    columns, team = turns_of(RUNS, S, ROWS, POSITIONS)
    program = first_program()
    return program // team, (program % team).to(tl.int32), columns, team


@triton.jit
def elements_of(member, RUNS, S, columns, ROWS: tl.constexpr, POSITIONS: tl.constexpr):
    """How many elements a member has, fp64; 0 past the team."""
    runs = tl.maximum(tl.minimum(RUNS - member // columns * ROWS, ROWS), 0)
    return (runs * tl.minimum(S - member % columns * POSITIONS, POSITIONS)).to(tl.float64)


@triton.jit
def tile_moments(x, mask, n):
    """(mean, sum of squares about it) of n elements, each ``[1, 1]`` and fp64."""
    center = (whole_sum(x) / n).to(x.dtype)
    distance = tl.where(mask, x - center, 0.0)
    moved = whole_sum(distance) / n  # what rounding left in the mean
    squares = whole_sum(distance * distance) - moved * moved * n
    return center.to(tl.float64) + moved, tl.where(squares < 0.0, 0.0, squares)


@triton.jit
def merged_members(means, squares, counts, n):
    """Chan's rule: (mean, sum of squares about it), each ``[1, 1]``, of n elements from those of each member."""
    mean = team_sum(means * counts) / n
    shift = means - tl.sum(mean)
    return mean, team_sum(squares + shift * shift * counts)


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
    PDL: tl.constexpr,
):
    """VAR (unbiased) and running statistics, of each statistic's number, where they are given."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    S = in_units(S, UNIT)
    statistic, member, columns, team = member_of_program(RUNS, S, ROWS, POSITIONS)
    first, stride, parameters, step = runs_of(statistic, C, RUNS, OVER_SAMPLES, PER_SAMPLE)
    runs, live, offsets, mask = tile_of_turn(member, first, stride, RUNS, S, columns, RAGGED, ROWS, POSITIONS)
    stored = load(X + offsets, mask)
    w, b = load_parameters_of_runs(W, B, parameters + runs * step, C, live, PER_SAMPLE)

    mean, squares = tile_moments(widened(stored, ACC), mask, elements_of(member, RUNS, S, columns, ROWS, POSITIONS))
    words = WORDS + statistic * 2 * team
    every = tl.full([1, 1], True, tl.int1)
    publish_wide(words + member, mean, every)
    publish_wide(words + team + member, squares, every)
    counts = elements_of(tl.arange(0, LANES), RUNS, S, columns, ROWS, POSITIONS)
    count = tl.zeros([1, 1], tl.float64) + RUNS.to(tl.float64) * S.to(tl.float64)
    means = awaited_wide(words, team, LANES)
    mean, squares = merged_members(means, awaited_wide(words + team, team, LANES), counts, count)
    if RESCUE:
        if tl.sum(trusted(squares / count + eps).to(tl.int32)) == 0:
            mean, squares = rescued_runs(X, first, stride, RUNS, S, count, RAGGED, ACC, ROWS, POSITIONS)
    rstd = tl.rsqrt(squares / count + eps)
    unbiased = squares / (count - 1.0)
    here = statistic + tl.zeros([1, 1], tl.int64)
    teller = tl.full([1, 1], member == 0, tl.int1)
    tl.store(MEAN + here, mean.to(MEAN.dtype.element_ty), mask=teller)
    tl.store(RSTD + here, rstd.to(RSTD.dtype.element_ty), mask=teller)
    if VAR is not None:
        tl.store(VAR + here, unbiased, mask=teller)
    update_running(RUNNING_MEAN, here, mean, momentum, teller)
    update_running(RUNNING_VAR, here, unbiased, momentum, teller)

    xhat = normalized(stored, mean.to(ACC), rstd.to(ACC), ACC)
    y = activated(before_activation(xhat, w, b, RESIDUAL, offsets, mask), ACTIVATION)
    tl.store(Y + offsets, y.to(Y.dtype.element_ty), mask=mask)


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
    OVER_SAMPLES: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UNIT: tl.constexpr,
    RAGGED: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    LANES: tl.constexpr,
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
    dz, xhat = gradient_of_turn(DY, X, RESIDUAL, offsets, mask, mean, rstd, w, b, ACTIVATION, RAGGED, ACC)
    if DZ is not None:
        tl.store(DZ + offsets, dz.to(DZ.dtype.element_ty), mask=mask)

    of_x, of_1 = row_sums(dz * xhat, dz)
    if not OVER_SAMPLES:
        part = (first // C * columns + member % columns) * C + first % C + runs
        if DY_XHAT is not None:
            tl.store(DY_XHAT + part, of_x, mask=live)
        if DY_SUM is not None:
            tl.store(DY_SUM + part, of_1, mask=live)
        of_x, of_1 = affine_backward(of_x, w, 0.0), affine_backward(of_1, w, 0.0)
    words = WORDS + statistic * 2 * team
    every = tl.full([1, 1], True, tl.int1)
    publish_wide(words + member, tl.sum(of_x.to(tl.float64), axis=0, keep_dims=True), every)
    publish_wide(words + team + member, tl.sum(of_1.to(tl.float64), axis=0, keep_dims=True), every)
    of_x = team_sum(awaited_wide(words, team, LANES))
    of_1 = team_sum(awaited_wide(words + team, team, LANES))
    if OVER_SAMPLES:
        teller = tl.full([1, 1], member == 0, tl.int1)
        if DW is not None:
            tl.store(DW + here, of_x.to(DW.dtype.element_ty), mask=teller)
        if DB is not None:
            tl.store(DB + here, of_1.to(DB.dtype.element_ty), mask=teller)
    size = RUNS.to(tl.float64) * S.to(tl.float64)
    c1, c2 = (of_x / size).to(ACC), (of_1 / size).to(ACC)
    if OVER_SAMPLES:  # the weight is one
        of_channel, _ = load_parameters_of_runs(W, None, here, C, here < C, PER_SAMPLE)
        c1, c2 = affine_backward(c1, of_channel, 0.0), affine_backward(c2, of_channel, 0.0)
    dx = dx_of(affine_backward(dz, w, 0.0), xhat, rstd, c1, c2, True)
    tl.store(DX + offsets, dx.to(DX.dtype.element_ty), mask=mask)
