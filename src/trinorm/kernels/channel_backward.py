"""Channel norms, backward. With g = dy·w, x̂ = (x - mean)·rstd, and means taken over the elements of a statistic:

    dx = rstd·(g - x̂·c1 - c2),   c1 = mean(g·x̂),   c2 = mean(g)
    dw = Σ dy·x̂,                 db = Σ dy           over all elements of a channel

Where the statistics are given (BatchNorm's running ones) they have no derivative: dx = rstd·g. Behind an activation dy is
dL/dz, made of y's own gradient wherever it is read.

- ``channel_sums``              Σ dy·x̂ and Σ dy of each channel in a share of the positions (or of samples)
- ``channel_combine_backward``  of these, dw and db of each channel, c1 and c2 of each statistic, in a fixed order
- ``channel_apply_backward``    dx, in a second reading of x and dy

Tiles, shares and partials are channel.py's.
"""

import triton
import triton.language as tl

from .activation import through_activation
from .affine import NO_WEIGHT, affine_backward
from .channel_combine import channels_of, partials_of, sets_of_program, sums_of_both
from .channel_tiles import (
    inner_in_units,
    lanes_there,
    last_ones_first,
    load_channel_stats,
    load_parameters,
    statistics_of,
    store_partial,
    walk_of_program,
)
from .index import first_program, load, load_once, load_or, store_once, widened, widened_anew
from .overlap import let_next_launch, wait_for_previous
from .row_backward import dx_of, normalized
from .stats import add_to_sum, row_sum_with_lost


@triton.jit
def gradient_of(
    dy,
    x,
    RESIDUAL,
    DZ,
    offsets,
    mask,
    mean,
    rstd,
    w,
    b,
    ACTIVATION: tl.constexpr,
    RAGGED: tl.constexpr,
    ACC: tl.constexpr,
):
    """(dL/dz, x̂) of a tile of dy and x as they came, 0 past the mask. DZ: where dL/dz goes, or None."""
    xhat = normalized(x, mean, rstd, ACC)
    dz = through_activation(widened(dy, ACC), xhat, w, b, RESIDUAL, offsets, mask, ACTIVATION)
    if RAGGED:  # where there is no element x̂ may be infinite
        dz, xhat = tl.where(mask, dz, 0.0), tl.where(mask, xhat, 0.0)
    if DZ is not None:
        tl.store(DZ + offsets, dz.to(DZ.dtype.element_ty), mask=mask)
    return dz, xhat


@triton.jit
def gradient_again(dy, x, dz, mean, rstd, ACTIVATION: tl.constexpr, ACC: tl.constexpr):
    """gradient_of's results once more, of dy and x that a program holds; behind an activation dz is held itself. Widened by
    other means than the first time, so that the compiler holds them as they came, in half the registers.
    """
    if ACTIVATION is None:
        dz = dy.to(ACC) if dy.dtype == tl.bfloat16 else widened_anew(dy, ACC)
    return dz, (widened_anew(x, ACC) - mean) * rstd


