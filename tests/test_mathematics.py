"""docs/mathematics.md, checked: its formulas by autograd in float64 or in exact rationals, its worked numbers as given.

Identities of rational functions hold exactly in Fractions. Those with a square root are compared in float64, to the last
place of float32: a wrong formula is wrong by far more, and float64's own rounding by far less.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trinorm.compare import assert_no_worse, unit_in_last_place
from trinorm.reference import Gradients, oracle_gradients
from trinorm.reference import conditioned as conditioned_reference
from trinorm.reference import qk as qk_reference
from trinorm.spec import GATE_ACTIVATIONS, LAYER_NORM, RMS_NORM, ConditionedNorm, GateActivation, RowNorm

ROOT = Path(__file__).parents[1]
ROWS, N, EPS = 5, 7, 0.1

both = pytest.mark.parametrize("spec", [LAYER_NORM, RMS_NORM], ids=lambda spec: spec.name)
numbers = st.lists(st.fractions(-100, 100, max_denominator=16), min_size=1, max_size=12)


def assert_formula(what: str, formula: Tensor, exact: Tensor) -> None:
    """The formula's float64 value is the exact one, to float32's last place."""
    assert_no_worse(what, formula.float(), exact, exact.float())


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def xhat_of(spec: RowNorm, x: Tensor, eps: float) -> Tensor:
    """The definition, and nothing derived from it: what autograd differentiates."""
    centered = x - x.mean(-1, keepdim=True) if spec.center else x
    return centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()


def differentiated(spec: RowNorm, x: Tensor, w: Tensor, b: Tensor, eps: float, dy: Tensor) -> Gradients:
    """dx, dw and db by autograd."""
    inputs = [t.clone().requires_grad_() for t in (x, w, b)]
    y = xhat_of(spec, inputs[0], eps) * inputs[1] + inputs[2]
    return Gradients(*torch.autograd.grad(y, inputs, dy))


def statistics(spec: RowNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of each row, ``[..., 1]``."""
    mean = x.mean(-1, keepdim=True) if spec.center else torch.zeros_like(x[..., :1])
    return mean, ((x - mean).square().mean(-1, keepdim=True) + EPS).rsqrt()


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, w, b and dy. x is off zero, so that a mean left out would show."""
    return (
        torch.randn(ROWS, N, dtype=torch.float64) + 0.5,
        torch.randn(N, dtype=torch.float64),
        torch.randn(N, dtype=torch.float64),
        torch.randn(ROWS, N, dtype=torch.float64),
    )


# The backward.


@both
def test_gradients_are_autograds(spec: RowNorm, problem: tuple[Tensor, ...]) -> None:
    x, w, b, dy = problem
    closed = oracle_gradients(spec, x, (N,), w, b, EPS, dy)
    exact = differentiated(spec, x, w, b, EPS, dy)
    for name, ours, autograds in zip(Gradients._fields, closed, exact, strict=True):
        assert_formula(name, ours, autograds)


@both
def test_dx_as_two_multiply_adds(spec: RowNorm, problem: tuple[Tensor, ...]) -> None:
    x, w, b, dy = problem
    mean, rstd = statistics(spec, x)
    g, xhat = dy * w, (x - mean) * rstd
    c1 = (g * xhat).mean(-1, keepdim=True)
    c2 = g.mean(-1, keepdim=True) * spec.center
    assert_formula("dx", rstd * g - (xhat * (rstd * c1) + rstd * c2), differentiated(spec, x, w, b, EPS, dy).dx)


@both
def test_derivatives_of_rstd_and_xhat(spec: RowNorm, problem: tuple[Tensor, ...]) -> None:
    x = problem[0][0]
    mean, rstd = statistics(spec, x)
    xhat = (x - mean) * rstd
    by_autograd = torch.autograd.functional.jacobian(lambda t: statistics(spec, t)[1], x)[0]
    assert_formula("drstd/dx", -rstd.square() * xhat / N, by_autograd)
    closed = rstd * (torch.eye(N) - spec.center / N - xhat[:, None] * xhat[None, :] / N)
    assert_formula("dxhat/dx", closed, torch.autograd.functional.jacobian(lambda t: xhat_of(spec, t, EPS), x))


@both
def test_unit_power_up_to_eps(spec: RowNorm, problem: tuple[Tensor, ...]) -> None:
    x = problem[0]
    _, rstd = statistics(spec, x)
    assert_formula("mean(xhat^2)", 1 - EPS * rstd.square(), xhat_of(spec, x, EPS).square().mean(-1, keepdim=True))


@both
def test_what_the_norm_does_not_pass_on(spec: RowNorm, problem: tuple[Tensor, ...]) -> None:
    x, w, b, dy = problem
    mean, rstd = statistics(spec, x)
    dx = differentiated(spec, x, w, b, EPS, dy).dx
    c1 = (dy * w * (x - mean) * rstd).mean(-1, keepdim=True)
    assert_formula("scale", N * c1 * EPS * rstd.square(), (dx * (x - mean)).sum(-1, keepdim=True))
    # The sum cancels to 0, so it is seen beside what cancels: 1 + 0.
    along_ones = dx.sum(-1) / dx.abs().sum(-1)
    assert (along_ones + 1).float().eq(1).all() == spec.center


@pytest.mark.parametrize("interleaved", [False, True])
def test_what_turns_the_gradient_back(problem: tuple[Tensor, ...], interleaved: bool) -> None:
    """Of any cos and sin; and what a forward without roundings multiplies with."""
    x, w, _, dy = problem
    r = 6
    pairs = [(i, i + 1) for i in range(0, r, 2)] if interleaved else [(i, i + r // 2) for i in range(r // 2)]
    cos, sin = torch.randn(2, r, dtype=torch.float64)
    xhat = xhat_of(RMS_NORM, x, EPS)
    n = (xhat * w).requires_grad_()
    y, dn, by_brackets = n.clone(), dy.clone(), (xhat * w).clone()
    for i, p in pairs:
        y[:, i], y[:, p] = n[:, i] * cos[i] - n[:, p] * sin[i], n[:, p] * cos[p] + n[:, i] * sin[p]
        dn[:, i], dn[:, p] = dy[:, i] * cos[i] + dy[:, p] * sin[p], dy[:, p] * cos[p] - dy[:, i] * sin[i]
        by_brackets[:, i] = xhat[:, i] * (w[i] * cos[i]) - xhat[:, p] * (w[p] * sin[i])
        by_brackets[:, p] = xhat[:, p] * (w[p] * cos[p]) + xhat[:, i] * (w[i] * sin[p])
    assert_formula("dn", dn, *torch.autograd.grad(y, n, dy))
    assert_formula("y", by_brackets, y.detach())
    every_turn = torch.cat((cos, cos.new_ones(1))), torch.cat((sin, sin.new_zeros(1)))
    whole = qk_reference.oracle(RMS_NORM, x[:, None], w, EPS, *(t[:r] for t in every_turn), interleaved)
    assert_formula("y", whole[:, 0], y.detach())


@pytest.mark.parametrize(("count", "divisor"), [(N, N), (N, 1), (1, 1), (3, 3), (4, 2.5)])
def test_by_another_statistic(problem: tuple[Tensor, ...], count: int, divisor: float) -> None:
    """Of the first K elements' squares, over D: the derivative, and what x̂ and c1 add up to."""
    x, w, _, dy = (t.requires_grad_() if i < 2 else t for i, t in enumerate(problem))
    rstd = (x[:, :count].square().sum(-1, keepdim=True) / divisor + EPS).rsqrt()
    found = torch.autograd.grad(x * rstd * w, (x, w), dy)
    with torch.no_grad():
        xhat, g = x * rstd, dy * w
        c1 = (g * xhat).sum(-1, keepdim=True) / divisor
        dx = rstd * (g - (torch.arange(N) < count) * xhat * c1)
        assert_formula("dx", dx, found[0])
        assert_formula("dw", (dy * xhat).sum(0), found[1])
        assert_formula("power", xhat[:, :count].square().sum(-1, keepdim=True) / divisor, 1 - EPS * rstd.square())
        if divisor == int(divisor):
            spec = ConditionedNorm(RMS_NORM, counted=count, divisor=int(divisor))
            exact = conditioned_reference.oracle_gradients(spec, 1, N, x, None, w, None, EPS, dy)
            for name, got, want in zip(("dx", "dw"), exact[::2], (dx, (dy * xhat).sum(0)), strict=True):
                assert got is not None
                assert_formula(name, got, want)


