"""The worker process: receive, compute, reply.

    Start -> pin, bound threads, import -> Hello -> [ message -> reply ]* -> Stop or end of file

Owns the process itself: its signals, its watch over the coordinator's life, its progress counter.
What is computed is the replica's business. A worker holds no state that matters: everything it
knows it was told, and can be told again to its successor.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from workers import collector, sf_compat
from workers.errors import ArenaError, QPoolError, RemoteError, ShippingError
from workers.exchange import protocol
from workers.exchange.arena import Arena, Segment
from workers.exchange.faults import Faults
from workers.exchange.waiting import Waiter
from workers.layout import progress_counter
from workers.logs import Once, hushed
from workers.process import affinity, device
from workers.process.entry import die_with
from workers.process.memory import Memory


def serve(
    channel: Connection, segment_handle: int | None, log: int | None, forkserver: int | None = None
) -> None:
    """Run a worker over ``channel`` until it is told to stop or the coordinator is gone.

    ``segment_handle`` is the arena's file descriptor in this process (POSIX); on ``log`` a fatal
    signal leaves the traceback, which the coordinator reads. ``forkserver`` is the process that
    forked this one.
    """
    # A program that the model starts must not hold on to what tells the coordinator of our end.
    for handle in (channel.fileno(), segment_handle, log):
        if handle is not None and sys.platform != "win32":
            os.set_inheritable(handle, False)
    # The coordinator decides what Ctrl-C means; a dying one is seen on the channel.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(RuntimeError, OSError, AttributeError, ValueError):
        faulthandler.enable(sys.stderr if log is None else log)
    watch = None
    try:
        start: protocol.Start = protocol.decode(channel.recv_bytes())
        watch = die_with(start.coordinator, forkserver)
        _Worker(channel, start, segment_handle).run()
    except (EOFError, ConnectionError):  # the coordinator has let go
        if watch is not None and forkserver is not None:
            watch.join(1.5)  # if it is dead, the watch ends the forkserver and this process
        return
    except BaseException:
        with contextlib.suppress(OSError):
            channel.send_bytes(protocol.encode(protocol.Crashed(traceback.format_exc())))
        os._exit(1)


#: What a model may not expect that is called with a vector.
_ONE_AXIS = (
    ". (The first argument has one axis, which is taken for the batch: workers get some of its "
    "rows. Expected, of latent vectors: (batch, width). One vector at a time is nothing to share "
    "out: call such a method unpooled)"
)


class _Worker:
    def __init__(
        self, channel: Connection, start: protocol.Start, segment_handle: int | None
    ) -> None:
        self._channel = channel
        self._number = start.worker
        self._segment_handle = segment_handle
        self._arena = Arena.attach(self._here(start.segment))
        self._slot = start.slot
        self._spin = start.spin
        self._faults = Faults(start.faults)
        self._faults.reach("start")
        self._memory = Memory()
        sys.path[:] = start.path
        self._replicas: dict[int, Any] = {}
        self._gone = collector.Gone()
        self._models_of_plans: dict[int, int] = {}
        self._frames: dict[int, protocol.Frame] = {}
        self._handlers: dict[type, Callable[[Any], Any]] = {
            protocol.Remap: self._remap,
            protocol.Build: self._build,
            protocol.Confirm: self._confirm,
            protocol.Place: self._place,
            protocol.Plan: self._plan,
            protocol.Frame: self._frame,
            protocol.Rehearse: self._rehearse,
            protocol.Probe: self._probe,
            protocol.Compute: self._compute,
            protocol.Forget: self._forget,
            protocol.Discard: self._discard,
            protocol.Inject: self._inject,
        }
        hello = self._load(start)
        self._faults.reach("hello")
        self._send(hello)

    def _load(self, start: protocol.Start) -> protocol.Hello:
        """Be pinned and bounded before TensorFlow is there, then load it."""
        began = time.perf_counter()
        self._all_cores = affinity.current_cores()
        affinity.pin(start.cores)
        affinity.yield_to_coordinator()
        affinity.keep_memory()
        device.reveal(start.device)
        with hushed():
            sf_compat.install()
            with collector.loading():
                import strawberryfields
                import tensorflow as tf

            affinity.bound_tensorflow(start.threads)
            tf.get_logger().addFilter(Once(silent=start.worker != 0))  # all run the same code
            self._scope = device.scope(start.device)
            tf.constant(0.0)  # TensorFlow's runtime starts here, within its bounds
        cores = affinity.pin(start.cores)  # again: a library may have reset it while loading
        return protocol.Hello(
            pid=os.getpid(),
            cores=cores,
            pinned=bool(start.cores) and cores == tuple(sorted(start.cores)),
            threads=affinity.thread_counts(),
            versions={
                "python": sys.version.split()[0],
                "tensorflow": tf.__version__,
                "strawberryfields": strawberryfields.__version__,
                "numpy": np.__version__,
            },
            import_seconds=time.perf_counter() - began,
        )

    def run(self) -> None:
        waiter: Waiter[None] = Waiter(self._spin)
        waiter.add(None, self._channel)
        while True:
            waiter.wait(None)
            message = protocol.decode(self._channel.recv_bytes())
            self._faults.reach("loop")
            if isinstance(message, protocol.Stop):
                return
            ticket = getattr(message, "ticket", 0)
            try:
                with self._scope:
                    reply = self._handlers[type(message)](message)
            except Exception as error:
                if _out_of_memory(error):
                    raise  # it is a matter of this process, whose successor starts with none used
                reply = protocol.Failed(ticket, self._finished(), self._remote(error, message))
            if reply is not None:
                self._faults.reach("answer")
                self._send(reply)

    # -- one method a message --------------------------------------------------------------

    def _remap(self, message: protocol.Remap) -> None:
        self._arena.remap(self._here(message.segment))
        for replica in self._replicas.values():
            replica.weights.distrust()  # they may lie over the former mapping

    def _build(self, message: protocol.Build) -> None:
        from workers.replica.replica import Replica

        self._faults.reach("build")
        in_force = next((r.settings for r in self._replicas.values()), None)
        try:
            self._replicas[message.model] = Replica(message, in_force)
        except ModuleNotFoundError as error:
            raise ShippingError(
                f"a worker on {platform.node()} cannot import {error.name!r}, which the model "
                "needs: install it there, or put the code in the main script, which travels along"
            ) from error

    def _confirm(self, message: protocol.Confirm) -> protocol.Confirmed:
        if message.model is not None:
            _ = self._replicas[message.model]
        return protocol.Confirmed(message.ticket, self._finished())

    def _place(self, message: protocol.Place) -> None:
        self._replicas[message.model].weights.place(message.weights)

    def _plan(self, message: protocol.Plan) -> None:
        self._models_of_plans[message.plan] = message.model
        self._replicas[message.model].add_plan(message)

    def _frame(self, message: protocol.Frame) -> None:
        self._frames[message.frame] = message

    def _probe(self, message: protocol.Probe) -> protocol.Probed:
        replica = self._replicas[self._models_of_plans[message.plan]]
        frame = self._frames[message.frame]
        with affinity.anywhere(self._all_cores):  # what one compiles, others wait for
            return replica.probe(message, frame, self._finished(), self._arena.views)

    def _rehearse(self, message: protocol.Rehearse) -> None:
        replica = self._replicas[self._models_of_plans[message.plan]]
        frame = self._frames[message.frame]
        replica.rehearse(
            message.plan, frame, message.weights_version, message.kind, self._arena.views
        )

    def _compute(self, message: protocol.Compute) -> protocol.Computed:
        moments = [time.perf_counter()]
        buffer = self._arena.views
        replica = self._replicas[self._models_of_plans[message.plan]]
        frame = self._frames[message.frame]
        recomputed = replica.recomputed
        backward = message.kind in (protocol.Kind.BACKWARD, protocol.Kind.SECOND)
        self._faults.reach("load")
        replica.load(message.plan, message.weights_version, buffer)
        progress = progress_counter(self._arena.buffer, self._slot)
        moments.append(time.perf_counter())
        for index in message.tiles:
            self._faults.reach("backward" if backward else "forward")
            replica.compute(message.kind, message.plan, frame, message.call, index, buffer)
            moments.append(time.perf_counter())
            self._faults.reach("written")
            progress += 1
        return protocol.Computed(
            message.ticket,
            self._finished(),
            tuple(moments),
            time.process_time(),
            self._memory.own(),
            replica.recomputed - recomputed,
        )

    def _inject(self, message: protocol.Inject) -> None:
        self._faults.add(message.faults)

    def _forget(self, message: protocol.Forget) -> None:
        for replica in self._replicas.values():
            replica.forget(message.calls)

    def _discard(self, message: protocol.Discard) -> None:
        self._replicas.pop(message.model, None)
        gone = [plan for plan, model in self._models_of_plans.items() if model == message.model]
        for plan in gone:
            del self._models_of_plans[plan]
        self._gone.one_more()

    # -- within ----------------------------------------------------------------------------

    def _send(self, reply: Any) -> None:
        self._channel.send_bytes(protocol.encode(reply))

    def _finished(self) -> int:
        return int(progress_counter(self._arena.buffer, self._slot)[0])

    def _here(self, segment: Segment) -> Segment:
        """The segment by the descriptor that it has in this process."""
        if isinstance(segment.handle, int) and self._segment_handle is not None:
            return replace(segment, handle=self._segment_handle)
        return segment

    def _remote(self, error: Exception, message: Any) -> QPoolError:
        """The error as the coordinator will see it, with the original where it pickles."""
        text = traceback.format_exc()
        where = type(message).__name__.lower()
        if isinstance(message, protocol.Compute):
            where = f"{message.kind.value}, tiles {message.tiles}"
        if isinstance(error, QPoolError):
            error.__cause__ = error.__context__ = None
            return error
        summary = f"{type(error).__name__}: {error}"
        if isinstance(message, protocol.Probe):
            inputs = self._frames[message.frame].inputs
            if [len(placed.spec.shape) for placed in inputs] == [1]:
                summary += _ONE_AXIS
        return RemoteError(
            summary,
            worker=self._number,
            where=where,
            traceback=text,
            original=_picklable(error),
        )


def _out_of_memory(error: Exception) -> bool:
    import tensorflow as tf

    exhausted = isinstance(error, MemoryError | tf.errors.ResourceExhaustedError)
    return exhausted and not isinstance(error, ArenaError)


def _picklable(error: Exception) -> Exception | None:
    with contextlib.suppress(Exception):
        error = error.with_traceback(None)
        error.__cause__ = error.__context__ = None
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    return None
