"""Runs that are stopped, killed and gone on with: the same bits; and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from rich.console import Console

from qpool.errors import CheckpointError, ConfigurationError, DataError
from qpool.executors.auto import executor
from qpool.executors.auto.choices import Candidate, Choice
from qpool.training import checkpoints, run
from qpool.training.config import Config
from qpool.training.journal import Journal, read_table

CONFIG = Config(
    data="iris",
    steps=25,
    batch_size=16,
    layers=1,
    cutoff=3,
    critic_steps=1,
    workers=2,
    checkpoint_every=4,
    evaluate_every=6,
    norm_penalty=0.1,
    ema_momentum=0.9,
    clip_norm=1.0,
    schedule="cosine",
)
QUIET = Console(quiet=True)

#: Two epochs of nine batches, and a part of one.
STEPS = 25

pytestmark = pytest.mark.filterwarnings("ignore:.*share cores.*")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    summary = run.train(CONFIG, out, QUIET)
    assert summary["steps"] == STEPS
    assert "stopped" not in summary
    return out


def contents(out: Path) -> dict[str, bytes]:
    """What two runs of the same settings have in common, to the bit."""
    found = {name: (out / name).read_bytes() for name in ("metrics.csv", "evaluations.csv")}
    folder = checkpoints.Folder(out / "checkpoints")
    for path in (folder.steps()[STEPS], folder.best):
        made = checkpoints.read(path)
        numbers = np.array([made.step, made.calls, made.best])
        found[path.name] = b"".join(
            [numbers.tobytes(), *(a.tobytes() for a in made.arrays.values())]
        )
    return found


def test_a_run_leaves_a_full_directory(whole) -> None:
    names = {path.name for path in whole.iterdir()}
    pictures = {"samples.png", "losses.png", "workers.png", "wigner.png"}
    assert pictures | {"run.json", "summary.json", "tensorboard", "checkpoints"} <= names
    assert "running.json" not in names
    assert [row["step"] for row in read_table(whole / "metrics.csv")] == list(range(1, STEPS + 1))
    steps = [row["step"] for row in read_table(whole / "evaluations.csv")]
    assert steps == [0, 6, 12, 18, 24, STEPS]
    assert len(list((whole / "tensorboard" / "train").iterdir())) >= 1
    assert list(checkpoints.Folder(whole / "checkpoints").steps()) == [25, 24, 20]


def test_stopped_by_a_signal_and_gone_on_with(whole, tmp_path, monkeypatch) -> None:
    """In the middle of an epoch, and with another number of workers."""
    out, step = tmp_path / "run", 14
    original = Journal.on_train_batch_end

    def stop(self, batch, logs=None):
        if self.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, batch, logs)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "on_train_batch_end", stop)
        former = signal.getsignal(signal.SIGTERM)
        summary = run.train(CONFIG, out, QUIET)
        assert signal.getsignal(signal.SIGTERM) is former
    assert (summary["stopped"], summary["steps"]) == ("SIGTERM", step)
    assert next(iter(checkpoints.Folder(out / "checkpoints").steps())) == step
    summary = run.resume(out, workers=1, console=QUIET)
    assert summary["steps"] == STEPS
    assert contents(out) == contents(whole)


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_killed_and_gone_on_with(whole, tmp_path) -> None:
    """SIGKILL, for real, once the first checkpoint is there; then a torn checkpoint as well."""
    from qpool.studies import resume_soak

    out = tmp_path / "run"
    settings = {k: v for k, v in dataclasses.asdict(CONFIG).items() if v is not None}
    path = tmp_path / "run.toml"
    path.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items()))
    process = resume_soak.command("train", out, 2, f"--config={path}")
    seen = threading.Event()
    while process.poll() is None and not checkpoints.Folder(out / "checkpoints").steps():
        seen.wait(0.01)
    process.kill()
    process.communicate()
    assert not (out / "summary.json").exists()
    steps = checkpoints.Folder(out / "checkpoints").steps()
    assert steps
    if len(steps) > 1:
        next(iter(steps.values())).write_bytes(b"torn")
    run.resume(out, workers=3, console=QUIET)
    assert contents(out) == contents(whole)


def test_samples_are_those_of_the_checkpoint(whole) -> None:
    rows, columns = run.sample(whole, 40)
    assert rows.shape == (40, 2)
    assert columns == ("petal length (cm)", "petal width (cm)")
    np.testing.assert_array_equal(rows, run.sample(whole, 40)[0])
    best = checkpoints.Folder(whole / "checkpoints").best
    found = [run.sample(whole, 40, checkpoint=which)[0] for which in ("best", str(best))]
    np.testing.assert_array_equal(*found)
    assert np.abs(run.sample(whole, 40, seed=1)[0] - rows).max() > 1e-3
    with pytest.raises(ConfigurationError, match="count"):
        run.sample(whole, 0)


def test_what_is_no_run_or_in_use_or_of_another_format(whole, tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="not a run of qpool"):
        run.resume(tmp_path)
    with pytest.raises(ConfigurationError, match="qpool resume"):
        run.train(CONFIG, whole)
    asked = json.loads((whole / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**asked, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        run.resume(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(asked))
    parent = psutil.Process().parent()
    mark = {"pid": parent.pid, "created": parent.create_time()}
    (tmp_path / "running.json").write_text(json.dumps(mark))
    with pytest.raises(ConfigurationError, match=f"in use by process {parent.pid}"):
        run.resume(tmp_path)


def test_a_run_that_could_not_be_begun_can_be_begun_again(tmp_path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "running.json").write_text("{")  # of one that was killed while it started
    broken = dataclasses.replace(CONFIG, readout="density", strategy="cpu_batch", steps=1)
    with pytest.raises(ConfigurationError, match="makes samples of shape"):
        run.train(broken, out, QUIET)
    summary = run.train(dataclasses.replace(broken, readout="positions"), out, QUIET)
    assert summary["steps"] == 1


def test_a_strategy_that_was_measured_is_the_runs_own(tmp_path, monkeypatch) -> None:
    """It is written down with the run, and one that is gone on with measures nothing."""
    choice = Choice(Candidate("threads", 2, tile=4), 16, {"threads": 1.0}, {}, 1.0, "today")
    asked = []

    def choose(model, z, options, *, within):
        asked.append((z.shape, within))
        return choice

    monkeypatch.setattr(executor, "choose", choose)
    config = dataclasses.replace(CONFIG, strategy="auto", workers=None, steps=9)
    out = tmp_path / "run"
    run.train(config, out, QUIET)
    assert asked == [((CONFIG.batch_size, 4), "xla")]
    chosen = json.loads((out / "run.json").read_text())["chosen"]
    assert (chosen["strategy"], chosen["workers"], chosen["tile"]) == ("threads", 2, 4)
    first = (out / "metrics.csv").read_bytes()
    max((out / "checkpoints").glob("step-*.npz")).unlink()
    run.resume(out, workers=1, console=QUIET)
    assert (out / "metrics.csv").read_bytes() == first
    assert len(asked) == 1


def test_data_that_changed_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).normal(size=(40, 2))
    np.save("rows.npy", rows)
    config = dataclasses.replace(CONFIG, data="rows.npy", strategy="cpu_batch", steps=1)
    run.train(config, tmp_path / "run", QUIET)
    monkeypatch.chdir("/")
    assert run.sample(tmp_path / "run", 3)[0].shape == (3, 2)
    np.save(tmp_path / "rows.npy", 7 * rows + 3)
    with pytest.raises(DataError, match="not those that this run was begun with"):
        run.sample(tmp_path / "run", 3)


def test_both_rates_fall_over_the_whole_run(tmp_path, monkeypatch) -> None:
    rates = []

    def note(self, batch, logs=None):
        optimizers = self.model.generator_optimizer, self.model.critic_optimizer
        rates.append([float(optimizer.learning_rate) for optimizer in optimizers])

    monkeypatch.setattr(Journal, "on_train_batch_begin", note)
    config = dataclasses.replace(CONFIG, strategy="cpu_batch", critic_steps=3, steps=9)
    run.train(config, tmp_path / "run", QUIET)
    start = np.array(rates[0])
    np.testing.assert_allclose(start, 0.01, rtol=1e-6)
    np.testing.assert_allclose(rates[3], start * (1 + np.cos(np.pi * 3 / 9)) / 2, rtol=1e-4)


def test_a_checkpoint_of_another_model_is_refused(whole, tmp_path) -> None:
    asked = json.loads((whole / "run.json").read_text())
    asked["config"] |= {"layers": 2, "strategy": "cpu_batch"}
    (tmp_path / "run.json").write_text(json.dumps(asked))
    folder = checkpoints.Folder(tmp_path / "checkpoints")
    folder.write(checkpoints.Folder(whole / "checkpoints").newest()[0])
    with pytest.raises(CheckpointError, match=r"of another model: generator/0 is \(1, 1\) there"):
        run.sample(tmp_path, 4)