@both
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("activation", GATE_ACTIVATIONS)
def test_through_a_gate(problem: tuple[Tensor, ...], spec: RowNorm, gate_first: bool, activation: GateActivation) -> None:
    """Both orders; w and b of two sets of rows."""
    x, w, b, dy = problem
    sets = torch.arange(x.shape[0]) % 2
    w, b = (torch.stack((t, t.flip(0) - 0.5)).requires_grad_() for t in (w, b))
    x, z = x.detach().requires_grad_(), torch.randn_like(x).requires_grad_()
    s = z.sigmoid()
    a, slope = (s, s * (1 - s)) if activation == "sigmoid" else (z * s, s + z * s * (1 - s))
    xhat = xhat_of(spec, x * a if gate_first else x, EPS)
    n = xhat * (w + 1)[sets] + b[sets]
    y = n if gate_first else n * a
    found = torch.autograd.grad(y, (x, z, w, b), dy)
    with torch.no_grad():
        kept = x * a if gate_first else x
        centered = kept - kept.mean(-1, keepdim=True) if spec.center else kept
        rstd = (centered.square().mean(-1, keepdim=True) + EPS).rsqrt()
        dn = dy if gate_first else dy * a
        g = dn * (w + 1)[sets]
        c1 = (g * xhat).mean(-1, keepdim=True)
        ds = rstd * (g - xhat * c1 - (g.mean(-1, keepdim=True) if spec.center else 0))
        dx, dz = (ds * a, ds * x * slope) if gate_first else (ds, dy * n * slope)
        dw, db = (torch.stack([part[sets == i].sum(0) for i in range(2)]) for part in (dn * xhat, dn))
        for name, got, want in zip(("dx", "dz", "dw", "db"), (dx, dz, dw, db), found, strict=True):
            assert_formula(name, got, want)
        conditioned = ConditionedNorm(spec, activation, gate_first, modulated=True)
        given = x, z, w[sets], b[sets]
        exact = conditioned_reference.oracle_gradients(conditioned, 1, x.shape[-1], *given, EPS, dy)
        for name, got, want in zip(("dx", "dz"), exact, (dx, dz), strict=False):
            assert got is not None
            assert_formula(name, got, want)


