"""The recipes, as scripts, where what they are for is installed: their exit status says whether the curves are one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"

# What each imports.
NEEDS = {
    "transformers_trainer": ("transformers", "accelerate"),
    "lightning_module": ("lightning",),
    "torchtune_model": ("torchtune",),
}


def test_every_recipe_is_tried() -> None:
    assert {path.stem for path in RECIPES.glob("*.py")} == {*NEEDS, "shared"}


@pytest.mark.parametrize("recipe", NEEDS)
def test_a_recipe_trains_as_torchs_norms_do(recipe: str) -> None:
    script = f"import {', '.join(NEEDS[recipe])}"
    imported = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    if imported.returncode:
        pytest.skip(f"{script}: {imported.stderr.splitlines()[-1]}")
    command = [sys.executable, "-W", "ignore", str(RECIPES / f"{recipe}.py")]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"trinorm\.replace: 5 replaced, 0 left", done.stdout)
    assert re.search(r"trinorm\.fuse: 4 fused", done.stdout)
    assert "losses: error" in done.stdout
