"""``fuse`` of QK-norm in forwards that are written out: which go together, which stay apart, and what a call may be."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import trinorm
import written_heads
from trinorm.models.heads_fused import turned
from trinorm.models.made import ROTARY
from unfused import Results, assert_as_unfused
from written_heads import Attention
from written_norms import BeforeTheWeightNorm, OneAndAWeight, named_norm


def both_of(kind: type[Attention], device: torch.device, **how: Any) -> tuple[Attention, Attention, trinorm.Report]:
    """(an attention whose norms are replaced, one that is fused besides, what fuse said)."""
    torch.manual_seed(0)
    before = kind(**how).to(device)
    trinorm.replace(before)
    after = copy.deepcopy(before)
    return before, after, trinorm.fuse(after)


def inputs(kind: type[Attention], device: torch.device) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    angles = torch.randn(2, 5, written_heads.SIZE // kind.parts, device=device) * 3
    return torch.randn(2, 5, written_heads.HEADS * written_heads.SIZE, device=device), (angles.cos(), angles.sin())


def run_on(x: Tensor, angles: tuple[Tensor, Tensor], *more: Any) -> Any:
    def run(model: Any) -> Results:
        dtype = model.q_proj.weight.dtype
        of = x.detach().to(dtype).requires_grad_()
        results = model(of, tuple(t.to(dtype) for t in angles), *more)
        dys = [torch.linspace(-1, 1, y.numel(), dtype=dtype, device=y.device).view(y.shape) for y in results]
        parameters = [p for p in model.parameters() if p.requires_grad]
        dx, *others = torch.autograd.grad(results, [of, *parameters], dys, allow_unused=True)
        return {"y": [*results], "dx": [dx], "others": [g for g in others if g is not None]}

    return run


def values_on(x: Tensor, angles: tuple[Tensor, Tensor]) -> Any:
    def run(model: Any) -> Results:
        dtype = model.q_proj.weight.dtype
        return {"y": [*model(x.to(dtype), tuple(t.to(dtype) for t in angles))]}

    return run


TOGETHER: list[tuple[type[Attention], dict[str, Any]]] = [
    (Attention, {}),
    (Attention, dict(norm=named_norm(OneAndAWeight))),
    (Attention, dict(norm=torch.nn.RMSNorm)),
    (written_heads.BehindTransposing, {}),
    (written_heads.BehindTransposing, dict(norm=torch.nn.RMSNorm)),
    (written_heads.Named, {}),
    (written_heads.Perhaps, {}),
    (written_heads.Interleaved, {}),
    (written_heads.Partial, {}),
    (written_heads.OfTokensAlone, {}),
    (written_heads.Shared, {}),
    (written_heads.Inheriting, {}),
    (written_heads.Scripted, {}),
]


@pytest.mark.parametrize(("kind", "how"), TOGETHER, ids=lambda value: getattr(value, "__name__", ""))
def test_heads_that_go_together(
    kind: type[Attention], how: dict[str, Any], device: torch.device, heads_together: list[bool]
) -> None:
    before, after, report = both_of(kind, device, **how)
    norms = ["q_norm"] if kind is written_heads.Shared else ["q_norm", "k_norm"]
    assert [entry.path for entry in report.fused] == norms and not report.left[2 - len(norms) :]
    assert type(after).__name__ == kind.__name__ and isinstance(after, kind)
    x, angles = inputs(kind, device)
    assert_as_unfused(run_on(x, angles), after, before, by_bits=False)
    assert heads_together == [True]
    assert [y.stride() for y in after(x, angles)] == [y.stride() for y in before(x, angles)]
    trinorm.restore(after)
    assert type(after) is kind and ROTARY not in vars(after)


def test_as_many_tokens_as_a_head_has_elements_and_none(device: torch.device, heads_together: list[bool]) -> None:
    kind = written_heads.BehindTransposing
    before, after, _ = both_of(kind, device)
    x, (cos, sin) = inputs(kind, device)
    x, cos, sin = (t.repeat(1, 2, 1)[:, : written_heads.SIZE] for t in (x, cos, sin))
    assert_as_unfused(run_on(x, (cos, sin)), after, before, by_bits=False)
    assert [y.shape for y in after(x[:0], (cos[:0], sin[:0]))] == [y.shape for y in before(x[:0], (cos[:0], sin[:0]))]
    assert heads_together == [True, False]


def test_a_function_may_have_any_argument_by_name() -> None:
    def function(*of: int, key: int) -> tuple[int, ...]:
        return *of, key

    assert turned(torch.nn.Module(), [None, None], ((), ()), function, 1, 2, 3, 4, key=5) == (1, 2, 3, 4, 5)


def test_another_last_dim_than_the_norms(device: torch.device, heads_together: list[bool]) -> None:
    before, after, report = both_of(written_heads.Turned, device, norm=torch.nn.RMSNorm)
    x, angles = inputs(written_heads.Turned, device)
    x, *angles = (t.repeat(1, 2, 1)[:, : written_heads.SIZE] for t in (x, *angles))
    assert len(report.fused) == 2
    assert_as_unfused(run_on(x, tuple(angles)), after, before)
    assert heads_together == [False]


@pytest.mark.parametrize("norm", [torch.nn.RMSNorm, BeforeTheWeightNorm])
def test_the_order_of_memory_that_the_model_has(norm: Any, device: torch.device, heads_together: list[bool]) -> None:
    """As many tokens as a head has elements, or fewer: a view of the results is one of the fused ones."""
    before, after, report = both_of(written_heads.TokensFirst, device, norm=norm)
    assert len(report.fused) == 2
    for tokens in (written_heads.SIZE, 3):
        x, (cos, sin) = (inputs(Attention, device)[0].repeat(1, 2, 1)[:, :tokens], inputs(Attention, device)[1])
        of = x.transpose(0, 1).contiguous(), tuple(t.repeat(1, 2, 1)[:, :tokens] for t in (cos, sin))
        for y, unfused in zip(after(*of), before(*of), strict=True):
            assert torch.equal(y, unfused) and y.stride() == unfused.stride()
    assert heads_together == [False, False]


@pytest.mark.parametrize("norm", [BeforeTheWeightNorm, named_norm(OneAndAWeight)])
def test_another_function_in_16_bits(norm: Any, device: torch.device, heads_together: list[bool]) -> None:
    before, after, report = both_of(written_heads.Doubled, device, norm=norm)
    assert {entry.to for entry in report.fused} == {"trinorm.functional.qk_norm, of float32"}
    x, (cos, sin) = inputs(Attention, device)
    before.half(), after.half()
    assert all(map(torch.equal, after(x.half(), (cos.half(), sin.half())), before(x.half(), (cos.half(), sin.half()))))
    assert heads_together == [False]


def test_where_no_norm_is_asked_for(device: torch.device, heads_together: list[bool]) -> None:
    before, after, _ = both_of(written_heads.Perhaps, device)
    x, angles = inputs(written_heads.Perhaps, device)
    assert_as_unfused(run_on(x, angles, False), after, before)
    assert not heads_together


APART: dict[type[Attention], str] = {
    written_heads.Elsewhere: "has its result too",
    written_heads.Later: "has its result too",
    written_heads.Kept: "another function has its result",
    written_heads.WrittenTo: "writes to a tensor",
    written_heads.HandedOn: "may write to what it is of",
    written_heads.InPlace: "writes to a tensor",
    written_heads.OfItsDtype: "has its result too",
    written_heads.Scaled: "no sum",
    written_heads.Divided: "divides its result into heads",
    written_heads.Sometimes: "is not always run",
    written_heads.NormBehind: "has turned, and not before it",
    written_heads.OfOne: "only one of the two",
    written_heads.Backwards: "no rotary embedding that qk_norm has",
    written_heads.Starred: "no sum",
    written_heads.OwnForward: "no sum",
    written_heads.Different: "differ in what they compute",
    written_heads.LayerNorms: "which its norms are not",
}


@pytest.mark.parametrize("kind", APART, ids=lambda kind: kind.__name__)
def test_heads_that_stay_apart(kind: type[Attention], device: torch.device, heads_together: list[bool]) -> None:
    before, after, report = both_of(kind, device)
    assert not report.fused and type(after) is kind
    assert APART[kind] in {entry.path: entry.reason for entry in report.left}["q_norm"]
    x, angles = inputs(kind, device)
    assert_as_unfused(values_on(x, angles), after, before)
    assert not heads_together


# --- at a call ---


def test_hooks_and_whatever_else_has_changed_since(
    device: torch.device, heads_together: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after, _ = both_of(Attention, device)
    x, angles = inputs(Attention, device)
    seen: list[object] = []

    def alike() -> None:
        heads_together.clear()
        assert_as_unfused(run_on(x, angles), after, before)

    hooks = [model.q_norm.register_forward_hook(lambda *of: (seen.append(of), of[2] * 2)[1]) for model in (before, after)]
    heads_together.clear()
    assert torch.equal(after(x, angles)[0], before(x, angles)[0])
    assert not heads_together and len(seen) == 2
    for hook in hooks:
        hook.remove()
    # Of the attention itself they see what they did.
    hook = after.register_forward_hook(lambda *of: seen.append(of))
    assert_as_unfused(run_on(x, angles), after, before, by_bits=False)
    hook.remove()
    assert len(seen) == 3 and heads_together == [True]
    for model in (before, after):
        model.k_norm.variance_epsilon = 0.5
    alike()
    assert heads_together == [False]
    before, after, _ = both_of(Attention, device)
    turn = written_heads.turn
    monkeypatch.setattr(written_heads, "turn", lambda q, k, cos, sin: turn(q, k, cos, -sin))
    alike()
    assert heads_together == [False]


class Halved(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_a_norm_that_is_another_by_now(device: torch.device, heads_together: list[bool]) -> None:
    """A function, a module, or of another class, as torch.nn.utils.parametrize makes it."""
    x, angles = inputs(Attention, device)
    for norm in (torch.tanh, torch.nn.Tanh(), None):
        before, after, _ = both_of(Attention, device)
        for model in (before, after):
            if norm is None:
                torch.nn.utils.parametrize.register_parametrization(model.q_norm, "weight", Halved())
            else:
                del model.q_norm
                model.q_norm = norm
        assert all(map(torch.equal, after(x, angles), before(x, angles)))
    assert True not in heads_together


@pytest.mark.parametrize("lambdas", [False, True])
def test_files_of_a_function_without_a_name(
    lambdas: bool, device: torch.device, heads_together: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read of one has its norms, and then the function."""
    if lambdas:
        turn = written_heads.turn
        monkeypatch.setattr(written_heads, "turn_scripted", lambda *of: turn(*of))
    before, after, report = both_of(written_heads.Scripted, device)
    assert len(report.fused) == 2
    x, angles = inputs(Attention, device)
    read, copied = pickle.loads(pickle.dumps(after)), copy.deepcopy(after)
    assert all(map(torch.equal, read(x, angles), before(x, angles)))
    assert all(map(torch.equal, copied(x, angles), after(x, angles)))
    assert heads_together == [True, True]


