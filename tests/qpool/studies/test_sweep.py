"""The sweep: its grid, its directory, going on with it; and the report on measurements by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest

from qpool.studies import report, sweep
from workers.errors import CheckpointError, ConfigurationError, DataError

GRID = sweep.Grid(
    workers=(1, 2),
    batch=(4,),
    modes=(1,),
    layers=(1,),
    cutoff=(3,),
    strategy=("processes", "sequential"),
    engine=("stock",),
    seconds=0.05,
    turns=1,
)


def test_a_strategy_without_workers_is_measured_once() -> None:
    cells = list(dataclasses.replace(GRID, tile=(0, 2)).cells())
    assert len(cells) == len(set(cells)) == 5  # two counts of workers, two tiles; and in place
    assert sum(cell.strategy == "sequential" for cell in cells) == 1


def test_stopped_and_gone_on_with(tmp_path, monkeypatch) -> None:
    """Cells that are done are not measured again, and a torn line is."""
    measured = []

    def measure(cell, pools, seconds, turns, address):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(cell)
        return sweep.Measurement(8.0, 7.0, 9.0, 500.0, 0.9, 250.0, 2, 100.0, 50.0, 1.0)

    monkeypatch.setattr(sweep, "measure", measure)
    out, said = tmp_path / "sweep", []
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(GRID, out, said.append)
    assert len(sweep.read(out / "cells.csv")) == 2
    with (out / "cells.csv").open("a") as file:
        file.write("stock,proc")
    kept, measured[:] = list(measured), []
    monkeypatch.setattr(sweep, "measure", measure)
    rows = sweep.sweep(GRID, out, said.append)
    assert len(rows) == 3
    assert measured == [cell for cell in GRID.cells() if cell not in kept]
    assert len(said) == 3
    with pytest.raises(ConfigurationError, match=r"another grid \(batch\)"):
        sweep.sweep(dataclasses.replace(GRID, batch=(8,)), out, said.append)
    asked = json.loads((out / "sweep.json").read_text())
    (out / "sweep.json").write_text(json.dumps({**asked, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        sweep.sweep(GRID, out, said.append)


def test_a_real_cell(tmp_path) -> None:
    grid = dataclasses.replace(GRID, workers=(2,), strategy=("processes",))
    (row,) = sweep.sweep(grid, tmp_path / "sweep", lambda _: None)
    assert row["slowest"] <= row["samples_per_second"] <= row["fastest"]
    assert row["tiles"] == 2
    assert 0 < row["tile_ms"] <= row["step_ms"]
    assert row["cpu_use"] > 0
    assert row["memory_mib"] > 50


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"workers": ()}, "nothing to run: no value of workers"),
        ({"strategy": ("procesess",)}, "did you mean 'processes'"),
        ({"tile": (3,)}, "power of two"),
        ({"cutoff": (1,)}, "at least 2"),
        ({"seconds": 0.0}, "more than 0"),
        ({"engine": ("fast",)}, "must be one of"),
        ({"strategy": ("cpu_batch",)}, "rules it out"),
    ],
)
def test_grids_that_cannot_be_run(tmp_path, change, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        sweep.sweep(dataclasses.replace(GRID, **change), tmp_path / "sweep", lambda _: None)
    assert not (tmp_path / "sweep").exists()


def test_a_directory_of_something_else(tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="not an empty directory"):
        sweep.sweep(GRID, tmp_path, lambda _: None)


def row(workers: int, rate: float, **more) -> dict:
    cell = sweep.Cell("traced", "processes", workers, 1, 2, 2, 8, 64, 0)
    seconds = 64 / rate
    figures = sweep.Measurement(
        rate, 0.9 * rate, 1.1 * rate, 1e3 * seconds, 0.95, 1e3 * workers / rate, 8, 10.0, 300.0, 4.0
    )
    return {**dataclasses.asdict(cell), **dataclasses.asdict(figures), **more}


def test_the_report_tells_measured_from_predicted(tmp_path) -> None:
    for line in (row(1, 700.0), row(2, 1300.0), row(4, 900.0)):  # four on two cores
        sweep._append(tmp_path / "cells.csv", line)
    host = {"cores": 2, "platform": "a <system>", "python": "3", "tensorflow": "2", "qpool": "0"}
    said = {"grid": dataclasses.asdict(GRID), "host": host}
    (tmp_path / "sweep.json").write_text(json.dumps(said))
    page = report.write(tmp_path).read_text()
    assert "a &lt;system&gt;" in page
    assert page.count("data:image/png;base64,") == 3
    assert "src=" not in page.replace('src="data:', "")  # it can be read alone
    text = (tmp_path / "report.md").read_text()
    measured, predicted = text.split("## Predicted")
    assert "| 1,300 |" in measured
    assert "| 1.86 | 93% |" in measured
    assert "256 workers" in predicted
    assert "Universal Scalability Law" in predicted


def test_workers_without_a_core_each_are_left_out_of_the_fit() -> None:
    (curve,) = report.curves([row(1, 700.0), row(2, 1300.0), row(4, 900.0)], 2)
    (fitted,) = report.curves([row(1, 700.0), row(2, 1300.0)], 2)
    assert curve.constants() == fitted.constants() is not None
    assert report.curves([row(1, 700.0)], 2)[0].constants() is None


def test_a_tiles_time_is_that_of_a_whole_step() -> None:
    """Ten steps of four tiles, each a second forward and two back."""
    none = dict.fromkeys(("tiles", "forward_calls", "backward_calls", "computing"), 0)
    after = {"tiles": 80, "forward_calls": 10, "backward_calls": 10, "computing": 120.0}
    assert sweep.per_step(none, after) == (4, 3.0)
    assert sweep.per_step(none, none) == (0, 0.0)


def test_nothing_measured_yet(tmp_path) -> None:
    with pytest.raises(DataError, match="no measurements yet"):
        report.write(tmp_path)
