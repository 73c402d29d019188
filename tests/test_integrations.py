"""transformers' use_kernels=True, served from here. The second half needs a version of kernels that transformers takes."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import trinorm
from trinorm.compare import assert_no_worse
from trinorm.integrations import layers
from trinorm.integrations.transformers import Registered, register, unregister
from trinorm.models.forms import Form

import_utils = pytest.importorskip("transformers.utils.import_utils")

from transformers_models import given, made, result  # noqa: E402

# (the class, in its model's module; its layer; the casting mode that its forward has)
CLASSES = [
    ("llama", "LlamaRMSNorm", layers.RMSNorm, "llama"),
    ("qwen3", "Qwen3RMSNorm", layers.RMSNorm, "llama"),
    ("olmo2", "Olmo2RMSNorm", layers.RMSNorm, "output"),
    ("qwen3_5", "Qwen3_5RMSNorm", layers.RMSNormZeroCentered, "gemma"),
    ("qwen3_next", "Qwen3NextRMSNormGated", layers.RMSNormGated, "llama"),
]


def norm(model: str, name: str, layer: type[nn.Module], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """As kernels patches a module."""
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    patched: nn.Module = getattr(module, name)(48)
    nn.init.uniform_(patched.weight, 0.5, 1.5)
    patched.to(device, dtype).forward = types.MethodType(layer.forward, patched)  # type: ignore[method-assign]
    return patched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("model", "name", "layer", "cast"), CLASSES, ids=[name for _, name, *_ in CLASSES])
def test_a_layer_computes_what_the_modules_class_does(
    model: str, name: str, layer: type[nn.Module], cast: str, dtype: torch.dtype, device: torch.device
) -> None:
    module = norm(model, name, layer, dtype, device)
    form = layers.form_of(module, layer)
    assert isinstance(form, Form)
    assert form.norm.cast == cast
    tensors = [torch.randn(2, 3, 48, device=device, dtype=dtype).requires_grad_() for _ in range(form.tensors)]
    dy = torch.randn(2, 3, 48, device=device, dtype=dtype)
    wanted: list[Any] = []
    for double in (False, True):
        leaves = [t.detach().to(torch.float64 if double else dtype).requires_grad_() for t in (*tensors, module.weight)]
        y = form.by_torch((leaves[-1], None), *leaves[:-1])
        wanted.append((y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))))
    y = module(*tensors)
    found = y.detach(), *torch.autograd.grad(y, (*tensors, module.weight), dy)
    names = ("y", "dx", *["dgate"][: form.tensors - 1], "dw")
    for what, got, by_torch, exact in zip(names, found, *wanted, strict=True):
        assert got.dtype == dtype
        assert_no_worse(what, got, exact, by_torch)
    assert_no_worse("its own", y.detach(), wanted[1][0], type(module).forward(module, *tensors).detach())


@pytest.mark.parametrize("first", ["compiled", "eager"])
@pytest.mark.parametrize("epsilons", [(1e-6,), (1e-6, 1e-5, 1e-4)], ids=["one epsilon", "three"])
def test_a_layer_goes_into_one_graph(
    epsilons: tuple[float, ...], first: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its module's class computes is found while the graph is traced, too."""
    monkeypatch.setattr(layers, "_NAMES", {})
    torch._dynamo.reset()
    for eps in epsilons:  # which Dynamo makes a symbol of, the second time that it sees another
        module = norm("llama", "LlamaRMSNorm", layers.RMSNorm, torch.float32, device)
        module.variance_epsilon = eps
        x = torch.randn(2, 3, 48, device=device, requires_grad=True)
        eager = module(x) if first == "eager" else None
        y = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
        assert torch.equal(y, module(x) if eager is None else eager)
        y.sum().backward()
        assert x.grad is not None


class Odd(nn.Module):
    """A norm times a factor: of what its layer does not read, none, of a row's length; or with an epsilon of its own."""

    def __init__(self, factor: str) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.two = nn.Parameter(torch.ones(64)), 1e-6, 2
        self.factor = factor

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        n = hidden_states.shape[-1]
        factor = {"state": lambda: self.two, "two": lambda: 2, "length": lambda: 1 + (n > 64), "eps": lambda: 1}[
            self.factor
        ]()
        eps = 1e-6 if self.factor == "eps" else self.variance_epsilon
        return nn.functional.rms_norm(hidden_states, (n,), self.weight, eps) * factor


WHY = {"state": "no attribute 'two'", "two": "no norm that trinorm has", "length": "depends on a row's length"}
WHY["eps"] = "its epsilon is 1e-06 whatever its variance_epsilon is"


@pytest.mark.parametrize("factor", WHY)
def test_what_is_no_norm_of_ours_keeps_its_own_forward(factor: str) -> None:
    kind = type(f"Odd{factor}", (Odd,), {"factor": factor})
    module, x = kind(factor), torch.randn(2, 3, 64)
    own = module(x)
    module.forward = types.MethodType(layers.RMSNorm.forward, module)
    assert torch.equal(module(x), own)
    assert WHY[factor] in str(layers.form_of(module, layers.RMSNorm))
    assert "it has no activation" in str(layers.form_of(module, layers.RMSNormGated))


