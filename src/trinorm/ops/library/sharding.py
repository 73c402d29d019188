"""How the registered ops are shared out over a device mesh: the rules that DTensor asks for.

What statistics run over stays together. So these stay where they are, and so do their results: rows, those of a sum too,
by any leading dim; samples of GroupNorm; samples and positions of LayerNorm over channels; channels of BatchNorm. weight
and bias are whole on every device, whose sums dw and db are, or lie as the channels or samples do that they belong to. Of
QK-norm tokens stay, with cos and sin beside them, and heads: those of the queries and the keys, or, where keys are fewer
than devices and so whole on each, of the queries alone. Of conditioned norms all leading dims stay, heads that have
weights among them, and scale, shift, weight and a sum's gate lie as those do, or are whole where they are broadcast along
them. Of a quantized result rows stay, and their scales with them, swizzled ones where each device has whole tiles of them;
a scale of the whole tensor is whole, as parameters are.
Of DyT, Derf and PolyNorm rows stay, by any leading dim, and all parameters are whole. Of weight normalization what has a
length of its own stays, and g with it. What lies otherwise, as by a normalized dim or as a sum not yet taken, is
redistributed first, in the way that DTensor finds cheapest. registering.know_distributed imports this when the first
distributed tensor comes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from ...formats import FORMATS, TILE
from ...spec import BATCH_NORM, CHANNEL_LAYER_NORM, DYNAMIC_NORMS, GROUP_NORM, LAYER_NORM, ROW_NORMS
from .names import CONDITIONED_NORMS, GATED_SUMS, POLY_NORM, QK_NORM, QUANTIZED_NORMS, WEIGHT_NORM


class _Way(NamedTuple):
    """A way to lay a call along a mesh dim: input, and what is of its shape; statistics; weight and bias; the gradients of
    these.
    """

    input: Placement
    statistics: Placement
    parameters: Placement
    sums: Placement


# A call's arguments by name. Of a tensor DTensor tells the shape.
_Call = dict[str, Any]


def _whole_parameters(dim: int, of_statistics: int) -> _Way:
    return _Way(Shard(dim), Shard(of_statistics), Replicate(), Partial("sum"))


def _of_rows(call: _Call) -> list[_Way]:
    x = call["input"] if "input" in call else call["sum"]
    leading = x.ndim - len(call["normalized_shape"])
    return [_whole_parameters(dim, dim) for dim in range(leading)]


def _of_groups(call: _Call) -> list[_Way]:
    return [_Way(*[Shard(0)] * 4) if _has_each_samples(call) else _whole_parameters(0, 0)]


def _of_channels(call: _Call) -> list[_Way]:
    parameters = Shard(1 if _has_each_samples(call) else 0)
    return [_Way(Shard(1), Shard(0), parameters, parameters)]


def _of_positions(call: _Call) -> list[_Way]:
    return [_whole_parameters(0, 0), *(_whole_parameters(dim, dim - 1) for dim in range(2, call["input"].ndim))]


def _has_each_samples(call: _Call) -> bool:
    """Whether weight and bias are those of each sample."""
    return any(t is not None and t.ndim == 2 for t in (call["weight"], call["bias"]))


Placements = list[Placement | None]


def _rule(op: OpOverload, *args: Any, ways: Callable[[_Call], list[_Way]]) -> list[tuple[Placements, Placements]]:
    """(placements of the results, placements of the arguments) for each way to lay the call along a mesh dim.

    What is no tensor, and what is not given or not wanted, has None.
    """
    call = _named(op, args)
    found: list[tuple[Placements, Placements]] = []
    for way in (_Way(*[Replicate()] * 4), *ways(call)):
        laid: dict[str, Placement] = dict.fromkeys(("input", "residual", "sum", "dy", "dsum"), way.input)
        laid |= dict.fromkeys(("mean", "rstd", "row_scale"), way.statistics) | dict.fromkeys(
            ("weight", "bias"), way.parameters
        )
        of_input = 2 if "alpha" in call else 1  # y, and the sum where there is one
        results: Placements = [*[way.input] * of_input, *[way.statistics] * (len(op._schema.returns) - of_input)]
        if "dy" in call:
            wanted = {"dx": way.input, "dresidual": way.input, "dw": way.sums, "db": way.sums, "dr": way.input}
            results = [p if call[name] not in (False, None) else None for name, p in wanted.items() if name in call]
        found.append((results, _of_arguments(call, laid)))
    return found


def _named(op: OpOverload, args: tuple[Any, ...]) -> _Call:
    return {argument.name: value for argument, value in zip(op._schema.arguments, args, strict=True)}


def _of_arguments(call: _Call, laid: dict[str, Placement]) -> Placements:
    return [None if value is None else laid.get(name) for name, value in call.items()]


def _rule_of_heads(op: OpOverload, *args: Any) -> list[tuple[Placements, Placements]]:
    """The same of QK-norm."""
    call = _named(op, args)
    of_heads, whole = call["query"].ndim - 2, Replicate()
    ways: list[tuple[Placement, Placement, Placement]] = [(whole, whole, whole)]
    ways += [(Shard(dim), Shard(dim), _beside(call["cos"], dim, of_heads + 1)) for dim in range(of_heads)]
    ways += [(Shard(of_heads), Shard(of_heads), whole), (Shard(of_heads), whole, whole)]
    found: list[tuple[Placements, Placements]] = []
    for of_query, of_key, of_angles in ways:
        laid: dict[str, Placement] = dict.fromkeys(("query_weight", "key_weight"), whole)
        laid |= dict.fromkeys(("query", "query_dy", "query_rstd"), of_query)
        laid |= dict.fromkeys(("key", "key_dy", "key_rstd"), of_key) | dict.fromkeys(("cos", "sin"), of_angles)
        results: Placements = [of_query, of_key] * 2  # of each, and the rstd of each
        if "query_dy" in call:
            sums = (side if side == whole else Partial("sum") for side in (of_query, of_key))
            wanted = zip(("dquery", "dkey", "dquery_weight", "dkey_weight"), (of_query, of_key, *sums), strict=True)
            results = [p if call[name] else None for name, p in wanted]
        found.append((results, _of_arguments(call, laid)))
    return found


def _rule_of_conditions(
    op: OpOverload, *args: Any, parameters: tuple[str, ...] = ("weight", "bias")
) -> list[tuple[Placements, Placements]]:
    """The same of conditioned norms. parameters: what is broadcast to the rows, as a gated sum's gate is."""
    call = _named(op, args)
    dims = call["input"].ndim
    found: list[tuple[Placements, Placements]] = []
    for dim in (None, *range(dims - call["dims"])):
        of_x: Placement = Replicate() if dim is None else Shard(dim)
        laid = dict.fromkeys(("input", "residual", "gate", "sum", "dy", "dsum", "mean", "rstd"), of_x)
        laid |= {name: Replicate() if dim is None else _beside(call[name], dim, dims) for name in parameters}
        results: Placements = [of_x] * len(op._schema.returns)
        if "dy" in call:
            results = []
            for name in ("input", "residual", "gate", "weight", "bias"):
                is_sum = name in parameters and dim is not None and laid[name].is_replicate()
                if f"d{name}" in call:
                    results.append((Partial("sum") if is_sum else laid[name]) if call[f"d{name}"] else None)
        found.append((results, _of_arguments(call, laid)))
    return found


