"""How the code that Inductor writes calls registered ops: past torch's dispatcher, where their like were done before."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

# Where Inductor looks for who writes an op's call (2.11 to 2.13); another torch has the dispatcher called.
_WRITERS = "torch._inductor.codegen.custom_extern_kernel_codegen"


def tell(overload: Any) -> None:
    """Have Inductor, if it is there, write calls of a registered op as below."""
    module = sys.modules.get(_WRITERS)
    written = getattr(module, "CUSTOM_EXTERN_KERNEL_CODEGEN", None)
    name = f"{overload.__module__.replace('._ops.', '.ops.')}.{overload.__name__}"  # by which Inductor asks
    if written is not None and name not in written:
        written[name] = module.CustomCodegen(python=write_call)  # type: ignore[union-attr]


def write_call(node: Any, write: Callable[[str], None]) -> None:
    """``buf = called(...)`` where the overload's own call would stand, with registering.Op's ``called`` on top; or, where
    all sizes are fixed, its ``site``, one for each call.

    Such code is kept on disk, and found by another version of trinorm's: so the overload itself stands there for one that
    has neither.
    """
    from torch._inductor.codegen.wrapper import ExternKernelAllocLine
    from torch._inductor.virtualized import V

    wrapper = V.graph.wrapper_code
    top: Any = wrapper
    if V.graph.fx_wrapper or V.graph.cpp_wrapper:  # who write no Python
        wrapper.writeline(ExternKernelAllocLine(wrapper, node))
        return
    while (parent := getattr(top, "parent_wrapper", None)) is not None:  # of a graph within a graph
        top = parent
    overload = node.python_kernel_name
    called, made = overload.replace(".", "_"), f"getattr({overload}, 'called', {overload})"
    if _is_static(node):
        top.trinorm_sites = site = getattr(top, "trinorm_sites", 0) + 1
        called, made = f"{called}_{site}", f"getattr({overload}, 'site', lambda: {overload})()"
    top.add_import_once(f"{called} = {made}")
    write(f"{node.get_name()} = {called}({', '.join([*node.codegen_args(), *node.codegen_kwargs()])})")


def _is_static(node: Any) -> bool:
    """Whether its arguments have the same sizes and strides each time, and are the same where they are no tensors."""
    sizes = [[*t.get_size(), *t.get_stride()] for t in node.inputs]
    return all(map(_is_fixed, (*sizes, *node.constant_args, *node.kwargs.values())))


def _is_fixed(argument: Any) -> bool:
    if isinstance(argument, (list, tuple)):
        return all(map(_is_fixed, argument))
    return not isinstance(argument, torch.SymInt) and getattr(argument, "is_number", True)
