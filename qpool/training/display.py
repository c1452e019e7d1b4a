"""Progress for people: a live line in a terminal, plain lines elsewhere. A Keras callback.

Owns what is shown. Figures are measured over the last second or so, the workers' by a Monitor.
"""

from __future__ import annotations

import time
from typing import Any

import keras
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qpool.measure.monitor import Monitor, Sample

#: Seconds between plain lines, and between refreshes of the figures in a terminal.
_LINE_SECONDS = 10.0
_REFRESH_SECONDS = 1.0


class Display(keras.callbacks.Callback):
    """Shows steps, losses, samples/s and the CPU use of each worker."""

    def __init__(
        self, generator: Any, steps: int, batch_size: int, console: Console, first: int = 0
    ) -> None:
        super().__init__()
        self._monitor = Monitor(generator)
        self._steps = steps
        self._batch = batch_size
        self._console = console
        self._step = first
        self._last = (time.monotonic(), first)
        self._progress: Progress | None = None
        self._began = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if not self._began:  # a run of whole epochs and a part of one is two calls of fit
            self._began = True
            self._last = (time.monotonic(), self._step)
            self._monitor.sample()  # what was before does not count
        if self._console.is_terminal and self._progress is None:
            self._progress = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task(
                "train", total=self._steps, completed=self._step, figures=""
            )
            self._progress.start()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._step += 1
        now = time.monotonic()
        since, step = self._last
        period = _REFRESH_SECONDS if self._progress else _LINE_SECONDS
        if self._progress:
            self._progress.update(self._task, completed=self._step)
        if now - since < period and self._step < self._steps:
            return
        rate = (self._step - step) * self._batch / max(now - since, 1e-9)
        figures = self._figures(logs or {}, rate, self._monitor.sample())
        self._last = (now, self._step)
        if self._progress:
            self._progress.update(self._task, figures=figures)
        else:
            self._console.print(
                f"step {self._step}/{self._steps}  {figures}", highlight=False, soft_wrap=True
            )

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; also when training ended by an exception."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def _figures(self, logs: dict[str, Any], rate: float, sample: Sample) -> str:
        losses = "  ".join(
            f"{short} {float(logs[name]):+.3f}"
            for short, name in (("generator", "generator_loss"), ("critic", "critic_loss"))
            if name in logs
        )
        use = " ".join(f"{100 * worker.cpu_use:.0f}%" for worker in sample.workers)
        cpu = f"  CPU of workers {use}" if use else ""
        return f"{losses}  {rate:.0f} samples/s{cpu}"
