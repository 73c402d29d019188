"""Norms of a gated sum: functional/gated_sum.py, reference/gated_sum.py, ops/gated_sum.py, ops/hosts/gated_sum_rows.py,
tuning/gated_sum.py and kernels/gated_sum.py. What is normalized is test_modulated.py's.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from conditioned_norms import DTYPES, EPS, NORMS, modulated, sets, terms
from machine import ON_GPU
from trinorm import functional
from trinorm.compare import assert_no_worse
from trinorm.ops.hosts import gated_sum_rows
from trinorm.reference import gated_sum as gated_sum_reference
from trinorm.reference.conditioned import summed_to
from trinorm.spec import LAYER_NORM, RMS_NORM, ConditionedNorm, RowNorm
from trinorm.tuning import RowBackward, RowForward, Tile, choose_gated_sum_backward

BY_NORM = pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)

# At the edges of tiles, and within them.
SIZES = (1, 2, 64, 65, 200, 513, 1000, 1025, 3073)


class Call(NamedTuple):
    """A gated sum, whose last ``dims`` dims are normalized; not modulated, scale and shift are weight and bias."""

    norm: RowNorm
    x: Tensor
    residual: Tensor
    gate: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    dims: int = 1
    eps: float = EPS
    modulated: bool = True

    @property
    def spec(self) -> ConditionedNorm:
        return ConditionedNorm(self.norm, modulated=self.modulated and self.scale is not None)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x, self.residual, self.gate, self.scale, self.shift

    def of(self, tensors: Any) -> Call:
        return self._replace(**dict(zip(("x", "residual", "gate", "scale", "shift"), tensors, strict=True)))

    @property
    def size(self) -> int:
        return self.x.shape[self.x.dim() - self.dims :].numel()

    @property
    def kept(self) -> Tensor:
        """The sum, rounded once."""
        kept = torch.promote_types(self.x.dtype, self.residual.dtype)
        exact = gated_sum_reference.oracle_sum(self.x, self.residual, self.gate)
        return exact.to(torch.promote_types(kept, torch.float32)).to(kept)

    def __call__(self, **how: Any) -> tuple[Tensor, Tensor]:
        norm, over = getattr(functional, f"add_modulated_{self.norm.name}"), self.x.shape[self.x.dim() - self.dims :]
        if self.modulated:
            how |= dict(scale=self.scale, shift=self.shift)
        else:
            how |= dict(weight=self.scale) | (dict(bias=self.shift) if self.norm.center else {})
        return norm(self.x, self.residual, self.gate, over, eps=self.eps, **how)

    def by_torch(self) -> tuple[Tensor, Tensor]:
        return gated_sum_reference.composite(
            self.spec,
            self.dims,
            self.size,
            *self.tensors,
            self.eps,
            self.x.dtype,  # type: ignore[arg-type]
        )


def drawn(
    norm: RowNorm, lead: tuple[int, ...], own: tuple[int, ...], n: int, dtype: torch.dtype, device: torch.device
) -> Call:
    x, residual = torch.randn(2, *lead, n, device=device).to(dtype)
    return Call(norm, x, residual, sets(x, own), sets(x, own), sets(x, own))


def assert_right(call: Call, dy: Tensor | None = None, dsum: Tensor | None = None) -> None:
    """Both results, and every gradient of both."""
    leaves, plain = ([None if t is None else t.detach().requires_grad_() for t in call.tensors] for _ in range(2))
    results, torchs = call.of(leaves)(), call.of(plain).by_torch()
    assert [t.dtype for t in results] == [call.x.dtype, torch.promote_types(call.x.dtype, call.residual.dtype)]
    assert all(t.is_contiguous() for t in results)
    dy, dsum = (torch.randn_like(t) if d is None else d for t, d in zip(results, (dy, dsum), strict=True))
    of = call.spec, call.dims, call.size
    kept = call.kept
    exact = gated_sum_reference.oracle_sum(*(t.detach() for t in (call.x, call.residual, call.gate)))
    assert_no_worse("sum", results[1].detach(), exact, torchs[1].detach())
    of_sum = modulated(call.norm, kept, call.scale, call.shift, call.dims, call.eps)._replace(spec=call.spec)  # type: ignore[arg-type]
    of_y, ds, _, dw, db = terms(of_sum, dy)
    assert ds is not None
    oracle = gated_sum_reference.oracle(*of, kept, call.scale, call.shift, call.eps)
    assert_no_worse("y", results[0].detach(), oracle.y, torchs[0].detach(), of_y)
    dr, gate, x = ds + dsum.double().abs(), call.gate.double(), call.x.double()
    sizes = dr * gate.abs(), dr, summed_to((dr * x).square(), gate.shape).sqrt(), dw, db
    of_all = call.x, call.gate, call.scale, call.shift, kept, call.eps, dy, dsum
    wanted = gated_sum_reference.oracle_gradients(*of, *of_all)
    found, by_torch = (
        iter(torch.autograd.grad(values, [t for t in inputs if t is not None], (dy, dsum)))
        for values, inputs in ((results, leaves), (torchs, plain))
    )
    for name, want, size_ in zip(("x", "residual", "gate", "scale", "shift"), wanted, sizes, strict=True):
        if want is not None:
            got = next(found)
            assert got.is_contiguous()
            assert_no_worse(f"d{name}", got, want, next(by_torch), size_)


@BY_NORM
@pytest.mark.parametrize(
    ("n", "dtype"), [(n, dtype) for n in SIZES for dtype in (DTYPES if n in (65, 1000) else DTYPES[::2])], ids=str
)
def test_every_size(norm: RowNorm, dtype: torch.dtype, n: int, device: torch.device) -> None:
    assert_right(drawn(norm, (2, 5), (2, 1), n, dtype, device))


@BY_NORM
@pytest.mark.parametrize(
    ("lead", "own"),
    [
        ((), ()),
        ((40,), ()),
        ((40,), (40,)),
        ((3, 9), (3, 1)),
        ((3, 9), (9,)),
        ((3, 9), (3, 9)),
        ((2, 3, 5), (2, 1, 1)),
        ((2, 3, 5), (3, 1)),
        ((2, 3, 5), (2, 1, 5)),  # rows that are no [outer, sets, repeat]: expanded
    ],
    ids=str,
)
def test_every_sharing(norm: RowNorm, lead: tuple[int, ...], own: tuple[int, ...], device: torch.device) -> None:
    assert_right(drawn(norm, lead, own, 48, torch.bfloat16, device))


@pytest.mark.parametrize("of_gate", [(), (2, 1, 1), (2, 3, 5), (2, 1, 5)], ids=str)
@pytest.mark.parametrize("of_scale", [(), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("of_shift", [(3, 1), None], ids=str)
def test_gate_scale_and_shift_of_other_sharings(
    of_gate: tuple[int, ...],
    of_scale: tuple[int, ...],
    of_shift: tuple[int, ...] | None,
    device: torch.device,
    launched: list[Any],
) -> None:
    x, residual = torch.randn(2, 2, 3, 5, 24, device=device)
    shift = None if of_shift is None else sets(x, of_shift)
    assert_right(Call(LAYER_NORM, x, residual, sets(x, of_gate), sets(x, of_scale), shift))
    assert [kernel.fn.__name__ for kernel in launched][:2] == ["gated_sum_forward", "gated_sum_backward"]


@BY_NORM
@pytest.mark.parametrize("own", [(), (3, 1)], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_a_weight_in_place_of_a_scale(norm: RowNorm, own: tuple[int, ...], weighted: bool, device: torch.device) -> None:
    """LayerScale: a gate for all, or for each sample, and the norm's own weight and bias, or nothing."""
    x, residual = torch.randn(2, 3, 9, 40, device=device).bfloat16()
    weight = sets(x, ()) if weighted else None
    bias = sets(x, ()) if weighted and norm.center else None
    assert_right(Call(norm, x, residual, sets(x, own), weight, bias, modulated=False))


