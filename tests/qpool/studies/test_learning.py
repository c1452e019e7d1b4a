"""The learning table: what it runs, what it reads, what it makes of it."""

from __future__ import annotations

import json

from click.testing import CliRunner

from qpool.studies import learning
from qpool.training import Campaign
from qpool.training.campaign import grid


def test_its_cells_are_runs_that_train_takes(tmp_path) -> None:
    cells = learning.cells(learning.DATA, 3, None)
    assert len(cells) == 3 * len(learning.DATA)
    assert {cell["encoding"] for cell in cells} == {"coherent_state", "classical_neural"}
    Campaign(out=tmp_path, base=learning.SETTINGS, cells=cells)  # it refuses what cannot be run
    assert {cell["steps"] for cell in learning.cells(("ring",), 2, 7)} == {7}


def test_what_came_of_them_is_summed_up(tmp_path, monkeypatch) -> None:
    def run(self):
        rows = [
            {
                "data": cell.settings["data"],
                "seed": cell.settings["seed"],
                "energy_distance_before": 0.4,
                "energy_distance_after": 0.1 * cell.settings["seed"],
                "energy_distance_floor": 0.08,
                "coverage": 0.7,
                "ket_norm": 0.99,
                "training_seconds": 30.0,
            }
            for cell in self.cells
        ]
        return {"finished": len(rows), "runs": rows}

    monkeypatch.setattr(Campaign, "run", run)
    done = CliRunner().invoke(
        learning.main, ["--data", "ring", "--out", str(tmp_path), "--json"], catch_exceptions=False
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(row["seed"], round(row["after"], 3)) for row in rows] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    (summed,) = learning.by_data(rows)
    assert (summed["seeds"], round(summed["after"], 3), round(summed["worst_after"], 3)) == (
        3,
        0.2,
        0.3,
    )
    assert len({cell.name for cell in grid.cells({}, {}, learning.cells(("ring",), 3, None))}) == 3


def test_a_table_with_holes_is_none(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Campaign, "run", lambda self: {"finished": 2, "runs": [{}] * 3})
    done = CliRunner().invoke(learning.main, ["--data", "ring", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "2 of 3 runs finished" in done.output
