"""At which sizes norms are measured: those that models have."""

from __future__ import annotations

from collections.abc import Mapping

from ..norms import ROW_OPS, SUM_OPS, Shape

# The first is the seed's own. The others: where the memory is the limit, the narrow, the few rows of decoding, the wide.
SEED_SHAPE = (128, 768)
SHAPES: tuple[Shape, ...] = (
    SEED_SHAPE,
    (32768, 1024),
    (8192, 4096),
    (8192, 5120),
    (8192, 8192),
    (262144, 128),
    (16, 4096),
    (4096, 16384),
)

# What a plot needs besides: hidden sizes at one batch size, and batch sizes at one hidden size.
SWEEPS = (
    *((8192, n) for n in (256, 512, 1024, 2048, 16384)),
    *((m, 4096) for m in (1, 128, 1024, 4096, 32768)),
)

# Of a sum: besides, where serving and large models have it.
SUM_SHAPES = tuple(dict.fromkeys([*SHAPES, *((m, 4096) for m in (1, 16, 64, 256, 4096, 16384)), (64, 8192), (4096, 7168)]))

# Of the channel norms: what diffusion models, ResNets, style transfer, sequence models and ConvNeXt have.
CHANNEL_SHAPES: dict[str, tuple[Shape, ...]] = {
    "group_norm": ((16, 320, 64, 64), (8, 640, 32, 32), (4, 512, 128, 128), (1, 128, 1024, 1024)),
    "instance_norm": ((16, 64, 256, 256), (64, 256, 1024)),
    "batch_norm": ((64, 256, 56, 56), (32, 1024, 14, 14), (65536, 1024), (256, 512, 2048)),
    "channel_layer_norm": ((64, 96, 56, 56), (64, 384, 14, 14), (64, 768, 7, 7), (4, 256, 64, 64), (8, 1536, 16, 16)),
}

# Of QK-norm, batch × tokens × query heads × key heads × elements of a head: what Qwen3 and Gemma 3 have, in training or a
# prompt, and in decoding, where each sample has one token.
HEAD_SHAPES: tuple[Shape, ...] = (
    (4, 4096, 32, 8, 128),
    (4, 4096, 16, 8, 128),
    (4, 4096, 16, 8, 256),
    (1, 512, 32, 8, 128),
    (64, 1, 32, 8, 128),
)

# Of conditioned norms, batch × tokens × columns: of the modulated ones what DiT-XL/2, Stable Diffusion 3 and Flux have; of
# the gates behind the norm, Gated DeltaNet's and Qwen3-Next's heads; of those before it, Mamba2's, in one group and in
# eight; of heads with a weight each, and of the L2 norm, as of Gated DeltaNet's queries, tokens × heads × elements. And
# decoding, where each sample has one token.
CONDITIONED_SHAPES: dict[str, tuple[Shape, ...]] = {
    "modulated_layer_norm": ((64, 256, 1152), (8, 4096, 1536), (4, 4096, 3072)),
    "add_modulated_layer_norm": ((64, 256, 1152), (8, 4096, 1536), (4, 4096, 3072)),
    "gated_rms_norm": ((16384, 32, 128), (64, 32, 128)),
    "gated_rms_norm/first": ((8, 2048, 5120), (64, 1, 5120)),
    "gated_rms_norm/groups": ((8, 2048, 8192), (64, 1, 8192)),
    "per_head_rms_norm": ((4, 4096, 32, 128), (64, 1, 32, 128)),
    "l2_norm": ((16384, 16, 128), (64, 16, 128)),
    "partial_rms_norm": ((4, 2048, 4096), (64, 1, 4096)),
}

# Of DyT, Derf, PolyNorm, weight normalization and quantized results, rows × columns: as of rows, fewer.
ELEMENT_SHAPES: tuple[Shape, ...] = ((32768, 1024), (8192, 4096), (8192, 8192), (16, 4096))

# Shapes by name, for --shapes, of each op that they are for. Of rows, every width from 64 to 262144 and the row counts of
# decoding, and four of them for the dtypes that need no more; of channels, those above.
NAMED_SHAPES: dict[str, Mapping[str, tuple[Shape, ...]]] = {
    "matrix": dict.fromkeys(
        ROW_OPS + SUM_OPS,
        (
            SEED_SHAPE,
            *((m, 4096) for m in (1, 16, 64, 256)),
            (64, 8192),
            (2048, 4096),
            (262144, 64),
            (262144, 128),
            (364800, 128),  # a shape that users of other libraries report
            (131072, 256),
            (32768, 1024),
            (16384, 768),
            (16384, 2048),
            *((8192, n) for n in (3072, 4096, 5120, 7168, 8192)),
            (4096, 12288),
            (4096, 16384),
            (2048, 32768),
            (1024, 65536),
            (512, 131072),
            (256, 262144),
        ),
    ),
    "quartet": dict.fromkeys(ROW_OPS + SUM_OPS, (SEED_SHAPE, (32768, 1024), (8192, 4096), (4096, 16384))),
    "channels": CHANNEL_SHAPES,
}
