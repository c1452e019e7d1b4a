"""Campaigns with real processes: the bits of each run, and what happens when things go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from qpool.errors import CheckpointError
from qpool.training import Campaign, checkpoints, report, run, run_directory
from qpool.training.campaign import grid, records
from qpool.training.config import Config

QUIET = Console(quiet=True)

BASE = {
    "data": "iris",
    "steps": 12,
    "batch_size": 8,
    "layers": 1,
    "cutoff": 3,
    "critic_steps": 1,
    "evaluate_every": 6,
    "checkpoint_every": 4,
}
SECOND = {"seed": 2, "data": "iris", "generator_rate": 0.003, "critic_rate": 0.02}
CELLS = [{"seed": 1, "data": "iris"}, SECOND, {"seed": 1, "data": "wine"}]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What each run makes by itself, in this process."""
    out = tmp_path_factory.mktemp("alone")
    found = {}
    for cell in grid.cells(BASE, {}, CELLS):
        run.train(Config(**cell.settings, strategy="cpu_batch"), out / cell.name, QUIET)
        found[cell.name] = contents(out / cell.name)
    return found


def contents(out: Path) -> bytes:
    """What two runs of the same settings have in common, to the bit."""
    tables = [(out / name).read_bytes() for name in ("metrics.csv", "evaluations.csv")]
    last = checkpoints.Folder(out / "checkpoints").newest()[0]
    return b"".join([*tables, *(array.tobytes() for array in last.arrays.values())])


def write(path: Path, **more: Any) -> Path:
    lines = [f"{name} = {json.dumps(value)}" for name, value in {**BASE, **more}.items()]
    for cell in CELLS:
        lines += ["[[cells]]", *(f"{name} = {json.dumps(value)}" for name, value in cell.items())]
    path.write_text("\n".join(lines))
    return path


def by_name(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["run"]: row for row in summary["runs"]}


def test_each_run_makes_the_bits_that_it_makes_alone(alone, tmp_path) -> None:
    options = {"out": tmp_path / "c", "base": BASE, "cells": CELLS, "console": QUIET}
    summary = Campaign(**options).run()
    assert summary["finished"] == 3
    for name, expected in alone.items():
        assert contents(tmp_path / "c" / "runs" / name) == expected
    for row in summary["runs"]:
        assert row["core_hours"] * 3600 == pytest.approx(row["seconds"])
        assert row["energy_distance_after"] > 0
    assert (tmp_path / "c" / "report.html").exists()
    assert len(run.sample(tmp_path / "c" / "runs" / "seed=1,data=wine", 3)[0]) == 3
    before = os.stat(tmp_path / "c" / "runs" / "seed=1,data=iris" / "summary.json").st_mtime_ns
    assert Campaign(**options).run()["finished"] == 3
    after = os.stat(tmp_path / "c" / "runs" / "seed=1,data=iris" / "summary.json").st_mtime_ns
    assert before == after


