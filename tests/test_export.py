"""torch.export and AOTInductor: a model with our norms saved by one process and run by another."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trinorm import nn


class Block(torch.nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(8, device=device), nn.RMSNorm(8, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * 2)


def exported(model: Block, x: Tensor, strict: bool = False) -> torch.export.ExportedProgram:
    """For any number of rows. Its norms are the registered ops."""
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("rows", min=2)}}, strict=strict)
    targets = [node.target for node in program.graph.nodes]
    assert {torch.ops.trinorm.layer_norm.default, torch.ops.trinorm.rms_norm.default} <= set(targets)
    return program


def check_elsewhere(load: str, model: Block, inputs: list[Tensor], folder: Path) -> None:
    """What another process loads from ``folder`` by the expression ``load`` has the model's bits."""
    torch.save([(x, model(x).detach()) for x in inputs], folder / "expected.pt")
    script = RUN.format(load=load)
    ran = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script, str(Path(__file__).parent), str(folder)],
        capture_output=True,
        text=True,
    )
    if ran.returncode < 0 and "aoti" in load and not torchs_own_packages_load(folder):
        pytest.skip("AOTInductor's packages of torch's own modules crash here too (torch 2.11, CUDA)")
    assert ran.stdout.split() == ["same"] * len(inputs), f"status {ran.returncode}: {ran.stderr}"


def torchs_own_packages_load(folder: Path) -> bool:
    """Whether another process can load what AOTInductor makes of a GPU's torch.nn.LayerNorm."""
    program = torch.export.export(torch.nn.LayerNorm(8, device="cuda"), (torch.randn(4, 8, device="cuda"),))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "torchs.pt2"))
    script = "import sys, torch; torch._inductor.aoti_load_package(sys.argv[1])"
    return subprocess.run([sys.executable, "-c", script, path], capture_output=True).returncode == 0


RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import machine  # the interpreter, where there is no GPU
import torch, trinorm

with torch.no_grad():
    model = {load}
    for x, expected in torch.load(sys.argv[2] + "/expected.pt"):
        print("same" if torch.equal(model(x), expected) else "different")
"""


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_exported_and_loaded_elsewhere(strict: bool, device: torch.device, tmp_path: Path) -> None:
    model, inputs = Block(device), [torch.randn(m, 8, device=device) for m in (4, 7)]
    torch.export.save(exported(model, inputs[0], strict), tmp_path / "model.pt2")
    check_elsewhere('torch.export.load(sys.argv[2] + "/model.pt2").module()', model, inputs, tmp_path)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")
def test_compiled_ahead_of_time_and_loaded_elsewhere(device: torch.device, tmp_path: Path) -> None:
    model, inputs = Block(device), [torch.randn(m, 8, device=device) for m in (4, 7)]
    package = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(exported(model, inputs[0]), package_path=package)
    check_elsewhere('torch._inductor.aoti_load_package(sys.argv[2] + "/model.pt2")', model, inputs, tmp_path)
