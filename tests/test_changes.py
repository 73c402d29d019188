"""What got slower between two files of times, told from noise. Kernels that grew: tests/test_inspection.py."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest

from trinorm.bench import changes, changes_report
from trinorm.bench.cases import HOST_PASSES
from trinorm.bench.changes import Line
from trinorm.cli import bench, main

RESULTS = sorted((Path(__file__).parents[1] / "benchmarks/results").rglob("*.jsonl"))


def line(us: float | None, **others: Any) -> Line:
    """A made-up line. Its medians are sure to far less than NOISE."""
    made_up: Line = dict(op="rms_norm", shape=[8192, 4096], layout="contiguous", dtype="bfloat16", weight_dtype="bfloat16")
    made_up |= {"pass": "forward", "provider": "trinorm", "gpu": "Made-up GPU 9", "triton": "0.0"}
    made_up |= dict(device_us=us, device_us_std=0.01, replays=50, ceiling_us=30.0, host_us=7.0)
    return made_up | others


def kernel(**others: Any) -> Line:
    """A made-up line of a kernel."""
    made_up: Line = dict(op="rms_norm", shape=[1, 2], dtype="bfloat16", weight_dtype="bfloat16", target="sm_90", kernel="k")
    made_up |= {"pass": "forward", "launch": 0, "triton": "0.0", "registers": 32, "spills": 0, "occupancy": {"programs": 2}}
    return made_up | {"ordinary": {"instructions": {"fma": 9}, "loop": {}}} | others


def found(before: list[Line], after: list[Line]) -> list[str]:
    """The quantities that are worse (+) or better (-)."""
    compared = changes.compare_lines(before, after).compared
    return [f"{'+' if change.worse else '-'}{change.subject.who}" for change in compared if change.worse or change.better]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (100.0, 101.9, []),
        (100.0, 102.1, ["+trinorm"]),
        (100.0, 98.1, []),
        (100.0, 97.9, ["-trinorm"]),
        (100.0, None, ["+trinorm"]),
        (None, 100.0, []),
        (None, None, []),
    ],
)
def test_two_percent_is_noise(before: float | None, after: float | None, expected: list[str]) -> None:
    assert found([line(before)], [line(after)]) == expected


def test_a_time_that_is_there_no_more_is_a_failure() -> None:
    compared = changes.compare_lines([line(100.0)], [line(None, ok=False)])
    assert [change.after for change in compared.failures] == [math.inf]


def test_the_spread_of_replays_is_noise() -> None:
    # σ = 10 over 50 replays: a median of 100 is known to 10·√(π/2)/√50 = 1.77, the ratio of two to 2.4%; three times that.
    assert found([line(100.0, device_us_std=10.0)], [line(107.0, device_us_std=10.0)]) == []
    assert found([line(100.0, device_us_std=10.0)], [line(107.6, device_us_std=10.0)]) == ["+trinorm"]
    assert found([line(100.0, device_us_std=10.0, replays=5000)], [line(107.0, device_us_std=0.0)]) == ["+trinorm"]


def test_first_calls_are_not_compared_and_older_lines_have_none() -> None:
    assert found([line(100.0)], [line(100.0, first_call_s=90.0)]) == []
    assert found([line(100.0, first_call_s=1.0)], [line(100.0, first_call_s=90.0)]) == []


def test_what_the_copy_went_is_noise() -> None:
    assert found([line(100.0)], [line(104.9, ceiling_us=31.5)]) == []
    assert found([line(100.0)], [line(105.1, ceiling_us=31.5)]) == ["+trinorm"]
    assert found([line(100.0)], [line(95.1, ceiling_us=28.5)]) == []
    # Not the other way: a copy that got faster is no reason to be slower.
    assert found([line(100.0)], [line(104.9, ceiling_us=28.5)]) == ["+trinorm"]
    assert found([line(100.0)], [line(95.1, ceiling_us=31.5)]) == ["-trinorm"]


def test_lines_of_one_file_that_differ_are_noise() -> None:
    assert found([line(98.0), line(102.0), line(100.0)], [line(103.9)]) == []
    assert found([line(98.0), line(102.0), line(100.0)], [line(104.1)]) == ["+trinorm"]
    assert found([line(100.0)], [line(101.0), line(107.0), line(104.0)]) == []


def test_a_peer_that_got_slower_is_shown_and_no_failure() -> None:
    before, after = [line(10.0, provider="quack"), line(10.0)], [line(20.0, provider="quack"), line(10.0)]
    assert found(before, after) == ["+quack"]
    assert changes.compare_lines(before, after).failures == []


def test_only_the_same_thing_is_compared() -> None:
    before = [line(10.0), line(10.0, dtype="float16"), line(10.0, gpu="Made-up GPU 8"), line(10.0, weight_dtype="float32")]
    after = [line(10.0), line(90.0, **{"pass": "backward"}), line(90.0, shape=[1, 4096]), line(90.0, op="layer_norm")]
    result = changes.compare_lines(before, after)
    assert len(result.compared) == 1
    assert (len(result.only_before), len(result.only_after)) == (3, 3)
    assert "In one file only: 6 (3 before, 3 after)" in changes_report.summary(result)
    with pytest.raises(ValueError, match="nothing in common"):
        changes.compare_lines(before[1:], after)


def test_the_worst_comes_first() -> None:
    shapes = [[1, n] for n in range(4)]
    before = [line(us, shape=shape) for us, shape in zip((100.0, 10.0, 50.0, 1.0), shapes, strict=True)]
    after = [line(us, shape=shape) for us, shape in zip((150.0, 5.0, 100.0, None), shapes, strict=True)]
    compared = changes.compare_lines(before, after).compared
    assert [change.subject.shape[1] for change in compared] == [3, 2, 0, 1]


def test_kernels_of_two_versions_of_triton_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"Triton 3\.6\.0 and 3\.7\.1"):
        changes.compare_lines([kernel(triton="3.7.1")], [kernel(triton="3.6.0")])


def test_a_kernel_that_is_there_twice_is_one_only_where_it_is_the_same() -> None:
    with pytest.raises(ValueError, match="twice, and not the same of it"):
        changes.compare_lines([kernel()], [kernel(registers=255), kernel()])
    assert changes.compare_lines([kernel(), kernel()], [kernel()]).failures == []


# --- with what a kernel is launched ---


def test_a_change_of_options_is_told_and_the_kernels_are_compared() -> None:
    before = [kernel(options={"num_warps": 4, "STAGES": 2, "PDL": True}, grid=[132])]
    after = [kernel(options={"num_warps": 8, "STAGES": 2, "PDL": False}, grid=[132], registers=64)]
    result = changes.compare_lines(before, after)
    assert [change.quantity for change in result.failures] == ["registers"]
    assert (result.only_before, result.only_after) == ((), ())
    assert list(changes_report.remarks(result)) == [
        "Launched with other options: rms_norm forward 1×2 bfloat16, k: PDL True → False, num_warps 4 → 8."
    ]
    (remark,) = changes_report.remarks(changes.compare_lines([kernel(grid=[1])], [kernel(grid=[2])]))
    assert remark.endswith("k: grid (1,) → (2,).")
    assert changes.compare_lines(before, before).relaunched == ()


def test_launches_that_differ_in_options_alone_are_two() -> None:
    few, many = ({"options": {"num_warps": warps, "STAGES": 2}} for warps in (4, 8))
    result = changes.compare_lines(
        [kernel(**few), kernel(**many)], [kernel(**many, registers=64), kernel(**few)]
    )  # whichever line came last
    assert [str(change) for change in result.failures] == [
        "rms_norm forward 1×2 bfloat16, k num_warps=8: registers 32 → 64"
    ]
    # What tells them apart is their name; a change of what does not is one of options.
    later = [kernel(options=of["options"] | {"STAGES": 3}) for of in (few, many)]
    result = changes.compare_lines([kernel(**few), kernel(**many)], later)
    assert [(was.who, now.who) for was, now in result.relaunched] == [(f"k num_warps={warps}",) * 2 for warps in (4, 8)]
    assert [subject.who for subject in changes.compare_lines([kernel(**few), kernel(**many)], later[:1]).missing] == [
        "k num_warps=8"
    ]


# --- what is not compared ---


def test_what_is_ours_and_there_no_more_is_missing() -> None:
    before = [line(1.0), line(1.0, shape=[1, 2]), line(1.0, provider="torch.nn"), line(1.0, provider="trinorm.nn")]
    assert [subject.who for subject in changes.compare_lines(before, [line(1.0)]).missing] == ["trinorm", "trinorm.nn"]
    kernels = [kernel(), kernel(launch=1, kernel="l")]
    assert [subject.who for subject in changes.compare_lines(kernels, kernels[:1]).missing] == ["l"]
    assert changes.compare_lines([line(1.0)], before).missing == []


def test_host_times_are_said_not_to_be_compared_but_must_be_there() -> None:
    host = line(None, **{"pass": "host_forward"})
    result = changes.compare_lines([line(1.0), host], [line(1.0), host | {"host_us": 70.0}])
    (remark,) = changes_report.remarks(result)
    assert remark.startswith("1 not compared, for want of a device time before: rms_norm host_forward 8192×4096 bfloat16")
    (gone,) = changes.compare_lines([host], [host | {"host_us": None, "ok": False}]).failures
    assert (gone.quantity, gone.before, gone.after) == ("host µs", 7.0, math.inf)


def test_two_states_in_one_file_do_not_pass_for_noise() -> None:
    two = [line(100.0, commit="a"), line(150.0, commit="b")]
    for before, after in ((two[:1], two), (two, two[:1])):
        with pytest.raises(ValueError, match="of commit a and b, whose difference would pass for noise"):
            changes.compare_lines(before, after)
    with pytest.raises(ValueError, match=r"of torch 2\.11 and 2\.12"):
        changes.compare_lines([line(1.0, torch="2.11"), line(1.0, torch="2.12")], [line(1.0)])
    # A peer is the same at every commit of ours, and of what is not known nothing is said.
    assert found([one | {"provider": "torch"} for one in two], [line(125.0, provider="torch")]) == []
    assert found([line(100.0, commit=None), line(100.0, commit="a")], [line(100.0)]) == []


def test_what_the_files_were_made_with_is_said_where_it_differs() -> None:
    before = [line(1.0, torch="2.11", commit="a"), line(1.0, provider="torch", torch="2.11", commit="a")]
    before += [line(1.0, provider="liger", provider_version="0.7", torch="2.11")]
    after = [one | {"torch": "2.12", "commit": "b"} for one in before]
    after[2]["provider_version"] = "0.8"
    assert list(changes_report.remarks(changes.compare_lines(before, after))) == [
        "Between the files: torch 2.11 → 2.12, commit a → b, liger 0.7 → 0.8."
    ]
    assert list(changes_report.remarks(changes.compare_lines(before, before))) == []


def test_noise_that_hides_is_said() -> None:
    result = changes.compare_lines(
        [line(100.0), line(1.0, shape=[1, 2])], [line(130.0, ceiling_us=45.0), line(1.0, shape=[1, 2])]
    )
    assert result.failures == []
    assert list(changes_report.remarks(result)) == [
        "Of 1 times the noise is over 10%, up to 50%: what is less is not seen."
    ]


@pytest.mark.parametrize(
    "figure",
    [{"device_us": -1.0}, {"device_us": 0.0}, {"ceiling_us": -30.0}, {"replays": 0}, {"device_us_std": -1.0}],
)
def test_what_cannot_be_a_time_is_refused(figure: Line) -> None:
    with pytest.raises(ValueError, match="no such figure"):
        changes.compare_lines([line(1.0)], [line(1.0) | figure])


# --- the command ---


def write(path: Path, *lines: Line) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return str(path)


def test_the_command_shows_what_changed_and_fails_where_it_is_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "HAS_TRITON", False)  # it needs neither Triton nor a GPU
    a = write(tmp_path / "a.jsonl", line(100.0), line(100.0, shape=[1, 64]), line(3.0, provider="torch"))
    b = write(tmp_path / "b.jsonl", line(110.0), line(50.0, shape=[1, 64]), line(3.0, provider="torch"))
    assert main(["bench", "--compare", a, b]) == 1
    shown = capsys.readouterr().out
    worse, better = (next(row for row in shown.splitlines() if shape in row).split() for shape in ("8192×4096", "1×64"))
    assert worse[-4:] == ["100", "110", "+10.0%", "2"]
    assert better[-4:] == ["100", "50", "-50.0%", "2"]
    assert "3 compared: 1 worse, 1 better, 1 the same within what is allowed.\n" in shown
    assert main(["bench", "--compare", a, a]) == 0


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_results_file_equals_itself(path: Path) -> None:
    lines = changes.read(path)
    result = changes.compare_lines(lines, lines)
    assert len(result.compared) > 0
    assert not any(change.worse or change.better for change in result.compared)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{]", "Expecting"),
        ('{"device_us": NaN}\n', "NaN is no number"),
        ('{"device_us": -Infinity}\n', "-Infinity is no number"),
        ('{"device_us": 1e999}\n', "1e999 is no number"),
        ("[1]\n", "a.jsonl:1: not an object"),
        ('{}\n"rms_norm"\n', "a.jsonl:2: not an object"),
        ("{}\n{]\n", "a.jsonl:2: Expecting"),
        ("[" * 100_000, "a.jsonl:1: "),
        ("", "a.jsonl: there is no line in it"),
        ('{"op": "rms_norm"}\n', "a line without 'pass'"),
    ],
)
def test_what_is_no_such_file_is_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    assert main(["bench", "--compare", str(path), str(path)]) == 2
    assert message in capsys.readouterr().err
    assert main(["bench", "--compare", str(tmp_path / "absent"), str(path)]) == 2
    assert "absent" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (line(1.0, shape=5), line(1.0)),
        (line(1.0), line(1.0, shape=[[1], 2])),
        (line(1.0, op={}), line(1.0)),
        (line(1.0), line("1.0")),  # type: ignore[arg-type]
        (line(1.0, ceiling_us=[30.0]), line(1.0)),
        (line(1.0, provider=5), line(2.0, provider=5)),
        (kernel(registers="32"), kernel()),
        (kernel(), kernel(occupancy=2)),
        (kernel(ordinary={"instructions": [9], "loop": {}}), kernel()),
        (kernel(triton=3), kernel(triton="3")),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(
    before: Line, after: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--compare", write(tmp_path / "a.jsonl", before), write(tmp_path / "b.jsonl", after)]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.startswith("trinorm bench: --compare: a value of the wrong kind (")
    assert shown.err.count("\n") == 1


def test_made_up_kernels_are_right_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", kernel())
    assert main(["bench", "--compare", path, path]) == 0


def test_the_command_names_what_is_missing_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line(1.0, shape=[1, n]) for n in range(1, 7)]
    a, b = write(tmp_path / "a.jsonl", *lines), write(tmp_path / "b.jsonl", lines[0])
    assert main(["bench", "--compare", a, b]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    named = "; ".join(f"rms_norm forward 1×{n} bfloat16, trinorm, on Made-up GPU 9" for n in (2, 3, 4))
    assert f"AFTER lacks 5 of trinorm's that BEFORE has: {named}; and 2 more. To compare a part alone" in shown
    assert main(["bench", "--compare", b, a]) == 0  # there is more now
    assert main(["bench", "--compare", a, b, "--shapes", "1x1"]) == 0
    assert main(["bench", "--compare", a, b, "--shapes", "1x1,1x2"]) == 1


PARTS = {
    "--op": ("rms_norm", {"op": "layer_norm"}),
    "--shapes": ("quartet", {"shape": [1, 4096]}),
    "--dtype": ("bf16", {"dtype": "float32"}),
    "--pass": ("forward", {"pass": "host_forward"}),
    "--layout": ("contiguous", {"layout": "channels_last", "shape": [2, 2, 2, 2]}),
}


@pytest.mark.parametrize("option", PARTS)
def test_an_option_beside_compare_restricts_what_is_compared(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    word, other = PARTS[option]
    a = write(tmp_path / "a.jsonl", line(1.0), line(1.0, **other))
    b = write(tmp_path / "b.jsonl", line(1.0), line(9.0, **other))
    assert main(["bench", "--compare", a, b]) == 1
    assert main(["bench", "--compare", a, b, option, word]) == 0
    assert "1 compared: 0 worse, 0 better, 1 the same" in capsys.readouterr().out.splitlines()[-1]
    assert main(["bench", "--compare", a, write(tmp_path / "c.jsonl", line(1.0)), option, word]) == 0


def test_a_pass_of_the_host_is_its_three() -> None:
    args = argparse.Namespace(op=[], shapes=None, dtype=[], passes=["host", "chain"], layout=[], given=["--pass"])
    part = bench._part(args)
    assert part == {"pass_": {"host": HOST_PASSES, "chain": ["chain"]}}
    hosts = [line(None, **{"pass": pass_}) for pass_ in HOST_PASSES]
    with pytest.raises(ValueError, match="neither file has a line of chain"):
        changes.compare_lines(hosts, hosts, part)
    assert len(changes.compare_lines([*hosts, line(1.0)], hosts, {"pass_": {"host": HOST_PASSES}}).untold) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--op", "rms_norm,group_norm"), "--compare: neither file has a line of group_norm"),
        (("--shapes", "8192x4096,1x1"), "--compare: neither file has a line of 1x1"),
        (("--json", "x", "--peers", "none"), "--compare measures nothing, so --json and --peers cannot stand beside it"),
        (("--plot", "x"), "--compare measures nothing, so --plot cannot stand beside it"),
    ],
)
def test_what_cannot_stand_beside_compare_is_refused(
    options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", line(1.0))
    assert main(["bench", *options, "--compare", path, path]) == 2
    assert capsys.readouterr().err == f"trinorm bench: {message}\n"


def test_files_of_host_times_alone_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", line(None, **{"pass": "host_forward"}))
    assert main(["bench", "--compare", path, path]) == 2
    shown = capsys.readouterr()
    assert "no figure in them that can be compared" in shown.err
    assert "1 not compared" in shown.out


def test_files_of_two_gpus_are_named_by_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eight, nine = line(1.0, gpu="Made-up GPU 8"), line(1.0)
    a, b = write(tmp_path / "a.jsonl", eight), write(tmp_path / "b.jsonl", nine)
    assert main(["bench", "--compare", a, b]) == 2
    assert "(these are: Made-up GPU 8; Made-up GPU 9)" in capsys.readouterr().err
    both = write(tmp_path / "c.jsonl", eight, nine)
    assert main(["bench", "--compare", both, write(tmp_path / "d.jsonl", eight, nine | {"device_us": 2.0})]) == 1
    (worse,) = (row for row in capsys.readouterr().out.splitlines() if "+100.0%" in row)
    assert "Made-up GPU 9" in worse


def test_what_a_file_says_is_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path / "a.jsonl", line(1.0, op="[/red]"), line(1.0, op="[/bold]"))
    b = write(tmp_path / "b.jsonl", line(2.0, op="[/red]"))
    assert main(["bench", "--compare", a, b]) == 1
    shown = capsys.readouterr().out
    assert "[/red] forward" in shown
    assert "[/bold] forward" in shown
