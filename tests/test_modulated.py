"""Modulated norms and those of heads: functional/conditioned.py, reference/conditioned.py, ops/conditioned.py,
ops/hosts/conditioned_rows.py and kernels/conditioned.py. The gate is test_gated.py's.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from conditioned_norms import DTYPES, EPS, NORMS, Call, assert_right, modulated, of_heads, sets
from machine import ON_GPU
from trinorm import functional
from trinorm.compare import assert_no_worse
from trinorm.ops.hosts import conditioned_rows
from trinorm.ops.problems.conditioned import sets_of
from trinorm.reference import conditioned as conditioned_reference
from trinorm.spec import CASTS, LAYER_NORM, RMS_NORM, Cast, RowNorm
from trinorm.tuning import RowBackward, RowForward, Tile, choose_conditioned_backward

# At the edges of tiles, and within them.
SIZES = (1, 2, 64, 65, 128, 200, 768, 1000, 1025, 3072, 3073)

EVERY_SIZE = [(n, dtype) for n in SIZES for dtype in (DTYPES if n in (2, 65, 1000) else DTYPES[::2])]

# The leading sizes of x, and of its scale and shift: of all rows, of a sample, of a token, of a head, and what lies
# between.
SHARED = (
    ((), ()),
    ((1,), (1,)),
    ((40,), ()),
    ((40,), (1,)),
    ((40,), (40,)),
    ((3, 9), (3, 1)),
    ((3, 9), (1, 9)),
    ((3, 9), (9,)),
    ((3, 9), (3, 9)),
    ((2, 3, 5), (2, 1, 1)),
    ((2, 3, 5), (2, 3, 1)),
    ((2, 3, 5), (3, 1)),
    ((2, 3, 5), (1, 3, 5)),
    ((2, 1, 5), (2, 1, 5)),
    # Rows that are no [outer, sets, repeat]: expanded.
    ((2, 3, 5), (2, 1, 5)),
)


def drawn(
    norm: RowNorm, lead: tuple[int, ...], own: tuple[int, ...], n: int, dtype: torch.dtype, device: torch.device
) -> Call:
    x = torch.randn(*lead, n, device=device).to(dtype)
    return modulated(norm, x, sets(x, own), sets(x, own))


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
@pytest.mark.parametrize(("n", "dtype"), EVERY_SIZE, ids=str)
def test_every_size(norm: RowNorm, dtype: torch.dtype, n: int, device: torch.device) -> None:
    assert_right(drawn(norm, (2, 5), (2, 1), n, dtype, device))


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
@pytest.mark.parametrize(("lead", "own"), SHARED, ids=str)
def test_every_sharing(norm: RowNorm, lead: tuple[int, ...], own: tuple[int, ...], device: torch.device) -> None:
    assert_right(drawn(norm, lead, own, 48, torch.bfloat16, device))


@pytest.mark.parametrize("of_scale", [own for lead, own in SHARED if lead == (2, 3, 5)] + [(), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("of_shift", [(), (2, 1, 1), (2, 3, 5), None], ids=str)
def test_scale_and_shift_of_other_sharings(
    of_scale: tuple[int, ...], of_shift: tuple[int, ...] | None, device: torch.device, launched: list[Any]
) -> None:
    x = torch.randn(2, 3, 5, 24, device=device)
    call = modulated(LAYER_NORM, x, sets(x, of_scale), None if of_shift is None else sets(x, of_shift))
    assert_right(call)
    assert [kernel.fn.__name__ for kernel in launched][:2] == ["conditioned_forward", "conditioned_backward"]


@pytest.mark.parametrize("dtypes", [d for d in itertools.product(DTYPES[::-1][:3], repeat=3) if len(set(d)) > 1], ids=str)
def test_scale_and_shift_of_other_dtypes(dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    of_x, of_scale, of_shift = dtypes
    call = drawn(LAYER_NORM, (2, 4), (2, 1), 40, of_x, device)
    assert call.weight is not None and call.bias is not None
    assert_right(call._replace(weight=call.weight.to(of_scale), bias=call.bias.to(of_shift)))


def test_chunks_of_one_projection(device: torch.device, launched: list[Any]) -> None:
    """Read where they lie, aligned or not; x and its gradient in any layout."""
    for n, offset in ((64, 0), (64, 1), (50, 3)):
        for own in ((2, 1), (2, 7)):
            projection = torch.randn(*own, 6 * n + offset, device=device).bfloat16()[..., offset:]
            scale, shift, *_ = projection.chunk(6, -1)
            x = torch.randn(2, 7, n, device=device).bfloat16()
            assert_right(modulated(LAYER_NORM, x, scale, shift))
    x, scale, shift = (torch.randn(*lead, 32, device=device) for lead in ((2, 7), (2, 1), (2, 1)))
    for view in (
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: torch.stack((t, t), -1)[..., 0],
        lambda t: t[:1].expand(2, *t.shape[1:]),
        lambda t: torch._neg_view(-t),
        lambda t: torch.cat((t, t), -1)[..., :32],
    ):
        assert_right(modulated(RMS_NORM, view(x), view(scale), view(shift)), view(torch.randn_like(x)))


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
@pytest.mark.parametrize("given", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
def test_the_norms_own_weight_and_bias(
    norm: RowNorm, given: tuple[bool, bool], shifted: bool, device: torch.device
) -> None:
    """As the norm with them, scaled and shifted after; and gradients reach them."""
    if given[1] and not norm.center:
        return
    x, scale, shift = (torch.randn(*lead, 33, device=device, requires_grad=True) for lead in ((2, 5), (2, 1), (2, 1)))
    weight, bias = (torch.randn(33, device=device, requires_grad=True) if there else None for there in given)
    rest = dict(weight=weight, bias=bias) if norm.center else dict(weight=weight)
    y = getattr(functional, f"modulated_{norm.name}")(x, (33,), scale, shift if shifted else None, eps=EPS, **rest)
    n = torch.nn.functional.layer_norm(x, (33,), weight, bias, EPS) if norm.center else None
    n = torch.nn.functional.rms_norm(x, (33,), weight, EPS) if n is None else n
    expected = n * (1 + scale) + (shift if shifted else 0)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    asked, dy = [t for t in (x, scale, shift if shifted else None, weight, bias) if t is not None], torch.randn_like(y)
    for got, want in zip(torch.autograd.grad(y, asked, dy), torch.autograd.grad(expected, asked, dy), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_norms_own_weight_and_bias_beside_an_input_in_fp64(device: torch.device) -> None:
    """Are multiplied in fp64 too, whatever they are in."""
    x = torch.randn(4, 33, device=device, dtype=torch.float64)
    scale, shift, weight, bias = torch.randn(4, 33, device=device)
    y = functional.modulated_layer_norm(x, (33,), scale, shift, weight, bias)
    n = torch.nn.functional.layer_norm(x, (33,), weight.double(), bias.double())
    torch.testing.assert_close(y, n * (1 + scale.double()) + shift, rtol=1e-13, atol=1e-13)


def test_a_shift_of_other_sharings_beside_an_input_in_fp64(device: torch.device) -> None:
    """Has its gradient summed in fp64, whatever it is in itself."""
    x, scale, dy = torch.randn(3, 40, 3, 24, device=device, dtype=torch.float64)
    shift = torch.randn(3, 24, device=device, requires_grad=True)
    (found,) = torch.autograd.grad(functional.modulated_layer_norm(x, (24,), scale, shift), shift, dy)
    assert torch.equal(found, dy.sum(0).float())


def test_rows_of_several_dims(device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 5, device=device)
    for own in ((), (2, 1), (2, 3), (3,)):
        scale, shift = torch.randn(2, *own, 4, 5, device=device)
        assert_right(modulated(LAYER_NORM, x, scale, shift, dims=2))
    assert_right(modulated(RMS_NORM, x, torch.randn_like(x), None, dims=4))


@pytest.mark.parametrize("own", [(), (3, 1), (1, 9), (3, 9)], ids=str)
@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("tile", [Tile(4, 16, 4), Tile(1, 64, 1)], ids=str)
def test_programs_that_walk(
    own: tuple[int, ...], programs: int, tile: Tile, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each set's rows by one program and by several, of more than one turn each; in chunks, with lanes to spare."""
    forward, backward = RowForward(tile, 1, True, True, True), RowBackward(tile, 1, 3, 1, True)
    monkeypatch.setattr(conditioned_rows, "choose_conditioned_forward", lambda *_: forward)
    monkeypatch.setattr(conditioned_rows, "choose_conditioned_backward", lambda *_: backward)
    monkeypatch.setattr(conditioned_rows, "programs_of_a_set", lambda *_: programs)
    assert_right(drawn(LAYER_NORM, (3, 9), own, 40, torch.float32, device))


