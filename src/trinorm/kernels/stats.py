"""Mean and rstd of rows: centred, fp32 (fp64 for fp64), and right where a square overflows or underflows.

That is: as long as mean, rstd and every distance from the mean are numbers of fp32 themselves (|x| up to 1.7e38).

``rstd = (power + eps)^-1/2``, with ``power`` the variance about the mean (CENTER, LayerNorm) or the mean square
(RMSNorm). A power that fp32 cannot hold (x beyond 1e19, or below 1e-15 with eps 0) is taken again over the row times a
power of two that brings its largest element to 1..2: exact, and off the common path behind one comparison.
"""

import triton
import triton.language as tl

from .index import chunk_columns, columns_live, is_interpreted, load, rounded_up, widened

# Squares sum safely inside these: far from fp32's overflow, and far enough from its denormals that no digit is lost.
TRUSTED_MIN: tl.constexpr = tl.constexpr(1e-30)
TRUSTED_MAX: tl.constexpr = tl.constexpr(3e38)

# So many neighbours are a group, whose own moments come first: what a thread loads at once of 16-bit numbers.
_GROUP: tl.constexpr = tl.constexpr(8)

# Groups are merged two at a time: so often between the lanes of a warp, and from there on in every thread.
_STEPS_IN_WARP: tl.constexpr = tl.constexpr(5)
_LANES: tl.constexpr = tl.constexpr(1 << _STEPS_IN_WARP.value)


@triton.jit
def mean_of(total, N: tl.constexpr):
    """total / N correctly rounded: a product with 1/N and, where that is rounded, one step of correction.

    ``/`` on fp32 is an approximation, and an exact division a slow path in the machine code.
    """
    quotient = total * (1.0 / N)
    if N & (N - 1) == 0:
        return quotient
    else:
        residual = tl.fma(quotient, tl.full(total.shape, -N, total.dtype), total)
        mean = tl.fma(residual, tl.full(total.shape, 1.0 / N, total.dtype), quotient)
        return tl.where(mean == mean, mean, quotient)  # an infinite quotient leaves no residual but NaN


@triton.jit
def row_sum(x):
    """The sum of each row of a tile, ``[ROWS, 1]``."""
    return tl.sum(x, axis=1, keep_dims=True)


@triton.jit
def row_sums(x, y):
    """``row_sum`` of two tiles at once: one exchange between warps where two calls take two."""
    sums = tl.sum(tl.join(x, y), axis=1, keep_dims=True)
    return tl.split(sums)


@triton.jit
def add_to_sum(total, lost, x, PRECISE: tl.constexpr):
    """(total + x, lost). PRECISE: lost has also what rounding left out of that, by Knuth's two-sum (The Art of Computer
    Programming, volume 2, 4.2.2).
    """
    new = total + x
    if PRECISE:
        gained = new - total
        lost += (total - (new - gained)) + (x - gained)
    return new, lost


@triton.jit
def row_sum_with_lost(total, lost, PRECISE: tl.constexpr):
    """The sum of each row of what ``add_to_sum`` made, PRECISE ones in fp64. A sum that is not finite has lost nothing."""
    if PRECISE:
        return row_sum(total.to(tl.float64) + tl.where(tl.abs(lost) < float("inf"), lost, 0.0).to(tl.float64))
    else:
        return row_sum(total)


@triton.jit
def trusted(power):
    """Where fp32 held ``power`` (eps included) to full precision. False for NaN."""
    return (power >= TRUSTED_MIN) & (power <= TRUSTED_MAX)


