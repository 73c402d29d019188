"""PolyNorm as a module (nn re-exports it)."""

import torch
from torch import Tensor

from .. import functional


class PolyNorm(torch.nn.Module):
    r"""PolyNorm, :math:`y = w_0 n(x^3) + w_1 n(x^2) + w_2 n(x) + b` with :math:`n(u) = u / \sqrt{\mathrm{E}[u^2] +
    \epsilon}` over the last dim; see :func:`trinorm.functional.poly_norm` for shapes, dtypes and errors.

    Args:
        eps: added to each mean square; >= 0.
        bias: has a bias of one element, 0 at first.
        device, dtype: of the weight, ``(3,)``, thirds at first, and of the bias.

    Source: Zhuo, Wang, Zeng, Zeng, Li, Ma, "Polynomial Composition Activations", arXiv:2411.03884.
    """

    bias: torch.nn.Parameter | None

    def __init__(
        self,
        eps: float = 1e-6,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(3, device=device, dtype=dtype))
        empty = torch.nn.Parameter(torch.empty(1, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", empty)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.constant_(self.weight, 1 / 3)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return functional.poly_norm(input, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, bias={self.bias is not None}"
