"""What came of a campaign, for people."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from qpool.training import directory
from qpool.training.campaign import grid, records, report
from qpool.training.campaign.records import Records, State
from qpool.training.campaign.table import Board, duration


@pytest.fixture
def of(tmp_path) -> Records:
    """Three runs by hand, of which one failed."""
    found = Records(tmp_path, grid.cells({}, {"layers": [1, 2], "seed": [1, 2]}))
    found.begin("qpool train")
    for number, cell in enumerate(found.cells[:3]):
        run = found.run(cell.name)
        run.mkdir(parents=True)
        (run / "evaluations.csv").write_text(
            f"step,energy_distance,coverage,ket_norm\n0,1,0.5,1\n10,0.{number + 1},0.9,0.99\n"
        )
        figures = {"after": 0.1 * (number + 1), "floor": 0.05}
        directory.write_json(
            run / "summary.json", {"energy_distance": figures, "coverage": 0.9, "ket_norm": 0.99}
        )
        found.note(cell.name, State(records.FINISHED, "", 10, 10, 60.0, 3600.0))
    found.note(found.cells[3].name, State(records.FAILED, "<b>it</b> fell", 4, 10, 6.0, 6.0))
    return found


def test_it_can_be_read_alone(of) -> None:
    page = report.write(of, of.table()).read_text()
    assert "3 of 4 runs finished. Cost: 3 core hours" in page
    assert "<td>layers=1</td><td>2 of 2</td><td>0.15 (0.1 to 0.2)</td>" in page
    assert "<td>layers=2</td><td>1 of 2</td><td>0.3</td>" in page
    assert "The best run: layers=1,seed=1" in page
    assert "&lt;b&gt;it&lt;/b&gt; fell" in page
    assert 'src="data:image/png;base64,' in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_tensorboard_finds_the_settings_and_the_figures(of) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report.write(of, of.table())
    folders = sorted((of.out / "tensorboard").iterdir())
    assert [folder.name for folder in folders] == [cell.name for cell in of.cells[:3]]
    events = EventAccumulator(str(folders[0])).Reload()
    assert events.Scalars("energy_distance_after")[0].value == pytest.approx(0.1)
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_figures_of_a_function_have_a_table_too(tmp_path) -> None:
    found = Records(tmp_path, grid.cells({}, {"rate": [0.1, 0.2]}))
    found.begin("mine")
    for cell in found.cells:
        found.run(cell.name).mkdir()
        directory.write_json(found.run(cell.name) / "result.json", {"loss": 1.5})
        found.note(cell.name, State(records.FINISHED))
    page = report.write(found, found.table()).read_text()
    assert "<th>loss</th>" in page
    assert "The best run" not in page  # nobody said whether a loss is to be small
    assert "Learning curves" not in page


def test_a_table_in_a_terminal_and_lines_elsewhere() -> None:
    row = {"name": "seed=1", "step": 5, "steps": 10, "rate": 2.5, "left": 100.0,
           "figures": {"ket_norm": 0.99}}  # fmt: skip
    for terminal in (True, False):
        said = io.StringIO()
        console = Console(file=said, force_terminal=terminal, width=100)
        with Board(console) as board:
            board.say("a line")
            assert board.due()
            board.show("1 of 2 done", [row] * 50)
        text = said.getvalue()
        assert "a line" in text
        assert "1 of 2 done" in text
        assert ("5/10" in text) == terminal
        assert ("and 10 more" in text) == terminal


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "-"), (0.4, "0 s"), (89, "89 s"), (600, "10 min"), (12000, "3 h 20 min")],
)
def test_durations_for_people(seconds, words) -> None:
    assert duration(seconds) == words