def test_an_epsilon_that_is_set_is_followed(device: torch.device) -> None:
    module = norm("llama", "LlamaRMSNorm", layers.RMSNorm, torch.float32, device)
    x = torch.randn(2, 3, 48, device=device) * 1e-2
    before = module(x)
    module.variance_epsilon = 1e-3
    assert not torch.equal(module(x), before)
    torch.testing.assert_close(module(x), type(module).forward(module, x))


def test_another_forward_of_the_class_is_followed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    module = norm("llama", "LlamaRMSNorm", layers.RMSNorm, torch.float32, device)
    x, kind = torch.randn(2, 3, 48, device=device), type(module)
    once, was = module(x), kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: was(self, x) * 2)
    torch.testing.assert_close(module(x), 2 * once)


def test_a_class_first_seen_under_anomaly_detection(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which raises where a gradient is NaN, as one of the trial's may be."""
    monkeypatch.setattr(layers, "_NAMES", {})
    module = norm("llama", "LlamaRMSNorm", layers.RMSNorm, torch.float32, device)
    with torch.autograd.set_detect_anomaly(True):
        assert isinstance(layers.form_of(module, layers.RMSNorm), Form)


def test_layers_have_no_state() -> None:
    """As kernels validates them: nothing but forward, and the two flags that it reads."""
    for layer in layers.LAYERS.values():
        assert layer.__init__ is nn.Module.__init__
        assert set(dir(layer)) - set(dir(nn.Module)) <= {"has_backward", "can_torch_compile", "__annotations__"}


# --- what is installed ---


def test_without_transformers_or_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "kernels", None)
        with pytest.raises(ImportError, match=rf"pip install 'kernels>={import_utils.KERNELS_MIN_VERSION}"):
            register()
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match="pip install transformers"):
            register()


def test_a_pair_of_versions_that_makes_stubs_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = types.ModuleType("kernels")
    kernels.__version__ = "0.1.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    monkeypatch.setattr(import_utils, "is_kernels_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"no norm would be patched: transformers .* takes kernels>=.*0\.1\.0.*stubs"):
        register()


@pytest.mark.parametrize("devices", ["cuda", ["cuda", "tpu"]])
def test_other_devices(devices: Any) -> None:
    with pytest.raises(ValueError, match="devices must be a sequence of cuda, rocm, cpu"):
        register(devices)


# --- with kernels ---


@pytest.fixture
def registered(device: torch.device) -> Iterator[Registered]:
    try:
        yield register(("cuda", "cpu"))
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error))
    unregister()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "norms"), [("Llama", 5), ("Qwen3", 9), ("Olmo2", 9)])
def test_models_of_use_kernels_are_patched(name: str, norms: int, training: bool, registered: Registered) -> None:
    model, x = made(name).train(training), given(name)
    expected, exact = result(model, x), result(made(name).double().train(training), x)
    model.set_use_kernels(True)
    model.train(not training).train(training)  # transformers registers its own anew
    report = registered.patched(model)
    assert (len(report.replaced), report.left) == (norms, ())
    assert str(report).startswith(f"trinorm.register: {norms} replaced, 0 left")
    y = result(model, x)
    assert_no_worse("logits", y.detach(), exact.detach(), expected.detach())
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_no_worse("compiled", result(compiled, x).detach(), exact.detach(), expected.detach())


def test_unregister_undoes_it(registered: Registered) -> None:
    model = made("Llama")
    assert "use_kernels=True" in registered.patched(model).left[0].reason
    model.set_use_kernels(True)
    unregister(model)
    assert not any("forward" in vars(module) for module in model.modules() if type(module).__name__.endswith("RMSNorm"))
    model.set_use_kernels(True)
    assert "no layer RMSNorm" in registered.patched(model).left[0].reason


def test_norms_without_a_decorator_are_left_and_replace_takes_them(registered: Registered) -> None:
    model = made("Gemma3")
    model.set_use_kernels(True)
    report = registered.patched(model)
    assert report.replaced == ()
    assert {entry.reason for entry in report.left} == {"its class has no decorator of kernels"}
    assert len(trinorm.replace(model).replaced) == len(report.left)


def test_on_a_gpu_ours_wins_over_the_hubs_until_it_is_undone(
    registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which nothing is loaded here: the hub's would be fetched."""
    import kernels
    from transformers.integrations.hub_kernels import register_kernel_mapping_transformers

    monkeypatch.setattr(kernels.layer.repos, "_find_capability", lambda: 90)
    register_kernel_mapping_transformers()
    module = made("Llama").model.norm  # type: ignore[union-attr]
    for mode in (kernels.Mode.INFERENCE, kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE):
        kernels.kernelize(module, mode=mode, device="cuda")
        assert len(registered.patched(module).replaced) == 1
    unregister(module)
    left = kernels.layer.globals._KERNEL_MAPPING.get()["RMSNorm"]["cuda"].repos
    assert left
    assert all(isinstance(repository, kernels.LayerRepository) for repository in left.values())
