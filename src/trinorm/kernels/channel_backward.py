"""Channel norms, backward. With g = dy·w, x̂ = (x - mean)·rstd, and means taken over the elements of a statistic:

    dx = rstd·(g - x̂·c1 - c2),   c1 = mean(g·x̂),   c2 = mean(g)
    dw = Σ dy·x̂,                 db = Σ dy           over all elements of a channel

Where the statistics are given (BatchNorm's running ones) they have no derivative: dx = rstd·g.

- ``channel_sums``              Σ dy·x̂ and Σ dy of each channel in a slab of positions (or of samples)
- ``channel_combine_backward``  of these, dw and db of each channel, c1 and c2 of each statistic, in a fixed order
- ``channel_apply_backward``    dx, in a second reading of x and dy

Tiles, slabs and partials are channel.py's.
"""

import triton
import triton.language as tl

from .affine import NO_WEIGHT, affine_backward
from .channel import partials_of, sets_of_program
from .channel_tiles import (
    inner_in_units,
    lanes_there,
    load_channel_stats,
    load_parameter,
    statistics_of,
    store_partial,
    tile_of_program,
    walk_of_program,
)
from .index import first_program, load, widened
from .overlap import let_next_launch, wait_for_previous
from .row_backward import dx_of, normalized
from .stats import row_sum


