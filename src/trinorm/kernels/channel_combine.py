"""What channel_moments found in parts, of a statistic's channels and shares of positions, as one, by Chan's rule: mean and
rstd, and running statistics.
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
def partial_counts(part, live, A, S, tile, shares, SAMPLES):
    """How many elements each of some partials is made of, fp64. tile: the positions of one; the last may lack some.
    The first of the shares have a tile more than the others, which asks for no division by each partial.
    """
    tiles = tl.cdiv(S, tile).to(tl.int32)
    most = tl.cdiv(tiles, shares)
    full = tiles - (most - 1) * shares
    share = part % shares
    positions = tl.where(share < full, most * tile, (most - 1) * tile).to(tl.float64)
    lacked = tiles.to(tl.int64) * tile - S
    positions -= tl.where(share == full - 1, lacked, 0).to(tl.float64)
    samples = tl.minimum(A - part // shares * SAMPLES, SAMPLES)
    return tl.where(live, positions * samples, 0.0)


@triton.jit
def load_means(MEANS, PIVOTS, base, offsets, live):
    """Some partial means from ``base`` on."""
    if PIVOTS is None:
        return load(MEANS + offsets, live)
    else:
        return load(MEANS + offsets, live) + (load(PIVOTS + offsets, live) - base)


@triton.jit
def combined_moments(MEANS, PIVOTS, SQUARES, outer, sets, A, S, tile, shares, R, D, C, SAMPLES, K: tl.constexpr):
    """(mean, sum of squares about it, count), each ``[1, SETS]`` and fp64. Partials are read twice."""
    base = 0.0 if PIVOTS is None else load(PIVOTS + outer.to(tl.int64) * R * C + sets * D, sets < C // D)
    count = tl.zeros([K, sets.shape[1]], tl.float64)
    total = tl.zeros([K, sets.shape[1]], tl.float64)
    for start in tl.range(0, R * D, K):
        part, offsets, live = partials_of(start, outer, sets, R, D, C, K)
        n = partial_counts(part, live, A, S, tile, shares, SAMPLES)
        count += n
        total += tl.where(live, load_means(MEANS, PIVOTS, base, offsets, live), 0.0) * n
    count = tl.maximum(tl.sum(count, axis=0, keep_dims=True), 1.0)
    mean = tl.sum(total, axis=0, keep_dims=True) / count
    squares = tl.zeros([K, sets.shape[1]], tl.float64)
    for start in tl.range(0, R * D, K):
        part, offsets, live = partials_of(start, outer, sets, R, D, C, K)
        distance = load_means(MEANS, PIVOTS, base, offsets, live) - mean
        n = partial_counts(part, live, A, S, tile, shares, SAMPLES)
        squares += load(SQUARES + offsets, live) + tl.where(live, distance * distance * n, 0.0)
    return mean + base, tl.sum(squares, axis=0, keep_dims=True), count


@triton.jit
def update_running(RUNNING, sets, value, momentum, mask):
    """running·(1 - momentum) + value·momentum, in place."""
    if RUNNING is not None:
        running = load(RUNNING + sets, mask).to(tl.float64)
        kept = running * (1.0 - momentum) + value * momentum
        tl.store(RUNNING + sets, kept.to(RUNNING.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["A", "S", "tile", "shares", "R", "D", "C", "SAMPLES"])
def channel_combine(
    MEAN,
    RSTD,
    VAR,
    RUNNING_MEAN,
    RUNNING_VAR,
    MEANS,
    PIVOTS,
    SQUARES,
    A,
    S,
    tile,
    shares,
    R,
    D,
    C,
    SAMPLES,
    eps: tl.float64,
    momentum: tl.float64,
    K: tl.constexpr,
    SETS: tl.constexpr,
    PDL: tl.constexpr,
):
    """SETS statistics a program, of R parts of D channels each: mean and rstd; VAR (unbiased), running ones if given."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    outer, sets = sets_of_program(first_program().to(tl.int32), C, D, SETS)
    mask = sets < C // D
    mean, squares, count = combined_moments(MEANS, PIVOTS, SQUARES, outer, sets, A, S, tile, shares, R, D, C, SAMPLES, K)
    where = outer.to(tl.int64) * (C // D) + sets
    tl.store(MEAN + where, mean.to(MEAN.dtype.element_ty), mask=mask)
    tl.store(RSTD + where, tl.rsqrt(squares / count + eps).to(RSTD.dtype.element_ty), mask=mask)
    unbiased = squares / (count - 1.0)
    if VAR is not None:
        tl.store(VAR + where, unbiased, mask=mask)
    update_running(RUNNING_MEAN, sets, mean, momentum, mask)
    update_running(RUNNING_VAR, sets, unbiased, momentum, mask)
