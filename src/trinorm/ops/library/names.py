"""What the registered ops are called whose norm is not: by the norms' names."""

from __future__ import annotations

from ...spec import ROW_NORMS


def _names(of: str) -> dict[str, str]:
    return {spec.name: of + spec.name for spec in ROW_NORMS}


SUMS, CONDITIONED_NORMS, GATED_SUMS, QUANTIZED_NORMS = map(_names, ("add_", "conditioned_", "add_modulated_", "quantized_"))

QK_NORM, POLY_NORM, WEIGHT_NORM = "qk_norm", "poly_norm", "weight_norm"
