"""Runs every kernel once on small tensors, for a checker that watches memory: ``make sanitize``."""

from typing import Any

import torch
from torch import Tensor

from trinorm.forced import forced
from trinorm.formats import FORMATS, SCALE_LAYOUTS
from trinorm.ops import gated_sum
from trinorm.ops.hosts import (
    channel_layers,
    channels,
    conditioned_rows,
    dynamic_rows,
    gated_sum_rows,
    heads,
    poly_rows,
    quantized_rows,
    rows,
    weight_rows,
)
from trinorm.ops.poly import MOST_OF_ROW
from trinorm.ops.problems.conditioned import Conditioned
from trinorm.ops.problems.gated_sum import problem_of
from trinorm.ops.problems.quantized import Given, Quantizing
from trinorm.spec import (
    BATCH_NORM,
    DYNAMIC_NORMS,
    GROUP_NORM,
    INSTANCE_NORM,
    LAYER_NORM,
    RMS_NORM,
    ConditionedNorm,
    RowNorm,
)
from trinorm.tuning import (
    RowBackward,
    RowBackwardFew,
    RowBackwardSplit,
    RowBackwardWide,
    RowForward,
    RowForwardSplit,
    RowForwardWide,
    Tile,
)

HELD = RowForward(Tile(1, 512, 4), tiles=1, stream=True, preload=False, early=True, pairwise=True)
TILES = RowForward(Tile(4, 256, 4), tiles=2, stream=False, preload=True, early=True)
# (rows, columns, forward, backward); 1000 columns leave a ragged chunk.
CALLS = (
    (300, 1000, HELD, RowBackward(Tile(1, 512, 4), tiles=1, stages=3, per_sm=1, stream=True)),
    (301, 768, TILES, RowBackward(Tile(4, 256, 4), tiles=2, stages=3, per_sm=1, stream=False)),
    (37, 1000, HELD, RowBackwardFew(Tile(1, 1024, 4), sums=Tile(32, 32, 4))),
    (140, 4096, RowForwardSplit(Tile(1, 512, 4), 1024), RowBackwardSplit(Tile(1, 512, 4), 1024, stages=3, per_sm=1)),
    (20, 5000, RowForwardWide(Tile(1, 1024, 4)), RowBackwardWide(Tile(1, 1024, 4), stages=2, per_sm=4)),
)
# (norm, shape, groups): odd sizes of all kinds; more tiles than programs, so that some walk; one position.
IMAGES = (
    (GROUP_NORM, (3, 12, 7, 11), 4),
    (GROUP_NORM, (2, 96, 640, 321), 3),
    (INSTANCE_NORM, (5, 7, 13, 5), 7),
    (BATCH_NORM, (65, 33, 14, 14), 33),
    (BATCH_NORM, (3000, 130, 1, 1), 130),
    # Statistics that a program has whole: small ones, ragged tiles, tiles that divide.
    (GROUP_NORM, (70, 24, 9, 14), 6),
    (GROUP_NORM, (40, 20, 61, 57), 4),
    (INSTANCE_NORM, (5, 40, 64, 64), 40),
    # Held ones: several to a program, several runs.
    (INSTANCE_NORM, (5, 70, 9, 9), 70),
    (GROUP_NORM, (70, 24, 9, 8), 8),
    (BATCH_NORM, (9, 70, 14, 14), 70),
    (BATCH_NORM, (6, 80, 56, 56), 80),
    # Those of teams: ragged tiles, several runs to a tile, several tiles to a run.
    (GROUP_NORM, (3, 40, 61, 57), 2),
    (BATCH_NORM, (16, 70, 56, 56), 70),
    (INSTANCE_NORM, (3, 5, 256, 256), 5),
)


# LayerNorm over channels: one position a run, more tiles than programs, more channels than a program holds.
LAYERS = ((3, 13, 7, 7), (2, 96, 640, 321), (3, 4500, 8, 8))


# QK-norm: (tokens, query heads, key heads, elements of a head, how many are turned): ragged tiles of all kinds; enough of
# them that programs walk.
HEADS = ((1, 1, 1, 2, 2), (37, 6, 2, 80, 32), (700, 32, 8, 128, 128), (300, 7, 7, 96, 0), (5, 2, 1, 1000, 64))