def test_killed_and_gone_on_with_on_other_cores(alone, tmp_path) -> None:
    out, words = tmp_path / "c", ["--config", str(write(tmp_path / "c.toml")), "--json"]
    command = [sys.executable, "-m", "qpool", "campaign", *words, "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--cores", "2"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    while process.poll() is None and not any(out.glob("runs/*/checkpoints/step-*")):
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    gone, left = psutil.wait_procs(children, timeout=20)
    assert gone
    assert not left
    done = subprocess.run(
        [*command, "--cores", "1"], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["finished"] == 3
    for name, expected in alone.items():
        assert contents(out / "runs" / name) == expected


def misbehave(settings: dict[str, Any]) -> dict[str, float]:
    """A user's function; what it does is a setting, unless it is called again."""
    again = run_directory() / "again"
    how, first = settings["how"], not again.exists()
    again.write_text("")
    report(step=1, steps=2, loss=1.5)
    if how == "raises" and first:
        raise ValueError("no such thing")
    if how == "dies" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hangs" and first:
        threading.Event().wait()
    if how == "says nothing of use" and first:
        return [1, 2]  # type: ignore[return-value]
    if how == "fills the disk" and first:
        raise OSError(28, "No space left on device")
    return {"loss": 0.5, "how_long": len(how)}


def test_what_goes_wrong_is_noted_and_stops_no_other(tmp_path) -> None:
    ways = ["is well", "raises", "dies", "hangs", "says nothing of use", "is well too"]
    options = {"out": tmp_path / "c", "grid": {"how": ways}, "console": QUIET}
    summary = Campaign(misbehave, timeout=2, **options).run()
    assert (summary["finished"], summary["failed"]) == (2, 4)
    reasons = {row["how"]: row["reason"] for row in summary["runs"]}
    assert reasons["raises"] == "ValueError: no such thing"
    assert "SIGKILL" in reasons["dies"]
    assert "it hung: nothing was heard of it for" in reasons["hangs"]
    assert "expected a dictionary of numbers" in reasons["says nothing of use"]
    well = next(row for row in summary["runs"] if row["how"] == "is well")
    assert (well["loss"], well["how_long"]) == (0.5, 7)
    log = next((tmp_path / "c" / "logs").glob("how=raises*"))
    assert "ValueError: no such thing" in log.read_text()
    assert Campaign(misbehave, **options).run()["failed"] == 4  # not by itself
    summary = Campaign(misbehave, retry=True, start_method="spawn", **options).run()
    assert (summary["finished"], summary["failed"]) == (6, 0)


def test_a_full_disk_ends_the_campaign_and_fails_no_run(tmp_path) -> None:
    options = {"out": tmp_path, "grid": {"how": ["fills the disk", "is well"]}, "console": QUIET}
    with pytest.raises(CheckpointError, match=r"the disk is full.*run the same command again"):
        Campaign(misbehave, cores=1, **options).run()
    assert Campaign(misbehave, **options).run()["finished"] == 2


def wait_for_a_signal(settings: dict[str, Any]) -> dict[str, float]:
    """Tells that it is under way, and is then ended by its signal."""
    (run_directory() / "begun").write_text("")
    if settings["first"] and not Path(settings["go"]).exists():
        threading.Event().wait()
    return {"loss": 1.0}


def test_ctrl_c_ends_all_of_them_and_the_same_call_goes_on(tmp_path) -> None:
    go = tmp_path / "go"
    options = {
        "out": tmp_path / "c",
        "base": {"go": str(go)},
        "grid": {"first": [True, False]},
        "cores": 1,
        "console": QUIET,
    }

    def interrupt() -> None:
        while not (tmp_path / "c" / "runs" / "first=true" / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    summary = Campaign(wait_for_a_signal, **options).run()
    thread.join()
    assert summary["stopped"] == "SIGINT"
    assert (summary["finished"], summary["waiting"]) == (0, 2)
    servers = [p for p in psutil.Process().children() if "campaign.runner" in " ".join(p.cmdline())]
    assert not any(server.children() for server in servers)
    go.write_text("")
    assert Campaign(wait_for_a_signal, **options).run()["finished"] == 2


def test_a_run_that_comes_to_no_number_has_diverged(tmp_path) -> None:
    base = {**BASE, "critic_rate": 1e30, "steps": 8}
    summary = Campaign(out=tmp_path, base=base, console=QUIET).run()
    assert summary["diverged"] == 1
    row = summary["runs"][0]
    assert "nan" in row["reason"]
    assert "a smaller generator_rate" in (tmp_path / "states" / "run.json").read_text()
    assert row["state"] == records.DIVERGED


def test_hopeless_runs_end_early(tmp_path) -> None:
    pytest.importorskip("optuna")

    halving = {"first": 2, "factor": 2, "objective": "loss"}
    losses = {"loss": [1.0, 2.0, 3.0, 4.0]}
    options = {"grid": losses, "cores": 1, "halving": halving, "console": QUIET}
    rows = by_name(Campaign(steadily, out=tmp_path, **options).run())
    assert rows["loss=1.0"]["state"] == records.FINISHED
    assert rows["loss=4.0"]["state"] == records.PRUNED
    assert rows["loss=4.0"]["reason"] == "hopeless"


def steadily(settings: dict[str, Any]) -> dict[str, float]:
    """Reports its loss, and waits to be told that it is hopeless, if it is."""
    report(step=2, steps=4, loss=settings["loss"])
    if settings["loss"] > 2:
        threading.Event().wait()
    return {"loss": settings["loss"]}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:.*:FutureWarning:ray.*")
def test_on_a_ray_cluster_runs_make_the_same_bits(alone, tmp_path, monkeypatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # nodes import what we import
    options = {"out": tmp_path, "base": BASE, "cells": CELLS[:2], "console": QUIET}
    summary = Campaign(strategy="ray", **options).run()
    assert summary["finished"] == 2, [row["reason"] for row in summary["runs"]]
    for row in summary["runs"]:
        assert contents(tmp_path / "runs" / row["run"]) == alone[row["run"]]
