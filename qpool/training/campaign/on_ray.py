"""Runs placed on the nodes of a Ray cluster, by Ray's own scheduler: a task each.

Owns how a run becomes a task. A task has a process of its own and as many CPUs as a run has cores;
one whose node or process is lost is begun again by Ray, and goes on from its checkpoint. All nodes
must see the campaign's directory under the same path.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qpool.executors.cluster import connect
from qpool.training.campaign import job as jobs
from qpool.training.campaign.job import Ended, Job, Report
from qpool.training.campaign.records import FAILED
from qpool.training.campaign.runners import Runners
from workers import cache
from workers.process import affinity

#: How often Ray begins a run again whose process or node was lost.
_AGAIN = 3


class RayRunners(Runners):
    """As many runs side by side as the cluster has CPUs."""

    def __init__(self, address: str | None, each: int, most: int | None, threads: int) -> None:
        self._ray = connect.ray()
        connect.connect(address)
        from ray.util.queue import Queue

        cpus = sum(place.cpus // each for place in connect.places().values())
        self.count = max(1, cpus if most is None else min(cpus, most))
        self.cores_each = each
        self._mailbox = Queue(actor_options={"num_cpus": 0})
        self._task = self._ray.remote(
            num_cpus=each,
            max_calls=1,  # what TensorFlow keeps of a model goes with its process alone
            max_retries=_AGAIN,
            runtime_env={"env_vars": affinity.environment(threads)},
        )(_run)
        self._running: dict[str, Any] = {}
        self._threads = threads

    def ready(self, job: Job) -> bool:
        return True

    def start(self, job: Job) -> None:
        self._running[job.name] = self._task.remote(job, self._threads, sys.path, self._mailbox)

    def wait(self, seconds: float) -> list[tuple[str, Report | Ended]]:
        said: list[tuple[str, Report | Ended]] = []
        tasks = {task: name for name, task in self._running.items()}
        if tasks:
            done, _ = self._ray.wait(list(tasks), timeout=seconds)
            if not self._mailbox.empty():
                said += self._mailbox.get_nowait_batch(self._mailbox.qsize())
            for task in done:
                said.append((tasks[task], self._end(task)))
                del self._running[tasks[task]]
        return said

    def _end(self, task: Any) -> Ended:
        from ray.exceptions import RayError, TaskCancelledError

        try:
            return self._ray.get(task)
        except TaskCancelledError:
            return Ended(jobs.STOPPED)
        except RayError as error:
            return Ended(FAILED, f"Ray lost it: {error}")

    def stop(self, name: str) -> None:
        self._ray.cancel(self._running[name], force=False)  # SIGINT there

    def kill(self, name: str) -> None:
        self._ray.cancel(self._running.pop(name), force=True)

    def close(self) -> None:
        for name in list(self._running):
            self.kill(name)
        with contextlib.suppress(Exception):  # whatever became of the cluster
            self._mailbox.shutdown(force=True)
        connect.disconnect()


def _run(job: Job, threads: int, path: Sequence[str], mailbox: Any) -> Ended:
    """The task."""
    sys.path += [entry for entry in path if entry not in sys.path]
    os.environ |= cache.environment(threads)
    with jobs.output_to(Path(job.log)):
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # its runtime is at work: in a task tried again
            affinity.bound_tensorflow(threads)
        tf.constant(0.0)
        return jobs.run(job, lambda report: mailbox.put((job.name, report)))