# Conditioned norms: (sizes of x, sizes of its parameters before the last, elements of a row): ragged tiles of all kinds;
# sets of rows that programs share, walk and have alone.
CONDITIONED = (
    ((1, 1, 2), (1, 1), 2),
    ((3, 37, 80), (3, 1), 80),
    ((3, 700, 130), (1, 700), 130),
    ((5, 1000, 384), (), 128),
    ((2, 301, 1000), (2, 301), 1000),
    ((1, 3000, 1024), (), 1024),
    ((4, 50, 3072), (4, 1), 3072),
    ((2, 70, 8192), (), 8192),
    # Rows that no program holds: of a sample, of a group, of a token.
    ((2, 300, 8200), (2, 1), 8200),
    ((2, 70, 20002), (), 10001),
    ((1, 3, 65536), (1, 3), 65536),
)


# Norms with a quantized result: (rows, columns), ragged tiles and blocks, a row of several chunks.
QUANTIZED = ((37, 130), (300, 1000), (70, 8192))


# DyT and Derf, PolyNorm, weight normalization: rows and columns: ragged tiles of both; enough rows that programs walk.
ELEMENTS = ((1, 1), (37, 80), (3000, 130), (20000, 1000), (70, 8192), (5, 70001))


def main() -> None:
    norms_of_elements()
    conditioned_norms()
    gated_sums()
    quantized_norms()
    heads_norms()
    row_norms()
    channel_norms()
    channel_layer_norms()


def heads_norms() -> None:
    for tokens, of_query, of_key, n, turned in HEADS:
        packed, dy = (torch.randn(tokens, of_query + 2 * of_key, n, device="cuda").bfloat16() for _ in range(2))
        packed[::3] *= 1e30
        weight = torch.randn(n, device="cuda").bfloat16()
        angles = torch.rand(2, tokens, turned, device="cuda") if turned else (None, None)
        for interleaved, cast in ((False, "output"), (True, "llama")):
            query, key, _ = (heads.Side(t, weight) for t in packed.split((of_query, of_key, of_key), 1))
            rotation = heads.Rotation(*angles, interleaved)
            spec = RMS_NORM.with_cast(cast)
            _, _, *rstds = heads.forward(spec, query, key, 1e-6, rotation, save=True)
            dys = dy.split((of_query, of_key, of_key), 1)
            wanted = (heads.Wanted(*pair, True, True) for pair in zip(dys, rstds, strict=False))
            heads.backward(spec, query, key, *wanted, rotation)
            torch.cuda.synchronize()
            print("qk_norm", cast, tokens, of_query, of_key, n, turned, flush=True)


def norms_of_elements() -> None:
    for m, n in ELEMENTS:
        x, dy = torch.randn(2, m, n, device="cuda").bfloat16()
        x[::3] *= 1e30
        weight, bias = torch.randn(2, n, device="cuda").bfloat16()
        numbers = torch.rand(5, device="cuda").bfloat16()
        for spec in DYNAMIC_NORMS:
            inputs = dynamic_rows.Inputs(x, numbers[:1], numbers[1:2] if spec.shifted else None, weight, bias)
            dynamic_rows.forward(spec, 1, inputs)
            for wanted in ((True,) * 5, (True, *[False] * 4), (False, True, False, False, True)):
                dynamic_rows.backward(spec, 1, inputs, dy, wanted)
            torch.cuda.synchronize()
            print(spec.name, m, n, flush=True)
        if n <= MOST_OF_ROW:
            poly_rows.forward(1e-6, x, numbers[2:], numbers[:1])
            for of in ((True,) * 3, (True, False, False), (False, True, True)):
                poly_rows.backward(1e-6, of, dy, x, numbers[2:], numbers[:1])
            torch.cuda.synchronize()
            print("poly_norm", m, n, flush=True)
        for dim, g in ((0, torch.rand(m, 1, device="cuda").bfloat16()), (None, numbers[:1])):
            weight_rows.forward(dim, x, g)
            for both in ((True, True), (True, False), (False, True)):
                weight_rows.backward(dim, both, dy, x, g)
            torch.cuda.synchronize()
            print("weight_norm", dim, m, n, flush=True)