def test_a_norms_own_weight_goes_into_scale_and_shift(problem: tuple[Tensor, ...]) -> None:
    x, w, b, scale = problem
    shift = torch.randn_like(scale)
    xhat = xhat_of(RMS_NORM, x, EPS)
    whole = xhat * (w * (1 + scale)) + (b * (1 + scale) + shift)
    assert_formula("y", whole, (xhat * w + b) * (1 + scale) + shift)


@pytest.mark.parametrize("f", [torch.tanh, torch.erf])
def test_functions_of_an_element(problem: tuple[Tensor, ...], f: Callable[[Tensor], Tensor]) -> None:
    x, w, b, dy = problem
    inputs = [t.clone().requires_grad_() for t in (x, vector(0.7), vector(-0.3), w, b)]
    y = f(inputs[1] * inputs[0] + inputs[2]) * inputs[3] + inputs[4]
    v, e = 0.7 * x - 0.3, (-2 * (0.7 * x - 0.3).abs()).exp()
    h = 2 / (1 + (2 * v.abs()).exp())
    assert_formula("tanh", 1 - h, v.abs().tanh())
    assert_formula("its slope", h * (2 - h), 1 - v.tanh() ** 2)
    dv = dy * w * (4 * e / (1 + e) ** 2 if f is torch.tanh else 2 / torch.pi**0.5 * (-v * v).exp())
    formulas = [dv * 0.7, (dv * x).sum().view(1), dv.sum().view(1), (dy * f(v)).sum(0), dy.sum(0)]
    for formula, exact in zip(formulas, torch.autograd.grad(y, inputs, dy), strict=True):
        assert_formula("of an element", formula, exact)


