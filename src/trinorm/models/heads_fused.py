"""What a rewritten forward calls for the norms of queries and keys, and the rotary embedding behind them: qk_norm, or what
stood there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .. import reference
from ..functional import qk_norm
from ..nn.row import RMSNorm
from ..ops import qk
from ..ops.calls import Known
from ..ops.road import PLAIN, PLAIN_OR_NONE
from ..spec import RMS_NORM
from ..switches import when_set
from .forms import Form
from .heads_source import Exchanged, Heads
from .made import ROTARY
from .norm_calls import asked_of, is_replaced, row_of
from .recognize import Recognized, form_in_force
from .rotary import Rotary, rotary


class _Deferred(NamedTuple):
    """A norm that is put off, and what it is of."""

    norm: torch.nn.Module
    x: Tensor


# Of queries and of keys, where it is.
_Kept = list[_Deferred | None]

# What is transposed between the norm and the rotary embedding, of each.
_Between = tuple[tuple[Exchanged, ...], tuple[Exchanged, ...]]


def deferred(module: torch.nn.Module, kept: _Kept, place: int, norm: Any, x: Any) -> Any:
    """x itself, whose norm ``turned`` will see to; or the norm of it."""
    known = isinstance(norm, (RMSNorm, Recognized))  # whoever has put another in its place may have taken a function
    if vars(module).get(ROTARY) is None or type(x) is not Tensor or not known or is_replaced(norm):
        return norm(x)
    kept[place] = _Deferred(norm, x)
    return x


def turned(
    module: torch.nn.Module,
    kept: _Kept,
    between: _Between,
    function: Callable[..., Any],
    query: Any,
    key: Any,
    cos: Any,
    sin: Any,
    /,
    *more: Any,
    **named: Any,
) -> Any:
    """What the model's function makes of the normalized queries and keys."""
    of_query, of_key = kept
    kept[:] = None, None  # what they are of may go
    if of_query is not None and of_key is not None:
        both = _both(vars(module).get(ROTARY), function, (of_query, of_key), between, query, key, cos, sin)
        if both is not None:
            return both
    query = query if of_query is None else _normalized(of_query, between[0])
    key = key if of_key is None else _normalized(of_key, between[1])
    return function(query, key, cos, sin, *more, **named)


def _normalized(of: _Deferred, exchanged: tuple[Exchanged, ...]) -> Any:
    y = of.norm(of.x)
    for dims in exchanged:
        y = y.transpose(*dims)
    return y


def _both(
    found: Any,
    function: Any,
    sides: tuple[_Deferred, _Deferred],
    between: _Between,
    query: Any,
    key: Any,
    cos: Any,
    sin: Any,
) -> tuple[Tensor, Tensor] | None:
    """Both in one launch; None where each is to be called. query, key: as the function takes them, without their norms."""
    if not isinstance(found, Rotary) or function is not found.of or type(query) is not Tensor or type(key) is not Tensor:
        return None
    if query.dim() < 3 or key.dim() < 3 or type(cos) not in PLAIN or type(sin) not in PLAIN:
        return None
    if cos.requires_grad or sin.requires_grad or not (query.numel() and key.numel()):
        return None
    asked, key_asked = asked_of(sides[0].norm), asked_of(sides[1].norm)
    if asked is None or key_asked is None:
        return None
    manner = found, between, asked[0], key_asked[0]
    tensors = query, key, asked[1], key_asked[1], cos, sin
    # What follows was asked of one like it.
    kept = None if has_torch_function_variadic(*tensors) else CALLS.recall(manner, *tensors)
    if kept is not None:
        call, runs = kept
        return _laid(found, call(found.laid(query), found.laid(key), *tensors[2:]), runs)
    if any(dim in (-1, query.dim() - 1) for exchanged in between for dims in exchanged for dim in dims):
        return None  # the norm's last dim is not the function's
    # Along its heads a token lies as a norm of rows wants it, however the function does.
    queries, keys = found.laid(query), found.laid(key)
    in_one_run = (cos.shape[-1] < query.shape[-1]) in found.contiguous
    if not in_one_run and not all(map(_is_in_order, sides, between, (queries, keys), (found.heads, found.heads))):
        return None
    row, key_row = row_of(sides[0].norm, _alike(queries)), row_of(sides[1].norm, _alike(keys))
    if row is None or key_row is None:
        return None
    spec, shape, query_weight, _, eps, batch_invariant = row
    key_spec, key_shape, key_weight, *_ = key_row
    if (spec, eps, batch_invariant) != (key_spec, *key_row[4:]) or spec.center:
        return None
    if not tuple(shape) == tuple(key_shape) == tuple(queries.shape[-1:]):
        return None
    weights = query_weight, key_weight
    if len({None if w is None else w.dtype for w in weights}) > 1 or not PLAIN_OR_NONE.issuperset(map(type, weights)):
        return None
    if not found.serves(queries, keys, query_weight, cos, sin) or reference.autocast_to_fp32(spec, query.device.type):
        return None
    given: dict[str, Any] = dict(cos=cos, sin=sin, interleaved=found.interleaved, cast=spec.cast)
    both = qk_norm(queries, keys, *weights, eps, batch_invariant=batch_invariant, **given)
    runs = tuple(
        in_one_run or (not exchanged and _is_in_one_run(side)) for side, exchanged in zip(sides, between, strict=True)
    )
    # By qk_norm's own key; with another nothing would be kept.
    made = qk.CALLS.recall((eps, found.interleaved, spec.cast, batch_invariant), queries, keys, *weights, cos, sin)
    if made is not None:
        CALLS.keep(manner, (made, runs), *tensors)
    return _laid(found, both, runs)


