"""``fuse(model)``: models that are given to it of which nothing, or not all, is fused, and its report."""

from __future__ import annotations

import copy

import pytest
import torch

import trinorm
from written_blocks import Plain


def test_models_of_which_nothing_is_fused() -> None:
    assert str(trinorm.fuse(torch.nn.Linear(2, 2))) == "trinorm.fuse: 0 fused, 0 left"
    with pytest.raises(TypeError, match=r"fuse\(\): model must be"):
        trinorm.fuse(3)  # type: ignore[arg-type]
    model = Plain()
    assert {entry.reason for entry in trinorm.fuse(model).left} == {"it is not trinorm's: replace() it first"}
    model.norm = torch.nn.BatchNorm1d(16)
    trinorm.replace(model)
    assert "no sum with a norm of its kind" in {e.path: e.reason for e in trinorm.fuse(model).left}["norm"]
    model = Plain()
    trinorm.replace(model)
    model.forward = model.forward  # type: ignore[method-assign]
    assert "replaced on the instance" in trinorm.fuse(model).left[0].reason
    del model.forward
    assert trinorm.fuse(model).fused
    assert {entry.reason for entry in trinorm.fuse(model).left} == {"already fused"}
    assert {entry.reason for entry in trinorm.replace(model).left} == {"already trinorm's"}
    trinorm.restore(model)
    assert type(model) is Plain and "_trinorm_replaced" not in vars(model)


def test_shared_norms_and_weights_and_a_model_on_meta() -> None:
    model = torch.nn.ModuleList([Plain(), Plain()])
    model[1].norm, model[1].other.weight = model[0].norm, model[0].other.weight
    trinorm.replace(model.to("meta"))
    assert {entry.path for entry in trinorm.fuse(model).fused} == {"0.norm", "0.other", "1.norm", "1.other"}
    assert model[1].norm is model[0].norm
    assert model[0](torch.empty(2, 16, device="meta")).is_meta
    with torch.no_grad():
        assert model[1](model[0](torch.empty(2, 16, device="meta"))).is_meta


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_layers_around_a_norm() -> None:
    model = Plain()
    model.layer = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(model.layer), {torch.nn.Linear})[0]
    trinorm.replace(model)
    plain, x = copy.deepcopy(model), torch.randn(2, 16)
    assert trinorm.fuse(model).fused
    assert torch.equal(model(x), plain(x))


def test_an_exception_in_the_middle_leaves_the_model_as_it_was() -> None:
    class Sealed(Plain):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "__class__":
                raise RuntimeError("sealed")
            super().__setattr__(name, value)

        forward = Plain.forward

    model = torch.nn.Sequential(Plain(), Sealed())
    trinorm.replace(model)
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    with pytest.raises(RuntimeError, match="sealed"):
        trinorm.fuse(model)
    assert [(type(m), dict(vars(m))) for m in model.modules()] == before


def test_a_class_that_cannot_be_extended_is_left() -> None:
    class Final(Plain):
        def __init_subclass__(cls) -> None:
            raise ValueError("no more")

        forward = Plain.forward

    model = Final()
    trinorm.replace(model)
    assert "cannot be extended: ValueError: no more" in trinorm.fuse(model).left[0].reason


def test_a_report_is_a_table_of_richs() -> None:
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=160, record=True)
    model = Plain()
    trinorm.replace(model)
    report = trinorm.fuse(model)
    console.print(report)
    for shown in (console.export_text(), str(report)):
        for word in ("2 fused, 0 left", "residual + self.layer(x), line ", "the gradient of x, in its backward"):
            assert word in shown
