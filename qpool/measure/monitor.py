"""What a pool does while it works: CPU use, waiting, copying, imbalance, throttling, memory.

Every figure is a difference between two readings of counters that workers and pool keep anyway, so
watching costs a reading now and then (0.2 ms for two workers), whatever a step takes.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import keras

from qpool.measure.host import throttling
from workers.errors import ConfigurationError


@dataclasses.dataclass(frozen=True)
class WorkerSample:
    """One worker over the period.

    ``cpu_use`` is CPU seconds, as the system counts them, over wall seconds times its cores.
    ``compute`` is the share of the period in which it computed tiles, ``wait`` the rest.
    """

    worker: int
    cpu_use: float
    compute: float
    wait: float
    memory_mib: float


@dataclasses.dataclass(frozen=True)
class Sample:
    """A pool over a period of ``seconds``.

    ``coordinator`` is the share of the period that the trainer's process spent in each phase of
    calls (copy_in, weights, send, wait, copy_out). ``slowest_shard`` is the time of the slowest
    shard of each step over the mean of its shards: 1 if all end together. ``throttled`` is how
    many seconds the cgroup's quota held processes back, ``hot`` how often a core was slowed down
    for its heat; both None where the system does not tell. A worker that was replaced within the
    period is left out.
    """

    seconds: float
    samples: int
    samples_per_second: float
    workers: tuple[WorkerSample, ...]
    coordinator: dict[str, float]
    slowest_shard: float
    throttled: float | None
    hot: int | None
    replaced_workers: int

    @property
    def cpu_use(self) -> float:
        """The mean over workers; 0 without any."""
        return sum(w.cpu_use for w in self.workers) / max(len(self.workers), 1)

    def figures(self) -> dict[str, float]:
        """All of it by name, flat, as TensorBoard takes it."""
        found = {
            "samples_per_second": self.samples_per_second,
            "slowest_shard": self.slowest_shard,
            "replaced_workers": float(self.replaced_workers),
            **{f"coordinator/{phase}": share for phase, share in self.coordinator.items()},
        }
        for worker in self.workers:
            for name, value in dataclasses.asdict(worker).items():
                if name != "worker":
                    found[f"worker {worker.worker}/{name}"] = value
        for name in ("throttled", "hot"):
            if getattr(self, name) is not None:
                found[name] = float(getattr(self, name))
        return found


def _pooled(generator: Any) -> Any:
    if not callable(getattr(generator, "stats", None)):
        raise ConfigurationError(
            f"{type(generator).__name__} is not pooled, and counts nothing: give the monitor what "
            "qpool.parallelize(...) returned"
        )
    return generator


class Monitor:
    """Reads a pooled generator's counters; each ``sample`` is of the time since the last.

        monitor = qpool.measure.Monitor(generator)
        ...
        print(monitor.sample())  # samples a second, CPU and memory, measured

    Raises:
        ConfigurationError: what is to be read is not pooled.
    """

    def __init__(self, generator: Any) -> None:
        self._generator = _pooled(generator)
        self._last = self._read()

    def sample(self) -> Sample:
        """What happened since the last sample, or since the monitor was made."""
        before, now = self._last, self._read()
        self._last = now
        seconds = max(now["time"] - before["time"], 1e-9)
        pool, former = now["pool"], before["pool"]
        samples = max(0, now["samples"] - before["samples"])
        workers = tuple(
            WorkerSample(
                worker["worker"],
                (worker["cpu_seconds"] - earlier["cpu_seconds"]) / (seconds * _cores(worker)),
                computing := (worker["compute_seconds"] - earlier["compute_seconds"]) / seconds,
                max(0.0, 1.0 - computing),
                worker["memory_bytes"] / 2**20,
            )
            for worker, earlier in zip(
                pool.get("workers", ()), former.get("workers", ()), strict=False
            )
            if worker["pid"] == earlier["pid"] and worker["pid"] is not None
        )
        phases = pool.get("seconds", {})
        earlier_phases = former.get("seconds", {})
        mean = _difference(pool, former, "mean_shard_seconds")
        return Sample(
            seconds,
            samples,
            samples / seconds,
            workers,
            {name: (s - earlier_phases.get(name, 0.0)) / seconds for name, s in phases.items()},
            _difference(pool, former, "slowest_shard_seconds") / mean if mean else 1.0,
            _change(before["throttled"], now["throttled"]),
            _change(before["hot"], now["hot"]),
            int(_difference(pool, former, "replaced_workers")),
        )

    def _read(self) -> dict[str, Any]:
        stats = self._generator.stats()
        throttled, hot = throttling()
        return {
            "time": time.perf_counter(),
            "pool": stats.get("pool", {}),
            "samples": stats.get("samples", 0),
            "throttled": throttled,
            "hot": hot,
        }


class MonitorCallback(keras.callbacks.Callback):
    """Writes samples during ``fit``: to TensorBoard, to a file of JSON lines, or both.

    ``generator`` is pooled. A sample is taken after the step that ends a period of ``every``
    seconds, and at the end. ``tensorboard`` is a directory, ``jsonl`` a file that lines are
    appended to. ``samples`` has them all.
    """

    def __init__(
        self,
        generator: Any,
        every: float = 1.0,
        *,
        tensorboard: Path | str | None = None,
        jsonl: Path | str | None = None,
    ) -> None:
        super().__init__()
        self.samples: list[Sample] = []
        self._generator = _pooled(generator)
        self._every = every
        self._jsonl = None if jsonl is None else Path(jsonl)
        self._tensorboard = tensorboard
        self._writer: Any = None
        self._step = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if self._tensorboard is not None:
            import tensorflow as tf

            self._writer = tf.summary.create_file_writer(str(self._tensorboard))
        self._monitor = Monitor(self._generator)
        self._since = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._step += 1
        if time.perf_counter() - self._since >= self._every:
            self._take()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._take()
        if self._writer is not None:
            self._writer.close()

    def _take(self) -> None:
        sample = self._monitor.sample()
        self._since = time.perf_counter()
        self.samples.append(sample)
        if self._jsonl is not None:
            line = {"step": self._step, **dataclasses.asdict(sample)}
            with self._jsonl.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self._writer is not None:
            import tensorflow as tf

            with self._writer.as_default(self._step):
                for name, value in sample.figures().items():
                    tf.summary.scalar(f"qpool/{name}", value)


def _cores(worker: dict[str, Any]) -> int:
    """How many cores a worker may keep busy: those it is pinned to, or its threads."""
    if worker.get("pinned"):
        return max(len(worker["cores"]), 1)
    return max(worker.get("threads", {}).get("tensorflow_intra_op", 1), 1)


def _difference(now: dict[str, Any], before: dict[str, Any], name: str) -> float:
    return now.get(name, 0.0) - before.get(name, 0.0)


def _change(before: Any, now: Any) -> Any:
    return None if before is None or now is None else now - before
