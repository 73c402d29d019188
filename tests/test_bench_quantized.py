"""``trinorm bench``, ``inspect`` and ``profile`` of norms with a quantized result: a forward alone, its bytes and its
ceiling, what is right, what is compiled.
"""

from __future__ import annotations

import contextlib
import io
from concurrent.futures import Executor
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from trinorm import cli
from trinorm.bench import cases, measure, predict, providers
from trinorm.bench.cases import CHAIN, HOST, OPS, Case
from trinorm.cli import main
from trinorm.formats import FORMAT_NAMES
from trinorm.functional.quantized import Quantized
from trinorm.norms import QUANTIZED_OPS, OfQuantized

STILL = SimpleNamespace(synchronize=lambda: None)
CPU = torch.device("cpu")


def case(op: str, dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] = (6, 256)) -> Case:
    return Case(op, "forward", shape, dtype, dtype)


def of_format(op: str) -> OfQuantized:
    norm = OPS[op].norm
    assert isinstance(norm, OfQuantized)
    return norm


# --- shapes, passes and inputs ---


def test_every_format_is_measured_and_named() -> None:
    assert {of_format(op).format for op in QUANTIZED_OPS if op.startswith("quantized_rms_norm")} == {*FORMAT_NAMES}
    assert OPS["quantized_rms_norm/nvfp4"].title == "RMSNorm to nvfp4"
    assert OPS["quantized_rms_norm/nvfp4_swizzled"].title == "RMSNorm to nvfp4, swizzled"
    assert [OPS[op].eps for op in ("quantized_layer_norm", "quantized_rms_norm/fp8")] == [1e-5, 1e-6]


@pytest.mark.parametrize("op", QUANTIZED_OPS)
def test_shapes_are_rows_and_columns_that_a_program_holds(op: str) -> None:
    assert cases.shapes_of(op, cli.shapes("16384x2048,8x16384")) == [(16384, 2048), (8, 16384)]
    with pytest.raises(ValueError, match=f"{op} takes no 8x16386, but rows x .*columns, at most 16384"):
        cases.shapes_of(op, cli.shapes("8x16386"))
    of = Case.all(op, "forward", [(8, 8192), (8, 16384)], torch.float32)
    assert [found.shape for found in of] == [(8, 8192)]  # a wider one has torch's operators
    assert case(op).worthwhile
    assert not [pass_ for pass_ in ("backward", CHAIN) if Case.all(op, pass_, [(8, 64)], torch.float32)]


def test_pairs_are_whole() -> None:
    with pytest.raises(ValueError, match="but rows x an even number of columns"):
        cases.shapes_of("quantized_rms_norm/nvfp4", cli.shapes("8x65"))


@pytest.mark.parametrize("pass_", ["backward", f"{CHAIN},{HOST}"])
def test_there_is_a_forward_alone(pass_: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for command in ("bench", "inspect"):
        monkeypatch.setattr(f"trinorm.cli.{command}.INTERPRETED", False)
    assert main(["bench", "--op", "quantized_rms_norm", "--pass", pass_]) == 2
    assert "a quantized result's forward is measured alone" in capsys.readouterr().err
    if pass_ == "backward":
        for command in (["inspect"], ["profile", "--shape=8x64"]):
            assert main([*command, "quantized_rms_norm", "--pass", pass_]) == 2
            assert "a quantized result's forward is measured alone" in capsys.readouterr().err


def test_a_number_of_the_whole_tensor_comes_last() -> None:
    shapes = {op: [tuple(t.shape) for t in case(op).draw(CPU).arguments] for op in QUANTIZED_OPS}
    for op, found in shapes.items():
        whole = [(1,)] * of_format(op).form.given
        assert found == [(6, 256), *[(256,)] * (1 + OPS[op].norm.biased), *whole]


# --- bytes and the ceiling ---


@pytest.mark.parametrize("op", QUANTIZED_OPS)
def test_the_ceiling_moves_the_bytes_that_are_read_and_stored(op: str) -> None:
    of = case(op)
    call = providers.load([])[0][0].build(of)
    inputs = of.draw(CPU)
    found = call(*inputs.arguments)
    assert isinstance(found, Quantized)
    taken = 0 if op.endswith("/fp8") else found.scale.nbytes
    assert of.bytes_stored == found.data.nbytes + taken
    assert of.bytes == sum(t.nbytes for t in inputs.arguments) + of.bytes_stored
    (copy,) = measure.ceiling_calls(of, [inputs])
    copied = copy()
    assert isinstance(copied, Tensor)
    assert 0 <= 2 * copied.nbytes - (inputs.x.nbytes + of.bytes_stored) < 2 * inputs.x.itemsize
    assert OPS[op].ceilings["forward"] == "equal copy"


@pytest.mark.parametrize("op", QUANTIZED_OPS)
def test_every_tensor_is_given_to_the_kernel_once(op: str) -> None:
    of = case(op, shape=(8192, 4096))
    (forward,) = predict.launches(of)
    assert sum(arg.nbytes for arg in forward.args if isinstance(arg, Tensor)) == of.bytes


# --- what is right ---


@pytest.mark.parametrize("op", QUANTIZED_OPS)
def test_trinorm_and_torchs_users_are_found_right(op: str, device: torch.device) -> None:
    shapes = ((6, 256), (3, 1000))  # of blocks, the last of which is not whole
    for of in (case(op, dtype, shape) for dtype in (torch.float32, torch.bfloat16) for shape in shapes):
        expected = measure.expect(of, of.draw(device))
        for provider in providers.load(["torch"])[0]:
            found = measure.verify(lambda p=provider, of=of: p.build(of), expected, STILL).comparisons  # type: ignore[misc, arg-type]
            assert [one.what for one in found] == ["y"]
            assert found[0].ok, (provider.name, found)


@pytest.mark.parametrize("op", QUANTIZED_OPS)
def test_scales_or_data_of_another_are_found(op: str, device: torch.device) -> None:
    of = case(op)
    inputs = of.draw(device)
    expected = measure.expect(of, inputs)
    found = providers.load([])[0][0].build(of)(*inputs.arguments)
    assert isinstance(found, Quantized)
    (right,) = measure.compared(found, expected)
    assert right.ok
    scale = found.scale.view(torch.uint8) if found.scale.itemsize == 1 else found.scale
    others = scale + 8 if scale.dtype == torch.uint8 else 2 * scale
    data = found.data.view(torch.uint8).roll(1, 0).view(found.data.dtype)
    for wrong in (found._replace(scale=others.view(found.scale.dtype)), found._replace(data=data)):
        assert not measure.compared(wrong, expected)[0].ok


# --- what is compiled ---


def _printed(*arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["inspect", *arguments]) == 0
    return out.getvalue()


def test_inspect_compiles_it(compiling: Executor) -> None:
    tables = compiling.submit(_printed, "quantized_rms_norm/mxfp8", "--shape", "64x256").result()
    assert "RMSNorm to mxfp8 forward, bfloat16, compiled for sm_90" in tables
    assert "quantized_forward" in tables
    assert "of equal copy" in " ".join(tables.split())