@triton.jit
def power_of_two_below(largest):
    """The power of two under ``largest`` (>= 0), within 2^±126 (fp64: 2^±1022) so that its reciprocal is normal too."""
    if largest.dtype == tl.float64:
        unit = (largest.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
        return tl.minimum(tl.maximum(unit, 2.2250738585072014e-308), 4.49423283715579e307)
    else:
        exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
        unit = exponent.to(tl.float32, bitcast=True)
        return tl.minimum(tl.maximum(unit, 1.1754943508222875e-38), 8.507059173023462e37)


@triton.constexpr_function
def sums_exactly(dtype, N, ACC):
    """Whether the sum of up to N equal numbers of ``dtype`` is exact in ACC, and with it the mean of a row of them.

    k·v has as many significant bits as v and k together. True of bf16 up to 65536 columns and of fp16 up to 8192.
    """
    return dtype.fp_mantissa_width + (N - 1).bit_length() <= ACC.fp_mantissa_width


@triton.jit
def settled(mean, power, drift, N: tl.constexpr):
    """(mean, power) without what rounding left in the mean: the mean of the distances from it, whose sum is ``drift``.

    Else a row of equal values would have a deviation, which a small eps blows up. Not needed where ``sums_exactly``. The
    distances from an infinite mean are no numbers; that mean stands.
    """
    shift = mean_of(drift, N)
    return tl.where(shift == shift, mean + shift, mean), power - shift * shift


@triton.jit
def held_moments(xs, N: tl.constexpr, CENTER: tl.constexpr, ACC: tl.constexpr):
    """(mean, power), each ``[ROWS, 1]``, of rows held as chunks: the mean first, then the squares about it. mean is 0
    without CENTER.
    """
    ROWS: tl.constexpr = xs[0].shape[0]
    CHUNK: tl.constexpr = xs[0].shape[1]
    SETTLE: tl.constexpr = CENTER and not sums_exactly(xs[0].dtype, N, ACC)
    mean = tl.zeros([ROWS, 1], ACC)
    if CENTER:
        total = tl.zeros([ROWS, CHUNK], ACC)
        for i in tl.static_range(len(xs)):
            total += widened(xs[i], ACC)
        mean = mean_of(row_sum(total), N)
    squares = tl.zeros([ROWS, CHUNK], ACC)
    drift = tl.zeros([ROWS, CHUNK], ACC)
    for i in tl.static_range(len(xs)):
        x = widened(xs[i], ACC)
        if CENTER:
            live = columns_live(chunk_columns(i * CHUNK, CHUNK), (i + 1) * CHUNK, N)
            x = tl.where(live, x - mean, 0.0)
        if SETTLE:
            drift += x
        squares += x * x
    if SETTLE:
        squared, moved = row_sums(squares, drift)
        return settled(mean, mean_of(squared, N), moved, N)
    else:
        return mean, mean_of(row_sum(squares), N)


@triton.constexpr_function
def steps_to_one(parts):
    """How often so many, a power of two, are halved until one is left."""
    return (parts - 1).bit_length()


@triton.jit
def two_by_two(x):
    """Neighbours beside each other, ``[ROWS, COLUMNS / 2, 2]``."""
    return tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2])


@triton.jit
def group_sum(x):
    """The sum of each group of a tile, ``[ROWS, GROUPS]``, as a tree too: a thread's elements wait for each other less."""
    for _ in tl.static_range(steps_to_one(_GROUP)):
        x = tl.sum(two_by_two(x), axis=2)
    return x


