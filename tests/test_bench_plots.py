"""The plot of the ceiling's ratio over hidden size, and the legend of every plot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trinorm.bench import plots
from trinorm.bench.cases import CHAIN, HOST_PASSES, PASSES, Case
from trinorm.bench.providers import OURS, PEERS
from trinorm.bench.records import Provenance, Record

HERE = Provenance(gpu="Made-up GPU 9", torch="0.0", triton="0.0", commit=None, date="2000-01-01")


def record(pass_: str, m: int, n: int, provider: str = OURS, device_us: float | None = 4.0) -> Record:
    """A record whose times are made up: the ceiling takes 2 µs."""
    of = Record.of(Case("rms_norm", pass_, (m, n), torch.bfloat16, torch.bfloat16), provider, HERE)
    return replace(of, ceiling_us=2.0, device_us=device_us)


def test_each_width_is_drawn_at_its_most_rows_and_not_where_it_is_small() -> None:
    shapes = [(8192, 4096), (16, 4096), (2048, 4096), (262144, 64), (1, 768)]
    records = [record(pass_, m, n) for m, n in shapes for pass_ in PASSES]
    assert [(found.shape, found.pass_) for found in plots._largest(records)] == [
        ((m, n), pass_) for m, n in ((262144, 64), (8192, 4096)) for pass_ in PASSES
    ]


def test_the_figure_has_a_line_for_each_provider_over_the_widths_it_was_measured_at() -> None:
    rows = [record(pass_, 8192, n, who) for n in (4096, 5120) for who in (OURS, "torch") for pass_ in PASSES]
    rows += [record("forward", 8192, 8192, "torch", None), record("forward", 8192, 8192)]
    figure = plots._ceiling_figure(plots._largest(rows), "title")
    forward, backward = figure.axes
    for axes, ours in ((forward, [4096, 5120, 8192]), (backward, [4096, 5120])):
        lines = {line.get_label(): line for line in axes.lines}
        assert list(lines) == [OURS, "torch", "ceiling"]
        assert list(lines[OURS].get_xdata()) == ours  # type: ignore[arg-type]
        assert list(lines["torch"].get_xdata()) == [4096, 5120]  # type: ignore[arg-type]
        assert list(lines[OURS].get_ydata()) == [0.5] * len(ours)  # type: ignore[arg-type]


@pytest.mark.parametrize("widths", [[4096], [4096, 5120]])
def test_it_is_drawn_where_there_are_two_widths_and_chains_and_host_times_are_left_out(
    tmp_path: Path, widths: list[int]
) -> None:
    records = [record(pass_, 8192 + n, n) for n in widths for pass_ in (*PASSES, CHAIN, *HOST_PASSES)]
    written = plots.draw(records, tmp_path)
    assert [path.name for path in written] == ["rms_norm-bfloat16-ceiling.png"] * (len(widths) > 1)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


@pytest.mark.parametrize("passes", [PASSES[:1], PASSES])
def test_the_legend_lies_within_the_figure_and_names_every_provider(passes: tuple[str, ...]) -> None:
    providers = (OURS, *PEERS)
    rows = [record(pass_, 8192, n, who) for pass_ in passes for n in (4096, 5120) for who in providers]
    for figure in (plots._figure(rows, 1, "title"), plots._ceiling_figure(rows, "title")):
        figure.draw_without_rendering()
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == [*providers, "ceiling"]
        extent = legend.get_window_extent()
        assert figure.bbox.x0 <= extent.x0 < extent.x1 <= figure.bbox.x1
