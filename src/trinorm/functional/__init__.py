"""The norms as functions, with torch.nn.functional's own signatures and defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import checks
from ..ops import CALLS, channel, channel_norm, jagged, row_norm
from ..ops.layout import is_in_order
from ..spec import CHANNEL_LAYER_NORM, LAYER_NORM, RMS_NORM, Cast
from .added import add_layer_norm, add_rms_norm
from .channels import batch_norm, check_channels, group_norm, instance_norm
from .conditioned import (
    gated_layer_norm,
    gated_rms_norm,
    modulated_layer_norm,
    modulated_rms_norm,
)
from .dynamic import dynamic_erf, dynamic_tanh
from .gated_sum import add_modulated_layer_norm, add_modulated_rms_norm
from .linear import layer_norm_linear, rms_norm_linear
from .per_head import per_head_layer_norm, per_head_rms_norm
from .poly import poly_norm
from .qk import qk_norm
from .quantized import Quantized, quantized_layer_norm, quantized_rms_norm
from .relatives import l2_norm, partial_rms_norm, scale_norm
from .weight import weight_norm

__all__ = [
    "Quantized",
    "add_layer_norm",
    "add_modulated_layer_norm",
    "add_modulated_rms_norm",
    "add_rms_norm",
    "batch_norm",
    "channel_layer_norm",
    "dynamic_erf",
    "dynamic_tanh",
    "gated_layer_norm",
    "gated_rms_norm",
    "group_norm",
    "instance_norm",
    "l2_norm",
    "layer_norm",
    "layer_norm_linear",
    "modulated_layer_norm",
    "modulated_rms_norm",
    "partial_rms_norm",
    "per_head_layer_norm",
    "per_head_rms_norm",
    "poly_norm",
    "qk_norm",
    "quantized_layer_norm",
    "quantized_rms_norm",
    "rms_norm",
    "rms_norm_linear",
    "scale_norm",
    "weight_norm",
]

# What is kept for the backward.
Save = Literal["input", "output"]


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    save: Save = "input",
    cast: Cast = "output",
    batch_invariant: bool | None = None,
) -> Tensor:
    r"""Layer normalization over the last ``len(normalized_shape)`` dims.

    .. math::
        y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} \cdot w + b

    with the biased variance, and with :math:`1 + w` for :math:`w` where ``cast="gemma"``. The signature, defaults and
    meaning are :func:`torch.nn.functional.layer_norm`'s.

    Args:
        input: ``(*, *normalized_shape)``; float16, bfloat16, float32 or float64, any strides. Of a jagged tensor the ragged
            dim is one of ``*``, and the result is as jagged.
        normalized_shape: the sizes of the dims that share statistics.
        weight: ``normalized_shape``, any of the dtypes above, not necessarily the input's; None is 1.
        bias: as weight; None is 0.
        eps: added to the variance, so in the input's units squared; >= 0.
        save: what the kernels keep for the backward. "output" keeps y, which the next op often keeps anyway, in place of x,
            which then goes as soon as nobody else holds it. The backward takes :math:`(y - b)/w` for the normalized input,
            as good as y's rounding allows. Where an element of w is 0, subnormal or near overflow in y's dtype, or smaller
            than that of b, x is kept all the same; a warning says so, once. To look at w and b the host waits for the
            device at each call; under CUDA-graph capture nobody can, and x is kept. An op that changes y in place, or a
            bias changed before the backward, makes the backward raise, as torch does; so do second derivatives, which need
            x. Under torch.compile, for DTensors, and where trinorm's kernels do not run, "output" changes nothing.
        cast: where a result of fewer digits than its statistics is rounded, and what the weight is kept as; models differ.
            "output", torch's way: all in fp32, rounded once, at the end. "llama": the normalized input is rounded to the
            input's dtype before it meets weight and bias, and the result once more (LLaMA, Mistral, Qwen; T5 where input
            and weight have one dtype). "gemma": the weight is kept as its distance from 1, and 1 is added to it in fp32
            (Gemma; "zero-centered gamma"); without a weight, as "output". Derivatives are those without the roundings; the
            weight's is of what it met. Autocast leaves "llama" and "gemma" alone, as it does those models' own code.
        batch_invariant: True promises that the bits of a row's result, and of its gradient, do not depend on how many rows
            are beside it, among tensors of aligned storage: the launch is then that of many rows, which for few is slower.
            (Sums over rows, the gradients of weight and bias, depend on all of them.) None: as ``trinorm.options`` says.
            Where trinorm's kernels do not run, torch's own operator promises what it does.

    Returns:
        A contiguous tensor of the input's shape and dtype (fp32 where autocast makes torch's own op return that).
        Statistics, products and sums are fp32, fp64 as soon as one of the tensors is.

    Raises:
        RuntimeError: a shape does not fit ``normalized_shape``, or the tensors are on different devices.
        NotImplementedError: a dtype other than the four.
        TypeError: an argument of the wrong kind.
        ValueError: eps is negative or NaN; ``save`` or ``cast`` is none of their values; or ``save`` is "output" with the
            ``cast`` "llama", whose y has two roundings, too many to be undone.

    Source: Ba, Kiros, Hinton, "Layer Normalization", arXiv:1607.06450.
    """
    # First, as what follows asks a tensor for more than a TorchFunctionMode, set_default_device's own too, should see.
    if has_torch_function_variadic(input, weight, bias) and not jagged.is_jagged(input):
        given: dict[str, Any] = dict(
            weight=weight, bias=bias, eps=eps, save=save, cast=cast, batch_invariant=batch_invariant
        )
        return handle_torch_function(layer_norm, (input, weight, bias), input, normalized_shape, **given)
    manner = (
        save
        if cast == "output" and batch_invariant is None
        else (_OTHER, save, cast, batch_invariant, type(batch_invariant))
    )
    if (call := CALLS.recall("layer_norm", manner, input, normalized_shape, weight, bias, eps)) is not None:
        return call(input, weight, bias)
    if type(input) is not Tensor and jagged.is_jagged(input):
        given = dict(weight=weight, bias=bias, eps=eps, save=save, cast=cast, batch_invariant=batch_invariant)
        return jagged.of_values(layer_norm, input, normalized_shape, **given)
    asked = normalized_shape, eps, manner
    shape, eps, invariant = checks.rows(
        "layer_norm", input, normalized_shape, weight, bias, eps, cast, batch_invariant, save
    )
    return row_norm(LAYER_NORM.with_cast(cast), input, shape, weight, bias, eps, asked, save, invariant)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    save: Save = "input",
    cast: Cast = "output",
    batch_invariant: bool | None = None,
) -> Tensor:
    r"""Root mean square normalization over the last ``len(normalized_shape)`` dims.

    .. math::
        y = \frac{x}{\sqrt{\mathrm{E}[x^2] + \epsilon}} \cdot w

    with :math:`1 + w` for :math:`w` where ``cast="gemma"``. The signature, defaults and meaning are
    :func:`torch.nn.functional.rms_norm`'s.

    Args:
        input: as :func:`layer_norm`.
        normalized_shape: the sizes of the dims that share statistics.
        weight: ``normalized_shape``, any of the dtypes above, not necessarily the input's; None is 1.
        eps: added to the mean square, so in the input's units squared; >= 0. None is an epsilon of the input's
            dtype, as torch has it: 2^-23 for float16, bfloat16 and float32, 2^-52 for float64.
        save, cast, batch_invariant: as :func:`layer_norm`.

    Returns:
        As :func:`layer_norm`.

    Raises:
        RuntimeError, NotImplementedError, TypeError, ValueError: as :func:`layer_norm`; ValueError too where
            ``normalized_shape`` has more dims than the input.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.
    """
    if has_torch_function_variadic(input, weight) and not (jagged.is_jagged(input) or jagged.is_jagged(weight)):
        given: dict[str, Any] = dict(weight=weight, eps=eps, save=save, cast=cast, batch_invariant=batch_invariant)
        return handle_torch_function(rms_norm, (input, weight), input, normalized_shape, **given)
    manner = (
        save
        if cast == "output" and batch_invariant is None
        else (_OTHER, save, cast, batch_invariant, type(batch_invariant))
    )
    if (call := CALLS.recall("rms_norm", manner, input, normalized_shape, weight, None, eps)) is not None:
        return call(input, weight, None)
    if type(input) is not Tensor and jagged.is_jagged(input):
        given = dict(weight=weight, eps=eps, save=save, cast=cast, batch_invariant=batch_invariant)
        return jagged.of_values(rms_norm, input, normalized_shape, **given)
    asked = normalized_shape, eps, manner
    eps = checks.own_epsilon(RMS_NORM, input, eps)
    shape, eps, invariant = checks.rows("rms_norm", input, normalized_shape, weight, None, eps, cast, batch_invariant, save)
    return row_norm(RMS_NORM.with_cast(cast), input, shape, weight, None, eps, asked, save, invariant)


def channel_layer_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    batch_invariant: bool | None = None,
) -> Tensor:
    r"""Layer normalization over the channels, at each position of each sample: ConvNeXt's of channels-first tensors, and
    SAM's LayerNorm2d.

    .. math::
        y_{n,c,p} = \frac{x_{n,c,p} - \mathrm{E}_c[x_{n,c,p}]}{\sqrt{\mathrm{Var}_c[x_{n,c,p}] + \epsilon}} \cdot w_c + b_c

    with the biased variance. Nothing is transposed: channels-first memory is read and written as it is, and of
    channels-last memory this is :func:`layer_norm`.

    Args:
        input: ``(N, C, *)``; float16, bfloat16, float32 or float64. Contiguous and channels-last memory are read as they
            are, any other is copied once.
        weight: ``(C,)``, any of the dtypes above, not necessarily the input's; None is 1.
        bias: as weight; None is 0.
        eps: added to the variance, so in the input's units squared; >= 0.
        batch_invariant: as :func:`layer_norm`, of a sample among samples in one of the two orders of memory.

    Returns:
        A tensor of the input's shape, dtype and memory order (fp32 where autocast makes :func:`layer_norm` return that).
        Statistics, products and sums are fp32, fp64 as soon as one of the tensors is.

    Raises:
        RuntimeError: the input has fewer than 2 dims, weight or bias does not fit, or the tensors are on different devices.
        ValueError: eps is negative or NaN.
        NotImplementedError: a dtype other than the four.
        TypeError: an argument of the wrong kind.

    Source: Liu, Mao, Wu, Feichtenhofer, Darrell, Xie, "A ConvNet for the 2020s", arXiv:2201.03545.
    """
    if has_torch_function_variadic(*(all_tensors := (input, weight, bias))):
        given: dict[str, Any] = dict(weight=weight, bias=bias, eps=eps, batch_invariant=batch_invariant)
        return handle_torch_function(channel_layer_norm, all_tensors, input, **given)
    plain = type(eps) is float and (batch_invariant is None or type(batch_invariant) is bool)
    asked = (eps, batch_invariant) if plain else None
    if asked is not None:
        call = channel.CALLS.recall(("channel_layer_norm", asked), input, weight, bias, None, None, None)
        if call is not None:
            return call(input, weight, bias, None, None, None)
    eps = check_channels("channel_layer_norm", input, eps, None, weight=weight, bias=bias)
    invariant = checks.invariance("channel_layer_norm", batch_invariant)
    rows = input.movedim(1, -1)
    if is_in_order(rows):
        return layer_norm(rows, rows.shape[-1:], weight, bias, eps, batch_invariant=batch_invariant).movedim(-1, 1)
    given = dict(asked=asked, batch_invariant=invariant)
    return channel_norm(CHANNEL_LAYER_NORM, input, 1, weight, bias, eps, **given)


# What begins a manner that is not the plain one, so that no argument of one call looks like several of another.
_OTHER = object()