@triton.jit
def neighbours(x, y):
    """x and y of every other column, then of those between. What is in other warps comes in one exchange, of both."""
    both = tl.reshape(tl.join(x, y), [x.shape[0], x.shape[1] // 2, 2, 2])
    left, right = tl.split(tl.permute(both, [0, 1, 3, 2]))
    x_left, y_left = tl.split(left)
    x_right, y_right = tl.split(right)
    return x_left, y_left, x_right, y_right


@triton.jit
def as_scalar(x):
    """x of one element as a scalar has it, without a layout: else the compiler makes it anew for each that is asked for,
    exchanges and all.
    """
    return tl.full(x.shape, tl.sum(tl.reshape(x, [1]), axis=0), x.dtype) if x.numel == 1 else x


@triton.jit
def merge(total, squares, other_total, other_squares):
    """(total, squares) of two groups of one size together. The squares about a group's mean are here times its size n, so
    that n appears nowhere: ``2n·(s + s' + (t - t')²/2n) = 2·(n·s + n·s') + (t - t')²``, by Chan's rule.
    """
    apart = total - other_total
    return total + other_total, apart * apart + (squares * 2.0 + other_squares * 2.0)


@triton.jit
def group_moments(xs, ACC: tl.constexpr):
    """(total, sum of squares about the mean) of each group of columns, over all chunks, ``[ROWS, GROUPS]``: of a thread's
    own elements, as a rule, so that nothing is exchanged.
    """
    ROWS: tl.constexpr = xs[0].shape[0]
    CHUNK: tl.constexpr = xs[0].shape[1]
    total = widened(xs[0], ACC)
    for i in tl.static_range(1, len(xs)):
        total += widened(xs[i], ACC)
    total = group_sum(total)
    center = mean_of(total, len(xs) * _GROUP)[:, :, None]
    squares = tl.zeros([ROWS, CHUNK], ACC)
    for i in tl.static_range(len(xs)):
        in_groups = tl.reshape(widened(xs[i], ACC), [ROWS, CHUNK // _GROUP, _GROUP])
        distance = tl.reshape(in_groups - center, [ROWS, CHUNK])
        squares = distance * distance if i == 0 else squares + distance * distance
    return total, group_sum(squares)


@triton.jit
def merged_groups(xs, ACC: tl.constexpr):
    """(total, N times the sum of squares about the mean) of rows: each thread takes the moments of its own elements,
    centred, and these are merged two by two, as a tree: within warps by shuffles, then by every thread alike.
    """
    total, squares = group_moments(xs, ACC)
    squares *= len(xs) * _GROUP
    for step in tl.static_range(steps_to_one(total.shape[1])):
        # A reduction of two, as that of more promises no tree. The interpreter takes them one by one.
        if step < _STEPS_IN_WARP and not is_interpreted():
            total, squares = tl.reduce((two_by_two(total), two_by_two(squares)), axis=2, combine_fn=merge)
        else:
            left_total, left_squares, right_total, right_squares = neighbours(total, squares)
            total, squares = merge(left_total, left_squares, right_total, right_squares)
    return total, squares


@triton.jit
def summed_squares(xs, ACC: tl.constexpr):
    """The sum of squares of rows, likewise: each warp's own, and then all of these by every thread."""
    x = widened(xs[0], ACC)
    squares = x * x
    for i in tl.static_range(1, len(xs)):
        x = widened(xs[i], ACC)
        squares += x * x
    squares = group_sum(squares)
    lanes: tl.constexpr = min(_LANES, squares.shape[1])
    squares = tl.sum(tl.reshape(squares, [squares.shape[0], squares.shape[1] // lanes, lanes]), axis=2)
    for _ in tl.static_range(steps_to_one(squares.shape[1])):
        left, right = tl.split(two_by_two(squares))
        squares = left + right
    return squares


@triton.jit
def pairwise_moments(xs, N: tl.constexpr, CENTER: tl.constexpr, ACC: tl.constexpr):
    """(mean, power) of rows held as full chunks, as ``held_moments`` has them, by one barrier where that has two for each
    exchange between warps, and two exchanges with CENTER.

    Of no use to LayerNorm where the sum of equal numbers is not exact, nor where a chunk is not full: groups of several
    sizes have counts to be exchanged, and more instructions than they save.
    """
    tl.static_assert(rounded_up(N, xs[0].shape[1]) == N)
    if CENTER:
        total, squares = merged_groups(xs, ACC)
        return mean_of(as_scalar(total), N), mean_of(as_scalar(squares), N * N)
    else:
        return tl.zeros([xs[0].shape[0], 1], ACC), mean_of(as_scalar(summed_squares(xs, ACC)), N)


@triton.jit
def add_to_moments(mean, squares, step, x, live, CENTER: tl.constexpr):
    """(mean, squares, step) of each lane with one x more, where it is live: by Welford's recurrence, or plain squares."""
    if CENTER:
        step += 1.0
        delta = x - mean
        mean += tl.where(live, delta * (1.0 / step), 0.0)
        squares += tl.where(live, delta * (x - mean), 0.0)
    else:
        squares += x * x
    return mean, squares, step


@triton.jit
def columns_of_lanes(steps, N: tl.constexpr, CHUNK: tl.constexpr):
    """How many columns each lane saw in so many steps: all chunks have it, but perhaps the last."""
    last = columns_live(chunk_columns(rounded_up(N, CHUNK) - CHUNK, CHUNK), rounded_up(N, CHUNK), N)
    return steps - tl.where(last, tl.zeros([1, CHUNK], steps.dtype), 1.0)


@triton.jit
def streamed_moments(
    row, N: tl.constexpr, CENTER: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, exists=True, stride=1
):
    """(mean, power), each ``[ROWS, 1]``, in one reading of the rows at the pointers ``row``.

    exists: which of them there are. stride: from a column to the next.
    With CENTER each lane runs Welford's recurrence over its own columns, and the lanes are merged once at the end by
    Chan's rule: no statistic crosses lanes inside the loop.
    """
    mean = tl.zeros([row.shape[0], CHUNK], ACC)
    squares = tl.zeros([row.shape[0], CHUNK], ACC)
    step = tl.zeros([1, 1], ACC)
    for start in tl.range(0, N, CHUNK):
        columns = chunk_columns(start, CHUNK)
        live = columns_live(columns, rounded_up(N, CHUNK), N)
        x = widened(load(row + columns * stride, live & exists), ACC)
        mean, squares, step = add_to_moments(mean, squares, step, x, live, CENTER)
    row_mean, power = merged_lanes(mean, squares, columns_of_lanes(step, N, CHUNK), N, CENTER)
    if CENTER and tl.float64 == ACC:
        # The recurrence makes NaN of Inf. In fp32 the row is not trusted and its statistics are taken again anyway.
        if tl.max((row_mean != row_mean).to(tl.int32)) == 1:
            row_mean = tl.where(row_mean == row_mean, row_mean, streamed_mean(row, 1.0, N, ACC, CHUNK, exists, stride))
    return row_mean, power


@triton.jit
def streamed_mean(row, scale, N: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, exists=True, stride=1):
    """The mean of ``scale * x`` of the rows at the pointers ``row``: a plain sum, infinite where x is."""
    total = tl.zeros([row.shape[0], CHUNK], ACC)
    for start in tl.range(0, N, CHUNK):
        columns = chunk_columns(start, CHUNK)
        live = columns_live(columns, rounded_up(N, CHUNK), N)
        total += widened(load(row + columns * stride, live & exists), ACC) * scale
    return mean_of(row_sum(total), N)


@triton.jit
def merged_lanes(mean, squares, count, N: tl.constexpr, CENTER: tl.constexpr):
    """Chan's rule over lanes: (mean, power) of a whole row from each lane's mean, sum of squares and count."""
    row_mean = tl.zeros([mean.shape[0], 1], mean.dtype)
    if CENTER:
        row_mean = mean_of(row_sum(mean * count), N)
        # What rounding left in row_mean is the weighted mean of the lanes' distances from it.
        row_mean += mean_of(row_sum((mean - row_mean) * count), N)
        shift = mean - row_mean
        squares += shift * shift * count
    return row_mean, mean_of(row_sum(squares), N)


@triton.jit
def largest_of(row, N: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, exists=True, stride=1):
    """max |x| of the rows at the pointers ``row``."""
    largest = tl.zeros([row.shape[0], CHUNK], ACC)
    for start in tl.range(0, N, CHUNK):
        columns = chunk_columns(start, CHUNK)
        live = columns_live(columns, rounded_up(N, CHUNK), N)
        largest = tl.maximum(largest, tl.abs(widened(load(row + columns * stride, live & exists), ACC)))
    return tl.max(largest, axis=1, keep_dims=True)


@triton.jit
def rescued_stats(
    row, eps, N: tl.constexpr, CENTER: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, exists=True, stride=1
):
    """(mean, rstd) of rows whose squares leave fp32's range: of a row scaled by a power of two, scaled back.

    eps has a say in the scale, so that it stays within the range too.

    It is rare, so it takes three plain readings: the largest element, the mean, the squares.
    """
    unit = power_of_two_below(tl.maximum(largest_of(row, N, ACC, CHUNK, exists, stride), tl.sqrt(eps)))
    scale = 1.0 / unit
    mean = tl.zeros([row.shape[0], 1], ACC)
    if CENTER:
        mean = streamed_mean(row, scale, N, ACC, CHUNK, exists, stride)
    squares = tl.zeros([row.shape[0], CHUNK], ACC)
    drift = tl.zeros([row.shape[0], CHUNK], ACC)
    for start in tl.range(0, N, CHUNK):
        columns = chunk_columns(start, CHUNK)
        live = columns_live(columns, rounded_up(N, CHUNK), N)
        x = tl.where(live, widened(load(row + columns * stride, live & exists), ACC) * scale - mean, 0.0)
        squares += x * x
        drift += x
    power = mean_of(row_sum(squares), N)
    if CENTER:
        mean, power = settled(mean, power, row_sum(drift), N)
    # Where nothing deviates eps alone is left, and its share of the scaled sum may be below fp32.
    rstd = tl.where(power == 0.0, tl.rsqrt(eps), tl.rsqrt(power + eps * scale * scale) * scale)
    return mean * unit, rstd