@BY_NORM
def test_weight_and_scale(norm: RowNorm, device: torch.device) -> None:
    """As the norm with its weight and bias, scaled and shifted after; and gradients reach them."""
    leaves = [torch.randn(*s, 33, device=device, requires_grad=True) for s in ((2, 5), (2, 5), *[(2, 1)] * 3, (), ())]
    x, residual, gate, scale, shift, weight, bias = leaves
    own: dict[str, Any] = dict(weight=weight) | (dict(bias=bias) if norm.center else {})
    found = getattr(functional, f"add_modulated_{norm.name}")(x, residual, gate, (33,), scale, shift, eps=EPS, **own)
    total = residual + gate * x
    n = getattr(torch.nn.functional, norm.name)(total, (33,), **own, eps=EPS)
    expected, leaves = (n * (1 + scale) + shift, total), leaves[: 6 + norm.center]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.randn_like(t) for t in expected]
    for got, want in zip(*(torch.autograd.grad(t, leaves, gradients) for t in (found, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "dtypes", [d for d in itertools.product((torch.bfloat16, torch.float32), repeat=4) if len(set(d)) > 1], ids=str
)
def test_tensors_of_other_dtypes(dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """A stream of fp32 beside a branch of 16 bits; parameters of either."""
    of_x, of_residual, of_gate, of_scale = dtypes
    call = drawn(LAYER_NORM, (2, 4), (2, 1), 40, of_x, device)
    assert call.scale is not None
    given = call.residual.to(of_residual), call.gate.to(of_gate), call.scale.to(of_scale)
    assert_right(call._replace(residual=given[0], gate=given[1], scale=given[2]))


def test_chunks_of_one_projection(device: torch.device) -> None:
    """Read where they lie, aligned or not; x, the residual and gradients in any layout."""
    for n, offset in ((64, 0), (64, 1), (50, 3)):
        projection = torch.randn(2, 1, 6 * n + offset, device=device).bfloat16()[..., offset:]
        shift, scale, gate, *_ = projection.chunk(6, -1)
        x, residual = torch.randn(2, 2, 7, n, device=device).bfloat16()
        assert_right(Call(LAYER_NORM, x, residual, gate, scale, shift))
    x, residual = torch.randn(2, 2, 7, 32, device=device)
    parameters = torch.randn(3, 2, 1, 32, device=device)
    for view in (
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: torch.stack((t, t), -1)[..., 0],
        lambda t: t[:1].expand(2, *t.shape[1:]),
        lambda t: torch._neg_view(-t),
        lambda t: torch.cat((t, t), -1)[..., :32],
    ):
        dy, dsum = (view(torch.randn_like(x)) for _ in range(2))
        assert_right(Call(RMS_NORM, view(x), view(residual), *map(view, parameters)), dy, dsum)


def test_rows_of_several_dims(device: torch.device) -> None:
    x, residual = torch.randn(2, 2, 3, 4, 5, device=device)
    for own in ((), (2, 1), (3,)):
        assert_right(Call(LAYER_NORM, x, residual, *torch.randn(3, *own, 4, 5, device=device), dims=2))


@pytest.mark.parametrize("own", [(), (3, 1), (3, 9)], ids=str)
@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("tile", [Tile(4, 16, 4), Tile(1, 64, 1)], ids=str)
def test_programs_that_walk(
    own: tuple[int, ...], programs: int, tile: Tile, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each set's rows by one program and by several, of more than one turn each; in chunks, with lanes to spare."""
    forward, backward = RowForward(tile, 1, True, True, True), RowBackward(tile, 1, 3, 1, True)
    monkeypatch.setattr(gated_sum_rows, "choose_gated_sum_forward", lambda *_: forward)
    monkeypatch.setattr(gated_sum_rows, "choose_gated_sum_backward", lambda *_: backward)
    monkeypatch.setattr(gated_sum_rows, "programs_of_a_set", lambda *_: programs)
    assert_right(drawn(LAYER_NORM, (3, 9), own, 40, torch.float32, device))


@BY_NORM
@pytest.mark.parametrize("scale", [2.0**70, 2.0**-70, 2.0**-100])
def test_rows_beyond_the_squares_of_fp32(norm: RowNorm, scale: float, device: torch.device) -> None:
    """As the same rows within them: a power of two is exact. Beside rows that are."""
    call = drawn(norm, (4, 3), (4, 1), 100, torch.float32, device)._replace(eps=0.0)
    y, total = call()
    factors = torch.tensor([1.0, scale, scale, 1.0], device=device).view(4, 1, 1)
    found = call._replace(x=call.x * factors, residual=call.residual * factors)()
    torch.testing.assert_close(found[0], y, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[1], total * factors)


@BY_NORM
def test_what_is_no_number_stays_where_it_is(norm: RowNorm, device: torch.device) -> None:
    call = drawn(norm, (4, 5), (4, 1), 33, torch.float32, device)
    call.x[0, 1, 3], call.residual[1, 1, 20], call.x[2, 2, 31], call.gate[3, 0, 0] = torch.nan, torch.inf, torch.inf, 0.0
    y, total = call()
    by_torch = call.by_torch()
    assert_no_worse("sum", total, gated_sum_reference.oracle_sum(*call[1:4]), by_torch[1])
    oracle = gated_sum_reference.oracle(call.spec, 1, 33, call.kept, call.scale, call.shift, EPS)
    assert_no_worse("y", y, oracle.y, by_torch[0])


def test_a_product_is_not_rounded(device: torch.device) -> None:
    """Of fp32: r + g·x in one rounding, where torch takes two."""
    x = torch.full((3, 64), 1 + 2.0**-12, device=device)
    _, total = functional.add_modulated_rms_norm(x, torch.full_like(x, -1.0), x[0], (64,), eps=EPS)
    assert torch.equal(total, torch.full_like(x, 2.0**-11 + 2.0**-24))


@BY_NORM
def test_the_same_bits_on_every_run(norm: RowNorm, device: torch.device) -> None:
    call = drawn(norm, (4, 30), (4, 1), 96, torch.bfloat16, device)
    dy, dsum = torch.randn(2, 4, 30, 96, device=device).bfloat16()
    one, other = (everything(call, dy, dsum) for _ in range(2))
    assert all(map(torch.equal, one, other))


def everything(call: Call, dy: Tensor, dsum: Tensor, **how: Any) -> list[Tensor]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in call.tensors]
    results = call.of(leaves)(**how)
    return [*(t.detach() for t in results), *torch.autograd.grad(results, [t for t in leaves if t is not None], (dy, dsum))]


def test_a_rows_bits_do_not_depend_on_those_beside_it(device: torch.device) -> None:
    call = drawn(LAYER_NORM, (8, 40), (8, 1), 96, torch.bfloat16, device)
    dy, dsum = torch.randn(2, 8, 40, 96, device=device).bfloat16()
    whole = everything(call, dy, dsum, batch_invariant=True)
    for samples, tokens in ((slice(2, 3), slice(None)), (slice(1, 4), slice(3, 4)), (slice(0, 1), slice(0, 1))):
        of = [t[samples, tokens] for t in (call.x, call.residual)], [t[samples] for t in call.tensors[2:] if t is not None]
        part = everything(call.of((*of[0], *of[1])), dy[samples, tokens], dsum[samples, tokens], batch_invariant=True)
        for got, want in zip(part[:4], whole[:4], strict=True):  # y, sum, dx and dresidual
            assert torch.equal(got, want[samples, tokens])
    of_device = gated_sum_rows.describe(device)
    few, many = (choose_gated_sum_backward(m, 1, 96, 2, of_device, True).tile for m in (1, 1 << 16))
    assert few == many


@pytest.mark.parametrize("wanted", [w for w in itertools.product((False, True), repeat=5) if sum(w) in (1, 5)], ids=str)
@pytest.mark.parametrize("used", ["both", "y", "sum"])
def test_only_what_is_asked_for(wanted: tuple[bool, ...], used: str, device: torch.device, launched: list[Any]) -> None:
    call = drawn(LAYER_NORM, (2, 300 if ON_GPU else 20), (2, 1), 24, torch.float32, device)
    if used == "sum" and not any(wanted[:3]):
        return  # of which it is no function
    for _ in range(3 if ON_GPU or all(wanted) else 1):  # the third is a repetition of the second
        launched.clear()
        leaves = [t.detach().requires_grad_(w) for t, w in zip(call.tensors, wanted, strict=True) if t is not None]
        asked = [t for t in leaves if t.requires_grad]
        y, total = call.of(leaves)()
        s = leaves[1] + leaves[2] * leaves[0]
        expected = torch.nn.functional.layer_norm(s, (24,)) * (1 + leaves[3]) + leaves[4]
        of = {"both": y.sum() + total.square().sum(), "y": y.square().sum(), "sum": total.square().sum()}[used]
        of_torch = {"both": expected.sum() + s.square().sum(), "y": expected.square().sum(), "sum": s.square().sum()}[used]
        found = torch.autograd.grad(of, asked, allow_unused=True)
        assert [kernel.fn.__name__ for kernel in launched][:2] == ["gated_sum_forward", "gated_sum_backward"]
        for got, want in zip(found, torch.autograd.grad(of_torch, asked, allow_unused=True), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)


def test_gradients_of_each_token_are_no_sums(device: torch.device, launched: list[Any]) -> None:
    """And take no second pass."""
    assert_right(drawn(LAYER_NORM, (3, 50), (3, 50), 24, torch.bfloat16, device))
    assert [kernel.fn.__name__ for kernel in launched] == ["gated_sum_forward", "gated_sum_backward"]


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)], ids=str)
def test_nothing_to_normalize(shape: tuple[int, ...], device: torch.device, launched: list[object]) -> None:
    leaves = [
        torch.randn(size, device=device, requires_grad=True) for size in (shape, shape, *[(shape[0], 1, shape[2])] * 3)
    ]
    x, residual, gate, scale, shift = leaves
    results = functional.add_modulated_rms_norm(x, residual, gate, shape[2:], scale, shift)
    assert all(t.shape == shape for t in results)
    for leaf, gradient in zip(leaves, torch.autograd.grad(results, leaves, results), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))
    assert launched == []


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            dict(residual=torch.zeros(2, 4)),
            RuntimeError,
            r"residual has shape \(2, 4\); it must be the input's, \(2, 3, 4\)",
        ),
        (dict(gate=torch.zeros(3)), RuntimeError, r"gate has shape \(3,\)"),
        (dict(gate=torch.zeros(2, 2, 4)), RuntimeError, r"gate has shape \(2, 2, 4\)"),
        (dict(gate=None), TypeError, "gate must be a Tensor, not NoneType"),
        (dict(residual=1.0), TypeError, "residual must be a Tensor, not float"),
        (dict(scale=torch.zeros(5)), RuntimeError, r"scale has shape \(5,\)"),
        (dict(scale=None), RuntimeError, "shift is given, but scale is None"),
        (dict(gate=torch.zeros(4, dtype=torch.int32)), NotImplementedError, "gate has dtype torch.int32"),
        (dict(weight=torch.zeros(3)), RuntimeError, r"weight has shape \(3,\)"),
        (dict(normalized_shape=(3,)), RuntimeError, r"normalized_shape is \(3,\)"),
        (dict(eps=-1.0), ValueError, "eps is -1.0"),
        (dict(batch_invariant=1), TypeError, "batch_invariant must be True, False or None"),
        (dict(residual=torch.zeros(2, 3, 4, device="meta")), RuntimeError, "residual is on meta"),
    ],
    ids=str,
)
def test_bad_input(
    given: dict[str, Any], error: type[Exception], message: str, device: torch.device, launched: list[object]
) -> None:
    x = torch.zeros(2, 3, 4, device=device)
    right = dict(input=x, residual=x, gate=x[:, :1], normalized_shape=(4,), scale=x[:, :1], shift=x[:, :1])
    given = {name: t.to(device) if isinstance(t, Tensor) and not t.is_meta else t for name, t in given.items()}
    with pytest.raises(error, match=rf"add_modulated_layer_norm\(\): {message}"):
        functional.add_modulated_layer_norm(**(right | given))  # type: ignore[arg-type]
    assert launched == []


def test_long_rows(device: torch.device, launched: list[Any]) -> None:
    """Are added by torch's operator, and normalized by the kernels of long rows."""
    for n, dtype in ((9000, torch.bfloat16), (2100, torch.float64)):
        launched.clear()
        assert_right(drawn(LAYER_NORM, (2, 3), (2, 1), n, dtype, device))
        assert launched[0].fn.__name__ == "conditioned_forward_wide"  # type: ignore[attr-defined]


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
@pytest.mark.parametrize("own", [(4, 1), (4, 1024), (1, 1)], ids=str)
@pytest.mark.parametrize("n", [1152, 3072, 8192])
def test_the_launches_of_real_sizes(own: tuple[int, ...], n: int, device: torch.device) -> None:
    assert_right(drawn(LAYER_NORM, (4, 1024), own, n, torch.bfloat16, device))
