"""What is written down while a run trains, and when: a Keras callback.

Owns the CSV files, the evaluations, the moments of checkpoints, and the end that a signal asks for.
Every row and every checkpoint follow from the step's number, not from the clock, so that a run that
is gone on with writes the same ones.
"""

from __future__ import annotations

import csv
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from qpool import states
from qpool.measure.monitor import Monitor
from qpool.training import distance, sampling
from qpool.training.checkpoints import Checkpoint, Folder
from qpool.training.config import Config
from qpool.training.data import DataSet
from workers.errors import DivergedError

#: Is told the number of a step that is done, its figures, and those of its evaluation, if any.
Watch = Callable[[int, dict[str, float], dict[str, float] | None], None]

#: Mean weight of states inside the cutoff with which a run does not go on.
_LOST = 0.5

#: Generated samples for an evaluation and the picture.
SAMPLES = 512

_METRICS = ("step", "generator_loss", "critic_loss", "gradient_norm", "ket_norm")
_EVALUATIONS = ("step", "energy_distance", "coverage", "ket_norm")
_WORKERS = ("step", "seconds", "worker", "cpu_use")


class Journal(keras.callbacks.Callback):
    """Follows a run from ``begin`` to ``close``. ``step`` is how many steps are done; ``stopped``
    names the signal that ended the run before its time."""

    def __init__(
        self,
        config: Config,
        out: Path,
        rows: DataSet,
        trainer: Any,
        folder: Folder,
        watch: Watch | None = None,
    ) -> None:
        super().__init__()
        self.step = 0
        self.stopped = ""
        self._config = config
        self._rows = rows
        self._trainer = trainer
        self._folder = folder
        self._watch = watch
        self._best = float("inf")
        self._enough = 0.95
        self._asked = ""
        self._handlers: dict[int, Any] = {}
        self._metrics = _Table(out / "metrics.csv", _METRICS)
        self._evaluations = _Table(out / "evaluations.csv", _EVALUATIONS)
        self._workers = _Table(out / "workers.csv", _WORKERS)
        self._monitor = Monitor(trainer.generator)

    def begin(self, start: Checkpoint | None) -> None:
        """Take over where a checkpoint stands; without one, begin at the beginning."""
        if start is not None:
            self._trainer.restore(start.arrays)
            self.step, self._best = start.step, start.best
        for table in (self._metrics, self._evaluations, self._workers):
            table.open(-1 if start is None else self.step)
        if start is None:
            self._evaluate()
            self._best = float("inf")  # the best is one that was trained
        else:
            self._executor.calls = start.calls
        self._monitor.sample()  # what was before does not count

    def summary(self) -> dict[str, Any]:
        """Distances before, after and at best, the floor, and the last evaluation."""
        rows = self._evaluations.read()
        distances = {
            "before": rows[0]["energy_distance"],
            "after": rows[-1]["energy_distance"],
            "best": min(row["energy_distance"] for row in rows),
            "floor": distance.real_against_real(self._rows.rows),
        }
        last = {name: rows[-1][name] for name in ("coverage", "ket_norm")}
        used: dict[int, list[float]] = {}
        for row in self._workers.read():
            used.setdefault(int(row["worker"]), []).append(row["cpu_use"])
        use = [float(np.mean(values)) for _, values in sorted(used.items())]
        return {"energy_distance": distances, **last, "cpu_use_of_workers": use}

    # -- Keras's moments -------------------------------------------------------------------

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Have Ctrl-C and SIGTERM write a checkpoint first."""
        if threading.current_thread() is threading.main_thread() and not self._handlers:
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is signal.SIG_IGN:
                    continue  # whoever started this process decides
                self._handlers[number] = signal.signal(number, self._ask)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.step += 1
        last = self.step == self._config.steps
        figures = {name: float((logs or {})[name]) for name in _METRICS[1:]}
        if not all(map(math.isfinite, figures.values())):
            raise DivergedError(f"step {self.step} made {figures}. {self._way_out()}")
        self._metrics.add(self.step, *figures.values())
        best = False
        evaluated = last or self.step % self._config.evaluate_every == 0
        if evaluated:
            best = self._evaluate()
            self._note_workers()
            kept = self._evaluations.last["ket_norm"]
            if kept < _LOST:
                raise DivergedError(
                    f"at step {self.step} states have {kept:.3f} of their weight inside the "
                    f"cutoff, in the mean: what is read of them means little. {self._way_out()}"
                )
        if best or last or self._asked or self.step % self._config.checkpoint_every == 0:
            self._write(best=best)
        if self._asked:
            self.stopped = self._asked if not last else ""
            self.model.stop_training = True
        if self._watch is not None:
            self._watch(self.step, figures, self._evaluations.last if evaluated else None)

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def finish(self) -> None:
        """Write down what is not yet."""
        for table in (self._metrics, self._evaluations, self._workers):
            table.flush()

    # -- within ----------------------------------------------------------------------------

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked:  # twice: now
            raise KeyboardInterrupt
        self._asked = signal.Signals(number).name

    @property
    def _executor(self) -> Any:
        return self._trainer.generator._qpool.executor()

    def _way_out(self) -> str:
        kept = next(iter(self._folder.steps()), None)
        return (
            f"{'Nothing is kept' if kept is None else f'The checkpoint of step {kept} is kept'}: "
            "try a smaller generator_rate or critic_rate, clip_norm=1, a larger norm_penalty or a "
            "higher cutoff"
        )

    def _evaluate(self) -> bool:
        """Compare the generator with the data; whether it was never closer."""
        config = self._config
        with self._trainer.gan.averaged():
            made, norms = sampling.samples_and_norms(
                self._trainer.generator, SAMPLES, config.batch_size, config.seed
            )
        if norms.mean() < self._enough:
            states.warn_of_leakage(norms, self._enough)
            self._enough = norms.mean() - 0.05  # again when it has become worse
        found = distance.mean_distance(made, self._rows.rows)
        covered = distance.coverage(made, self._rows.rows)
        self._evaluations.add(self.step, found, covered, float(norms.mean()))
        better, self._best = found < self._best, min(found, self._best)
        return better

    def _note_workers(self) -> None:
        sample = self._monitor.sample()
        for worker in sample.workers:
            self._workers.add(self.step, sample.seconds, worker.worker, worker.cpu_use)

    def _write(self, *, best: bool) -> None:
        self.finish()
        arrays = self._trainer.arrays()
        at = Checkpoint(self.step, self._executor.calls, self._best, arrays)
        self._folder.write(at, best=best)


class _Table:
    """A CSV file of numbers whose first column is the step."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self._path = path
        self._columns = columns
        self._pending: list[list[Any]] = []
        #: The row that was added last.
        self.last: dict[str, float] = {}

    def open(self, step: int) -> None:
        """Begin, or go on: rows after ``step`` are of a run that was interrupted, and go."""
        kept = [row for row in self.read() if row["step"] <= step] if self._path.exists() else []
        beside = self._path.with_suffix(".part")
        with beside.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self._columns)
            for row in kept:
                writer.writerow([_plain(row[name]) for name in self._columns])
        beside.replace(self._path)

    def add(self, *values: Any) -> None:
        self._pending.append([_plain(value) for value in values])
        self.last = dict(zip(self._columns, map(float, values), strict=True))

    def flush(self) -> None:
        """Put the rows on disk."""
        if self._pending:
            with self._path.open("a", newline="") as file:
                csv.writer(file).writerows(self._pending)
                file.flush()
                os.fsync(file.fileno())
            self._pending = []

    def read(self) -> list[dict[str, float]]:
        """The rows that are whole: a run may have been killed while it wrote one."""
        self.flush()
        return read_table(self._path)


def read_table(path: Path) -> list[dict[str, float]]:
    """The whole rows of a CSV file of numbers, by column."""
    with path.open(newline="") as file:
        columns, *lines = list(csv.reader(file)) or [[]]
    found = []
    for line in lines:
        try:
            found.append({n: float(v) for n, v in zip(columns, line, strict=True)})
        except ValueError:
            break
    return found


def _plain(value: Any) -> Any:
    """A number as it is written: whole ones without a point, others with all their digits."""
    value = float(value)
    return int(value) if value.is_integer() and abs(value) < 2**53 else repr(value)
