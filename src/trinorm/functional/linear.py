"""A norm and the linear layer behind it as one function, which keeps nothing between them (functional re-exports these)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import checks
from ..ops import jagged
from ..ops.linear import NormLinear, autocast_dtype, norm_linear
from ..spec import LAYER_NORM, RMS_NORM, Cast, RowNorm


def layer_norm_linear(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    cast: Cast = "output",
    batch_invariant: bool | None = None,
) -> Tensor:
    r"""A linear layer of a layer normalization, whose result is not kept for the backward but made again.

    .. math::
        z = y A^\top + c, \qquad y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot w + b

    It is ``F.linear(layer_norm(input, normalized_shape, weight, bias, eps), linear_weight, linear_bias)``, and has the bits
    of that. That keeps x, for the norm's backward, and y, for A's gradient; this keeps x alone, and launches the norm's
    forward once more in the backward. For each of x's elements one element less is kept, and one more read and written.

    Args:
        input: x, ``(*, *normalized_shape)``; as :func:`layer_norm`'s, jagged too.
        normalized_shape: the sizes of the dims that share statistics. The linear layer is of the last of them.
        weight, bias: the norm's w and b, ``normalized_shape``, as :func:`layer_norm`'s; None is 1, and 0.
        linear_weight: A, ``(out_features, N)``, N being the input's last dim; of the input's dtype, but under autocast.
        linear_bias: c, ``(out_features,)``, of the same dtype; None is 0.
        eps: added to the variance, so in the input's units squared; >= 0.
        cast, batch_invariant: of the norm, as :func:`layer_norm`'s. (The linear layer is torch's, which promises nothing.)

    Returns:
        z, ``(*, out_features)``, of the dtype that F.linear returns: the input's, or autocast's. Under autocast y,
        linear_weight and linear_bias are taken to its dtype, as F.linear takes them; they are kept as they were given, and
        cast again in the backward.

        Kept for the backward are x, w, b, A and each row's mean and 1/sqrt(Var + eps), in fp32 (fp64). One of these that is
        changed in place before the backward makes that raise. Where A requires no gradient F.linear keeps no y, and nothing
        is made again. Where trinorm's kernels do not run (a CPU, torch.func, forward mode, tensor subclasses) this is the
        two functions, one after the other, and y is kept. Under torch.compile it is these in a region of activation
        checkpointing, as Inductor by itself keeps y; torch.export records the two functions.

    Raises:
        RuntimeError: a shape does not fit, tensors are on different devices, or linear_weight or linear_bias is of another
            dtype than the norm's result without autocast to make them one.
        NotImplementedError, TypeError, ValueError: as :func:`layer_norm`.

    Sources: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450; Chen, Xu, Zhang, Guestrin, "Training Deep Nets with
    Sublinear Memory Cost", arXiv:1604.06174 (making again what is cheap to make).
    """
    tensors = input, weight, bias, linear_weight, linear_bias
    how: dict[str, Any] = dict(linear_bias=linear_bias, eps=eps, cast=cast, batch_invariant=batch_invariant)
    of_values = jagged.is_jagged(input)
    if has_torch_function_variadic(*tensors) and not of_values:
        given = input, normalized_shape, weight, bias, linear_weight
        return handle_torch_function(layer_norm_linear, tensors, *given, **how)
    if of_values:
        how.update(weight=weight, bias=bias, linear_weight=linear_weight)
        return jagged.of_values(layer_norm_linear, input, normalized_shape, **how)
    return _linear(LAYER_NORM, normalized_shape, tensors, eps, cast, batch_invariant)


def rms_norm_linear(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    eps: float | None = None,
    *,
    cast: Cast = "output",
    batch_invariant: bool | None = None,
) -> Tensor:
    r"""A linear layer of a root mean square normalization, whose result is not kept for the backward but made again.

    .. math::
        z = y A^\top + c, \qquad y = \frac{x}{\sqrt{\mathrm{E}[x^2] + \epsilon}} \cdot w

    Args:
        input, normalized_shape, weight, linear_weight, linear_bias, cast, batch_invariant: as :func:`layer_norm_linear`.
        eps: as :func:`rms_norm`: None is an epsilon of the input's dtype.

    Returns:
        z, as :func:`layer_norm_linear`.

    Raises:
        RuntimeError, NotImplementedError, TypeError, ValueError: as :func:`layer_norm_linear`; ValueError too where
            ``normalized_shape`` has more dims than the input.

    Sources: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467; Chen, Xu, Zhang, Guestrin, "Training
    Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
    """
    tensors = input, weight, None, linear_weight, linear_bias
    how: dict[str, Any] = dict(linear_bias=linear_bias, eps=eps, cast=cast, batch_invariant=batch_invariant)
    of_values = jagged.is_jagged(input)
    if has_torch_function_variadic(*tensors) and not of_values:
        given = input, normalized_shape, weight, linear_weight
        return handle_torch_function(rms_norm_linear, tensors, *given, **how)
    if of_values:
        how.update(weight=weight, linear_weight=linear_weight)
        return jagged.of_values(rms_norm_linear, input, normalized_shape, **how)
    return _linear(RMS_NORM, normalized_shape, tensors, eps, cast, batch_invariant)


def _linear(
    spec: RowNorm,
    normalized_shape: Sequence[int],
    tensors: tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None],
    eps: float | None,
    cast: Cast,
    batch_invariant: bool | None,
) -> Tensor:
    input, weight, bias, linear_weight, linear_bias = tensors
    op = f"{spec.name}_linear"
    checks.tensor(op, "linear_weight", linear_weight, required=True)
    if linear_bias is not None:
        checks.tensor(op, "linear_bias", linear_bias)
    eps = checks.own_epsilon(spec, input, eps)
    shape, eps, invariant = checks.rows(op, input, normalized_shape, weight, bias, eps, cast, batch_invariant)
    _check_linear(op, input, linear_weight, linear_bias)
    return norm_linear(NormLinear(spec.with_cast(cast), shape, eps, invariant), *tensors)


def _check_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    n = x.shape[-1]
    checks.strided(op, "linear_weight", weight)
    if weight.dim() != 2 or weight.shape[1] != n:
        raise RuntimeError(
            f"{op}(): linear_weight has shape {tuple(weight.shape)}; it must be (out_features, {n}), {n} being the input's "
            "last dim"
        )
    checks.beside(op, "linear_weight", weight, x)
    if bias is not None:
        checks.strided(op, "linear_bias", bias)
        if bias.shape != weight.shape[:1]:
            raise RuntimeError(
                f"{op}(): linear_bias has shape {tuple(bias.shape)}; it must be {tuple(weight.shape[:1])}, of "
                "linear_weight's rows"
            )
        checks.beside(op, "linear_bias", bias, x)
    autocasts = autocast_dtype(x.device.type) is not None
    for name, t in (("linear_weight", weight), ("linear_bias", bias)):
        if t is None or t.dtype == x.dtype or (autocasts and torch.float64 not in (t.dtype, x.dtype)):
            continue
        raise RuntimeError(
            f"{op}(): {name} has dtype {t.dtype}, but the norm's result has the input's, {x.dtype}; they must be equal: "
            f"{name}.to({x.dtype})" + (", as autocast leaves float64 alone" if autocasts else ", or autocast on")
        )