def conditioned_norms() -> None:
    for sizes, own, size in CONDITIONED:
        x, gate, dy = (torch.randn(sizes, device="cuda").bfloat16() for _ in range(3))
        x[..., ::3, :] *= 1e30
        weight, bias = torch.randn(2, *own, sizes[-1], device="cuda").bfloat16()
        for spec in (
            ConditionedNorm(LAYER_NORM, modulated=True),
            ConditionedNorm(RMS_NORM.with_cast("llama"), "silu"),
            ConditionedNorm(LAYER_NORM, "sigmoid", gate_first=True),
            *(relatives(size) if sizes[-1] == size else ()),
        ):
            problem = Conditioned(spec, 1, size, 1e-6, x.dtype)
            given = (weight, bias) if spec.gate or spec.modulated else (weight if spec.counted else None, None)
            inputs = conditioned_rows.Inputs(x, None if spec.gate is None else gate, *given)
            _, mean, rstd = conditioned_rows.forward(problem, inputs, save=True)
            assert rstd is not None
            for wanted in (tuple(t is not None for t in inputs), (True, False, False, False)):
                conditioned_rows.backward(problem, inputs, dy, mean, rstd, wanted)
            torch.cuda.synchronize()
            print("conditioned", spec.norm.name, spec.gate, spec.counted, *sizes, own, size, flush=True)


def gated_sums() -> None:
    for sizes, own, size in CONDITIONED:
        if sizes[-1] != size or size > gated_sum.MOST_OF_ROW:
            continue
        x, residual, dy, dsum = (torch.randn(sizes, device="cuda").bfloat16() for _ in range(4))
        residual[..., ::3, :] *= 1e30
        gate, weight, bias = torch.randn(3, *own, size, device="cuda").bfloat16()
        for spec in (ConditionedNorm(LAYER_NORM, modulated=True), ConditionedNorm(RMS_NORM)):
            problem = problem_of(Conditioned(spec, 1, size, 1e-6, x.dtype), x, residual)
            inputs: tuple[Any, ...] = (gate, weight, bias if spec.modulated else None)
            _, total, mean, rstd = gated_sum_rows.forward(problem, x, residual, *inputs, save=True)
            assert total is not None and rstd is not None
            for wanted, of_sum in (((True, True, True, True, spec.modulated), dsum), ((True, *[False] * 4), None)):
                gated_sum_rows.backward(problem, wanted, dy, x, *inputs, total, mean, rstd, of_sum)
            torch.cuda.synchronize()
            print("gated sum", spec.norm.name, *sizes, own, flush=True)