@pytest.mark.parametrize("s", [1.0, 0.25])
def test_a_polynomial_of_normalized_powers(problem: tuple[Tensor, ...], s: float) -> None:
    (x, w, _, dy), leaf = problem, problem[0].clone().requires_grad_()
    y = sum(w[k] * xhat_of(RMS_NORM, leaf**k, EPS) for k in (1, 2, 3))
    t, dx = x * s, torch.zeros_like(x)
    for k in (1, 2, 3):
        r = ((t**k).square().mean(-1, keepdim=True) + EPS * s ** (2 * k)).rsqrt()
        p = k * w[k] * r
        dx += s * (dy * p * t ** (k - 1) - t * (p * r * (dy * t**k * r).mean(-1, keepdim=True) * t ** (2 * k - 2)))
    assert_formula("dx", dx, torch.autograd.grad(y, leaf, dy)[0])


@pytest.mark.parametrize("s", [1.0, 0.25])
def test_a_length_and_a_direction(problem: tuple[Tensor, ...], s: float) -> None:
    v, _, _, dw = problem
    g = torch.linspace(0.5, 2, len(v), dtype=v.dtype)[:, None]
    leaves = [t.clone().requires_grad_() for t in (v, g)]
    w = leaves[1] * leaves[0] / leaves[0].norm(dim=-1, keepdim=True)
    t = v / s
    r, d = t.square().sum(-1, keepdim=True).rsqrt(), (dw * t).sum(-1, keepdim=True)
    assert_formula("w", t * g * r, w)
    formulas = (dw - t * d * r**2) * g * r / s, d * r
    for formula, exact in zip(formulas, torch.autograd.grad(w, leaves, dw), strict=True):
        assert_formula("of a length and a direction", formula, exact)
    # Of two parts, each in a unit of its own.
    parts = [(v[:, :2] / 0.5, dw[:, :2], 0.5), (v[:, 2:] / 4, dw[:, 2:], 4.0)]
    squares = sum((unit / 4) ** 2 * t.square().sum(-1) for t, _, unit in parts)
    products = sum(unit / 4 * (t * of).sum(-1) for t, of, unit in parts)
    assert_formula("Σ t²", squares, (v / 4).square().sum(-1))
    assert_formula("d", products, (dw * v / 4).sum(-1))


# Statistics, exactly.


def moments(xs: list[Fraction]) -> tuple[Fraction, Fraction]:
    """Mean, and the sum of squares about it."""
    mean = sum(xs, Fraction()) / len(xs)
    return mean, sum(((x - mean) ** 2 for x in xs), Fraction())


@given(numbers)
def test_welfords_recurrence(xs: list[Fraction]) -> None:
    mean, squares = Fraction(), Fraction()
    for count, x in enumerate(xs, 1):
        delta = x - mean
        mean += delta / count
        squares += delta * (x - mean)
    assert (mean, squares) == moments(xs)


@given(st.lists(numbers, min_size=1, max_size=4))
def test_chans_rule(lanes: list[list[Fraction]]) -> None:
    row = [x for lane in lanes for x in lane]
    parts = [(len(lane), *moments(lane)) for lane in lanes]
    row_mean = sum(count * mean for count, mean, _ in parts) / len(row)
    squares = sum(part for _, _, part in parts) + sum(count * (mean - row_mean) ** 2 for count, mean, _ in parts)
    assert (row_mean, squares) == moments(row)
    assert sum(count * (mean - row_mean) for count, mean, _ in parts) == 0


