"""Weight normalization as a function (functional re-exports it)."""

from __future__ import annotations

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import checks
from ..ops import inputs_only
from ..ops.library.names import WEIGHT_NORM
from ..ops.weight import Weight
from ..reference.weight import g_shape


def weight_norm(v: Tensor, g: Tensor, dim: int | None = 0) -> Tensor:
    r"""Weight normalization: a weight by its direction and its length.

    .. math::
        w = g \cdot \frac{v}{\lVert v \rVert}

    with the L2 norm over all dims but ``dim``, so that each slice along ``dim`` has a length of its own. Arguments and
    meaning are ``torch._weight_norm``'s, which :func:`torch.nn.utils.parametrizations.weight_norm` calls;
    :func:`trinorm.nn.weight_norm` is that with this function. As there, there is no epsilon: a slice of zeros has no
    direction, and gives NaN.

    Args:
        v: any shape; float16, bfloat16, float32 or float64. Any strides; where a slice is not one run of memory it is
            copied.
        g: of v's shape with all dims but ``dim`` of size 1; where ``dim`` is None a tensor of one element. Any of the
            dtypes above, not necessarily v's.
        dim: which dim's slices have lengths of their own, 0 as a rule: a row of a linear layer, an output channel of a
            convolution. None is one length of all; so is -1, torch's way to say that. Others below 0 count from the end.

    Returns:
        A contiguous tensor of v's shape and dtype, under autocast too. Sums and products are fp32, fp64 as soon as one of
        the tensors is; slices whose squares fp32 does not hold are scaled by a power of two. The bits of a slice, and of
        its gradients, do not depend on the slices beside it, and no gradient is a sum over slices. A ``dim`` other than 0
        and None has torch's own operators.

    Raises:
        RuntimeError: g's shape does not fit, or the tensors are on different devices.
        IndexError: v has no such dim.
        NotImplementedError: a dtype other than the four.
        TypeError: an argument of the wrong kind.

    Source: Salimans, Kingma, "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural
    Networks", arXiv:1602.07868.
    """
    tensors = v, g
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(weight_norm, tensors, v, g, dim=dim)
    asked = (WEIGHT_NORM, dim) if dim is None or type(dim) is int else None
    if asked is not None and (call := inputs_only.CALLS.recall(asked, *tensors)) is not None:
        return call(*tensors)
    for name, t in dict(v=v, g=g).items():
        checks.tensor(WEIGHT_NORM, name, t, required=True)
        checks.strided(WEIGHT_NORM, name, t)
        if t.is_nested:
            raise RuntimeError(f"{WEIGHT_NORM}(): {name} is a nested tensor, which this norm does not take")
        checks.beside(WEIGHT_NORM, name, t, v, "v")
    along = _along(v, dim)
    wanted = g_shape(along, v.shape)
    if g.numel() != 1 if along is None else g.shape != wanted:
        of = f"{wanted}, v's with all dims but {dim} of size 1" if along is not None else "of one element"
        raise RuntimeError(f"{WEIGHT_NORM}(): g has shape {tuple(g.shape)}; with dim={dim} it must be {of}")
    return inputs_only.inputs_only_norm(Weight(along), asked, *tensors)


def _along(v: Tensor, dim: int | None) -> int | None:
    """dim from 0 on, or None."""
    if dim is None:
        return None
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{WEIGHT_NORM}(): dim must be an int or None, not {dim!r}")
    if dim == -1:
        return None
    if not -v.dim() <= dim < v.dim():
        last = f"from {-v.dim()} to {v.dim() - 1}, or None" if v.dim() else "None, as v has no dims"
        raise IndexError(f"{WEIGHT_NORM}(): dim is {dim}; of a v with shape {tuple(v.shape)} it must be {last}")
    return dim % v.dim()