@triton.jit(do_not_specialize=["A", "width", "S", "slab", "slabs", "C", "D"])
def channel_sums(
    DY_XHAT,
    DY_SUM,
    DY,
    X,
    MEAN,
    RSTD,
    A,
    width,
    S,
    slab,
    slabs,
    C,
    D,
    eps: tl.float64,
    GROUPED: tl.constexpr,
    VARIANCE: tl.constexpr,
    LAST: tl.constexpr,
    UNIT: tl.constexpr,
    SAMPLES: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A block of ROWS channels a program, as channel_moments. DY_XHAT, DY_SUM: ``[parts, width]``; one may be None."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    width, S = inner_in_units(width, S, LAST, UNIT)
    part, sample, channels, live, walk = walk_of_program(A, width, S, slab, slabs, LAST, UNIT, SAMPLES, ROWS, POSITIONS)
    first, step, steps, there = walk
    sets = statistics_of(sample, channels, width, C, D, GROUPED)
    mean, rstd = load_channel_stats(MEAN, RSTD, sets, live, eps, VARIANCE, ACC)
    dy_xhat = tl.zeros([ROWS, POSITIONS], ACC)
    dy_sum = tl.zeros([ROWS, POSITIONS], ACC)
    for i in tl.range(0, steps):
        mask = live & lanes_there(i, there, SAMPLES, POSITIONS)
        dy = widened(load(DY + first + i * step, mask), ACC)
        if DY_XHAT is not None:
            x = load(X + first + i * step, mask)
            dy_xhat += tl.where(mask, dy * normalized(x, mean, rstd, ACC), 0.0)
        if DY_SUM is not None:
            dy_sum += dy
    if DY_XHAT is not None:
        store_partial(DY_XHAT, part, width, channels, row_sum(dy_xhat), live)
    if DY_SUM is not None:
        store_partial(DY_SUM, part, width, channels, row_sum(dy_sum), live)


@triton.jit
def summed_partials(PARTIALS, W, outer, sets, R, D, C, weights, K: tl.constexpr):
    """Σ w·partial of some statistics, ``[1, SETS]`` and fp64. weights: of how many channels W is."""
    total = tl.zeros([K, sets.shape[1]], tl.float64)
    for start in tl.range(0, R * D, K):
        _, offsets, live = partials_of(start, outer, sets, R, D, C, K)
        channels = sets * D + (start + tl.arange(0, K)[:, None]) % D
        w = load_parameter(W, channels, weights, live, NO_WEIGHT)
        total += load(PARTIALS + offsets, live).to(tl.float64) * w.to(tl.float64)
    return tl.sum(total, axis=0, keep_dims=True)


@triton.jit
def combine_channels(OUT, MEANS, PARTIALS, W, program, parts, C, size: tl.float64, K: tl.constexpr, SETS: tl.constexpr):
    """The sum over all parts of SETS channels: OUT, dw or db; and MEANS, c1 or c2 of it where those are a channel's."""
    _, channels = sets_of_program(program, C, 1, SETS)
    mask = channels < C
    total = summed_partials(PARTIALS, None, program * 0, channels, parts, 1, C, C, K)
    if OUT is not None:
        tl.store(OUT + channels, total.to(OUT.dtype.element_ty), mask=mask)
    if MEANS is not None:
        w = load_parameter(W, channels, C, mask, NO_WEIGHT).to(tl.float64)
        tl.store(MEANS + channels, (total * w / size).to(MEANS.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R", "D", "width", "parts", "C", "set_programs"])
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
    width,
    parts,
    C,
    set_programs,
    size: tl.float64,
    GROUPED: tl.constexpr,
    K: tl.constexpr,
    SETS: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first ``set_programs`` programs make c1 and c2 of SETS groups each, K partials at a time; the others dw
    and db of CHANNELS channels, PARTS at a time.

    Without GROUPED c1 and c2 are the channels', and come with dw and db. Of partials ``[?, R, width]`` a group has R parts
    of D channels; seen as ``[parts, C]``, a channel has all. size: elements of a statistic.
    """
    wait_for_previous(PDL)
    let_next_launch(PDL)
    program = first_program().to(tl.int32)
    if program < set_programs:
        if GROUPED:
            outer, sets = sets_of_program(program, width, D, SETS)
            mask = sets < width // D
            where = outer.to(tl.int64) * (width // D) + sets
            if C1 is not None:
                c1 = summed_partials(DY_XHAT, W, outer, sets, R, D, width, C, K) / size
                tl.store(C1 + where, c1.to(C1.dtype.element_ty), mask=mask)
                c2 = summed_partials(DY_SUM, W, outer, sets, R, D, width, C, K) / size
                tl.store(C2 + where, c2.to(C2.dtype.element_ty), mask=mask)
    else:
        program -= set_programs
        if DY_XHAT is not None:
            combine_channels(DW, None if GROUPED else C1, DY_XHAT, W, program, parts, C, size, PARTS, CHANNELS)
        if DY_SUM is not None:
            combine_channels(DB, None if GROUPED else C2, DY_SUM, W, program, parts, C, size, PARTS, CHANNELS)


@triton.jit(do_not_specialize=["width", "S", "slabs", "C", "D"])
def channel_apply_backward(
    DX,
    DY,
    X,
    MEAN,
    RSTD,
    C1,
    C2,
    W,
    width,
    S,
    slabs,
    C,
    D,
    eps: tl.float64,
    GROUPED: tl.constexpr,
    VARIANCE: tl.constexpr,
    LAST: tl.constexpr,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile a program. C1 and C2 None: the statistics are constants, and x is not read."""
    wait_for_previous(PDL)
    let_next_launch(PDL)
    width, S = inner_in_units(width, S, LAST, UNIT)
    sample, channels, live, offsets, mask = tile_of_program(width, S, slabs, LAST, ROWS, POSITIONS)
    dy = widened(load(DY + offsets, mask), ACC)
    sets = statistics_of(sample, channels, width, C, D, GROUPED)
    w = load_parameter(W, channels, C, live, NO_WEIGHT)
    g = affine_backward(dy, w, 0.0)
    if C1 is None:
        rstd = load(RSTD + sets, live).to(ACC)
        if VARIANCE:
            rstd = tl.rsqrt(rstd + tl.full([1, 1], eps, ACC))
        dx = rstd * g
    else:
        x = load(X + offsets, mask)
        mean, rstd = load_channel_stats(MEAN, RSTD, sets, live, eps, VARIANCE, ACC)
        c1, c2 = load(C1 + sets, live), load(C2 + sets, live)
        dx = dx_of(g, normalized(x, mean, rstd, ACC), rstd, c1, c2, True)
    tl.store(DX + offsets, dx.to(DX.dtype.element_ty), mask=mask)