def _rule_of_quantized(op: OpOverload, *args: Any) -> list[tuple[Placements, Placements]]:
    """The same of norms with a quantized result."""
    call = _named(op, args)
    leading = call["input"].ndim - call["dims"]
    centered = op is getattr(torch.ops.trinorm, QUANTIZED_NORMS[LAYER_NORM.name]).default
    taken = FORMATS[call["format"]].scaling != "tensor"
    there = True, taken, call["residual"] is not None, call["save"] and centered, call["save"], call["save"]
    found: list[tuple[Placements, Placements]] = []
    for dim in (None, *range(leading)) if call["scale_layout"] != "swizzled" else (None, *_of_whole_tiles(call)):
        of_x: Placement = Replicate() if dim is None else Shard(dim)
        laid: dict[str, Placement] = dict.fromkeys(("input", "residual"), of_x)
        laid |= dict.fromkeys(("weight", "bias", "scale"), Replicate())
        laid["input_scale"] = of_x if dim is None else _beside(call["input_scale"], dim, leading + 1)
        found.append(([of_x if one else None for one in there], _of_arguments(call, laid)))
    return found


def _of_whole_tiles(call: _Call) -> tuple[int, ...]:
    """By which dims swizzled scales may be shared out: the first, where each device then has whole tiles of its rows."""
    x, devices = call["input"], call["input"].mesh.size()
    each, rest = divmod(math.prod(x.shape[: x.ndim - call["dims"]]), devices)
    return (0,) if x.ndim > call["dims"] and not (rest or each % TILE[0] or x.shape[0] % devices) else ()


