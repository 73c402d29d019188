"""How the code that Inductor writes calls registered ops: past torch's dispatcher, where their like were done before."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

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
    """``buf = called(...)`` where the overload's own call would stand, with registering.Op's ``called`` on top.

    Such code is kept on disk, and found by another version of trinorm's: so the overload itself stands there for one that
    has no ``called``.
    """
    from torch._inductor.codegen.wrapper import ExternKernelAllocLine
    from torch._inductor.virtualized import V

    top = wrapper = V.graph.wrapper_code
    if V.graph.fx_wrapper or V.graph.cpp_wrapper:  # who write no Python
        wrapper.writeline(ExternKernelAllocLine(wrapper, node))
        return
    while (parent := getattr(top, "parent_wrapper", None)) is not None:  # of a graph within a graph
        top = parent
    overload = node.python_kernel_name
    called = overload.replace(".", "_")
    top.add_import_once(f"{called} = getattr({overload}, 'called', {overload})")
    write(f"{node.get_name()} = {called}({', '.join([*node.codegen_args(), *node.codegen_kwargs()])})")
