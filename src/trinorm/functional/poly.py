"""PolyNorm as a function (functional re-exports it)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import checks
from ..ops import inputs_only
from ..ops.poly import Poly
from .conditioned import check_inputs


def poly_norm(input: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    r"""PolyNorm: a polynomial of each element, whose powers are normalized over the last dim.

    .. math::
        y = w_0 \cdot n(x^3) + w_1 \cdot n(x^2) + w_2 \cdot n(x) + b, \qquad
        n(u) = \frac{u}{\sqrt{\mathrm{E}[u^2] + \epsilon}}

    It is an activation where a feed-forward layer has one. The order of the weight, and eps, are those of the paper's code
    and of Liger-Kernel.

    Args:
        input: ``(*, N)``; float16, bfloat16, float32 or float64. Any strides; where the last dim is not contiguous it is
            copied.
        weight: ``(3,)``, of the cube, the square and x itself; any of the dtypes above, not necessarily the input's.
        bias: of one element; as weight. None is 0.
        eps: added to each mean square; >= 0.

    Returns:
        A contiguous tensor of the input's shape and dtype, under autocast too. Powers, statistics, products and sums are
        fp32, fp64 as soon as one of the tensors is; powers beyond fp32's range are not, and rows of any size that fp32
        has are right. The bits of a row's result, and of its gradient, do not depend on the rows beside it. Rows of more
        than 8192 elements (2048 in fp64) have torch's own operators.

    Raises:
        RuntimeError: a shape does not fit, or the tensors are on different devices.
        NotImplementedError: a dtype other than the four.
        TypeError: an argument of the wrong kind.
        ValueError: eps is negative or NaN.

    Source: Zhuo, Wang, Zeng, Zeng, Li, Ma, "Polynomial Composition Activations", arXiv:2411.03884.
    """
    tensors = input, weight, bias
    if has_torch_function_variadic(*tensors):
        given: dict[str, Any] = dict(bias=bias, eps=eps)
        return handle_torch_function(poly_norm, tensors, input, weight, **given)
    asked = ("poly_norm", eps) if type(eps) is float else None
    if asked is not None and (call := inputs_only.CALLS.recall(asked, *tensors)) is not None:
        return call(*tensors)
    check_inputs("poly_norm", input, ("bias",), weight=weight, bias=bias)
    if input.dim() < 1:
        raise RuntimeError("poly_norm(): input has no dims; it must be (..., N)")
    if weight.shape != (3,):
        raise RuntimeError(
            f"poly_norm(): weight has shape {tuple(weight.shape)}; it must be (3,), of the cube, the square and x itself"
        )
    if bias is not None and bias.numel() != 1:
        raise RuntimeError(f"poly_norm(): bias has shape {tuple(bias.shape)}; it must have one element")
    return inputs_only.inputs_only_norm(Poly(checks.epsilon("poly_norm", eps)), asked, *tensors)