def relatives(size: int) -> tuple[ConditionedNorm, ...]:
    """Of the L2 norm and of partial RMSNorm, whose part ends within a chunk."""
    count = -(-size // 3)
    return ConditionedNorm(RMS_NORM, divisor=1), ConditionedNorm(RMS_NORM, counted=count, divisor=count)


def quantized_norms() -> None:
    for m, n in QUANTIZED:
        x, residual, weight = (torch.randn(s, device="cuda").bfloat16() for s in ((m, n), (m, n), (n,)))
        x[::5] *= 1e30
        codes, each = (
            torch.randn(m, n, device="cuda").to(torch.float8_e4m3fn).view(torch.uint8),
            torch.rand(m, 1, device="cuda"),
        )
        for name, form in FORMATS.items():
            for spec in (LAYER_NORM, RMS_NORM.with_cast("llama")):
                given = torch.full((1,), 0.02, device="cuda") if form.given else None
                for layout in SCALE_LAYOUTS if form.swizzles else SCALE_LAYOUTS[:2]:
                    problem = Quantizing(spec, 1, 1e-5, name, layout, False, True)
                    quantized_rows.forward(problem, Given(x, None, residual, weight, None, given))
                    quantized_rows.forward(problem, Given(codes, each, None, weight, weight, given))
            torch.cuda.synchronize()
            print("quantized", m, n, name, flush=True)


def channel_layer_norms() -> None:
    for shape in LAYERS:
        x, dy = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
        x[0] *= 1e30
        weight = torch.randn(shape[1], device="cuda").bfloat16()
        _, mean, rstd = channel_layers.forward(x, weight, weight, 1e-6, save=True)
        assert mean is not None and rstd is not None
        channel_layers.backward(dy, x, weight, mean, rstd, dx=True, dw=weight.dtype, db=weight.dtype)
        torch.cuda.synchronize()
        print("channel_layer_norm", *shape, flush=True)


def channel_norms() -> None:
    for spec, shape, groups in IMAGES:
        for order in (torch.contiguous_format, torch.channels_last):
            for given in (False, True) if spec is BATCH_NORM else (False,):
                x, dy = (torch.randn(shape, device="cuda").bfloat16().contiguous(memory_format=order) for _ in range(2))
                x[0] *= 1e30
                of_samples = () if spec is BATCH_NORM else shape[:1]
                weight = torch.randn(*of_samples, shape[1], device="cuda").bfloat16()
                problem = channels.Problem(spec, groups, 1e-5, "silu", given)
                wanted = dict(dx=True, dw=weight.dtype, db=weight.dtype)
                for residual in (None, torch.ones_like(x)):
                    if given:
                        mean, rstd = (torch.rand(shape[1], device="cuda") for _ in range(2))
                        channels.apply(problem, x, weight, weight, mean, rstd, residual)
                    else:
                        _, mean, rstd = channels.forward(problem, x, weight, weight, residual)
                    tensors = dy, x, weight, weight, mean, rstd, residual
                    channels.backward(problem, *tensors, **wanted, dr=residual is not None)
                torch.cuda.synchronize()
                print(spec.name, *shape, order, "given" if given else "taken", flush=True)


def row_norms() -> None:
    for spec in (LAYER_NORM, RMS_NORM, LAYER_NORM.with_cast("llama"), RMS_NORM.with_cast("gemma")):
        for m, n, forward, backward in CALLS:
            for extreme in (False, True):  # with rows whose squares overflow, which take the rescue
                x, dy = (torch.randn(m, n, device="cuda").bfloat16() for _ in range(2))
                if extreme:
                    x[::3] *= 1e30
                weight = torch.randn(n, device="cuda").bfloat16()
                bias = weight.clone() if spec.center else None
                with forced(forward=forward, backward=backward):
                    y, mean, rstd = rows.forward(spec, x, 1, weight, bias, 1e-5, save=True)
                    assert rstd is not None
                    wanted = dict(dx=True, dw=weight.dtype, db=weight.dtype if spec.center else None)
                    rows.backward(spec, dy, x, 1, weight, mean, rstd, **wanted)
                    if not spec.rounded:
                        rows.backward(spec, dy, y, 1, weight, None, rstd, **wanted, from_output=True, bias=bias)
                    norms_of_sums(spec, x, dy, weight, bias, wanted)
                torch.cuda.synchronize()
                print(spec.name, spec.cast, m, n, type(forward).__name__, type(backward).__name__, flush=True)


def norms_of_sums(
    spec: RowNorm, x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor | None, wanted: dict[str, Any]
) -> None:
    """The same launches of x and a residual in x's dtype, and one in fp32, whose gradient is not dx; and in its place."""
    for dtype in (x.dtype, torch.float32):
        residual, dsum = (torch.randn_like(x, dtype=dtype) for _ in range(2))
        for total in (torch.empty_like(residual), residual):
            added = rows.Added(residual, total, x.dtype, 1.0)
            _, mean, rstd = rows.forward(spec, x, 1, weight, bias, 1e-5, save=True, added=added)
        assert rstd is not None
        apart = torch.empty_like(residual) if dtype != x.dtype else None
        for of_sum in (None, dsum):
            how = rows.AddedBackward(of_sum, apart, x.dtype, 1.0 if apart is None else 0.5)
            rows.backward(spec, dy, total, 1, weight, mean, rstd, **wanted, added=how)


if __name__ == "__main__":
    main()