@pytest.mark.parametrize("of", [(1, 1), (1, 4), (6, 1), (3, 7), (40, 5)], ids=str)
@pytest.mark.parametrize(("norm", "cast"), [*((RMS_NORM, cast) for cast in CASTS), (LAYER_NORM, "output")])
def test_heads(of: tuple[int, int], norm: RowNorm, cast: Cast, device: torch.device) -> None:
    """Of a packed projection; of few tokens and of several tiles."""
    tokens, heads = of
    packed = torch.randn(2, tokens, 3 * heads, 16, device=device).bfloat16()
    weight, bias = torch.randn(2, heads, 16, device=device).unbind()
    for x in (packed[..., heads : 2 * heads, :], packed[0, :, :heads], packed[0, 0, :heads]):
        assert_right(of_heads(norm, x, weight.to(torch.bfloat16), cast=cast))
        assert_right(of_heads(norm, x, weight, bias if norm.center else None, cast))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_heads_in_transformers(dtype: torch.dtype, device: torch.device) -> None:
    """Cohere's and Chameleon's LayerNorm of queries and keys. Cohere's takes all in fp32 and rounds once, as ours; the
    other rounds x̂ and its product with the weight, so that both are compared with what is exact.
    """
    cohere = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    chameleon = pytest.importorskip("transformers.models.chameleon.modeling_chameleon")
    x, weight, bias = (torch.randn(*size, device=device).to(dtype) for size in ((2, 5, 3, 16), (3, 16), (3, 16)))
    ours = cohere.CohereLayerNorm((3, 16), eps=EPS).to(device)
    theirs = chameleon.ChameleonLayerNorm((3, 16)).to(device)
    assert EPS == 1e-5  # which Chameleon's always is
    for module, b in ((ours, None), (theirs, bias)):
        module.weight.data = weight
        if b is not None:
            module.bias.data = b
        call = of_heads(LAYER_NORM, x, weight, b)
        assert_no_worse("y", call(), conditioned_reference.oracle(*call).y, module(x))


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
@pytest.mark.parametrize("scale", [2.0**70, 2.0**-70, 2.0**-125])
def test_rows_beyond_the_squares_of_fp32(norm: RowNorm, scale: float, device: torch.device) -> None:
    """As the same rows within them: a power of two is exact, and rstd is as far the other way. Beside rows that are."""
    call = drawn(norm, (4, 3), (4, 1), 100, torch.float32, device)._replace(eps=0.0)
    expected = call()
    factors = torch.tensor([1.0, scale, scale, 1.0], device=device).view(4, 1, 1)
    torch.testing.assert_close(call._replace(x=call.x * factors)(), expected, rtol=1e-6, atol=1e-6)
    if scale < 2.0**-100:
        return
    dy, gradients = torch.randn_like(expected), []
    for x in (call.x, call.x * scale):
        leaves = [x.detach().requires_grad_(), *(t.detach().requires_grad_() for t in (call.weight, call.bias))]
        gradients.append(torch.autograd.grad(call.of([leaves[0], None, *leaves[1:]])(), leaves, dy))
    torch.testing.assert_close(gradients[1][0] * scale, gradients[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[1][1:], gradients[0][1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
def test_what_is_no_number_stays_where_it_is(norm: RowNorm, device: torch.device) -> None:
    call = drawn(norm, (4, 5), (4, 1), 33, torch.float32, device)
    call.x[0, 1, 3], call.x[1, 1, 20], call.x[2, 2, 31], call.x[3, 3] = torch.nan, torch.inf, -torch.inf, 0.0
    call.weight[0, 0, 0], call.bias[1, 0, 0] = torch.nan, torch.inf
    for eps in (EPS, 0.0) if not norm.center else (EPS,):
        of = call._replace(eps=eps)
        by_torch = conditioned_reference.composite(*of, torch.float32)
        assert_no_worse("y", of(), conditioned_reference.oracle(*of).y, by_torch)


def test_a_row_of_equal_values(device: torch.device) -> None:
    """Has a deviation of 0, whatever eps is."""
    x = torch.full((3, 300), 1e4 + 1 / 3, device=device)
    y = functional.modulated_layer_norm(x, (300,), torch.ones(300, device=device), eps=1e-12)
    assert not y.any()


def everything(x: Tensor, scale: Tensor, shift: Tensor, dy: Tensor, **how: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, scale, shift)]
    y = functional.modulated_layer_norm(leaves[0], x.shape[-1:], *leaves[1:], **how)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def test_the_same_bits_on_every_run(device: torch.device) -> None:
    given = [torch.randn(*lead, 96, device=device).bfloat16() for lead in ((4, 30), (4, 1), (4, 1), (4, 30))]
    for got, want in zip(everything(*given), everything(*given), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("own", [(8,), (1,)], ids=str)
def test_a_rows_bits_do_not_depend_on_those_beside_it(own: tuple[int, ...], device: torch.device) -> None:
    x, dy = (torch.randn(8, 40, 96, device=device).bfloat16() for _ in range(2))
    scale, shift = torch.randn(2, *own, 1, 96, device=device).bfloat16()
    whole = everything(x, scale, shift, dy, batch_invariant=True)
    for samples, tokens in ((slice(2, 3), slice(None)), (slice(1, 4), slice(3, 4)), (slice(0, 1), slice(0, 1))):
        of = samples if own == (8,) else slice(None)
        part = x[samples, tokens], scale[of], shift[of], dy[samples, tokens]
        for got, want in zip(everything(*part, batch_invariant=True)[:2], whole[:2], strict=True):
            assert torch.equal(got, want[samples, tokens])
    device_ = conditioned_rows.describe(device)
    few, many = (choose_conditioned_backward(m, 1, 96, 2, device_, False, True).tile for m in (1, 1 << 16))
    assert few == many


@pytest.mark.parametrize("wanted", [w for w in itertools.product((False, True), repeat=3) if any(w)], ids=str)
def test_only_what_is_asked_for(wanted: tuple[bool, ...], device: torch.device, launched: list[Any]) -> None:
    x, scale, shift = (torch.randn(*lead, 24, device=device) for lead in ((2, 300), (2, 1), (2, 1)))
    dy = torch.randn_like(x)
    for _ in range(3):  # the third is a repetition of the second
        launched.clear()
        leaves = [t.detach().requires_grad_(want) for t, want in zip((x, scale, shift), wanted, strict=True)]
        y = functional.modulated_layer_norm(leaves[0], (24,), *leaves[1:])
        asked = [t for t in leaves if t.requires_grad]
        found = torch.autograd.grad(y, asked, dy)
        names = ["conditioned_forward", "conditioned_backward", *(["sum_partials"] if any(wanted[1:]) else [])]
        assert [kernel.fn.__name__ for kernel in launched] == names
        expected = torch.nn.functional.layer_norm(leaves[0], (24,)) * (1 + leaves[1]) + leaves[2]
        for got, want in zip(found, torch.autograd.grad(expected, asked, dy), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_gradient_of_each_token_is_no_sum(device: torch.device, launched: list[Any]) -> None:
    """And takes no second pass."""
    assert_right(drawn(LAYER_NORM, (3, 50), (3, 50), 24, torch.bfloat16, device))
    assert [kernel.fn.__name__ for kernel in launched] == ["conditioned_forward", "conditioned_backward"]


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)], ids=str)
def test_nothing_to_normalize(shape: tuple[int, ...], device: torch.device, launched: list[object]) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    scale, shift = torch.randn(2, shape[0], 1, shape[2], device=device)
    leaves = x, scale.requires_grad_(), shift.requires_grad_()
    y = functional.modulated_rms_norm(x, shape[2:], *leaves[1:])
    assert y.shape == shape
    for leaf, gradient in zip(leaves, torch.autograd.grad(y, leaves, torch.randn_like(y)), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))
    assert launched == []


@pytest.mark.parametrize(
    ("rows", "own", "found"),
    [
        ((), (), (1, 1, 1)),
        ((8, 64, 1), (8, 1, 1), (1, 8, 64)),
        ((8, 64, 1), (1, 64, 1), (8, 64, 1)),
        ((8, 64, 1), (1,), (1, 1, 512)),
        ((8, 64, 1), (8, 64, 1), (1, 512, 1)),
        ((8, 64, 4), (4,), (512, 4, 1)),
        ((2, 8, 1, 64, 4), (8, 1, 1, 1), (2, 8, 256)),
        ((2, 8, 64), (2, 1, 64), None),
    ],
)
def test_sets(rows: tuple[int, ...], own: tuple[int, ...], found: tuple[int, int, int] | None) -> None:
    assert sets_of(rows, own) == found


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
@pytest.mark.parametrize("own", [(4, 1), (4, 1024), (1, 1)], ids=str)
@pytest.mark.parametrize("n", [1152, 3072])
def test_the_launches_of_real_sizes(own: tuple[int, ...], n: int, device: torch.device) -> None:
    assert_right(drawn(LAYER_NORM, (4, 1024), own, n, torch.bfloat16, device))
