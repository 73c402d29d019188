"""``trinorm bench`` and ``inspect`` of the channel norms: shapes, layouts, peers, and what is compiled."""

from __future__ import annotations

import contextlib
import io
import json
from concurrent.futures import Executor
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from trinorm import cli
from trinorm.bench import cases, changes, measure, predict, providers, report, timing
from trinorm.bench.cases import OPS, PASSES, Case
from trinorm.bench.providers import OURS, Provider
from trinorm.bench.records import Provenance, Record
from trinorm.bench.shapes import CHANNEL_SHAPES, CONDITIONED_SHAPES
from trinorm.cli import bench, inspect, main
from trinorm.norms import ELEMENT_OPS, QUANTIZED_OPS, ROW_OPS, SUM_OPS

HERE = Provenance(gpu="Made-up GPU 9", torch="0.0", triton="0.0", commit=None, date="2000-01-01")
STILL = SimpleNamespace(synchronize=lambda: None)
CHANNELS = tuple(CHANNEL_SHAPES)
IMAGE = (3, 6, 5, 4)
LAYOUTS = ("contiguous", "channels_last")


def case(op: str, pass_: str, layout: str = "channels_last") -> Case:
    return Case(op, pass_, IMAGE, torch.bfloat16, torch.bfloat16, layout)


def test_every_op_is_of_rows_of_channels_or_of_heads() -> None:
    assert (
        {op for op in OPS if OPS[op].of_rows}
        == {*ROW_OPS, *SUM_OPS, *QUANTIZED_OPS}
        == set(OPS) - {*CHANNELS, *CONDITIONED_SHAPES, *ELEMENT_OPS, "qk_norm"}
    )


def test_images_are_measured_in_both_layouts_and_rows_and_sequences_in_one() -> None:
    ops = ("group_norm", "instance_norm", "batch_norm")
    found = [of for op in ops for of in Case.all(op, "forward", cases.shapes_of(op, None), torch.bfloat16)]
    assert len(found) == 8 + 3 + 6
    assert {of.layout for of in found if len(of.shape) == 4} == set(LAYOUTS)
    assert {of.layout for of in found if len(of.shape) < 4} == {"contiguous"}
    assert [of.size for of in found[:2]] == ["16×320×64×64", "16×320×64×64 NHWC"]
    assert Case("batch_norm", "forward", (2, 3, 4, 5, 6), torch.half, torch.half, "channels_last").size == "2×3×4×5×6 NDHWC"


def test_a_name_stands_for_the_shapes_of_each_op() -> None:
    asked = cli.shapes("channels,8x32x4x4")
    assert cases.shapes_of("batch_norm", asked) == [*CHANNEL_SHAPES["batch_norm"], (8, 32, 4, 4)]
    assert cases.shapes_of("rms_norm", cli.shapes("channels")) == []
    assert cases.shapes_of("group_norm", cli.shapes("matrix")) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("bench", "--op", "rms_norm", "--shapes", "2x3x4"), "rms_norm takes no 2x3x4, but rows x columns"),
        (("bench", "--op", "instance_norm", "--shapes", "64x32"), "instance_norm takes no 64x32, but N x C x ..."),
        (("inspect", "layer_norm", "--shape", "2x3x4"), "layer_norm takes no 2x3x4"),
    ],
)
def test_a_shape_that_an_op_does_not_take_is_refused(
    command: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (bench, inspect):
        monkeypatch.setattr(module, "INTERPRETED", False)
    assert main(command) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("op", CHANNELS)
def test_trinorm_and_torch_are_found_right_with_channels_last(op: str, pass_: str, device: torch.device) -> None:
    of = case(op, pass_)
    expected = measure.expect(of, of.draw(device))
    for t in (expected.inputs.x, expected.inputs.dy):
        assert t is None or t.stride()[1] == 1
    for provider in providers.load(["torch"])[0]:
        found = measure.verify(lambda provider=provider: provider.build(of), expected, STILL).comparisons  # type: ignore[arg-type]
        assert [one.what for one in found] == (["y"] if pass_ == "forward" else ["dx", "dw", "db"])
        assert all(one.ok for one in found), found


def test_peers_are_measured_at_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    of = case("batch_norm", "forward")
    seen: list[str] = []

    def measured(served: Case, group: list[Provider], *_: object) -> list[Record]:
        seen.extend(provider.name for provider in group)
        return []

    monkeypatch.setattr(measure, "_measure", measured)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    rows_only = Provider("rows only", lambda of: torch.nn.functional.layer_norm, ops=ROW_OPS)
    measure.measure(of, [*providers.load(["torch"])[0], rows_only], HERE, torch.device("cpu"), lambda name: None)
    assert seen == [OURS, "torch"]


def test_a_record_and_its_table_say_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "device_time", lambda calls, stream, norms: timing.DeviceTime(3.5, 0.25, 3.0, 7))
    monkeypatch.setattr(measure, "host_times", lambda calls, stream: [11.0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=4096))
    records = [
        record
        for layout in LAYOUTS
        for record in measure._measure(
            case("group_norm", "forward", layout), providers.load(["torch"])[0], HERE, torch.device("cpu"), STILL, print
        )  # type: ignore[arg-type]
    ]
    assert [(record.shape, record.layout, record.ok) for record in records] == [
        (IMAGE, layout, True) for layout in LAYOUTS for _ in range(2)
    ]
    console = Console(file=io.StringIO(), width=200)
    console.print(report.table(records))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "GroupNorm forward" in text
    assert text.index("3×6×5×4 ") < text.index("3×6×5×4 NHWC")
    lines = [json.loads(record.to_json()) for record in records]
    assert "group_norm forward 3×6×5×4 NHWC bfloat16" in {str(changes.Subject.of(line)) for line in lines}


KERNELS = {
    "group_norm": ("held_forward", "channel_moments"),
    "instance_norm": ("held_forward", "channel_moments"),
    "batch_norm": ("channel_apply", "channel_apply"),
    "channel_layer_norm": ("channel_layer_forward", "row_forward"),
}


@pytest.mark.parametrize("layout", [0, 1], ids=LAYOUTS)
@pytest.mark.parametrize("op", CHANNELS)
def test_the_kernels_of_each_layout_are_written_down(op: str, layout: int) -> None:
    def launched(pass_: str) -> set[str]:
        calls = predict.launches(Case(op, pass_, (8, 64, 28, 28), torch.bfloat16, torch.bfloat16, LAYOUTS[layout]))
        assert all(t.is_meta for call in calls for t in call.args if isinstance(t, torch.Tensor))
        return {call.kernel.fn.__name__ for call in calls}

    assert KERNELS[op][layout] in launched("forward")
    assert any("backward" in kernel for kernel in launched("backward"))


def _printed(*arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["inspect", *arguments]) == 0
    return out.getvalue()


def test_inspect_compiles_both_layouts(compiling: Executor) -> None:
    arguments = ("channel_layer_norm", "--shape", "8x64x14x14", "--pass", "forward", "--json", "-")
    lines = [json.loads(line) for line in compiling.submit(_printed, *arguments).result().splitlines()]
    assert [line["layout"] for line in lines] == list(LAYOUTS)
    assert tuple(line["kernel"] for line in lines) == KERNELS["channel_layer_norm"]
    for line in lines:
        assert line["shape"] == [8, 64, 14, 14]
        assert line["call_bytes"] == 2 * 8 * 64 * 14 * 14 * 2 + 2 * 64 * 2
        assert line["registers"] > 0
        assert not line["spills"]
