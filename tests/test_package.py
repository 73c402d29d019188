"""The package as its users meet it: what an import costs, what it needs, and what it says of itself."""

import importlib.metadata
import os
import statistics
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import trinorm


def run(code: str, **environment: str) -> str:
    """What ``code`` prints in a fresh interpreter that imports this same package."""
    source = str(Path(trinorm.__file__).parents[1])
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [source, inherited.get("PYTHONPATH")]))
    settings = inherited | {"PYTHONPATH": path} | environment
    ran = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_import_adds_little_to_torchs() -> None:
    code = """
import time, torch
start = time.perf_counter()
import trinorm
print(time.perf_counter() - start)
"""
    # With bytecode, which the first of these writes and an installation brings.
    first, *others = (float(run(code, PYTHONDONTWRITEBYTECODE="")) for _ in range(4))
    seconds = statistics.median(others)
    assert seconds < 0.150, (first, others)


def test_import_leaves_triton_for_the_first_call() -> None:
    added = run("import sys, torch; before = set(sys.modules); import trinorm; print(*(set(sys.modules) - before))").split()
    assert "trinorm.functional" in added
    assert [name for name in added if name.partition(".")[0] in ("triton", "numpy", "rich", "matplotlib")] == []


def test_import_is_fork_safe() -> None:
    """A child that is forked after it, as a data loader's, is the first to ask for a GPU, and gets it."""
    assert run(FORKED, **({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})) == "done"


FORKED = """
import os, sys, torch
import trinorm

child = os.fork()
if not child:
    x = torch.randn(4, 8, device="cuda" if torch.cuda.is_available() else "cpu", requires_grad=True)
    trinorm.functional.rms_norm(x, (8,)).sum().backward()
    print("done", flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_works_without_triton() -> None:
    # Asking for the interpreter would take a CPU tensor to the kernels, were there any.
    assert run(WITHOUT_TRITON, TRITON_INTERPRET="1") == "done"


WITHOUT_TRITON = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
def find_all_but_triton(name, *args):
    return None if name.partition(".")[0] == "triton" else find(name, *args)
PathFinder.find_spec = find_all_but_triton

import torch
import trinorm

def gradients(module):
    module.zero_grad()
    x = torch.arange(12.0).reshape(2, 6).requires_grad_()
    y = module(x)
    y.square().sum().backward()
    return [y, x.grad, *(parameter.grad for parameter in module.parameters())]

for kind, parameters in ((torch.nn.LayerNorm, 2), (torch.nn.RMSNorm, 1)):
    module = kind(6)
    expected = gradients(module)
    assert len(trinorm.replace(module).replaced) == 1
    found = gradients(module)
    assert len(found) == 2 + parameters
    assert all(map(torch.equal, found, expected))
by_op, *_ = torch.ops.trinorm.rms_norm(torch.ones(2, 6), (6,), None, 1e-5, False, "output")
assert torch.equal(by_op, torch.nn.functional.rms_norm(torch.ones(2, 6), (6,), eps=1e-5))
assert not any(name.partition(".")[0] == "triton" for name in sys.modules)
print("done")
"""


def test_version_is_the_metadatas() -> None:
    try:
        installed = importlib.metadata.version("trinorm")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from the source tree, not installed")
    assert installed == trinorm.__version__


def test_types_are_published() -> None:
    assert (files("trinorm") / "py.typed").is_file()


def test_public_names_are_there_and_documented() -> None:
    assert trinorm.__all__ == ["Report", "functional", "fuse", "nn", "options", "replace", "restore"]
    assert trinorm.functional.__all__ == [
        "Quantized",
        "add_layer_norm",
        "add_modulated_layer_norm",
        "add_modulated_rms_norm",
        "add_rms_norm",
        "batch_norm",
        "channel_layer_norm",
        "dynamic_erf",
        "dynamic_tanh",
        "gated_layer_norm",
        "gated_rms_norm",
        "group_norm",
        "instance_norm",
        "l2_norm",
        "layer_norm",
        "layer_norm_linear",
        "modulated_layer_norm",
        "modulated_rms_norm",
        "partial_rms_norm",
        "per_head_layer_norm",
        "per_head_rms_norm",
        "poly_norm",
        "qk_norm",
        "quantized_layer_norm",
        "quantized_rms_norm",
        "rms_norm",
        "rms_norm_linear",
        "scale_norm",
        "weight_norm",
    ]
    for owner, name in (
        *((trinorm, name) for name in trinorm.__all__),
        *((trinorm.functional, name) for name in trinorm.functional.__all__),
        (trinorm.nn, "ChannelLayerNorm"),
        (trinorm.nn, "DynamicErf"),
        (trinorm.nn, "DynamicTanh"),
        (trinorm.nn, "GatedLayerNorm"),
        (trinorm.nn, "GatedRMSNorm"),
        (trinorm.nn, "LayerNorm"),
        (trinorm.nn, "LayerNormLinear"),
        (trinorm.nn, "ModulatedLayerNorm"),
        (trinorm.nn, "ModulatedRMSNorm"),
        (trinorm.nn, "PerHeadLayerNorm"),
        (trinorm.nn, "PerHeadRMSNorm"),
        (trinorm.nn, "PolyNorm"),
        (trinorm.nn, "QKNorm"),
        (trinorm.nn, "QuantizedLayerNorm"),
        (trinorm.nn, "QuantizedRMSNorm"),
        (trinorm.nn, "RMSNorm"),
        (trinorm.nn, "RMSNormLinear"),
        (trinorm.nn, "WeightNorm"),
        (trinorm.nn, "weight_norm"),
    ):
        assert getattr(owner, name).__doc__, name
