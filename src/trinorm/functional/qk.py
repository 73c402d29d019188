"""QK-norm as a function: queries and keys are normalized, and turned by their places (functional re-exports it)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import checks
from ..ops import qk
from ..ops import qk_norm as by_its_road
from ..spec import RMS_NORM, Cast


def qk_norm(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    eps: float | None = None,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    cast: Cast = "output",
    batch_invariant: bool | None = None,
) -> tuple[Tensor, Tensor]:
    r"""RMS normalization of each query head and each key head of a token, and the rotary embedding behind it, in one pass.

    .. math::
        n = \frac{x}{\sqrt{\mathrm{E}[x^2] + \epsilon}} \cdot w, \qquad
        y_j = n_j \cos_j \mp n_{p(j)} \sin_j

    with - where j is the first of its pair and + where it is the second. p(j) is the other: of the first R elements j ± R/2
    (halves: LLaMA, NeoX, transformers' ``rotate_half``), or, ``interleaved``, the neighbour (GPT-J, Cohere). From R on, and
    without cos and sin, y = n. Queries and keys may be views into a packed projection: nothing is copied or transposed.

    Args:
        query: ``(*, query heads, D)``, of any leading dims; float16, bfloat16, float32 or float64. Any strides; where
            the last dim is not contiguous it is copied.
        key: ``(*, key heads, D)``, of the query's leading dims and dtype.
        query_weight, key_weight: ``(D,)``, any of the dtypes above, not necessarily the query's; None is 1. May be one.
        eps: as :func:`rms_norm`.
        cos, sin: ``(*, R)``, alike, of the query's leading dims or broadcast to them: ``(T, R)``, ``(1, T, R)`` or
            ``(B, T, R)`` beside ``(B, T, heads, D)``. R is even, from 2 to D; less than D is a partial rotary embedding. As
            in transformers a token has R values, so that both of a pair have their own. Both or neither. Where one requires
            a gradient, torch's own operators compute all of the call.
        interleaved: whether the pairs are neighbours.
        cast: as :func:`layer_norm`. "output": all in fp32, rounded once, behind the rotation. "llama": the normalized input
            is rounded to its dtype before the weight and once more after it, and then, where cos and sin are of that dtype,
            each product of the rotation is too, as by transformers' ``apply_rotary_pos_emb``; derivatives are those without
            the roundings. "gemma": the weight is kept as its distance from 1.
        batch_invariant: as :func:`layer_norm`. The kernels keep that promise without being asked; with True torch.compile
            records them in any case.

    Returns:
        (query, key), each contiguous and of its input's shape and dtype, under autocast too. Statistics, products and sums
        are fp32, fp64 as soon as one of the tensors is. Heads of more than 1024 elements have torch's own operators.

    Raises:
        RuntimeError: a shape does not fit, tensors are on different devices, query and key have different dtypes, or cos
            and sin do, or one of these is missing.
        NotImplementedError: a dtype other than the four.
        TypeError: an argument of the wrong kind.
        ValueError: eps is negative or NaN, or ``cast`` is none of its values.

    Sources: Henry, Dachapally, Pawar, Chen, "Query-Key Normalization for Transformers", arXiv:2010.04245; Zhang, Sennrich,
    "Root Mean Square Layer Normalization", arXiv:1910.07467; Su et al., "RoFormer: Enhanced Transformer with Rotary
    Position Embedding", arXiv:2104.09864.
    """
    tensors = query, key, query_weight, key_weight, cos, sin
    if has_torch_function_variadic(*tensors):
        given: dict[str, Any] = dict(query_weight=query_weight, key_weight=key_weight, eps=eps, cos=cos, sin=sin)
        given.update(interleaved=interleaved, cast=cast, batch_invariant=batch_invariant)
        return handle_torch_function(qk_norm, tensors, query, key, **given)
    plain = (eps is None or type(eps) is float) and type(interleaved) is bool
    plain = plain and (batch_invariant is None or type(batch_invariant) is bool)
    # What a call is recalled by.
    asked = (eps, interleaved, cast, batch_invariant) if plain else None
    if asked is not None and (call := qk.CALLS.recall(asked, *tensors)) is not None:
        return call(*tensors)
    eps = checks.own_epsilon(RMS_NORM, query, eps)
    _check_inputs(query, key, query_weight=query_weight, key_weight=key_weight, cos=cos, sin=sin)
    eps = checks.epsilon(_OP, eps)
    checks.casting(_OP, cast)
    checks.flag(_OP, "interleaved", interleaved)
    invariant = checks.invariance(_OP, batch_invariant)
    return by_its_road(RMS_NORM.with_cast(cast), eps, interleaved, asked, invariant, *tensors)


_OP = "qk_norm"


def _check_inputs(query: Tensor, key: Tensor, **others: Tensor | None) -> None:
    """Of the tensors: kind, layout, dtype, device and shape."""
    there = {name: t for name, t in others.items() if t is not None}
    given: dict[str, Tensor] = dict(query=query, key=key, **there)
    for name, t in given.items():
        checks.tensor(_OP, name, t)
        checks.strided(_OP, name, t)
        if t.is_nested:
            raise RuntimeError(f"{_OP}(): {name} is a nested tensor, which this norm does not take")
    if query.dim() < 2:
        raise RuntimeError(f"{_OP}(): query has shape {tuple(query.shape)}; it must be (..., heads, D)")
    tokens, size = query.shape[:-2], query.shape[-1]
    if key.dim() < 2 or key.shape[:-2] != tokens or key.shape[-1] != size:
        raise RuntimeError(
            f"{_OP}(): key has shape {tuple(key.shape)}; of the query's, {tuple(query.shape)}, only the number of heads, "
            "the last dim but one, may differ"
        )
    if key.dtype != query.dtype:
        raise RuntimeError(f"{_OP}(): key has dtype {key.dtype}; it must be the query's, {query.dtype}")
    for name in ("query_weight", "key_weight"):
        if name in given and given[name].shape != (size,):
            raise RuntimeError(
                f"{_OP}(): {name} has shape {tuple(given[name].shape)}; it must be ({size},), as a head has {size} elements"
            )
    _check_angles(query, others["cos"], others["sin"])
    for name, t in given.items():
        checks.beside(_OP, name, t, query, of="query")


def _check_angles(query: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    if cos is None or sin is None:
        if cos is not sin:
            there, absent = ("sin", "cos") if cos is None else ("cos", "sin")
            raise RuntimeError(f"{_OP}(): {there} is given and {absent} is not; give both or neither")
        return
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        raise RuntimeError(
            f"{_OP}(): sin is {sin.dtype} of shape {tuple(sin.shape)}; it must be as cos, {cos.dtype} of {tuple(cos.shape)}"
        )
    size, tokens = query.shape[-1], query.shape[:-2]
    if cos.dim() < 1 or not 2 <= cos.shape[-1] <= size or cos.shape[-1] % 2:
        raise RuntimeError(
            f"{_OP}(): cos has shape {tuple(cos.shape)}, but a head has {size} elements; its last dim, a value for each "
            f"element that is turned, must be even, from 2 to {size}"
        )
    if not qk.broadcasts(cos, tokens):
        raise RuntimeError(
            f"{_OP}(): cos has shape {tuple(cos.shape)}, but query has tokens of {tuple(tokens)}; but for its last dim cos "
            "must be broadcast to that, without a dim for the heads"
        )
