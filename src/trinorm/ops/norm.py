"""A norm by the road that serves it: the kernels, the registered op, or torch's own operators."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from ..ops import added, conditioned, gated_sum, qk, quantized, road
from ..reference import added as added_reference
from ..reference import autocasts_to_fp32, in_fp32
from ..reference import channel as channel_reference
from ..reference import gated_sum as gated_sum_reference
from ..reference.channel import Averages, Given
from ..spec import Activation, ChannelNorm, ConditionedNorm, RowNorm
from .added import AddedCall, AddedProblem
from .channel import CALLS, ChannelCall
from .conditioned import ConditionedCall
from .gated_sum import GatedSumCall
from .layout import beside, channels_readable, dense, readable
from .library import added as added_library
from .library import channels as channel_library
from .library import conditioned as conditioned_library
from .library import gated_sums as gated_sum_library
from .library import qk as qk_library
from .library import quantized as quantized_library
from .library import rows as library
from .library.names import GATED_SUMS, QK_NORM, QUANTIZED_NORMS, SUMS
from .library.registering import any_requires_grad
from .problems.channel import Problem
from .problems.conditioned import Conditioned
from .problems.gated_sum import problem_of as problem_of_sum
from .problems.quantized import Given as Quantizable
from .problems.quantized import Quantizing
from .qk import QKCall, QKProblem
from .quantized import QuantizedCall
from .row import RowCall, prepared


def row_norm(
    spec: RowNorm,
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    asked: tuple[Sequence[int], float | None, Hashable],
    save: str,
    batch_invariant: bool,
) -> Tensor:
    """The norm of checked arguments. asked: as row.prepared's. save, batch_invariant: as functional's."""
    # Inductor leaves out a rounding that is widened again, as the composite's is.
    if road.takes_op(spec.name, x, weight, bias, whole=spec.rounded or batch_invariant):
        return library.norm(spec, x, normalized_shape, weight, bias, eps, batch_invariant)
    if not road.kernels_serve(spec.name, x, weight, bias):
        return reference.composite(spec, x, normalized_shape, weight, bias, eps)
    call, inputs = row_call(spec, x, normalized_shape, weight, bias, eps, asked, save, batch_invariant)
    return call(*inputs)


def row_call(
    spec: RowNorm,
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    asked: tuple[Sequence[int], float | None, Hashable],
    save: str,
    batch_invariant: bool,
) -> tuple[RowCall, tuple[Tensor, Tensor | None, Tensor | None]]:
    """Of arguments that the kernels serve: the call, and (x, weight, bias) as it takes them. Arguments as row_norm's."""
    autocast = torch._C._is_any_autocast_enabled() and x.dtype != torch.float64
    return prepared(
        spec,
        len(normalized_shape),
        (x, weight, bias),
        eps,
        asked,
        save=save,
        batch_invariant=batch_invariant,
        cast=autocast and reference.autocast_to_fp32(spec, x.device.type),
        differentiated=road.is_differentiated(x, weight, bias),
    )


