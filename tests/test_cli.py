"""The command line: help, errors for humans, and a short training run from end to end."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import programs
import pytest
from click.testing import CliRunner

from qpool import cli
from qpool.measure import doctor, host

PNG = b"\x89PNG\r\n\x1a\n"


def qpool_command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "qpool", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        check=False,
    )


def test_help_names_every_command_and_option() -> None:
    text = qpool_command("--help").stdout
    assert "train" in text
    assert "bench" in text
    text = qpool_command("train", "-h").stdout
    for option in ("--data", "--steps", "--workers", "--out", "--json", "breast-cancer"):
        assert option in text


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['qpool', '--help']\n"
        "from qpool.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('tensorflow', 'numpy', 'scipy', 'rich') if m in sys.modules])"
    )
    done = programs.run(code)
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--data", "irsi", "--out", "x"), "did you mean 'iris'"),
        (("train", "--steps", "0", "--out", "x"), "steps must be at least 1"),
        (("train", "--out", "."), "not an empty directory"),
        (("train", "--data", "iris", "--batch-size", "1000", "--out", "x"), "smaller batch_size"),
        (("train", "--workers", "0", "--out", "x"), "workers must be a whole number"),
        (("train", "--strategy", "procesess", "--out", "x"), "did you mean 'processes'"),
        (("bench", "speedupp"), "did you mean 'speedup'"),
        (("bench", "strategy"), "did you mean 'strategies'"),
        (("sweep", "--strategy", "procesess", "--out", "x"), "did you mean 'processes'"),
        (("sweep", "--batch", "", "--out", "x"), "nothing to run"),
        (("resume", "."), "not a run of qpool"),
        (("sample", "."), "not a run of qpool"),
        (("train", "--config", "missing.toml"), "cannot be read"),
        (("train", "--steps", "1", "--out", "something/x"), "something/x: Not a directory"),
    ],
)
def test_errors_are_one_message(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    done = qpool_command(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_option_is_a_usage_error() -> None:
    done = qpool_command("train", "--step", "3")
    assert done.returncode == 2
    assert "--steps" in done.stderr


def test_a_short_run_leaves_a_full_directory(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = "train --data iris --steps 41 --batch-size 32 --layers 1 --cutoff 4 --workers 2 --json"
    done = qpool_command(*words.split(), "--out", str(out))
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 41  # ten epochs of four batches, and a part of one
    assert set(summary["energy_distance"]) == {"before", "after", "best", "floor"}
    assert len(summary["cpu_use_of_workers"]) == 2
    assert all(0 < use < 2 for use in summary["cpu_use_of_workers"])
    workers = list(csv.DictReader((out / "workers.csv").read_text().splitlines()))
    read = sum(float(row["seconds"]) for row in workers) / 2
    assert read > 0.8 * summary["training_seconds"]  # of the run, not of the last call of fit
    assert "samples/s  CPU of workers" in done.stderr
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    assert len(rows) == 41
    assert all(abs(float(row["generator_loss"])) < 1e3 for row in rows)
    asked = json.loads((out / "run.json").read_text())
    assert asked["config"]["data"] == "iris"
    assert asked["host"]["strawberryfields"].startswith("0.23")
    for name in ("samples.png", "losses.png", "wigner.png"):
        assert (out / name).read_bytes()[:8] == PNG
    done = qpool_command("sample", str(out), "--count", "3", "--out", str(tmp_path / "s.csv"))
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert lines[0] == "petal length (cm),petal width (cm)"
    assert len(lines) == 4


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_ctrl_c_ends_a_run_with_a_checkpoint_and_says_how_to_go_on(tmp_path: Path) -> None:
    import signal

    words = "train --data iris --steps 10000 --layers 1 --cutoff 4 --workers 1 --batch-size 8"
    process = subprocess.Popen(
        [sys.executable, "-m", "qpool", *words.split(), "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "stopped by SIGINT after step" in out
    assert f"qpool resume {tmp_path / 'run'}" in out
    assert list((tmp_path / "run" / "checkpoints").glob("step-*.npz"))


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("advice", 0), ("wrong", 1)])
def test_doctor_fails_where_something_is_wrong(monkeypatch, status: str, code: int) -> None:
    finding = host.Finding("parallel step", "2 workers", status, "do this" * (status != "ok"))
    monkeypatch.setattr(doctor, "examine", lambda workers, address: iter([finding]))
    done = CliRunner().invoke(cli.cli, ["doctor"])
    assert done.exit_code == code
    assert "parallel step" in done.stdout
    assert ("do this" in done.stdout) == (status != "ok")
    line = json.loads(CliRunner().invoke(cli.cli, ["doctor", "--json"]).stdout)
    assert line["status"] == status
