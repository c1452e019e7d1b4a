"""A campaign's directory, and what is refused before anything starts."""

from __future__ import annotations

import dataclasses
import json

import pytest

from qpool.errors import CheckpointError, ConfigurationError, DataError
from qpool.training import Campaign, directory
from qpool.training.campaign import grid, records
from qpool.training.campaign.records import Records, State

CELLS = grid.cells({"steps": 3}, {"seed": [1, 2]})


def test_states_and_results(tmp_path) -> None:
    of = Records(tmp_path / "c", CELLS)
    assert of.begin("qpool train") == {}
    assert of.state("seed=1") == State()
    of.note("seed=1", State(records.FAILED, "why\nTraceback", 2, 3, 1.5, 3.0))
    of.run("seed=2").mkdir()
    (of.run("seed=2") / "summary.json").write_text(
        json.dumps({"energy_distance": {"after": 0.5}, "steps": 3, "directory": "x"})
    )
    rows = of.table()
    assert [row["state"] for row in rows] == [records.FAILED, records.FINISHED]
    assert rows[0]["reason"] == "why"
    assert rows[1]["energy_distance_after"] == 0.5
    header, *lines = (tmp_path / "c" / "results.csv").read_text().splitlines()
    assert header.startswith("run,seed,state,reason,step,seconds,core_hours")
    assert len(lines) == 2


def test_it_is_gone_on_with_and_may_grow_but_not_change(tmp_path) -> None:
    Records(tmp_path, CELLS).begin("qpool train")
    more = Records(tmp_path, grid.cells({"steps": 3}, {"seed": [1, 2, 3]}))
    more.begin("qpool train")
    more.decide({"strategies": {"a": {"strategy": "cpu_batch"}}})
    assert more.begin("qpool train")["strategies"]["a"]["strategy"] == "cpu_batch"
    with pytest.raises(ConfigurationError, match="its run seed=3 is not among these"):
        Records(tmp_path, CELLS).begin("qpool train")
    with pytest.raises(ConfigurationError, match="its run seed=1 is of other settings here"):
        Records(tmp_path, grid.cells({"steps": 4}, {"seed": [1, 2, 3]})).begin("qpool train")
    with pytest.raises(ConfigurationError, match="a campaign of qpool train, not of mine"):
        more.begin("mine")


def test_other_directories_are_refused(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="is not a campaign"):
        Records(tmp_path, CELLS).begin("qpool train")
    (tmp_path / "campaign.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Records(tmp_path, CELLS).begin("qpool train")
    (tmp_path / "campaign.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        Records(tmp_path, CELLS).begin("qpool train")


def test_a_damaged_state_is_said(tmp_path) -> None:
    of = Records(tmp_path, CELLS)
    of.begin("qpool train")
    (tmp_path / "states" / "seed=1.json").write_text("{")
    with pytest.raises(CheckpointError, match="delete the file"):
        of.state("seed=1")


@pytest.mark.parametrize(
    ("base", "given", "error", "words"),
    [
        ({"setps": 3}, {"seed": [1]}, ConfigurationError, "the run seed=1: .*'setps'.*steps"),
        ({}, {"cutoff": [4, 1]}, ConfigurationError, "the run cutoff=1: cutoff must be at least 2"),
        ({}, {"data": ["iris", "no.csv"]}, DataError, "the run data=no-.*cannot be read"),
        ({}, {"data": ["iris", "irsi"]}, DataError, "the run data=irsi: .*iris"),
        ({}, {"modes": [2, 3]}, DataError, "the run modes=3: .*width 3"),
        ({"batch_size": 151}, {"data": ["iris"]}, DataError, "the run data=iris: .*fewer"),
    ],
)
def test_a_cell_that_cannot_be_run_is_named(tmp_path, base, given, error, words) -> None:
    with pytest.raises(error, match=words):
        Campaign(out=tmp_path / "c", base=base, grid=given)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cores": 0}, "cores must be more than 0"),
        ({"timeout": -1}, "timeout must be more than 0"),
        ({"strategy": "threads"}, "strategy is ray or none"),
        ({"halving": {"first": 0}}, "first >= 1"),
    ],
)
def test_options_that_make_no_sense(tmp_path, options, words) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Campaign(out=tmp_path, **options)


def test_an_unknown_option_in_the_file(tmp_path) -> None:
    (tmp_path / "c.toml").write_text("[campaign]\ncroes = 2\n")
    with pytest.raises(ConfigurationError, match=r"unknown option 'croes'.*cores"):
        Campaign.read(tmp_path / "c.toml", out=tmp_path / "c")


def test_a_directory_in_use_is_refused(tmp_path, monkeypatch) -> None:
    import psutil

    campaign = Campaign(dict, out=tmp_path, grid={"seed": [1]})
    parent = psutil.Process().parent()
    directory.write_json(
        tmp_path / "running.json", {"pid": parent.pid, "created": parent.create_time()}
    )
    with pytest.raises(ConfigurationError, match=f"in use by process {parent.pid}"):
        campaign.run()


def test_halving_keeps_the_best() -> None:
    pytest.importorskip("optuna")
    from qpool.training.campaign.halving import Halving

    halving = Halving(first=10, factor=2)
    good = [halving.hopeless(f"good {n}", 10, {"energy_distance": 0.1}) for n in range(4)]
    assert halving.hopeless("bad", 5, {"energy_distance": 9.0}) is False  # not at a rung yet
    assert halving.hopeless("bad", 10, {"energy_distance": 9.0}) is True
    assert not good[0]
    halving.ended("bad", pruned=True)
    halving.ended("good 0", pruned=False)
    with pytest.raises(ConfigurationError, match=r"looks at 'energy_distance'.*'loss'"):
        halving.hopeless("x", 10, {"loss": 1.0})


def test_a_state_is_plain_data() -> None:
    assert State(**dataclasses.asdict(State(records.PRUNED, "x"))) == State(records.PRUNED, "x")
