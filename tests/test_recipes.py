"""The recipes, as scripts, where what they are for is installed: their exit status says whether the curves are one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"

NAMES = ("transformers_trainer", "lightning_module", "torchtune_model")


def test_every_recipe_is_tried() -> None:
    assert {path.stem for path in RECIPES.glob("*.py")} == {*NAMES, "shared"}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_as_torchs_norms_do(name: str) -> None:
    command = [sys.executable, "-W", "ignore", str(RECIPES / f"{name}.py")]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    # Trainer says by an ImportError of its own that accelerate is missing.
    missing = re.search(r"No module named '(?!trinorm|shared).*|requires `accelerate.*", done.stderr)
    if done.returncode and missing:
        pytest.skip(missing[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trinorm.replace: 5 replaced, 0 left" in done.stdout
    assert "trinorm.fuse: 4 fused" in done.stdout
    assert "losses: error" in done.stdout
