"""Weight normalization: functional/weight.py, ops/weight.py, kernels/weight.py. What it shares with DyT, Derf and PolyNorm
is test_inputs_only.py's, the parametrization test_weight_nn.py's.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from inputs_only_norms import DTYPES, Call, assert_right, gradients, weight
from machine import ON_GPU
from trinorm import functional
from trinorm.kernels import index
from trinorm.kernels import weight as kernels
from trinorm.ops import road
from trinorm.ops.hosts import weight_rows
from trinorm.reference.weight import g_shape
from trinorm.tuning import Tile, WeightRows

# At the edges of tiles, and within them; whole and shared.
SIZES = [(33, 1), (70, 2), (5, 3), (17, 5), (3, 127), (2, 128), (1, 129), (5, 1000), (2, 1025), (2, 3073), (2, 8193)]
EVERY_SIZE = [(*of, dtype) for of in SIZES for dtype in (DTYPES if of[1] in (2, 129, 8193) else DTYPES[:1])]


def draw(
    *shape: int, dim: int | None = 0, dtype: torch.dtype = torch.float32, of_g: torch.dtype | None = None, device: Any
) -> Call:
    v = torch.randn(shape, device=device).to(dtype)
    return weight(v, torch.randn(g_shape(dim, shape), device=device).to(of_g or dtype), dim)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> WeightRows:
    """Rows of any length by programs that share them: of four chunks of 32 elements three programs have one or two."""
    plan = WeightRows(Tile(1, 32, 1), 3, stream=True)
    monkeypatch.setattr(weight_rows, "choose_weight", lambda *_: plan)
    return plan


@pytest.mark.parametrize(("m", "n", "dtype"), EVERY_SIZE, ids=str)
def test_every_size(m: int, n: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_right(draw(m, n, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 32, 100])
def test_shared_rows(n: int, dtype: torch.dtype, device: torch.device, shared: WeightRows) -> None:
    """A program with two chunks, with one, with none."""
    assert_right(draw(3, n, dtype=dtype, device=device))
    assert_right(draw(3, n, dim=None, dtype=dtype, device=device))


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((7,), 0), ((6, 2, 3, 3), 0), ((6, 2, 3, 3), None), ((4, 3000), None), ((5,), None), ((), None)],
    ids=str,
)
def test_every_shape(shape: tuple[int, ...], dim: int | None, device: torch.device, launched: list[Any]) -> None:
    assert_right(draw(*shape, dim=dim, device=device))
    assert launched


@pytest.mark.parametrize("dim", [1, 2, -2])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.filterwarnings("ignore:.*neither 0 nor None")
def test_other_dims_have_torchs_operators(dim: int, dtype: torch.dtype, device: torch.device, launched: list[Any]) -> None:
    call = draw(4, 5, 6, dim=dim % 3, dtype=dtype, device=device)
    assert_right(call)
    assert torch.equal(functional.weight_norm(*call.present, dim), call())
    assert launched == []


@pytest.mark.parametrize("dtypes", [d for d in itertools.product(DTYPES, repeat=2) if len(set(d)) > 1][::2], ids=str)
def test_lengths_of_other_dtypes(dtypes: tuple[torch.dtype, torch.dtype], device: torch.device) -> None:
    assert_right(draw(6, 24, dtype=dtypes[0], of_g=dtypes[1], device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((6, 2, 3, 3), 0), ((6, 40), 0), ((6, 40), None), ((6, 40), 1)], ids=str)
@pytest.mark.filterwarnings("ignore:.*neither 0 nor None")
def test_as_torchs(shape: tuple[int, ...], dim: int | None, dtype: torch.dtype, device: torch.device) -> None:
    """g as torch makes it, and gradients."""
    v, dw = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    of_torch = -1 if dim is None else dim
    g = torch.norm_except_dim(v, 2, of_torch)
    torch.testing.assert_close(functional.weight_norm(v, g, dim), v)
    g = g * torch.rand_like(g)
    found = []
    for norm in (functional.weight_norm, torch._weight_norm):
        leaves = [t.detach().requires_grad_() for t in (v, g)]
        w = norm(*leaves, of_torch)
        found.append((w, *torch.autograd.grad(w, leaves, dw)))
    for got, want in zip(*found, strict=True):
        # In 16 bits a gradient of torch's, of operators that round each, has an error of several units.
        how = dict(rtol=0.02, atol=0.05) if dtype.itemsize == 2 else {}
        torch.testing.assert_close(got, want, **how)  # type: ignore[arg-type]


def test_where_tensors_lie(device: torch.device) -> None:
    """Strided slices, aligned or not; and layouts that are copied."""
    for n, offset in ((64, 0), (64, 1), (50, 3)):
        packed = torch.randn(7, 2 * n + offset, device=device).bfloat16()
        g = torch.randn(8, 1, device=device).bfloat16()[1:]
        assert_right(weight(packed[:, offset : offset + n], g), packed[:, -n:])
    v, g = draw(3, 4, 8, device=device).present
    for view in (
        lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
        lambda t: torch.stack((t, t), -1)[..., 0],
        lambda t: torch._neg_view(-t),
    ):
        for dim, of_dim in ((0, view(g)), (None, g[:1])):
            assert_right(weight(view(v), of_dim, dim), view(torch.randn_like(v)))
    assert_right(weight(v[:1].expand(3, 4, 8), g), torch.randn(8, device=device).expand(3, 4, 8))
    channels_last = torch.randn(4, 3, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    assert_right(weight(channels_last, draw(4, 1, 1, 1, device=device).x))
    found = gradients(Call.__call__, weight(v, g[0, 0, 0], None), v)[1][1]
    assert found is not None and found.shape == ()


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**60, 2.0**100])
@pytest.mark.parametrize("whole", [True, False])
def test_rows_whose_squares_fp32_has_not(
    scale: float, whole: bool, device: torch.device, request: pytest.FixtureRequest
) -> None:
    """As the same rows within its range, beside rows that are: bit for bit."""
    if not whole:
        request.getfixturevalue("shared")
    call = draw(4, 100, device=device)
    factors = torch.tensor([1.0, scale, scale, 1.0], device=device)[:, None]
    dw = torch.randn_like(call.x)
    (w, (dv, dg)), (of_plain, (dv_of_plain, dg_of_plain)) = (
        gradients(Call.__call__, weight(v, call.present[1]), dw) for v in (call.x * factors, call.x)
    )
    assert dv is not None and dg is not None and dv_of_plain is not None
    assert torch.equal(w, of_plain)
    assert torch.equal(dv * factors, dv_of_plain)
    assert torch.equal(dg, dg_of_plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_chunks_of_all_sizes_beside_each_other(dtype: torch.dtype, device: torch.device, shared: WeightRows) -> None:
    """Of one row, each with a unit of its own; some are zeros."""
    call = draw(2, 100, dtype=dtype, device=device)
    exponents = torch.tensor([-100.0, 60, 100, 99], device=device).repeat_interleave(32)[:100]
    call.x.mul_(exponents.exp2())
    call.x[1, 32:64] = 0
    dw = torch.randn_like(call.x)
    w, found = gradients(Call.__call__, call, dw)
    for got, want in zip((w, *found), (call.oracle(), *call.oracle_gradients(dw)), strict=True):
        assert got is not None and want is not None
        size = want.abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=0, atol=16 * torch.finfo(dtype).eps * size)


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_no_number_stays_in_its_row(whole: bool, device: torch.device, request: pytest.FixtureRequest) -> None:
    """As torch says: of a row of zeros too, which has no direction."""
    if not whole:
        request.getfixturevalue("shared")
    v, g = draw(6, 33, device=device).present
    v[0, 3], v[1, 20], v[2], v[3, 1:] = torch.nan, torch.inf, 0.0, 0.0
    g[4] = 0.0
    dw = torch.randn_like(v)
    (w, found), (of_torch, expected) = (gradients(by, weight(v, g), dw) for by in (Call.__call__, Call.composite))
    assert w[0].isnan().all() and w[2].isnan().all() and w[1, 20].isnan() and (w[1, :20] == 0).all()
    torch.testing.assert_close(w, of_torch, equal_nan=True)
    torch.testing.assert_close(w, torch._weight_norm(v, g, 0), equal_nan=True)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


def test_the_same_bits_on_every_run_and_beside_any_rows(device: torch.device) -> None:
    for n in (96, 9000):
        call = draw(5, n, dtype=torch.bfloat16, device=device)
        dw = torch.randn_like(call.x)

        def everything(rows: slice, call: Call = call, dw: Tensor = dw) -> list[Tensor]:
            w, found = gradients(Call.__call__, call.given([t[rows] for t in call.present]), dw[rows])
            return [w, *(t for t in found if t is not None)]

        whole = everything(slice(None))
        for rows in (slice(None), slice(1, 2), slice(0, 3)):
            for got, want in zip(everything(rows), whole, strict=True):
                assert torch.equal(got, want[rows])


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("n", [24, 8200])
def test_only_what_is_asked_for(n: int, wanted: tuple[bool, bool], device: torch.device, launched: list[Any]) -> None:
    given = draw(4, n, device=device)
    dw, sums = torch.randn_like(given.x), ["weight_sums"] * (n > 8192)
    for _ in range(3):  # the third is a repetition of the second
        launched.clear()
        found = []
        for by in (Call.__call__, Call.composite):
            leaves = [t.detach().requires_grad_(want) for t, want in zip(given.present, wanted, strict=True)]
            found.append(torch.autograd.grad(by(given.given(leaves)), [t for t in leaves if t.requires_grad], dw))
        assert [kernel.fn.__name__ for kernel in launched] == [*sums, "weight_forward", *sums, "weight_backward"]
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_gpu_says_once_that_it_has_no_kernel(device: torch.device) -> None:
    call = draw(4, 5, 2, 3, dim=3, device=device)
    road._warn_once.cache_clear()  # a test before this one may have been told
    if ON_GPU:
        with pytest.warns(UserWarning, match="dim is 3, neither 0 nor None"):
            call()
    call()


_V, _G = torch.randn(3, 2, 8), torch.randn(3, 1, 1)
REFUSED = [
    ((None, _G), TypeError, "v must be a Tensor, not NoneType"),
    ((_V, 1.0), TypeError, "g must be a Tensor, not float"),
    ((_V.int(), _G), NotImplementedError, "v has dtype torch.int32"),
    ((_V, _G.int()), NotImplementedError, "g has dtype torch.int32"),
    ((_V.to_sparse(), _G), NotImplementedError, "v has layout"),
    ((_V, _G.to("meta")), RuntimeError, "g is on meta, but v is on cpu"),
    ((_V, _G[:2]), RuntimeError, r"g has shape \(2, 1, 1\); with dim=0 it must be \(3, 1, 1\), v's with all dims but 0"),
    ((_V, _G[:, 0, 0]), RuntimeError, r"g has shape \(3,\); with dim=0 it must be \(3, 1, 1\)"),
    ((_V, _G, 1), RuntimeError, r"g has shape \(3, 1, 1\); with dim=1 it must be \(1, 2, 1\)"),
    ((_V, _G, None), RuntimeError, r"g has shape \(3, 1, 1\); with dim=None it must be of one element"),
    ((_V, _G, 3), IndexError, r"dim is 3; of a v with shape \(3, 2, 8\) it must be from -3 to 2, or None"),
    ((_V[0, 0, 0], _G), IndexError, r"dim is 0; of a v with shape \(\) it must be None"),
    ((_V, _G, 0.0), TypeError, "dim must be an int or None, not 0.0"),
    ((_V, _G, True), TypeError, "dim must be an int or None, not True"),
]


@pytest.mark.parametrize(("given", "error", "words"), REFUSED)
def test_what_it_refuses(given: tuple[Any, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=rf"^weight_norm\(\): {words}"):
        functional.weight_norm(*given)


@pytest.mark.parametrize(
    ("of_g", "dim", "words"),
    [
        ((3, 1, 1), 3, "the input has no dim 3"),
        ((3, 1, 1), None, "g has not one"),
        ((1, 2, 1), 0, "g is not of the input's"),
    ],
)
def test_what_the_registered_op_refuses(of_g: tuple[int, ...], dim: int | None, words: str, device: torch.device) -> None:
    with pytest.raises(RuntimeError, match=f"trinorm::weight_norm: {words}"):
        torch.ops.trinorm.weight_norm(_V.to(device), torch.ones(of_g, device=device), dim)


# --- the helpers, each alone ---

ROWS, CHUNK, N = 4, 8, 14


@triton.jit
def _sums_kernel(OUT, V, DW, N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, ACC: tl.constexpr):
    rows = index.tile_rows(0, ROWS)
    vs = index.load_row(V + rows * N, rows >= 0, N, CHUNK, False)
    dws = index.load_row(DW + rows * N, rows >= 0, N, CHUNK, False)
    unit, total, dot = kernels.weight_row_sums(vs, dws, ACC)
    tl.store(OUT + rows, unit)
    tl.store(OUT + ROWS + rows, total)
    tl.store(OUT + 2 * ROWS + rows, dot)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_of_rows(dtype: torch.dtype, device: torch.device) -> None:
    """In units that are powers of two, which bring the largest element to 1..2."""
    factors = torch.tensor([1.0, 2.0**100, 2.0**-100, 0.0], device=device)[:, None]
    v, dw = torch.randn(2, ROWS, N, device=device, dtype=dtype)
    v *= factors
    out = torch.empty(3, ROWS, device=device, dtype=dtype)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    _sums_kernel[(1,)](out, v, dw, N=N, ROWS=ROWS, CHUNK=CHUNK, ACC=acc)
    unit, *found = out.double()
    largest = v.double().abs().amax(1)[:3] / unit[:3]
    assert ((largest >= 1) & (largest < 2)).all()
    assert unit[3] == torch.finfo(dtype).tiny
    u = v.double() / unit[:, None]
    expected = u.square().sum(1), (dw.double() * u).sum(1)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@triton.jit
def _joined_kernel(OUT, SUMS, PARTS: tl.constexpr, PADDED: tl.constexpr):
    row = index.tile_rows(1, 1)
    unit, total, dot = kernels.joined_sums(SUMS, row, PARTS, PADDED, tl.float32)
    tl.store(OUT + row * 0, unit)
    tl.store(OUT + row * 0 + 1, total)
    tl.store(OUT + row * 0 + 2, dot)


def test_sums_of_parts(device: torch.device) -> None:
    """Brought to the largest unit."""
    sums = torch.rand(2, 3, 5, device=device) + 1
    sums[:, 0] = torch.tensor([2.0**-126, 2.0**3, 2.0**5, 2.0**-3, 2.0**5], device=device)
    out = torch.empty(3, device=device)
    _joined_kernel[(1,)](out, sums, PARTS=5, PADDED=8)
    units, totals, dots = sums[1].double()
    expected = torch.stack([units.max(), (totals * (units / 32) ** 2).sum(), (dots * units / 32).sum()])
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter takes minutes")
@pytest.mark.parametrize(
    ("m", "n", "dim"), [(4096, 4096, 0), (512, 4608, 0), (1024, 32768, 0), (4096, 4096, None)], ids=str
)
def test_the_launches_of_real_sizes(m: int, n: int, dim: int | None, device: torch.device) -> None:
    assert_right(draw(m, n, dim=dim, dtype=torch.bfloat16, device=device))


@pytest.mark.skipif(not ON_GPU, reason="a tensor over 2^31 elements needs a GPU")
def test_over_two_billion_elements(device: torch.device) -> None:
    v = torch.ones((1 << 16) + 1, (1 << 15) + 1, device=device, dtype=torch.float16)
    v[-1, -1] = -1
    w = functional.weight_norm(v, torch.full((), 2.0**15, device=device), None)
    assert w[-1, -1] == -w[0, 0]
    assert w[0, 0] == torch.tensor(2.0**15 / v.numel() ** 0.5).half().item()
