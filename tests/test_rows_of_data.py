"""torch.compile where the data decides how many rows there are, ``x[mask]``: nobody knows when the graph is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from machine import ON_GPU
from trinorm import functional
from trinorm.ops import road

N = 16
Norm = Callable[..., Any]

# Of each function: the sizes of what is masked, and of its parameters, and a call of these.
NORMS: dict[str, tuple[list[tuple[int, ...]], list[tuple[int, ...]], Norm]] = {
    "layer_norm": ([(4, N)], [(N,), (N,)], lambda x, w, b: functional.layer_norm(x, (N,), w, b)),
    "add_rms_norm": ([(4, N)] * 2, [(N,)], lambda x, r, w: functional.add_rms_norm(x, r, w)[0]),
    "modulated": ([(4, N), (1, N), (1, N)], [], lambda x, s, t: functional.modulated_layer_norm(x, (N,), s, t)),
    "of each token": ([(4, N), (4, N)], [(N,)], lambda x, s, w: functional.modulated_rms_norm(x, (N,), s, None, w)),
    "in two ways": ([(4, N), (1, N)], [(4, N)], lambda x, s, t: functional.modulated_rms_norm(x, (N,), s, t)),
    "gated": ([(4, N)] * 2, [(N,)], lambda x, g, w: functional.gated_rms_norm(x, g, w, group_size=8)),
    "gated sum": (
        [(4, N), (4, N), (1, N), (1, N)],
        [],
        lambda x, r, g, s: functional.add_modulated_rms_norm(x, r, g, (N,), s)[0],
    ),
    "per_head": ([(4, N)], [(4, N)], functional.per_head_rms_norm),
    "qk_norm": (
        [(4, 2, N), (4, 1, N), (4, N), (4, N)],
        [(N,)],
        lambda q, k, cos, sin, w: functional.qk_norm(q, k, w, w, cos=cos.detach(), sin=sin.detach())[0],
    ),
    "l2_norm": ([(4, N)], [], functional.l2_norm),
    "dynamic_tanh": ([(4, N)], [(1,)], lambda x, a: functional.dynamic_tanh(x, (N,), a)),
    "poly_norm": ([(4, N)], [(3,)], functional.poly_norm),
    "group_norm": ([(8, 4)], [(8,), (8,)], lambda x, w, b: functional.group_norm(x, 2, w, b)),
    "channels first": ([(8, 4)], [(8,), (8,)], functional.channel_layer_norm),
    "channels last": ([(4, 8)], [(8,)], lambda x, w: functional.channel_layer_norm(x.movedim(-1, 1), w)),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("kernels", [True, False])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_compiled_of_rows_that_a_mask_chooses(
    name: str, kernels: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph for any mask; with kernels of an eager call's bits, forward and backward."""
    if not kernels and ON_GPU:
        pytest.skip("a GPU has kernels")
    monkeypatch.setattr(road, "INTERPRETED", kernels and not ON_GPU)
    torch._dynamo.reset()
    sizes, parameters, norm = NORMS[name]
    tensors = [torch.randn(3, *size, device=device, requires_grad=True) for size in sizes]
    tensors += [torch.randn(size, device=device, requires_grad=True) for size in parameters]
    counter = CompileCounterWithBackend("aot_eager")

    def masked(mask: Tensor, *tensors: Tensor) -> Tensor:
        return norm(*(t[mask] for t in tensors[: len(sizes)]), *tensors[len(sizes) :])

    compiled = torch.compile(masked, backend=counter, fullgraph=True)
    for mask in ([True, False, True], [False, True, False], [True, True, True], [False, False, False]):
        chosen = torch.tensor(mask, device=device)
        found, expected = (_with_gradients(f(chosen, *tensors), tensors) for f in (compiled, masked))
        for of_compiled, of_eager in zip(found, expected, strict=True):
            if kernels:
                assert torch.equal(of_compiled, of_eager)
            else:
                torch.testing.assert_close(of_compiled, of_eager)
    assert counter.frame_count == 1


def _with_gradients(y: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return [y, *torch.autograd.grad(y, tensors, torch.ones_like(y), allow_unused=True, materialize_grads=True)]