def added_norm(
    spec: RowNorm,
    x: Tensor,
    residual: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    alpha: float,
    out: Tensor | None,
    asked: Hashable,
    batch_invariant: bool,
    seed: Tensor | None = None,
    row_scale: Tensor | None = None,
    drop: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(y, sum) of checked arguments. out: where the sum goes. asked: as channel_norm's. seed, row_scale, drop: of what is
    made of x first (kernels/added.py).
    """
    op, dims = SUMS[spec.name], len(normalized_shape)
    tensors, branch = (x, residual, weight, bias), (seed, row_scale)
    to_fp32 = x.dtype != torch.float64 and reference.autocast_to_fp32(spec, x.device.type)
    dtype = torch.float32 if to_fp32 else x.dtype
    # The op has no derivative of row_scale's; autograd's is refused, but torch.func's no tensor tells of.
    of_scale = row_scale is not None and road.within_transform()
    if not of_scale and road.takes_op(op, *tensors, *branch, whole=spec.rounded or batch_invariant):
        given = *tensors, *branch, normalized_shape
        y, total = added_library.norm(spec, *given, eps, alpha, drop, dtype, batch_invariant)
    elif not road.kernels_serve(op, *tensors, *branch, out):
        how = eps, alpha, dtype, *branch, drop
        y, total = added_reference.composite(spec, x, residual, normalized_shape, weight, bias, *how)
    else:
        parameters = (None if t is None else readable(t, dims) for t in (weight, bias))
        inputs: Any = (readable(x, dims), dense(residual), *parameters, *branch, out)
        call = None
        if asked is not None and any(now is not before for now, before in zip(inputs, tensors, strict=False)):
            call = added.recall(asked, *inputs)
        if call is None:
            call = AddedCall(
                AddedProblem(spec, dims, eps, alpha, dtype, batch_invariant, drop),
                added.dtypes_of(*tensors),
                differentiated=road.is_differentiated(*tensors),
            )
            if asked is not None:
                added.keep(asked, call, *inputs)
        return call(*inputs)
    return (y, total) if out is None else (y, out.copy_(total))


def qk_norm(
    spec: RowNorm, eps: float, interleaved: bool, asked: Hashable, batch_invariant: bool, *tensors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(query, key) of checked (query, key, query_weight, key_weight, cos, sin). asked: as channel_norm's."""
    problem, query, key = QKProblem(spec, eps, interleaved), tensors[0], tensors[1]
    assert query is not None and key is not None
    lacking = qk.lacking(query, tensors[4:])
    if lacking is None and road.takes_op(QK_NORM, *tensors, whole=spec.rounded or batch_invariant):
        return qk_library.norm(problem, *tensors, batch_invariant=batch_invariant)
    if road.is_empty(query, key) or not road.kernels_serve(QK_NORM, query, *tensors[1:], lacking=lacking):
        return qk.composite(problem, *tensors)
    inputs = qk.read(*tensors)
    call = None
    if asked is not None and any(now is not before for now, before in zip(inputs, tensors, strict=True)):
        call = qk.CALLS.recall(asked, *inputs)
    if call is None:
        differentiated = road.is_differentiated(*inputs)
        call = QKCall(problem, road.accumulator_dtype(*inputs), differentiated=differentiated)
        if asked is not None:
            qk.CALLS.keep(asked, call, *inputs)
    return call(*inputs)


def conditioned_norm(
    op: str,
    spec: ConditionedNorm,
    dims: int,
    size: int,
    eps: float,
    asked: Hashable,
    batch_invariant: bool,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """The norm of checked arguments. op: the function's name. size: of a row, which the last ``dims`` dims hold once or, of
    one dim, several times. asked: as channel_norm's.
    """
    to_fp32 = x.dtype != torch.float64 and reference.autocast_to_fp32(spec.norm, x.device.type)
    dtype = torch.float32 if to_fp32 else x.dtype
    problem = Conditioned(spec, dims, size, eps, dtype, batch_invariant)
    given = x, gate, weight, bias
    if not size or road.is_empty(x):
        return conditioned.composite(problem, *given)
    weight, bias = conditioned.aligned(problem, x, weight, bias)
    tensors = x, gate, weight, bias
    lacking = conditioned.lacking(problem, *tensors)
    if lacking is None and road.takes_op(op, *tensors, whole=spec.norm.rounded or batch_invariant):
        return conditioned_library.norm(problem, *tensors)
    if not road.kernels_serve(op, *tensors, lacking=lacking):
        return conditioned.composite(problem, *tensors)
    inputs = conditioned.read(problem, *tensors)
    call = None
    if asked is not None and any(now is not before for now, before in zip(inputs, given, strict=True)):
        call = conditioned.CALLS.recall(asked, *inputs)
    if call is None:
        differentiated = road.is_differentiated(*inputs)
        call = ConditionedCall(problem, road.accumulator_dtype(*inputs), differentiated=differentiated)
        if asked is not None:
            conditioned.CALLS.keep(asked, call, *inputs)
    return call(*inputs)


def gated_sum_norm(
    spec: ConditionedNorm,
    dims: int,
    eps: float,
    asked: Hashable,
    batch_invariant: bool,
    x: Tensor,
    residual: Tensor,
    *parameters: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, sum) of checked arguments. parameters: gate, weight and bias. asked: as channel_norm's. Of rows that the kernels
    do not hold the sum is torch's, and its norm a conditioned one.
    """
    op = GATED_SUMS[spec.norm.name]
    to_fp32 = x.dtype != torch.float64 and reference.autocast_to_fp32(spec.norm, x.device.type)
    dtype = torch.float32 if to_fp32 else x.dtype
    norm = Conditioned(spec, dims, x.shape[-dims:].numel(), eps, dtype, batch_invariant)
    problem, given = problem_of_sum(norm, x, residual), (x, residual, *parameters)
    if not norm.size or road.is_empty(x):
        return gated_sum.composite(problem, *given)
    if not gated_sum.are_held(norm, *given):
        gate, *own = parameters
        assert gate is not None
        total = gated_sum_reference.gated_sum(x, residual, gate).contiguous()
        return conditioned_norm(op, spec, dims, norm.size, eps, None, batch_invariant, total, None, *own).to(dtype), total
    others = residual, *conditioned.aligned(norm, x, *parameters)
    tensors = x, *others
    if road.takes_op(op, *tensors, whole=batch_invariant):
        return gated_sum_library.norm(problem, *tensors)
    if not road.kernels_serve(op, x, *others):
        return gated_sum.composite(problem, *tensors)
    inputs = gated_sum.read(problem, *tensors)
    call = None
    if asked is not None and any(now is not before for now, before in zip(inputs, given, strict=True)):
        call = gated_sum.CALLS.recall(asked, *inputs)
    if call is None:
        differentiated = road.is_differentiated(*inputs)
        call = GatedSumCall(problem, road.accumulator_dtype(*inputs), differentiated=differentiated)
        if asked is not None:
            gated_sum.CALLS.keep(asked, call, *inputs)
    return call(*inputs)


def channel_norm(
    spec: ChannelNorm,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: Activation | None = None,
    given: Given | None = None,
    averages: Averages | None = None,
    residual: Tensor | None = None,
    asked: Hashable = None,
    batch_invariant: bool = False,
) -> Tensor:
    """The norm of checked arguments: by the kernels, or, where they do not serve, by the composite.

    asked: what the caller was asked for besides tensors, by which the next call is recalled; None if it shall not be.
    """
    running = given or (None if averages is None else averages[:2]) or (None, None)
    if given is None and road.takes_op(spec.name, x, weight, bias, whole=batch_invariant):
        how = activation, averages, batch_invariant
        return channel_library.norm(spec, x, num_groups, weight, bias, residual, eps, *how)
    served = road.kernels_serve(spec.name, x, weight, bias)
    if not served or any(type(t) not in road.PLAIN_OR_NONE for t in (*running, residual)):
        return channel_reference.composite(spec, x, num_groups, weight, bias, eps, given, averages, activation, residual)
    if x.dtype != torch.float64 and autocasts_to_fp32(spec.name, x.device.type):
        x, weight, bias, residual = in_fp32(x, weight, bias, residual)
    x = channels_readable(x)
    inputs: Any = x, *(None if t is None else dense(t) for t in (weight, bias, *running)), beside(x, residual)
    # Of copies too: those of the next call will be like them.
    call = None if asked is None else CALLS.recall((spec.name, asked), *inputs)
    if call is None:
        call = ChannelCall(
            Problem(spec, num_groups, eps, activation, given is not None, batch_invariant),
            None if averages is None else averages.momentum,
            None if bias is None else bias.dtype,
            differentiated=road.is_differentiated(*inputs[:3], residual),
        )
        if asked is not None:
            CALLS.keep((spec.name, asked), call, *inputs)
    y = call(*inputs)
    if averages is not None:
        for t, now in zip(averages[:2], inputs[3:5], strict=True):
            if t is not now and now is not None:
                t.copy_(now)
    return y


def quantized_norm(problem: Quantizing, given: Quantizable, asked: Hashable) -> tuple[Any, ...]:
    """(data, scale, sum, straight) of checked arguments. asked: as channel_norm's."""
    op, of = QUANTIZED_NORMS[problem.spec.name], (given.x, given.residual, given.weight, given.bias)
    wanted = torch.is_grad_enabled() and (road.within_transform() or any_requires_grad(*of))
    # Of inference mode Dynamo may not be asked.
    differentiated = wanted and (torch.compiler.is_compiling() or not torch.is_inference_mode_enabled())
    if differentiated or forward_ad._current_level >= 0:
        data, scale, total, _, _, straight = quantized_library.norm(problem._replace(save=True), given)
        return data, scale, total, straight
    why = quantized.lacking(problem, given)
    if road.takes_op(op, *given, whole=True):
        return *quantized_library.norm(problem, given)[:3], None
    if not given.x.numel() or not road.kernels_serve(op, *given, lacking=why):
        return *quantized.composite(problem, given)[:3], None
    inputs = quantized.read(problem, given)
    call = QuantizedCall(problem, given.x)
    if asked is not None and all(now is before for now, before in zip(inputs, given, strict=True)):
        quantized.CALLS.keep(asked, call, *inputs)
    return *call(*inputs)[:3], None
