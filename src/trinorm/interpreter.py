"""Triton's interpreter made exact: the kernels on a CPU, with the numbers that a GPU gives.

As shipped (3.6 to 3.9) it truncates fp32 to bf16 where a GPU rounds to nearest even, reads bf16 denormals wrongly, makes an
integer of an fp64 that should become bf16, and adds a column's elements one after another where a GPU adds in a tree, so
that its sums err more; it rounds rsqrt twice, and before 3.9 an fma. Arithmetic on bf16 is wrong too, and is not mended
here: kernels compute in fp32 or fp64 on every device. Triton 3.6 does not run with numpy 2.4 at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray


def install() -> None:
    """Choose the interpreter for every kernel, and make it exact. To be called before the first kernel is imported.

    Raises:
        RuntimeError: Triton was imported before, and bound its own functions to a GPU.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    from .ops import road

    if not isinstance(tl.sum, InterpretedFunction):
        raise RuntimeError(
            "Triton was imported before its interpreter was chosen: set TRITON_INTERPRET=1 in the environment"
        )
    _mend()
    _hasten()
    road.INTERPRETED = True


def bfloat16_bits(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of x rounded to bfloat16, to nearest even. NaN stays NaN."""
    bits = x.view(np.uint32)
    # Half of bfloat16's last place, less one where the part kept is even: a tie carries only out of an odd one.
    rounded = bits + (bits >> 16 & 1) + 0x7FFF
    # In a NaN that carry could make an infinity, or a zero: it is made quiet instead.
    return (np.where(np.isnan(x), bits | 0x400000, rounded) >> 16).astype(np.uint16)


def fma_float32(x: NDArray[np.float32], y: NDArray[np.float32], z: NDArray[np.float32]) -> NDArray[np.float32]:
    """x·y + z in float32, rounded once.

    float64 holds the product. The sum is rounded to odd there, which keeps the second rounding from seeing a tie that is
    none (Boldo, Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd").
    """
    product, addend = x.astype(np.float64) * y, z.astype(np.float64)
    total = product + addend
    kept = total - product
    error = (product - (total - kept)) + (addend - kept)
    inexact = np.isfinite(error) & (error != 0)
    even = total.view(np.int64) & 1 == 0
    odd = np.where(inexact & even, np.nextafter(total, np.copysign(np.inf, error)), total)
    return odd.astype(np.float32)


@functools.cache
def _mend() -> None:
    """Replace what the installed Triton's interpreter gets wrong, once."""
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor, TensorHandle, _get_np_dtype, _LangPatchScope

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    builder: Any = interpreter.InterpreterBuilder
    reduce: Any = interpreter.ReduceOps
    shipped_cast, shipped_sum, shipped_patch = builder.cast_impl, reduce.sum, interpreter._patch_lang
    patched: list[bool] = []

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        """Triton's own but for bfloat16, which comes and goes by way of float32, as torch has it."""
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target):
            return shipped_cast(self, src, dst_type)
        wide = (src.data.astype(np.uint32) << 16).view(np.float32) if source == tl.bfloat16 else src.data.astype(np.float32)
        return TensorHandle(bfloat16_bits(wide) if target == tl.bfloat16 else wide.astype(_get_np_dtype(target)), target)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        """x·y + z rounded once, in z's dtype."""
        fma = fma_float32 if z.data.dtype == np.float32 else _fma_float64()
        return TensorHandle(fma(x.data, y.data, z.data), z.dtype.scalar)

    def sum(self: Any, input: Any) -> Any:
        """The sum along an axis, halves added to halves; an axis is a power of two long."""
        if self.axis is None:
            return shipped_sum(self, input)
        data = np.moveaxis(input.handle.data, self.axis, 0)
        while len(data) > 1:
            data = data[: len(data) // 2] + data[len(data) // 2 :]
        return self.to_tensor(np.moveaxis(data, 0, self.axis) if self.keep_dims else data[0], input.dtype)

    def patch_lang(fn: Any) -> Any:
        """Triton's own for all its modules, once a launch. It does it at every call, and looks anew for what to patch."""
        scope = _LangPatchScope()
        if not patched:
            for owner, name, value in replaced():
                scope.set_attr(owner, name, value)
            patched.append(True)
        return scope

    @functools.cache
    def replaced() -> list[tuple[Any, str, Any]]:
        scope = shipped_patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        if version < (3, 7):
            # 3.6 takes int() of a one-element array wherever a run-time value bounds a loop, which numpy 2.4 refuses.
            scope.set_attr(tl.tensor, "__index__", lambda self: self.handle.data.item())
        found = [(owner, name, getattr(owner, name)) for owner, name, _ in scope._changes]
        scope.restore()
        return found

    @contextlib.contextmanager
    def launching() -> Iterator[None]:
        patched.clear()
        with np.errstate(all="ignore"), warnings.catch_warnings():
            # NaN, Inf and overflow are the data's business: a GPU does not warn of them either. This one passes errstate.
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
            yield

    def create_rsqrt(self: Any, x: Any) -> Any:
        """x^-1/2 rounded once, as a GPU's instruction nearly is, and not a rounded root divided and rounded again."""
        return TensorHandle((1 / np.sqrt(x.data.astype(np.longdouble))).astype(x.data.dtype), x.dtype.scalar)

    builder.cast_impl = cast_impl
    builder.create_rsqrt = create_rsqrt
    reduce.sum = sum
    if version < (3, 9):
        builder.create_fma = create_fma
    interpreter._patch_lang = patch_lang
    GridExecutor.__call__ = launching()(GridExecutor.__call__)


@functools.cache
def _hasten() -> None:
    """Let the interpreter do once what it does anew at every operation on a tile, to the same result.

    Its time is Python's own: a tile's type, with its shape as a tuple of constexprs, is made several times an addition.
    This and patch_lang take the tests of the channel norms from 90 s to 35.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    shipped_block, shipped_tensor, shipped_equal = tl.block_type.__init__, tl.tensor.__init__, tl.dtype.__eq__
    shipped_dtype, shipped_broadcast = interpreter._get_np_dtype, TritonSemantic.broadcast_impl_value
    shipped_operands, shipped_to_ir = TritonSemantic.binary_op_type_checking_impl, tl.block_type.to_ir
    shapes: dict[tuple[int, ...], Any] = {}
    blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    tensors: dict[int, dict[str, Any]] = {}
    dtypes: dict[str, Any] = {}

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(getattr(size, "value", size) for size in shape)
        key = element_ty.name, sizes
        if key not in blocks:
            shipped_block(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key], element_ty=element_ty)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = id(type.shape) if type.is_block() else 0  # shapes keeps it
        if key not in tensors:
            shipped_tensor(self, handle, type)
            tensors[key] = dict(vars(self))
        vars(self).update(tensors[key], handle=handle, type=type, dtype=type.scalar)

    def equal(self: Any, other: Any) -> bool:
        return self is other or shipped_equal(self, other)

    def get_np_dtype(of: Any) -> Any:
        name = of.scalar.name
        return dtypes[name] if name in dtypes else dtypes.setdefault(name, shipped_dtype(of))

    def alike(lhs: Any, rhs: Any) -> bool:
        """Whether these are tiles of one shape."""
        return lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape

    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if alike(lhs, rhs) else shipped_broadcast(self, lhs, rhs)

    def operands(self: Any, lhs: Any, rhs: Any, *how: Any, **more: Any) -> Any:
        tiles = isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor) and alike(lhs, rhs)
        same = tiles and lhs.dtype is rhs.dtype and not lhs.dtype.is_ptr()
        divided = how[3:] or more  # which widens halves
        return (lhs, rhs) if same and not divided else shipped_operands(self, lhs, rhs, *how, **more)

    def to_ir(self: Any, builder: Any) -> Any:
        """The interpreter's types are Triton's own."""
        return self if builder is interpreter.interpreter_builder else shipped_to_ir(self, builder)

    def patch_attr(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        # What asks only whether _semantic is given need not.
        function = inspect.unwrap(member, stop=lambda wrapper: not tl.core.is_builtin(wrapper))

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **kwargs)

        scope.set_attr(owner, name, call)

    interpreter._patch_attr = patch_attr
    tl.block_type.__init__ = init_block
    tl.tensor.__init__ = init_tensor
    tl.dtype.__eq__ = equal
    interpreter._get_np_dtype = get_np_dtype
    tl.block_type.to_ir = to_ir
    TritonSemantic.broadcast_impl_value = broadcast
    TritonSemantic.binary_op_type_checking_impl = operands
    # Whether integers overflow is computed at each of their operations, and only asked with debug.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


@functools.cache
def _fma_float64() -> Callable[..., NDArray[np.float64]]:
    """x·y + z in float64, rounded once, by the C library: a microsecond an element."""
    fma = ctypes.CDLL("libm.so.6").fma
    fma.argtypes, fma.restype = (ctypes.c_double,) * 3, ctypes.c_double
    return np.vectorize(fma, otypes=[np.float64])
