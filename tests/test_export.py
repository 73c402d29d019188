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
    """In training: its result, and the state of its BatchNorm after that."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.rows = torch.nn.Sequential(nn.LayerNorm(8, device=device), nn.RMSNorm(8, device=device))
        self.groups, self.batch = nn.GroupNorm(2, 8, device=device), nn.BatchNorm1d(8, device=device)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.batch(self.groups(self.rows(x) * 2) * 2)
        return y, *(state.clone() for state in self.batch.buffers())


def exported(model: Block, x: Tensor, strict: bool = False) -> torch.export.ExportedProgram:
    """For any number of samples. Its norms are the registered ops."""
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("samples", min=2)}}, strict=strict)
    ops = (getattr(torch.ops.trinorm, name).default for name in ("layer_norm", "rms_norm", "group_norm", "batch_norm"))
    assert {*ops} <= {node.target for node in program.graph.nodes}
    return program


def check_elsewhere(load: str, model: Block, inputs: list[Tensor], folder: Path, kept: int = 3) -> None:
    """What another process loads from ``folder`` by the expression ``load`` has the model's bits, and its state after each
    input, of which the first ``kept`` are looked at, to fp32's rounding.
    """
    with torch.no_grad():
        torch.save([(x, *model(x)[: 1 + kept]) for x in inputs], folder / "expected.pt")
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
    for x, expected, *state in torch.load(sys.argv[2] + "/expected.pt"):
        y, *found = model(x)
        torch.testing.assert_close(found[: len(state)], state)
        print("same" if torch.equal(y, expected) else "different")
"""


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_exported_and_loaded_elsewhere(strict: bool, device: torch.device, tmp_path: Path) -> None:
    model, inputs = Block(device), [torch.randn(m, 8, device=device) for m in (4, 7)]
    torch.export.save(exported(model, inputs[0], strict), tmp_path / "model.pt2")
    check_elsewhere('torch.export.load(sys.argv[2] + "/model.pt2").module()', model, inputs, tmp_path)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")
def test_compiled_ahead_of_time_and_loaded_elsewhere(device: torch.device, tmp_path: Path) -> None:
    """But for the number of batches: buffers of one element are constants to AOTInductor, torch's own too (2.13)."""
    model, inputs = Block(device), [torch.randn(m, 8, device=device) for m in (4, 7)]
    package = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(exported(model, inputs[0]), package_path=package)
    check_elsewhere('torch._inductor.aoti_load_package(sys.argv[2] + "/model.pt2")', model, inputs, tmp_path, kept=2)