@triton.jit(do_not_specialize=["A", "width", "S", "shares", "C", "D"])
def channel_sums(
    DY_XHAT,
    DY_SUM,
    DZ,
    DY,
    X,
    MEAN,
    RSTD,
    W,
    B,
    RESIDUAL,
    A,
    width,
    S,
    shares,
    C,
    D,
    eps: tl.float64,
    GROUPED: tl.constexpr,
    VARIANCE: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    SAMPLES: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """A block of ROWS channels a program, as channel_moments. DY_XHAT, DY_SUM: ``[parts, width]``; one may be None, or both
    where DZ is there: dL/dz of x's shape, which is a residual's gradient, and what channel_apply_backward then takes for
    dL/dy.
    """
    wait_for_previous(PDL)
    let_next_launch(PDL)
    width, S = inner_in_units(width, S, LAST, UNIT)
    program = first_program().to(tl.int32)
    part, sample, channels, live, walk = walk_of_program(
        program, A, width, S, shares, LAST, UNIT, EVEN, SAMPLES, ROWS, POSITIONS
    )
    first, step, steps, left, pace = walk
    sets = statistics_of(sample, channels, width, C, D, LAST, GROUPED)
    mean, rstd = load_channel_stats(MEAN, RSTD, sets, live, eps, VARIANCE, ACC)
    if ACTIVATION is not None:
        w, b = load_parameters(W, B, sample, channels, width, C, live, LAST, PER_SAMPLE)
    else:
        w, b = None, None
    # A walk's plain fp32 sums are 2.5 times as far off as torch's (64x256x56x56): more than 16-bit numbers can tell.
    PRECISE: tl.constexpr = X.dtype.element_ty.primitive_bitwidth > 16
    dy_xhat, dy_xhat_lost = tl.zeros([ROWS, POSITIONS], ACC), tl.zeros([ROWS, POSITIONS], ACC)
    dy_sum, dy_sum_lost = tl.zeros([ROWS, POSITIONS], ACC), tl.zeros([ROWS, POSITIONS], ACC)
    for i in tl.range(0, steps, num_stages=STAGES):
        offsets = first + i * step
        mask = live & lanes_there(i, left, pace, EVEN, POSITIONS)
        dy = widened(load(DY + offsets, mask), ACC)
        if DY_XHAT is not None or ACTIVATION is not None:
            xhat = normalized(load(X + offsets, mask), mean, rstd, ACC)
            dy = through_activation(dy, xhat, w, b, RESIDUAL, offsets, mask, ACTIVATION)
            dy_xhat, dy_xhat_lost = add_to_sum(dy_xhat, dy_xhat_lost, tl.where(mask, dy * xhat, 0.0), PRECISE)
        if DZ is not None:
            tl.store(DZ + offsets, dy.to(DZ.dtype.element_ty), mask=mask)
        if DY_SUM is not None:
            dy_sum, dy_sum_lost = add_to_sum(dy_sum, dy_sum_lost, tl.where(mask, dy, 0.0), PRECISE)
    if DY_XHAT is not None:
        store_partial(DY_XHAT, part, width, channels, row_sum_with_lost(dy_xhat, dy_xhat_lost, PRECISE), live)
    if DY_SUM is not None:
        store_partial(DY_SUM, part, width, channels, row_sum_with_lost(dy_sum, dy_sum_lost, PRECISE), live)


@triton.jit
def summed_partials(DY_XHAT, DY_SUM, W, outer, sets, R, D, bits, G, weights, K: tl.constexpr, ONCE: tl.constexpr):
    """(Σ w·Σ dy·x̂, Σ w·Σ dy) of some statistics, ``[1, SETS]`` and fp64; 0 for what is None. weights: how many W has; each
    sample's follow the last's.
    """
    of_x = tl.zeros([K, sets.shape[1]], tl.float64)
    of_1 = tl.zeros([K, sets.shape[1]], tl.float64)
    from_sample = G * D if weights > G * D else 0
    first = outer.to(tl.int64) * from_sample + sets * D % weights
    for start in tl.range(0, K if ONCE else R << bits, K):
        _, channel, offsets, live = partials_of(start, outer, sets, R, D, bits, G, K)
        w = load_or(W, first + channel, live, NO_WEIGHT, False).to(tl.float64)
        if DY_XHAT is not None:
            of_x += load(DY_XHAT + offsets, live).to(tl.float64) * w
        if DY_SUM is not None:
            of_1 += load(DY_SUM + offsets, live).to(tl.float64) * w
    return sums_of_both(of_x, of_1)


@triton.jit
def store_sums(FIRST, SECOND, where, first, second, mask):
    """Each where it is asked for, in its tensor's dtype."""
    if FIRST is not None:
        tl.store(FIRST + where, first.to(FIRST.dtype.element_ty), mask=mask)
    if SECOND is not None:
        tl.store(SECOND + where, second.to(SECOND.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R", "D", "bits", "G", "parts", "C", "weights", "set_programs"])
def channel_combine_backward(
    DW,
    DB,
    C1,
    C2,
    DY_XHAT,
    DY_SUM,
    W,
    R,
    D,
    bits,
    G,
    parts,
    C,
    weights,
    set_programs,
    share: tl.float64,
    GROUPED: tl.constexpr,
    SINGLE: tl.constexpr,
    K: tl.constexpr,
    SETS: tl.constexpr,
    ONCE: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first ``set_programs`` programs make c1 and c2 of SETS groups each, K partials at a time; the others dw
    and db of CHANNELS channels, PARTS at a time. SINGLE, ONCE: as channel_combine's; PARTS_ONCE: of the others.

    Without GROUPED c1 and c2 are the channels', and come with dw and db. Of partials ``[?, R, G·D]`` a group has R parts
    of D channels; seen as ``[?, parts, C]``, a channel has ``parts``, and there are as many of dw and db as of those C.
    weights: how many there are of W. share: 1 over the elements of a statistic.
    """
    wait_for_previous(PDL)
    let_next_launch(PDL)
    program = first_program().to(tl.int32)
    if program < set_programs:
        if GROUPED:
            D, bits = channels_of(D, bits, SINGLE)
            outer, sets = sets_of_program(program, G, SETS)
            c1, c2 = summed_partials(DY_XHAT, DY_SUM, W, outer, sets, R, D, bits, G, weights, K, ONCE)
            store_sums(C1, C2, outer.to(tl.int64) * G + sets, c1 * share, c2 * share, sets < G)
    else:
        outer, channels = sets_of_program(program - set_programs, C, CHANNELS)
        mask = channels < C
        where = outer.to(tl.int64) * C + channels
        dw, db = summed_partials(DY_XHAT, DY_SUM, None, outer, channels, parts, 1, 0, C, C, PARTS, PARTS_ONCE)
        store_sums(DW, DB, where, dw, db, mask)
        if not GROUPED:
            w = load_or(W, where, mask, NO_WEIGHT, False).to(tl.float64)
            store_sums(C1, C2, where, dw * w * share, db * w * share, mask)


@triton.jit(do_not_specialize=["width", "S", "shares", "C", "D"])
def channel_apply_backward(
    DX,
    DY,
    X,
    MEAN,
    RSTD,
    C1,
    C2,
    W,
    B,
    width,
    S,
    shares,
    C,
    D,
    eps: tl.float64,
    GROUPED: tl.constexpr,
    VARIANCE: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STAGES: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):
    """As channel_apply. C1 and C2 None: the statistics are constants, and x is read for an activation alone."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    width, S = inner_in_units(width, S, LAST, UNIT)
    _, sample, channels, live, walk = walk_of_program(
        last_ones_first(), 0, width, S, shares, LAST, UNIT, EVEN, 1, ROWS, POSITIONS
    )
    first, step, steps, left, pace = walk
    sets = statistics_of(sample, channels, width, C, D, LAST, GROUPED)
    mean, rstd = load_channel_stats(MEAN, RSTD, sets, live, eps, VARIANCE, ACC)
    w, b = load_parameters(W, B, sample, channels, width, C, live, LAST, PER_SAMPLE)
    if C1 is not None:
        c1, c2 = load(C1 + sets, live), load(C2 + sets, live)
    else:
        c1, c2 = None, None
    for turn in tl.range(0, steps, num_stages=STAGES):
        i = steps - 1 - turn
        offsets = first + i * step
        mask = live & lanes_there(i, left, pace, EVEN, POSITIONS)
        dy = widened(load_once(DY + offsets, mask, STREAM), ACC)
        if C1 is None and ACTIVATION is None:
            dx = rstd * affine_backward(dy, w, 0.0)
        else:
            xhat = normalized(load_once(X + offsets, mask, STREAM), mean, rstd, ACC)
            dz = through_activation(dy, xhat, w, b, None, offsets, mask, ACTIVATION)
            g = affine_backward(dz, w, 0.0)
            dx = rstd * g if C1 is None else dx_of(g, xhat, rstd, c1, c2, True)
        store_once(DX + offsets, dx, mask, STREAM)
