"""What channel_moments found in parts, of a statistic's channels and shares of positions, as one: mean and rstd, and
running statistics. With the sums T of a channel's distances from its pivot p and Q of their squares, which parts add up,

    Σ (x - p₀) = Σ T + n·(p - p₀),    Σ (x - p₀)² = Σ Q + 2·(p - p₀)·T + n·(p - p₀)²     over channels of n elements
"""

import triton
import triton.language as tl

from .index import first_program, load
from .overlap import let_next_launch, wait_for_previous


@triton.jit
def partials_of(start, outer, sets, R, D, C, K: tl.constexpr):
    """(part, its offset, its mask), each ``[K, SETS]``, of K of the partials that some statistics are made of.

    A statistic has R parts of each of its D channels. Partials are ``[outer, R, C]``.
    """
    k = start + tl.arange(0, K)[:, None]
    part = k // D
    offsets = (outer.to(tl.int64) * R + part) * C + sets * D + k % D
    return part, offsets, (k < R * D) & (sets < C // D)


@triton.jit
def sets_of_program(program, C, D, SETS: tl.constexpr):
    """(outer, statistics ``[1, SETS]`` of it) of a program that combines partials."""
    blocks = tl.cdiv(C // D, SETS)
    return program // blocks, program % blocks * SETS + tl.arange(0, SETS)[None, :]


@triton.jit
def combined_moments(TOTALS, SQUARES, PIVOTS, COUNTS, outer, sets, R, D, C, n, K: tl.constexpr):
    """(mean, sum of squares about it), each ``[1, SETS]`` and fp64. n: elements of a channel. COUNTS: as channel_moments',
    and then parts are merged by Chan's rule, in a second reading.
    """
    pivots = PIVOTS + outer.to(tl.int64) * C + sets * D
    base = load(pivots, sets < C // D).to(tl.float64)
    total = tl.zeros([K, sets.shape[1]], tl.float64)
    squares = tl.zeros([K, sets.shape[1]], tl.float64)
    for start in tl.range(0, R * D, K):
        part, offsets, live = partials_of(start, outer, sets, R, D, C, K)
        of_part = load(TOTALS + offsets, live)
        channel = (start + tl.arange(0, K)[:, None]) % D
        shift = tl.where(live, load(pivots + channel, live).to(tl.float64) - base, 0.0)
        moved = tl.where(part == 0, n * shift, 0.0)  # once for each channel
        total += of_part + moved
        if COUNTS is None:
            squares += load(SQUARES + offsets, live) + (2.0 * of_part + moved) * shift
    count = n * D.to(tl.float64)
    total = tl.sum(total, axis=0, keep_dims=True)
    mean = total / count
    if COUNTS is not None:
        for start in tl.range(0, R * D, K):
            part, offsets, live = partials_of(start, outer, sets, R, D, C, K)
            channel = (start + tl.arange(0, K)[:, None]) % D
            of_part = tl.load(COUNTS + outer.to(tl.int64) * R + part, mask=part < R, other=1.0)
            shift = load(TOTALS + offsets, live) / of_part + (load(pivots + channel, live) - base) - mean
            squares += load(SQUARES + offsets, live) + tl.where(live, of_part * shift * shift, 0.0)
    squares = tl.sum(squares, axis=0, keep_dims=True)
    if COUNTS is None:
        squares -= mean * total
    return mean + base, tl.where(squares < 0.0, 0.0, squares)


@triton.jit
def update_running(RUNNING, sets, value, momentum, mask):
    """running·(1 - momentum) + value·momentum, in place."""
    if RUNNING is not None:
        running = load(RUNNING + sets, mask).to(tl.float64)
        kept = running * (1.0 - momentum) + value * momentum
        tl.store(RUNNING + sets, kept.to(RUNNING.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R", "D", "C"])
def channel_combine(
    MEAN,
    RSTD,
    VAR,
    RUNNING_MEAN,
    RUNNING_VAR,
    TOTALS,
    SQUARES,
    PIVOTS,
    COUNTS,
    R,
    D,
    C,
    n: tl.float64,
    eps: tl.float64,
    momentum: tl.float64,
    K: tl.constexpr,
    SETS: tl.constexpr,
    PDL: tl.constexpr,
):
    """SETS statistics a program, of R parts of D channels each, of n elements: mean and rstd; VAR (unbiased), running ones
    if given.
    """
    wait_for_previous(PDL)
    let_next_launch(PDL)
    outer, sets = sets_of_program(first_program().to(tl.int32), C, D, SETS)
    mask = sets < C // D
    mean, squares = combined_moments(TOTALS, SQUARES, PIVOTS, COUNTS, outer, sets, R, D, C, n, K)
    count = n * D.to(tl.float64)
    where = outer.to(tl.int64) * (C // D) + sets
    tl.store(MEAN + where, mean.to(MEAN.dtype.element_ty), mask=mask)
    tl.store(RSTD + where, tl.rsqrt(squares / count + eps).to(RSTD.dtype.element_ty), mask=mask)
    unbiased = squares / (count - 1.0)
    if VAR is not None:
        tl.store(VAR + where, unbiased, mask=mask)
    update_running(RUNNING_MEAN, sets, mean, momentum, mask)
    update_running(RUNNING_VAR, sets, unbiased, momentum, mask)
