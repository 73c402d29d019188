"""What is computed. A variant of a norm is a value of a spec, not another kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowNorm:
    """A norm whose statistics run over the last dims of each row.

    center: subtract the mean, so that the statistic is the variance (LayerNorm); otherwise it is the mean square (RMSNorm).
    """

    name: str
    center: bool


LAYER_NORM = RowNorm("layer_norm", center=True)
RMS_NORM = RowNorm("rms_norm", center=False)

ROW_NORMS = (LAYER_NORM, RMS_NORM)
