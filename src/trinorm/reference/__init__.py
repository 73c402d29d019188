"""The same specs without Triton: the float64 oracle, and the differentiable composite of ATen's own ops.

The oracle is what every test compares with: the definition, written out. The composite is what runs wherever the
kernels do not: on CPU, under forward-mode AD and vmap, and for second derivatives.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from ..spec import LAYER_NORM, RowNorm
from ..switches import options


class Exact(NamedTuple):
    """What the definition gives, as float64. ``mean`` is zero for a spec that does not center."""

    y: Tensor
    mean: Tensor
    rstd: Tensor


class Gradients(NamedTuple):
    """dL/dx, dL/dweight and dL/dbias; None where there is no such input."""

    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None


def oracle(
    spec: RowNorm,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Exact:
    """The definition: ``rstd = (mean((x - mean)^2) + eps)^-1/2``, ``y = (x - mean) * rstd * (weight + offset) + bias``.

    A spec's roundings are not in it: they are an implementation's error, as all roundings are.

    Computed in float64; where an input is float64, in extended precision (numpy's longdouble), so that the error of a
    float64 result can be seen at all.
    """
    lift, lower, quiet = precise(x, weight, bias)
    with quiet:
        mean, rstd, xhat = _normalized(spec, lift(x), len(normalized_shape), eps)
        y = xhat if weight is None else xhat * (lift(weight) + spec.offset)
        y = y if bias is None else y + lift(bias)
    return Exact(lower(y), lower(mean).flatten(), lower(rstd).flatten())


def oracle_gradients(
    spec: RowNorm,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dy: Tensor,
) -> Gradients:
    """The gradients in closed form, in the oracle's precision."""
    lift, lower, quiet = precise(x, weight, bias)
    with quiet:
        dims = len(normalized_shape)
        _, rstd, xhat = _normalized(spec, lift(x), dims, eps)
        dx, dw, db = _gradients(spec, xhat, rstd, dims, None if weight is None else lift(weight), lift(dy))
        return Gradients(lower(dx), None if weight is None else lower(dw), None if bias is None else lower(db))


def torch_gradients(
    spec: RowNorm,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dy: Tensor,
) -> Gradients:
    """The composite's gradients by torch's own backward: the yardstick that ``trinorm.compare`` asks for."""

    def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return composite(spec, x, normalized_shape, weight, bias, eps)

    return Gradients(*gradients_by_autograd(norm, (x, weight, bias), dy))


def gradients_by_autograd(
    norm: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    gradients: Tensor | tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """Those of ``norm(*inputs)``, of its results' gradients, as torch's autograd has them."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        results = norm(*leaves)
    found = iter(torch.autograd.grad(results, [leaf for leaf in leaves if leaf is not None], gradients))
    return tuple(None if leaf is None else next(found) for leaf in leaves)


def autocast_to_fp32(spec: RowNorm, device: str) -> bool:
    """Whether autocast is on, and the op is to compute in fp32 and return it, as torch's own then does."""
    # Other modes are those of models that write their norm out, which autocast does not know.
    return spec.cast == "output" and autocasts_to_fp32(spec.name, device)


def autocasts_to_fp32(op: str, device: str) -> bool:
    """The same of torch's op of this name."""
    return autocasts(device) and not options.autocast_keeps_dtype and _policy_is_fp32(op, device)


def autocasts(device: str) -> bool:
    """Whether autocast is on there. Of a meta tensor torch refuses to say."""
    return torch._C._is_any_autocast_enabled() and device != "meta" and torch.is_autocast_enabled(device)


def keeping_dtype(device: str) -> contextlib.AbstractContextManager[Any]:
    """Where to call an op that has a policy of its own: out of autocast, if the input's dtype is to be kept."""
    keeps = options.autocast_keeps_dtype and autocasts(device)
    return torch.autocast(device, enabled=False) if keeps else contextlib.nullcontext()


def in_fp32(x: Tensor, *parameters: Tensor | None) -> tuple[Any, ...]:
    """These tensors as autocast hands them to an op that it computes in fp32."""
    return x.float(), *(None if t is None else t.float() for t in parameters)


def _policy_is_fp32(op: str, device: str) -> bool:
    return _asked_policy_is_fp32(op, device)


# As torch.compiler.assume_constant_result marks it (2.11 to 2.13), which would import Dynamo, and with it Triton.
_policy_is_fp32._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _asked_policy_is_fp32(op: str, device: str) -> bool:
    # Asked of torch itself, once, out of sight of who records what is called: CUDA's list has layer_norm and group_norm,
    # and in 2.13 rms_norm; the CPU's has none.
    with _disable_current_modes(), torch.autocast(device, dtype=torch.bfloat16):
        x = torch.ones(1, 1, 2, dtype=torch.bfloat16, device=device)
        y = getattr(F, _TORCHS.get(op, op))(x, *_ARGUMENTS[op])
    return bool(y.dtype == torch.float32)


# Where torch has the op by another name.
_TORCHS = {"channel_layer_norm": "layer_norm"}

_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "layer_norm": ((2,),),
    "rms_norm": ((2,),),
    "channel_layer_norm": ((2,),),
    "group_norm": (1,),
    "instance_norm": (),
    "batch_norm": (None, None, None, None, True),
}


def statistics(spec: RowNorm, x: Tensor, dims: int, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of the rows in ATen's ops, float64, with x's leading dims."""
    mean, rstd, _ = _normalized(spec, x.double(), dims, eps)
    return mean.flatten(-dims).squeeze(-1), rstd.flatten(-dims).squeeze(-1)


def composite_gradients(
    spec: RowNorm,
    x: Tensor,
    dims: int,
    weight: Tensor | None,
    bias_dtype: torch.dtype | None,
    eps: float,
    dy: Tensor,
    dtype: torch.dtype | None = None,
) -> Gradients:
    """The same closed form in ATen's ops: a differentiable function of x, weight and dy. dtype: y's, None where it is x's.

    The road of second derivatives, of batched ones and of whatever looks inside a backward. In fp64, as the kernels that
    made y rescue rows beyond fp32's squares, which this could not.
    """
    _, rstd, xhat = _normalized(spec, x.double(), dims, eps)
    weighted = xhat.to(dtype or x.dtype).double() if spec.rounded else xhat
    return in_dtypes_of(_gradients(spec, xhat, rstd, dims, _double(weight), dy.double(), weighted), x, weight, bias_dtype)


def gradients_of_output(
    spec: RowNorm,
    y: Tensor,
    dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    bias_dtype: torch.dtype | None,
    rstd: Tensor,
    dy: Tensor,
) -> Gradients:
    """The same of y and rstd, of which x is not known: no function to be differentiated again."""
    w, b = _double(weight), _double(bias)
    xhat = y.double() if b is None else y.double() - b
    xhat = xhat if w is None else xhat / (w + spec.offset)
    rstd = rstd.double().reshape(*y.shape[:-dims], *[1] * dims)
    return in_dtypes_of(_gradients(spec, xhat, rstd, dims, w, dy.double()), y, weight, bias_dtype)


def _double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def in_dtypes_of(
    gradients: tuple[Tensor, Tensor, Tensor], x: Tensor, weight: Tensor | None, bias_dtype: torch.dtype | None
) -> Gradients:
    dx, dw, db = gradients
    return Gradients(
        dx.to(x.dtype), None if weight is None else dw.to(weight.dtype), None if bias_dtype is None else db.to(bias_dtype)
    )


def _gradients(
    spec: RowNorm, xhat: Any, rstd: Any, dims: int, weight: Any | None, dy: Any, weighted: Any | None = None
) -> tuple[Any, Any, Any]:
    """(dx, dw, db), of torch tensors or numpy arrays alike (docs/mathematics.md derives them).

    ``dx = rstd * (g - xhat * mean(g * xhat) - mean(g))`` with ``g = dy * (weight + offset)``, the last term for a spec that
    centers. weighted: x̂ as the weight met it, where it was rounded.
    """
    axes = tuple(range(-dims, 0))
    rows = tuple(range(xhat.ndim - dims))
    g = dy if weight is None else dy * (weight + spec.offset)
    dx = g - xhat * (g * xhat).mean(axis=axes, keepdims=True)
    if spec.center:
        dx = dx - g.mean(axis=axes, keepdims=True)
    # With no leading dims there is one row, and nothing to sum: an empty tuple of axes would mean all of them.
    dw, db = dy * (xhat if weighted is None else weighted), dy
    return rstd * dx, dw.sum(axis=rows) if rows else dw, db.sum(axis=rows) if rows else db


def _normalized(spec: RowNorm, x: Any, dims: int, eps: float) -> tuple[Any, Any, Any]:
    """(mean, rstd, xhat), of a torch tensor or a numpy array alike."""
    axes = tuple(range(-dims, 0))
    mean = x.mean(axis=axes, keepdims=True)
    mean = mean if spec.center else mean * 0
    centered = x - mean if spec.center else x
    rstd = 1 / ((centered * centered).mean(axis=axes, keepdims=True) + eps) ** 0.5
    return mean, rstd, centered * rstd


def precise(
    x: Tensor, *parameters: Tensor | None
) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor], contextlib.AbstractContextManager[Any]]:
    """(to the precision that the oracle computes in, from it to float64 on x's device, a context to compute in)."""
    if not any(t is not None and t.dtype == torch.float64 for t in (x, *parameters)):
        return (lambda t: t.detach().double()), (lambda t: t), contextlib.nullcontext()
    import numpy as np

    return (
        lambda t: t.detach().double().cpu().numpy().astype(np.longdouble),
        lambda a: torch.from_numpy(np.asarray(a, dtype=np.float64)).to(x.device),
        # numpy warns of NaN and Inf, which are data here.
        np.errstate(all="ignore"),
    )


def composite(
    spec: RowNorm,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The norm as torch's own op, differentiable any number of times and in either mode.

    torch's op where it takes the dtypes given; where it does not (weights of another floating dtype), the same op in
    fp32 or fp64 with one rounding at the end; so too in a casting mode of its own. Under torch.func and in forward mode
    LayerNorm is the definition, written out: of torch's op the forward mode of a derivative, and third derivatives, are
    wrong there, silently (2.13). dtype: the result's, None where it is the input's (or autocast's).
    """
    with keeping_dtype(x.device.type):
        return _composite(spec, x, list(normalized_shape), weight, bias, eps, dtype)


def _composite(
    spec: RowNorm,
    x: Tensor,
    shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
) -> Tensor:
    if x.dtype != torch.float64 and autocast_to_fp32(spec, x.device.type):
        x, weight, bias = in_fp32(x, weight, bias)
    narrow = dtype or x.dtype
    dtypes = {narrow, *(t.dtype for t in (x, weight, bias) if t is not None)}
    defined = spec.center and is_transformed()
    if len(dtypes) > 1 or defined or spec.cast != "output":
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        x = x.to(wide)
        weight = None if weight is None else weight.to(wide)
        bias = None if bias is None else bias.to(wide)
    weight = weight if weight is None or not spec.offset else weight + spec.offset
    if defined or spec.rounded:
        xhat = _normalized(spec, x, len(shape), eps)[2] if defined else _plain(spec, x, shape, None, None, eps)
        if spec.rounded:
            # Rounded in value alone: the gradient too would be, by the casts, and overflow in fp16.
            xhat = xhat + (xhat.to(narrow).to(x.dtype) - xhat).detach()
        y = xhat if weight is None else xhat * weight
        y = y if bias is None else y + bias
    else:
        y = _plain(spec, x, shape, weight, bias, eps)
    return y.to(narrow)


def _plain(spec: RowNorm, x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch's own op, of tensors of one dtype."""
    if spec.center:
        # A weight of ones changes no bit. Without one torch drops bias's second derivatives, silently (2.11, 2.13).
        weight = torch.ones_like(bias) if weight is None and bias is not None else weight
        if differentiates(x, weight, bias):
            return _LayerNorm.apply(x, weight, bias, shape, eps)
        return F.layer_norm(x, shape, weight, bias, eps)
    y = F.rms_norm(x, shape, weight, eps)
    return y if bias is None else y + bias


class _LayerNorm(torch.autograd.Function):
    """torch's own op and backward, but for the backward's own derivatives: torch's third are wrong, silently (2.13)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int], eps: float) -> Tensor:
        y, *statistics = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, *statistics)
        ctx.shape, ctx.eps = shape, eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            bias_dtype = None if bias is None else bias.dtype
            found = composite_gradients(LAYER_NORM, x, len(ctx.shape), weight, bias_dtype, ctx.eps, dy)
            return *found, None, None
        wanted = ctx.needs_input_grad[:3]
        return *torch.ops.aten.native_layer_norm_backward(dy, x, ctx.shape, mean, rstd, weight, bias, wanted), None, None


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether autograd is on for these plain tensors, and nobody records what is called."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or not torch.is_grad_enabled():
        return False
    if torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality):
        return False  # a registered op computes, whose derivatives are its own
    given = [t for t in tensors if t is not None]
    return any(t.requires_grad for t in given) and all(type(t) in (Tensor, torch.nn.Parameter) for t in given)


def is_transformed() -> bool:
    """Whether torch.func or forward mode differentiates. A tracer shows neither."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
