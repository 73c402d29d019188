"""What is measured: one op, one pass, one shape in one layout and its dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cases import LAYOUTS, layouts
from ..norms import ELEMENT_OPS, NORMS, ROW_OPS, SUM_OPS, VARIANTS, Norm, OfConditioned, OfHeads, OfQuantized, Shape
from .inputs import Inputs
from .shapes import (
    CHANNEL_SHAPES,
    CONDITIONED_SHAPES,
    ELEMENT_SHAPES,
    HEAD_SHAPES,
    NAMED_SHAPES,
    SEED_SHAPE,
    SHAPES,
    SUM_SHAPES,
)

# The passes of one norm. A chain is a forward many times over, each norm's y the next one's x, and its sum, where there is
# one, the next one's residual: what decoding does.
PASSES = ("forward", "backward")
CHAIN = "chain"
LINKS = 32
# What torch moves the same bytes with, and next to no arithmetic: a tensor that becomes another, two that become one. Of a
# sum: two that become two others (in one copy, of twice the elements); dy, the sum and its gradient that become one.
CEILINGS = {"forward": "copy", "backward": "add", CHAIN: "copy"}
SUM_CEILINGS = {"forward": "two copies", "backward": "addcmul", CHAIN: "two copies"}
# With a gate: two that become one, and the bytes of three that become two, in one copy of half of these.
GATED_CEILINGS = {"forward": "add", "backward": "2½ copies"}
# Of a gated sum: two that become two; x, dy, the sum and its gradient that become two, in the bytes of three copies.
GATED_SUM_CEILINGS = {"forward": "two copies", "backward": "three copies"}
# Of a quantized result: half of the bytes that move, in one copy.
QUANTIZED_CEILINGS = {"forward": "equal copy"}
# What an eager call costs the host. The kernels' size does not enter, so these are measured at one small shape.
HOST = "host"
HOST_PASSES = ("host_forward", "host_forward_with_grad", "host_forward_and_backward")

# From this many elements on the memory decides; below it the launches do, and only there a chain says something new.
SMALL_BELOW = 1 << 22


@dataclass(frozen=True)
class Op:
    """An op as it is measured: with its weight, unless models have none, with its bias where the signature has one, and its
    usual eps.

    shapes: where none are asked for. host: the shape of the passes of the host.
    """

    title: str
    norm: Norm
    eps: float
    shapes: tuple[Shape, ...]
    host: Shape

    @property
    def of_rows(self) -> bool:
        """Whether it is of rows × columns."""
        return self.norm.family == "rows"

    def layouts(self, shape: Shape) -> tuple[str, ...]:
        """In which orders of memory there is an x of this shape."""
        return layouts(shape) if self.norm.family == "channels" else ("contiguous",)

    @property
    def chained(self) -> bool:
        """Whether there are chains: what the norm returns, and nothing else, is what it takes."""
        return self.norm.family in ("rows", "channels")

    @property
    def ceilings(self) -> Mapping[str, str]:
        """Of each pass, what torch moves the same bytes with."""
        if self.norm.of_gated_sum:
            return GATED_SUM_CEILINGS
        if self.norm.form is not None:
            return QUANTIZED_CEILINGS
        return SUM_CEILINGS if self.norm.of_sum else GATED_CEILINGS if self.norm.gated else CEILINGS

    def lacking(self, pass_: str) -> str | None:
        """Why a pass is not measured; None where it is."""
        if self.norm.form is None or pass_ in self.ceilings:
            return None
        return "a quantized result's forward is measured alone, as its backward is the row norms' own"


# By the function's name, or a variant's: what a table calls it, and its usual eps.
_TITLES = {
    "layer_norm": ("LayerNorm", 1e-5),
    "rms_norm": ("RMSNorm", 1e-6),
    "group_norm": ("GroupNorm", 1e-5),
    "instance_norm": ("InstanceNorm", 1e-5),
    "batch_norm": ("BatchNorm", 1e-5),
    "channel_layer_norm": ("LayerNorm over channels", 1e-6),
    "add_layer_norm": ("Add and LayerNorm", 1e-5),
    "add_rms_norm": ("Add and RMSNorm", 1e-6),
    "qk_norm": ("QK-norm", 1e-6),
    "modulated_layer_norm": ("Modulated LayerNorm", 1e-6),
    "add_modulated_layer_norm": ("Gate, add and modulated LayerNorm", 1e-6),
    "gated_rms_norm": ("RMSNorm and gate", 1e-6),
    "gated_rms_norm/first": ("Gate and RMSNorm", 1e-5),
    "gated_rms_norm/groups": ("Gate and RMSNorm of 8 groups", 1e-5),
    "per_head_rms_norm": ("RMSNorm with a weight of each head", 1e-6),
    "l2_norm": ("L2 norm", 1e-6),
    "partial_rms_norm": ("Partial RMSNorm", 1e-6),
    "dynamic_tanh": ("DyT", 0.0),
    "dynamic_erf": ("Derf", 0.0),
    "poly_norm": ("PolyNorm", 1e-6),
    "weight_norm": ("Weight normalization", 0.0),
}
# Those that are measured unless others are named, and those of a host's passes.
_SHAPES = CHANNEL_SHAPES | dict.fromkeys(ROW_OPS, SHAPES) | dict.fromkeys(SUM_OPS, SUM_SHAPES) | {"qk_norm": HEAD_SHAPES}
_HOSTS: dict[str, Shape] = dict.fromkeys(CHANNEL_SHAPES, (2, 64, 8, 8)) | dict.fromkeys(ROW_OPS + SUM_OPS, SEED_SHAPE)
_NORMS = NORMS | VARIANTS
_QUANTIZED = {name: norm for name, norm in _NORMS.items() if isinstance(norm, OfQuantized)}
_OF_ROWS = {name: _TITLES[norm.spec.name] for name, norm in _QUANTIZED.items()}
_TITLES |= {name: (f"{title} to {_QUANTIZED[name].title}", eps) for name, (title, eps) in _OF_ROWS.items()}
_SHAPES |= CONDITIONED_SHAPES | dict.fromkeys((*ELEMENT_OPS, *_QUANTIZED), ELEMENT_SHAPES)
_HOSTS |= {"qk_norm": (128, 8, 2, 64)} | dict.fromkeys(CONDITIONED_SHAPES, (2, 64, 768))
_HOSTS |= dict.fromkeys((*ELEMENT_OPS, *_QUANTIZED), SEED_SHAPE)
OPS = {name: Op(title, _NORMS[name], eps, _SHAPES[name], _HOSTS[name]) for name, (title, eps) in _TITLES.items()}


def shapes_of(op: str, asked: Iterable[Shape | str] | None) -> list[Shape]:
    """The shapes to measure an op at: those asked for, by themselves or as lists by name; else its own.

    Raises ValueError for one that the op does not take.
    """
    if asked is None:
        return list(OPS[op].shapes)
    found: list[Shape] = []
    for one in asked:
        found += NAMED_SHAPES[one].get(op, ()) if isinstance(one, str) else [one]
    for shape in found:
        if not OPS[op].norm.takes(shape):
            raise ValueError(f"{op} takes no {'x'.join(map(str, shape))}, but {OPS[op].norm.wanted}")
    return list(dict.fromkeys(found))


def size(shape: Shape, layout: str) -> str:
    """``8192×4096``, ``16×320×64×64``, ``16×320×64×64 NHWC``."""
    order = "" if layout == "contiguous" else f" N{'DHW'[5 - len(shape) :]}C"
    return "×".join(map(str, shape)) + order


@dataclass(frozen=True)
class Case:
    """An x of a shape, as Norm.axes has it, through one pass of one op, or through a chain of forwards.

    A backward makes every gradient.
    """

    op: str
    pass_: str
    shape: Shape
    dtype: torch.dtype
    weight_dtype: torch.dtype
    layout: str = "contiguous"

    @classmethod
    def all(cls, op: str, pass_: str, shapes: Iterable[Shape], dtype: torch.dtype) -> list[Case]:
        """The cases worth measuring of these shapes, in every layout, with weights of x's dtype."""
        cases = [cls(op, pass_, shape, dtype, dtype, layout) for shape in shapes for layout in OPS[op].layouts(shape)]
        return [case for case in cases if case.worthwhile]

    def __str__(self) -> str:
        return f"{self.op} {self.pass_} {self.size}"

    @property
    def size(self) -> str:
        return size(self.shape, self.layout)

    @property
    def elements(self) -> int:
        """Of x, of QK-norm those of queries and keys."""
        return math.prod(OPS[self.op].norm.x_shape(self.shape))

    @property
    def backward(self) -> bool:
        return self.pass_ == "backward"

    @property
    def norms(self) -> int:
        """How many norms one call computes, one after the other. Times and bytes are those of one."""
        return LINKS if self.pass_ == CHAIN else 1

    @property
    def worthwhile(self) -> bool:
        """Whether its time says something: a chain of large norms takes what they take alone; and where no kernel serves,
        it would be that of torch's operators.
        """
        op = OPS[self.op]
        if op.lacking(self.pass_) is not None or not op.norm.serves(self.shape, self.dtype):
            return False
        return self.pass_ != CHAIN or (op.chained and self.elements < SMALL_BELOW)

    @property
    def bytes(self) -> int:
        """The fewest bytes the pass can move: each input read once, each output written once.

        forward, and each link of a chain: x, weight, bias; y. backward: x, dy, weight; dx, dw, db. Of a sum, forward: the
        residual too; and the sum. backward: the sum in x's place, and its gradient; dx, which is the residual's gradient.
        Of QK-norm both read cos and sin too; a gate is read by both, and has a gradient, as numbers do. Of a quantized
        result: its elements and scales in y's place. The saved statistics are not counted: they follow from x.
        """
        return self.bytes_read + self.bytes_written

    @property
    def bytes_read(self) -> int:
        """Those of ``bytes`` that are read."""
        norm, meta = OPS[self.op].norm, torch.device("meta")
        besides = (*(norm.angles(self.shape, self.dtype, meta) or ()), norm.tensor_scale(meta))
        read = self._bytes(self.moved[0]) + self._bytes_of_parameters(bias=not self.backward)
        return read + sum(t.nbytes for t in besides if t is not None)

    @property
    def bytes_written(self) -> int:
        """Those of ``bytes`` that are written."""
        parameters = self._bytes_of_parameters(bias=True) if self.backward else 0
        return self._bytes(self.moved[1]) + self.bytes_stored + parameters

    @property
    def bytes_stored(self) -> int:
        """Those of a quantized result."""
        return OPS[self.op].norm.bytes_stored(self.shape)

    @property
    def bytes_of_ceiling(self) -> int:
        """What the ceiling reads and writes."""
        return self._bytes(sum(self.moved)) + self.bytes_stored

    @property
    def moved(self) -> tuple[int, int]:
        """How many tensors of x's size are read, and how many written: by the ceiling, these alone, and what is stored."""
        if OPS[self.op].norm.form is not None:
            return (1, 0)
        if OPS[self.op].norm.gated:
            return (3, 2) if self.backward else (2, 1)
        if OPS[self.op].norm.of_gated_sum:
            return (4, 2) if self.backward else (2, 2)
        one_more = OPS[self.op].norm.of_sum
        return (2 + one_more, 1) if self.backward else (1 + one_more, 1 + one_more)

    def _bytes(self, tensors: int) -> int:
        return tensors * self.elements * self.dtype.itemsize

    def _bytes_of_parameters(self, bias: bool) -> int:
        """Of the weight, of numbers and, if asked for, of the bias."""
        norm = OPS[self.op].norm
        if norm.bare:
            return 0
        of_bias = math.prod(norm.bias_shape(self.shape)) if bias and norm.biased else 0
        of_weight = math.prod(norm.parameter_shape(self.shape)) * (1 + norm.of_gated_sum)
        return (of_weight + norm.numbers + of_bias) * self.weight_dtype.itemsize

    def draw(self, device: torch.device, generator: torch.Generator | None = None) -> Inputs:
        """Random inputs; for a backward the leaves require grad and come with its gradients."""

        def normal(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, dtype=dtype, device=device, generator=generator)

        norm = OPS[self.op].norm
        if isinstance(norm, OfHeads):
            inputs = self._of_heads(norm, normal, device)
        else:
            inputs = self._of_condition(norm, normal) if isinstance(norm, OfConditioned) else self._of_one(norm, normal)
        for leaf in inputs.leaves:
            leaf.requires_grad_(self.backward)
        return inputs

    def _of_one(self, norm: Norm, normal: Callable[..., Tensor]) -> Inputs:
        def like_x(wanted: bool) -> Tensor | None:
            return LAYOUTS[self.layout](normal(*self.shape, dtype=self.dtype)) if wanted else None

        each = (self.norms,) if self.pass_ == CHAIN else ()
        parameter, bias = (*each, *norm.parameter_shape(self.shape)), (*each, *norm.bias_shape(self.shape))
        x = like_x(True)
        assert x is not None
        return Inputs(
            x=x,
            weight=1 + normal(*parameter, dtype=self.weight_dtype) / 8,
            bias=normal(*bias, dtype=self.weight_dtype) if norm.biased else None,
            dy=like_x(self.backward),
            residual=like_x(norm.of_sum),
            dsum=like_x(norm.of_sum and self.backward),
            numbers=tuple(0.5 + normal(1, dtype=self.weight_dtype) / 8 for _ in range(norm.numbers)),
            tensor_scale=norm.tensor_scale(x.device),
        )

    def _of_heads(self, norm: OfHeads, normal: Callable[..., Tensor], device: torch.device) -> Inputs:
        """Queries and keys are views into a projection of as many values as keys."""
        *tokens, queries, keys, size = self.shape
        packed = normal(*tokens, queries + 2 * keys, size, dtype=self.dtype)
        query, key, _ = packed.split((queries, keys, keys), -2)
        weight, key_weight = (1 + normal(size, dtype=self.weight_dtype) / 8 for _ in range(2))
        dy, dkey = (normal(*x.shape, dtype=self.dtype) if self.backward else None for x in (query, key))
        angles = norm.angles(self.shape, self.dtype, device)
        return Inputs(query.detach(), weight, None, dy, key=key.detach(), key_weight=key_weight, dkey=dkey, angles=angles)

    def _of_condition(self, norm: OfConditioned, normal: Callable[..., Tensor]) -> Inputs:
        """Scale, shift and a sum's gate are chunks of a projection of six; x may be half of one, and another gate the other
        half.
        """
        *of_parameter, n = norm.parameter_shape(self.shape)
        dy = normal(*self.shape, dtype=self.dtype) if self.backward else None
        if norm.spec.modulated:
            shift, scale, gate, *_ = normal(*of_parameter, 6 * n, dtype=self.weight_dtype).chunk(6, -1)
            inputs = Inputs(normal(*self.shape, dtype=self.dtype), scale.detach(), shift.detach(), dy)
            if not norm.of_gated_sum:
                return inputs
            residual, dsum = (normal(*self.shape, dtype=self.dtype) if one else None for one in (True, self.backward))
            return inputs._replace(gate=gate.detach(), residual=residual, dsum=dsum)
        weight = None if norm.bare else 1 + normal(*of_parameter, n, dtype=self.weight_dtype) / 8
        packed, dim = [*self.shape], norm.packed_along
        if dim is None:
            return Inputs(normal(*self.shape, dtype=self.dtype), weight, None, dy)
        packed[dim] *= 2
        gate, x = normal(*packed, dtype=self.dtype).chunk(2, dim)
        return Inputs(x.detach(), weight, None, dy, gate=gate.detach() if norm.gated else None)