def _rule_of_inputs_only(op: OpOverload, *args: Any) -> list[tuple[Placements, Placements]]:
    """The same of DyT, Derf and PolyNorm."""
    call = _named(op, args)
    found: list[tuple[Placements, Placements]] = []
    for dim in (None, *range(call["input"].ndim - call.get("dims", 1))):
        of_x: Placement = Replicate() if dim is None else Shard(dim)
        laid: dict[str, Placement] = dict.fromkeys(("weight", "bias", "alpha", "shift"), Replicate())
        laid |= dict.fromkeys(("input", "dy"), of_x)
        results: Placements = [of_x]
        if "dy" in call:
            of_sums = Replicate() if dim is None else Partial("sum")
            named = (argument.name for argument in op._schema.arguments if f"d{argument.name}" in call)
            results = [(of_x if name == "input" else of_sums) if call[f"d{name}"] else None for name in named]
        found.append((results, _of_arguments(call, laid)))
    return found


def _rule_of_weights(op: OpOverload, *args: Any) -> list[tuple[Placements, Placements]]:
    """The same of weight normalization."""
    call = _named(op, args)
    found: list[tuple[Placements, Placements]] = []
    for of_all in (Replicate(), *([] if call["dim"] is None else [Shard(call["dim"])])):
        laid: dict[str, Placement] = dict.fromkeys(("input", "g", "dy"), of_all)
        wanted = [call[name] for name in ("dinput", "dg")] if "dy" in call else [True]
        found.append(([of_all if want else None for want in wanted], _of_arguments(call, laid)))
    return found


def _beside(t: Any, dim: int, dims: int) -> Placement:
    """How a tensor lies that is broadcast to one of ``dims`` dims, which is sharded by a dim: alike, or whole where it is
    broadcast along that.
    """
    own = -1 if t is None else dim - dims + t.ndim
    return Shard(own) if own >= 0 and t.shape[own] > 1 else Replicate()


_WAYS = dict.fromkeys((name for spec in ROW_NORMS for name in (spec.name, f"add_{spec.name}")), _of_rows) | {
    GROUP_NORM.name: _of_groups,
    BATCH_NORM.name: _of_channels,
    CHANNEL_LAYER_NORM.name: _of_positions,
}

_RULES: dict[str, Callable[..., list[tuple[Placements, Placements]]]] = {
    name: functools.partial(_rule, ways=ways) for name, ways in _WAYS.items()
}
_RULES[QK_NORM] = _rule_of_heads
_RULES |= dict.fromkeys(CONDITIONED_NORMS.values(), _rule_of_conditions)
_OF_GATED_SUMS = functools.partial(_rule_of_conditions, parameters=("gate", "weight", "bias"))
_RULES |= dict.fromkeys(GATED_SUMS.values(), _OF_GATED_SUMS)
_RULES |= dict.fromkeys(QUANTIZED_NORMS.values(), _rule_of_quantized)
_RULES |= dict.fromkeys((*(spec.name for spec in DYNAMIC_NORMS), POLY_NORM), _rule_of_inputs_only)
_RULES[WEIGHT_NORM] = _rule_of_weights

for _norm, _of_norm in _RULES.items():
    for _name in (_norm, f"{_norm}_backward"):
        if _norm in QUANTIZED_NORMS.values() and _name != _norm:  # whose gradients are the row norms'
            continue
        _op = getattr(torch.ops.trinorm, _name).default
        register_sharding(_op)(functools.partial(_of_norm, _op))
        # DTensor keeps what a rule said for the next call of these layouts. register_sharding has it tell calls apart by
        # tensors and by arguments from the first int on; ours differ by normalized_shape and by the gradients wanted too.
        DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[_op] = RuntimeSchemaInfo(1)
