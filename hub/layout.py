"""Lay out a project for Hugging Face's kernel-builder, from src/.

    python hub/layout.py dist/hub

What is in this folder is copied, and into torch-ext/trinorm go the modules that its __init__.py imports, and those that
they import, from src/trinorm. One thing is changed in them: a kernel of the hub may be loaded beside another version of
itself, so its operators are registered in a namespace of its own, which kernel-builder names in a module ``_ops``, and not
in torch.ops.trinorm.
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

HUB = Path(__file__).parent
SOURCE = HUB.parent / "src" / "trinorm"
PACKAGE = Path("torch-ext") / "trinorm"

# What stands for the namespace in the sources.
NAMESPACE = {
    r"\btorch\.ops\.trinorm\b": "_ops.ops",
    r'Library\("trinorm", ': "Library(_ops.ops.name, ",
    r'f"trinorm::\{op\.name\}"': "_ops.add_op_namespace_prefix(op.name)",
}


def imported(module: Path, text: str) -> Iterator[Path]:
    """The modules of the package that one imports, from the package's root. The hub wants them relative, as they are."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = module.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for path in (folder, *(folder / alias.name for alias in node.names)):
            if (SOURCE / path).with_suffix(".py").is_file():
                yield path.with_suffix(".py")
            elif path != Path() and (SOURCE / path / "__init__.py").is_file():
                yield path / "__init__.py"


def in_own_namespace(module: Path, text: str) -> str:
    """With every name of an operator in the namespace of this build."""
    changed = text
    for pattern, by in NAMESPACE.items():
        changed = re.sub(pattern, by, changed)
    if changed == text:
        return text
    first = "from __future__ import annotations\n"
    assert first in text, f"{module} names operators, and has no line to import their namespace behind"
    return changed.replace(first, f"{first}\nfrom {'.' * len(module.parts)} import _ops\n", 1)


def lay_out(to: Path) -> list[Path]:
    """Write the project, and return the modules that came from src/trinorm."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(HUB, to, ignore=shutil.ignore_patterns(Path(__file__).name, "README.md", "__pycache__"))
    root = (HUB / PACKAGE / "__init__.py").read_text("utf-8")
    waiting, found = list(imported(Path("__init__.py"), root)), set[Path]()
    while waiting:
        module = waiting.pop()
        # A folder's __init__ is run too when what is in it is imported.
        around = [folder / "__init__.py" for folder in module.parents if folder != Path()]
        for one in {module, *around} - found:
            text = (SOURCE / one).read_text("utf-8")
            waiting += imported(one, text)
            found.add(one)
            (to / PACKAGE / one).parent.mkdir(parents=True, exist_ok=True)
            (to / PACKAGE / one).write_text(in_own_namespace(one, text), "utf-8")
    shutil.copy(HUB.parent / "LICENSE", to)
    return sorted(found)


if __name__ == "__main__":
    print(f"{len(lay_out(Path(sys.argv[1])))} modules of src/trinorm")