@pytest.mark.parametrize(
    ("kind", "norm"), [(Attention, torch.nn.RMSNorm), (written_heads.BehindTransposing, BeforeTheWeightNorm)]
)
def test_export_for_any_number_of_tokens(kind: type[Attention], norm: Any, device: torch.device) -> None:
    """Of as many as a head has elements, too."""
    before, after, _ = both_of(kind, device, norm=norm)
    x, angles = inputs(kind, device)
    tokens = {1: torch.export.Dim("tokens", min=2, max=64)}
    for model in (before, after):
        torch.export.export(model, (x, angles), dynamic_shapes=(tokens, (tokens, tokens)), strict=True)


def test_hooked_norms_are_left(device: torch.device) -> None:
    model = Attention().to(device)
    trinorm.replace(model)
    model.q_norm.register_forward_hook(lambda *of: None)
    reasons = {entry.path: entry.reason for entry in trinorm.fuse(model).left}
    assert "hooks" in reasons["q_norm"] and "only one of the two" in reasons["k_norm"]
    assert type(model) is Attention


def test_calls_that_were_not_compared(device: torch.device, heads_together: list[bool]) -> None:
    """Angles of another dtype, whose results would have that; of one head each; with a gradient; float64."""
    before, after, _ = both_of(Attention, device)
    before.bfloat16(), after.bfloat16()
    x, (cos, sin) = inputs(Attention, device)
    x = x.bfloat16()
    assert [y.dtype for y in after(x, (cos, sin))] == [torch.float32] * 2
    after(x, (cos.bfloat16(), sin.bfloat16()))
    after(x[:1, :2], (cos.bfloat16()[:1, :1], sin.bfloat16()[:1, :1]))
    after(x, (cos.bfloat16()[:1], sin.bfloat16()[:1]))
    with_gradient = cos.bfloat16().requires_grad_()
    after(x, (with_gradient, sin.bfloat16()))[0].float().sum().backward()
    assert with_gradient.grad is not None
    assert heads_together == [False, True, False, True, False]
    before.double(), after.double()
    angles = cos.double(), sin.double()
    assert all(torch.equal(*of) for of in zip(after(x.double(), angles), before(x.double(), angles), strict=True))
    assert heads_together[-1] is False