@given(st.lists(st.fractions(-100, 100, max_denominator=16), min_size=4, max_size=4), st.sampled_from([1, 2, 4]))
def test_chans_rule_for_blocks_of_one_size(row: list[Fraction], size: int) -> None:
    blocks = [moments(row[i : i + size]) for i in range(0, 4, size)]
    mean = sum(block_mean for block_mean, _ in blocks) / len(blocks)
    squares = sum(part + size * (block_mean - mean) ** 2 for block_mean, part in blocks)
    assert (mean, squares) == moments(row)


@given(numbers, numbers)
def test_chans_rule_for_two_groups(xs: list[Fraction], others: list[Fraction]) -> None:
    (total, n, squares), (other_total, k, other_squares) = ((sum(g), len(g), moments(g)[1]) for g in (xs, others))
    both = squares + other_squares + (k * total - n * other_total) ** 2 / (n * k * (n + k))
    assert both == moments(xs + others)[1]
    if n == k:
        assert 2 * n * both == 2 * (n * squares + n * other_squares) + (total - other_total) ** 2


@pytest.mark.parametrize(("dtype", "columns"), [(torch.bfloat16, 65536), (torch.float16, 8192)], ids=str)
def test_sums_of_equal_values_are_exact(dtype: torch.dtype, columns: int) -> None:
    """Every partial sum, of the value with the most significant bits; one column more than allowed need not be."""
    value = 2 - torch.finfo(dtype).eps
    assert torch.tensor(value, dtype=dtype).item() == value
    counts = torch.arange(1, columns + 1, dtype=torch.float64)
    assert torch.equal((counts * value).float().double(), counts * value)
    beyond = torch.arange(columns, 2 * columns + 1, dtype=torch.float64)
    assert not torch.equal((beyond * value).float().double(), beyond * value)


@given(numbers, st.fractions(-100, 100, max_denominator=16))
def test_power_about_another_mean(xs: list[Fraction], m: Fraction) -> None:
    mean, squares = moments(xs)
    assert sum((x - m) ** 2 for x in xs) == squares + len(xs) * (mean - m) ** 2


@pytest.mark.parametrize("unit", [2.0**-100, 2.0**100])
@both
def test_rstd_of_a_scaled_row(spec: RowNorm, problem: tuple[Tensor, ...], unit: float) -> None:
    x, scale = problem[0] * unit, 1 / unit
    mean, rstd = statistics(spec, x)
    power = ((x - mean) * scale).square().mean(-1, keepdim=True)
    assert_formula("rstd", scale * (power + scale**2 * EPS).rsqrt(), rstd)


def test_what_narrow_sums_cannot_hold() -> None:
    assert torch.tensor(256.0, dtype=torch.float16).square().isinf()
    for dtype, full in ((torch.float16, 2048.0), (torch.bfloat16, 256.0)):
        before, full_sum = torch.tensor([full - 1, full], dtype=dtype)
        assert before + 1 == full
        assert full_sum + 1 == full


def test_uncentred_variance_loses_every_digit() -> None:
    x = (1e4 + 1e-2 * torch.randn(4096, dtype=torch.float64)).float()
    assert unit_in_last_place(x[0].double().square(), torch.float32) == 8
    assert (x.square().mean() - x.mean().square()) % 8 == 0
    assert x.double().var(correction=0) < 1e-3
    assert unit_in_last_place(x[0].double(), torch.float32) == 2.0**-10  # a tenth of 1e-2


# The page itself.


def test_every_name_on_the_page_is_in_the_code() -> None:
    derivation = (ROOT / "docs" / "mathematics.md").read_text().split("## Where the original description errs")[0]
    derivation = re.sub(r"```.*?```", "", derivation, flags=re.DOTALL)
    named = set(re.findall(r"`([A-Za-z_]\w+)`", derivation))
    files = list((ROOT / "src" / "trinorm").rglob("*.py"))
    known = {word for file in files for word in re.findall(r"\w+", file.read_text())}
    known |= {part for file in files for part in file.parts}
    assert {"dx_of", "merged_lanes"} <= named
    assert named <= known
