"""What channel_moments found in parts, of a statistic's channels and shares of positions, as one: mean and rstd, and
running statistics. With the sums T of a channel's distances from its pivot p and Q of their squares, which parts add up,

    Σ (x - p₀) = Σ T + n·(p - p₀),    Σ (x - p₀)² = Σ Q + 2·(p - p₀)·T + n·(p - p₀)²     over channels of n elements
"""

import triton
import triton.language as tl

from .index import first_program, load
from .overlap import let_next_launch, wait_for_previous


@triton.jit
def partials_of(start, outer, sets, R, D, bits, G, K: tl.constexpr):
    """(part, channel of its statistic, offset, mask), each ``[K, SETS]`` or less, of K of the partials that some statistics
    are made of.

    A statistic has R parts of each of its D channels; partials are ``[outer, R, G·D]``. Each part has room for 2^bits
    channels: a shift takes the place of a division, and no D needs a binary of its own.
    """
    k = start + tl.arange(0, K)[:, None]
    part, channel = k >> bits, k & ((1 << bits) - 1)
    offsets = (outer.to(tl.int64) * R + part) * (G * D) + sets * D + channel
    return part, channel, offsets, (part < R) & (channel < D) & (sets < G)


@triton.jit
def channels_of(D, bits, SINGLE: tl.constexpr):
    """(D, bits), which the compiler knows of SINGLE channels: partials of statistics side by side are read together."""
    if SINGLE:
        return 1, 0
    else:
        return D, bits


@triton.jit
def sets_of_program(program, G, SETS: tl.constexpr):
    """(outer, statistics ``[1, SETS]`` of its G) of a program that combines partials."""
    blocks = tl.cdiv(G, SETS)
    return program // blocks, program % blocks * SETS + tl.arange(0, SETS)[None, :]


@triton.jit
def sums_of_both(x, y):
    """What the partials ``[K, SETS]`` of two sums add up to: one exchange between warps where each by itself takes one."""
    sums = tl.sum(tl.join(x, y), axis=0, keep_dims=True)
    return tl.split(sums)


@triton.jit
def combined_moments(
    TOTALS,
    SQUARES,
    PIVOTS,
    COUNTS,
    outer,
    sets,
    R,
    D,
    bits,
    G,
    n,
    share,
    SINGLE: tl.constexpr,
    K: tl.constexpr,
    ONCE: tl.constexpr,
):
    """(mean, sum of squares about it), each ``[1, SETS]`` and fp64. n: elements of a channel; share: 1 over those of a
    statistic. COUNTS: as channel_moments', and then parts are merged by Chan's rule, in a second reading.
    """
    pivots = PIVOTS + outer.to(tl.int64) * (G * D) + sets * D
    base = load(pivots, sets < G).to(tl.float64)
    total = tl.zeros([K, sets.shape[1]], tl.float64)
    squares = tl.zeros([K, sets.shape[1]], tl.float64)
    for start in tl.range(0, K if ONCE else R << bits, K):
        part, channel, offsets, live = partials_of(start, outer, sets, R, D, bits, G, K)
        of_part = load(TOTALS + offsets, live)
        if COUNTS is None:
            squares += load(SQUARES + offsets, live)
        if not SINGLE:
            shift = tl.where(live, load(pivots + channel, live).to(tl.float64) - base, 0.0)
            moved = tl.where(part == 0, n * shift, 0.0)  # once for each channel
            if COUNTS is None:
                squares += (2.0 * of_part + moved) * shift
            of_part += moved
        total += of_part
    if COUNTS is None:
        total, squares = sums_of_both(total, squares)
        mean = total * share
        squares -= mean * total
    else:
        mean = tl.sum(total, axis=0, keep_dims=True) * share
        for start in tl.range(0, K if ONCE else R << bits, K):
            part, channel, offsets, live = partials_of(start, outer, sets, R, D, bits, G, K)
            of_part = tl.load(COUNTS + outer.to(tl.int64) * R + part, mask=part < R, other=1.0)
            shift = load(TOTALS + offsets, live) / of_part + (load(pivots + channel, live) - base) - mean
            squares += load(SQUARES + offsets, live) + tl.where(live, of_part * shift * shift, 0.0)
        squares = tl.sum(squares, axis=0, keep_dims=True)
    return mean + base, tl.where(squares < 0.0, 0.0, squares)


@triton.jit
def update_running(RUNNING, sets, value, momentum, mask):
    """running·(1 - momentum) + value·momentum, in place."""
    if RUNNING is not None:
        running = load(RUNNING + sets, mask).to(tl.float64)
        kept = running * (1.0 - momentum) + value * momentum
        tl.store(RUNNING + sets, kept.to(RUNNING.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R", "D", "bits", "G"])
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
    bits,
    G,
    n: tl.float64,
    share: tl.float64,
    eps: tl.float64,
    momentum: tl.float64,
    SINGLE: tl.constexpr,
    K: tl.constexpr,
    SETS: tl.constexpr,
    ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """SETS of G statistics a program, of R parts of D channels each, of n elements: mean and rstd; VAR (unbiased), running
    ones if given. share: 1 over the elements of a statistic. SINGLE: D is 1. K partials at a time; ONCE: there are no more.
    """
    wait_for_previous(PDL)
    let_next_launch(PDL)
    D, bits = channels_of(D, bits, SINGLE)
    outer, sets = sets_of_program(first_program().to(tl.int32), G, SETS)
    mask = sets < G
    mean, squares = combined_moments(TOTALS, SQUARES, PIVOTS, COUNTS, outer, sets, R, D, bits, G, n, share, SINGLE, K, ONCE)
    where = outer.to(tl.int64) * G + sets
    tl.store(MEAN + where, mean.to(MEAN.dtype.element_ty), mask=mask)
    tl.store(RSTD + where, tl.rsqrt(squares * share + eps).to(RSTD.dtype.element_ty), mask=mask)
    unbiased = squares / (n * D - 1.0)
    if VAR is not None:
        tl.store(VAR + where, unbiased, mask=mask)
    update_running(RUNNING_MEAN, sets, mean, momentum, mask)
    update_running(RUNNING_VAR, sets, unbiased, momentum, mask)
