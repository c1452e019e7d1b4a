"""The process that runs of a campaign have to themselves, on this machine.

    Begin -> pin, bound threads -> Report* -> Ended      and again, for a job of an equal program

Owns the process: its cores, its output, its signals, its end with the coordinator. Jobs of one
program follow each other in it and share what is compiled; others get a fresh one, since what
TensorFlow keeps of a model that is gone is gone with its process alone.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from qpool.training.campaign import job as jobs
from workers import cache
from workers.exchange import protocol
from workers.process import affinity
from workers.process.entry import die_with


@dataclasses.dataclass(frozen=True)
class Begin:
    """A job, and the cores it is for. Until its first report it may use all ``compiling`` ones."""

    job: jobs.Job
    cores: tuple[int, ...]
    compiling: tuple[int, ...]
    threads: int
    coordinator: int
    path: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Stop:
    """End as SIGTERM would have it: with a checkpoint, where there can be one."""


def serve(
    channel: Connection, segment: int | None, log: int | None, forkserver: int | None = None
) -> None:
    """Run jobs that come over ``channel``; ``log`` takes the traceback of a fatal signal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinator decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.enable(sys.stderr if log is None else log)
    for handle in (channel.fileno(), log):
        if handle is not None and sys.platform != "win32":
            os.set_inheritable(handle, False)
    try:
        begin: Begin = protocol.decode(channel.recv_bytes())
    except (EOFError, OSError):
        return
    die_with(begin.coordinator, forkserver)
    sys.path[:] = begin.path
    affinity.pin(begin.compiling)
    os.environ |= affinity.environment(begin.threads)
    os.environ |= cache.environment(begin.threads)
    waiting: queue.SimpleQueue[Begin] = queue.SimpleQueue()
    kept = None
    threading.Thread(target=_listen, args=(channel, waiting), daemon=True).start()
    while True:
        with jobs.output_to(Path(begin.job.log)):
            if kept is None:
                import tensorflow as tf

                from qpool.training.building import Kept

                affinity.bound_tensorflow(begin.threads)
                tf.constant(0.0)  # TensorFlow's runtime starts here, within its bounds
                kept = Kept()
            ended = _run(begin, channel, kept)
        _send(channel, ended)
        begin = waiting.get()


def _run(begin: Begin, channel: Connection, kept: object) -> jobs.Ended:
    affinity.pin(begin.compiling)
    compiling = begin.compiling != begin.cores

    def say(report: jobs.Report) -> None:
        nonlocal compiling
        if compiling:
            compiling = False
            affinity.pin(begin.cores)
        _send(channel, report)

    return jobs.run(begin.job, say, kept)  # type: ignore[arg-type]


def _send(channel: Connection, message: object) -> None:
    try:
        channel.send_bytes(protocol.encode(message))
    except OSError:  # the coordinator has let go of us
        os._exit(1)


def _listen(channel: Connection, waiting: queue.SimpleQueue[Begin]) -> None:
    try:
        while True:
            message = protocol.decode(channel.recv_bytes())
            if isinstance(message, Begin):
                waiting.put(message)
            else:
                jobs.stop_this_process()
    except (EOFError, OSError):
        os._exit(0)