# The launch of a call like one before; and of which of both results one run of memory is made.
CALLS: Known[tuple[qk.QKCall, tuple[bool, ...]]] = Known(1024)
when_set(CALLS.clear)


def _laid(found: Rotary, both: tuple[Tensor, Tensor], runs: tuple[bool, ...]) -> tuple[Tensor, Tensor]:
    """Both as the function returns them."""
    query, key = (found.laid(y).contiguous() if run else found.laid(y) for y, run in zip(both, runs, strict=True))
    return query, key


def _is_in_one_run(of: _Deferred) -> bool:
    """The norm's result: rows are, and what is written out has the order of memory of what it is of."""
    return type(of.norm) is RMSNorm or of.x.is_contiguous()


def _is_in_order(of: _Deferred, exchanged: tuple[Exchanged, ...], rows: Tensor, heads: int) -> bool:
    """Whether a product with the norm's result has the order of memory that qk_norm's has, or is in one run as it is."""
    if _is_in_one_run(of):
        return not exchanged or _is_undone(exchanged, rows.dim(), heads)
    return all(a >= b for a, b in itertools.pairwise(rows.stride()))


def _is_undone(exchanged: tuple[Exchanged, ...], dims: int, heads: int) -> bool:
    """Whether the dims that are exchanged are those that the function has otherwise than qk_norm."""
    order = list(range(dims))
    for first, second in (*exchanged, *([(-3, -2)] if heads == -3 else [])):
        order[first], order[second] = order[second], order[first]
    return order == sorted(order)


def _alike(x: Tensor) -> Tensor:
    """What to ask a norm about. Of as many tokens as a head has elements it would not know which of both a row is; and a
    traced graph should not depend on that, as torch.export takes no number of tokens that has exceptions.
    """
    if x.dim() == 4 and (torch.compiler.is_compiling() or x.shape[1] == x.shape[-1]):
        return x[:, :1]
    return x


def rotary_of(heads: Heads, norms: dict[str, torch.nn.Module], function: Any) -> Rotary | str:
    """What ``turned`` asks of a module: the rotary embedding that its function computes; or, in words, why there is none.

    norms: the module's.
    """
    alike = [_how(norms[name]) for name in heads.norms]
    if None in alike:
        return "qk_norm has RMSNorms of a head's elements, which its norms are not"
    if alike[0] != alike[1]:
        return "the norms of queries and keys differ in what they compute, or how"
    assert alike[0] is not None
    if not callable(function):
        return f"{heads.function} is no global function of its module"
    return rotary(function, heads.more, *alike[0])


def _how(norm: torch.nn.Module) -> tuple[Any, ...] | None:
    """(spec, eps, whether it has a weight, how many elements it is of: None is any) of an RMSNorm of the last dim."""
    if type(norm) is RMSNorm:
        if len(norm.normalized_shape) != 1:
            return None
        return RMS_NORM.with_cast(norm.cast), norm.eps, norm.weight is not None, norm.normalized_shape[0]
    form = form_in_force(norm) if isinstance(norm, Recognized) else None
    if type(form) is not Form or form.norm.center:
        return None
    return form.norm, form.eps, form.weight is not None, form.length
