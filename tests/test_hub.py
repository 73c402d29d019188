"""What hub/layout.py makes is a project as kernel-builder has them, and a kernel as Hugging Face's kernels loads one."""

import ast
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trinorm.compare import assert_no_worse
from trinorm.integrations import layers
from trinorm.reference import composite, oracle
from trinorm.spec import RMS_NORM

HUB = Path(__file__).parents[1] / "hub"
SOURCE = HUB.parent / "src" / "trinorm"

# As kernel-builder writes it, of the name, the backend, and the commit.
NAMESPACE = "_trinorm_cuda_0123abc"
OPS = f'''import torch
ops = torch.ops.{NAMESPACE}
def add_op_namespace_prefix(op_name: str) -> str:
    return f"{NAMESPACE}::{{op_name}}"
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("layout", HUB / "layout.py")
    assert spec is not None
    assert spec.loader is not None
    layout = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layout)
    to = tmp_path_factory.mktemp("hub") / "project"
    for _ in range(2):  # over what there is, too
        assert layout.lay_out(to)
    return to


@pytest.fixture(scope="module")
def kernel(project: Path) -> Iterator[types.ModuleType]:
    """Loaded as kernels does: by its path, under a name of its own."""
    folder = project / "torch-ext" / "trinorm"
    (folder / "_ops.py").write_text(OPS)
    spec = importlib.util.spec_from_file_location(NAMESPACE, folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[NAMESPACE] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == NAMESPACE]:
        del sys.modules[name]
    (folder / "_ops.py").unlink()


def test_the_project_is_as_its_build_toml_says(project: Path) -> None:
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    build = tomllib.loads((project / "build.toml").read_text())
    assert set(build) == {"general", "torch-noarch"}
    assert (project / "torch-ext" / build["general"]["name"] / "__init__.py").is_file()
    assert {path.name for path in project.iterdir()} == {"build.toml", "flake.nix", "LICENSE", "torch-ext"}


def test_it_imports_itself_relatively_and_else_torch_and_triton(project: Path) -> None:
    """As the hub requires. numpy is imported where the definition of a float64 result is asked for: by no layer."""
    names = set()
    for path in project.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").partition(".")[0])
    assert names - sys.stdlib_module_names == {"torch", "triton", "numpy"}


def test_only_the_namespace_of_operators_differs_from_the_sources(project: Path) -> None:
    folder = project / "torch-ext" / "trinorm"
    changed = set()
    for path in folder.rglob("*.py"):
        module = path.relative_to(folder)
        ours, theirs = path.read_text(), (SOURCE / module).read_text()
        assert "torch.ops.trinorm" not in ours
        if module != Path("__init__.py") and ours != theirs:
            lines = set(ours.splitlines()) - set(theirs.splitlines())
            assert all("_ops" in line for line in lines), lines
            changed.add(module.parts[0])
    assert changed == {"ops"}


def test_it_is_loaded_beside_the_package(kernel: types.ModuleType, device: torch.device) -> None:
    """With operators of its own, and layers that compute the same."""
    assert kernel.layers.RMSNorm is not layers.RMSNorm
    ops = getattr(torch.ops, NAMESPACE)
    assert ops.rms_norm.default is not torch.ops.trinorm.rms_norm.default
    x, weight = torch.randn(4, 96, device=device), torch.randn(96, device=device)
    exact = oracle(RMS_NORM, x, (96,), weight, None, 1e-6).y
    by_torch = composite(RMS_NORM, x, (96,), weight, None, 1e-6)
    assert_no_worse("function", kernel.functional.rms_norm(x, (96,), weight, 1e-6), exact, by_torch)
    assert_no_worse("operator", ops.rms_norm(x, [96], weight, 1e-6, False, "output")[0], exact, by_torch)
    compiled = torch.compile(kernel.functional.rms_norm, backend="aot_eager", fullgraph=True)
    assert_no_worse("compiled", compiled(x, (96,), weight, 1e-6), exact, by_torch)