def test_under_autocast(device: torch.device, heads_together: list[bool]) -> None:
    """Of which projections in bf16 come, beside angles in either dtype."""
    before, after, _ = both_of(Attention, device)
    x, (cos, sin) = inputs(Attention, device)
    for model in (before, after):
        for norm in (model.q_norm, model.k_norm):
            norm.bfloat16()

    for dtype in (torch.float32, torch.bfloat16):

        def run(model: Any, dtype: torch.dtype = dtype) -> Results:
            exact = model.q_proj.weight.dtype == torch.float64
            of, of_angles = (torch.float64, torch.float64) if exact else (torch.float32, dtype)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=not exact):
                return {"y": [*model(x.to(of), (cos.to(of_angles), sin.to(of_angles)))]}

        assert_as_unfused(run, after, before, by_bits=False)
    assert heads_together == [False, True]


def test_a_model_on_meta_and_a_report_that_is_a_table() -> None:
    rich = pytest.importorskip("rich.console")
    model = Attention(BeforeTheWeightNorm).to("meta")
    trinorm.replace(model)
    report = trinorm.fuse(model)
    angles = torch.empty(2, 5, 8, device="meta")
    assert all(y.is_meta for y in model(torch.empty(2, 5, 24, device="meta"), (angles, angles)))
    console = rich.Console(width=200, record=True)
    console.print(report)
    for shown in (console.export_text(), str(report)):
        for word in ("2 fused, 0 left", "trinorm.functional.qk_norm, of float32", "turn(query, key, cos, sin), line "):
            assert word in shown
