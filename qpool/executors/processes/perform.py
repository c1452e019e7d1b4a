"""A step carried out: what ``dispatch`` instructs, done by the ``supervisor``.

Owns telling a worker what it lacks before it is sent work (segment, model, plan, frame), and the
loop from instructions to events and back. Decides nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import textwrap
import time
from collections.abc import Callable, Hashable
from typing import Any

from qpool.children.process import WorkerProcess
from qpool.executors.arena_pool import Assignment
from qpool.executors.processes.dispatch import Complete, Finished, GiveUp, Instruction, Send, Step
from qpool.executors.processes.supervisor import Supervisor
from qpool.executors.shared_arrays import SharedArrays
from qpool.executors.shares import learn
from workers.errors import RemoteError, StartupError, WorkerLostError
from workers.exchange import protocol
from workers.exchange.protocol import Kind

#: What is sent for a shard: (ticket, tiles) -> message.
Message = Callable[[int, tuple[int, ...]], Any]

#: How many of the last things computed, by plan and kind, a new worker rehearses.
_REHEARSED = 8


@dataclasses.dataclass
class Performer:
    """Carries out steps. ``sending`` and ``waiting`` are seconds of wall time spent so; ``retried``
    counts tiles that were given to another worker after the first was lost."""

    supervisor: Supervisor
    shared: SharedArrays
    seed: int
    sending: float = 0.0
    waiting: float = 0.0
    retried: int = 0
    #: Of workers on different devices, against each other; empty where all are alike.
    speeds: dict[int, float] = dataclasses.field(default_factory=dict)
    _ticket: int = 1
    #: What was computed last, for each plan and kind: what a new worker rehearses.
    _recent: dict[tuple[int, Kind], tuple[protocol.Plan, protocol.Frame]] = dataclasses.field(
        default_factory=dict
    )

    def perform(
        self,
        model: int,
        number: int,
        message: Message,
        assignment: Assignment | None = None,
        plan: protocol.Plan | None = None,
        frame: protocol.Frame | None = None,
        kind: Kind | None = None,
    ) -> tuple[Step, list[Any]]:
        """Run a step of ``number`` tiles to its end, and return it with the replies.

        ``kind`` is what is computed for each tile, None for anything else that is asked.
        """
        if plan is not None and frame is not None and kind is not None:
            self._recent.pop((plan.plan, kind), None)
            self._recent[plan.plan, kind] = plan, frame
            while len(self._recent) > _REHEARSED:
                del self._recent[next(iter(self._recent))]
        speeds = self.speeds if kind is not None else {}
        step = Step(number, list(self.supervisor.ready), self._ticket, assignment, speeds)
        seconds: dict[int, float] = {}
        replies: list[Any] = []
        todo: list[Instruction] = step.begin()
        try:
            while True:
                began = time.perf_counter()
                while todo:
                    instruction = todo.pop(0)
                    if isinstance(instruction, Complete):
                        if seconds:
                            done = collections.Counter(step.done_by.values())
                            self.speeds = learn(speeds, {n: done[n] for n in seconds}, seconds)
                        return step, replies
                    if isinstance(instruction, GiveUp):
                        if instruction.error is None:
                            self.supervisor.launcher.drop_compiled()
                        raise failure_of(instruction, frame, of_tiles=kind is not None)
                    # A worker may have died since the instruction to send it something was given.
                    if step.expects(instruction.ticket):
                        todo += self._send(step, instruction, model, message, plan, frame, kind)
                sent = time.perf_counter()
                self.sending += sent - began
                for event, reply in self.supervisor.events():
                    if isinstance(event, Finished):
                        replies.append(reply)
                        if speeds:
                            spent = sum(reply.tile_seconds)
                            seconds[event.worker] = seconds.get(event.worker, 0.0) + spent
                    todo += step.on(event)
                self.waiting += time.perf_counter() - sent
        finally:
            self._ticket = step.next_ticket
            self.retried += step.retried

    def _send(
        self,
        step: Step,
        instruction: Send,
        model: int,
        message: Message,
        plan: protocol.Plan | None,
        frame: protocol.Frame | None,
        kind: Kind | None,
    ) -> list[Instruction]:
        """Tell a worker what it lacks, then what to compute."""
        worker = self.supervisor.ready[instruction.worker]
        kinds: list[Hashable] = []
        if plan is not None and frame is not None and kind is not None:
            kinds = [_kind_of_tile(plan, frame, kind, n) for n in instruction.tiles]
        try:
            messages = self._news(worker, model, plan, frame)
            messages.append(message(instruction.ticket, instruction.tiles))
            self.supervisor.send(worker, instruction.ticket, messages, kinds)
        except OSError:
            return step.on(self.supervisor.bury(worker))
        except BaseException:
            worker.kill()  # it may lack what is noted as told, or have got half a message
            raise
        return []

    def rehearsal(self, worker: WorkerProcess) -> list[Any]:
        """What a new worker is told so that it takes part without having to compile anything."""
        messages: list[Any] = []
        for (_, kind), (plan, frame) in self._recent.items():
            version = self.shared.models[plan.model].version
            messages += self._news(worker, plan.model, plan, frame)
            messages.append(protocol.Rehearse(kind, plan.plan, frame.frame, version))
            worker.seen.add(_kind_of_tile(plan, frame, kind, 0))
        return messages

    def forget_rehearsals(self, model: int | None = None) -> None:
        """Of a model that is no more; of all, when what lies in the arena has moved."""
        self._recent = {
            key: (plan, frame)
            for key, (plan, frame) in self._recent.items()
            if model not in (None, plan.model)
        }

    def _news(
        self,
        worker: WorkerProcess,
        model: int,
        plan: protocol.Plan | None,
        frame: protocol.Frame | None,
    ) -> list[Any]:
        """What a worker has to be told before it can work on this; often nothing."""
        messages = self.model_news(worker, model)
        for key, definition in (
            (("plan", plan and plan.plan), plan),
            (("frame", frame and frame.frame), frame),
        ):
            if definition is not None and worker.told.get(key) is not definition:
                worker.told[key] = definition
                messages.append(definition)
        return messages

    def model_news(self, worker: WorkerProcess, number: int) -> list[Any]:
        """What a worker has to be told before it can work on a model; often nothing."""
        shared = self.shared
        news: list[Any] = []
        if worker.told["segment"] != shared.segment:
            worker.told["segment"] = shared.segment
            news.append(protocol.Remap(shared.segment))
        model, key = shared.models[number], ("model", number)
        if worker.told.get(key) is not model.places:
            if key in worker.told:
                news.append(protocol.Place(number, model.places))
            else:
                news.append(
                    protocol.Build(number, model.shipment, model.places, self.seed, model.engine)
                )
            worker.told[key] = model.places
        return news


def _kind_of_tile(plan: protocol.Plan, frame: protocol.Frame, kind: Kind, index: int) -> Hashable:
    """Tiles of one kind take about as long as each other, once one has been computed."""
    rows = min(frame.tile, frame.batch - index * frame.tile)
    tangents = tuple(source for source, _ in frame.tangents)  # each set is compiled by itself
    return plan.plan, plan.level, kind, tangents, frame.tile, rows


def failure_of(
    instruction: GiveUp, frame: protocol.Frame | None, *, of_tiles: bool = True
) -> BaseException:
    """The error to raise; ``of_tiles`` unless all workers did the same on the frame's rows."""
    if instruction.error is not None:
        return with_cause(instruction.error)
    attempts = "\n".join(textwrap.indent(cause, "  ") for cause in instruction.causes)
    if frame is None:
        return StartupError(
            f"building the model took {len(instruction.causes)} workers, one after another; the "
            f"pool is usable, without this model:\n{attempts}"
        )
    begins = frame.first * frame.tile  # where it is a part of a larger batch
    spans = [(begins + n * frame.tile, begins + (n + 1) * frame.tile) for n in instruction.tiles]
    if not of_tiles:
        spans = [(begins, begins + frame.batch)]
    rows = ", ".join(f"{start} to {min(stop, begins + frame.batch) - 1}" for start, stop in spans)
    return WorkerLostError(
        f"samples {rows} took {len(instruction.causes)} workers with them, one after another; the "
        f"pool is usable, these samples are not:\n{attempts}"
    )


def with_cause(error: BaseException) -> BaseException:
    if isinstance(error, RemoteError) and error.original is not None:
        error.__cause__ = error.original
    return error
