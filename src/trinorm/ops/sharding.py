"""How the registered ops are shared out over a device mesh: the rules that DTensor asks for.

No row needs another. An input sharded by leading dims stays where it is, and so do its results; weight and bias are whole
on every device, whose sums dw and db are. What lies otherwise, as by a normalized dim or as a sum not yet taken, is
redistributed first, in the way that DTensor finds cheapest. library imports this when the first distributed tensor comes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from ..spec import ROW_NORMS

_OF_ROWS = ("dy", "input", "mean", "rstd")
_OF_ALL_ROWS = ("weight", "bias")

Placements = list[Placement | None]


def _rule(op: OpOverload, *args: Any) -> list[tuple[Placements, Placements]]:
    """(placements of the results, placements of the arguments) for each way to lay the rows along a mesh dim.

    What is no tensor, and what is not given or not wanted, has None.
    """
    call = {argument.name: value for argument, value in zip(op._schema.arguments, args, strict=True)}
    leading = call["input"].ndim - len(call["normalized_shape"])
    ways: list[tuple[Placement, Placement]] = [(Replicate(), Replicate())]
    ways += [(Shard(dim), Partial("sum")) for dim in range(leading)]
    found: list[tuple[Placements, Placements]] = []
    for rows, sums in ways:
        laid: dict[str, Placement] = dict.fromkeys(_OF_ROWS, rows) | dict.fromkeys(_OF_ALL_ROWS, Replicate())
        results: Placements = [rows] * len(op._schema.returns)
        if "dy" in call:
            results = [rows if call["dx"] else None, sums if call["dw"] else None, None if call["db"] is None else sums]
        found.append((results, [None if value is None else laid.get(name) for name, value in call.items()]))
    return found


for _name in (name for spec in ROW_NORMS for name in (spec.name, f"{spec.name}_backward")):
    _op = getattr(torch.ops.trinorm, _name).default
    register_sharding(_op)(functools.partial(_rule, _op))
    # DTensor keeps what a rule said for the next call of these layouts. register_sharding has it tell calls apart by
    # tensors and by arguments from the first int on; ours differ by normalized_shape and by the gradients wanted too.
    DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[_op] = RuntimeSchemaInfo(1)
