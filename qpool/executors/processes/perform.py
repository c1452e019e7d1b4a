"""A step carried out: what ``dispatch`` instructs, done by the ``supervisor``.

Owns telling a worker what it lacks before it is sent work (segment, model, plan, frame), and the
loop from instructions to events and back. Decides nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import textwrap
import time
from collections.abc import Callable, Hashable
from typing import Any

from qpool import tiles
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


@dataclasses.dataclass(eq=False)
class Work:
    """What workers are asked for: ``kind``, of each tile of the batch that lies in ``frame``, or
    something else with a model, which no tiles belong to."""

    model: int
    plan: protocol.Plan | None = None
    frame: protocol.Frame | None = None
    kind: Kind | None = None

    @functools.cached_property
    def kinds(self) -> tuple[Hashable, ...]:
        """The kind of each tile: tiles of one kind take about as long as each other, once one has
        been computed."""
        plan, frame = self.plan, self.frame
        if plan is None or frame is None or self.kind is None:
            return ()
        tangents = tuple(source for source, _ in frame.tangents)  # each set is compiled by itself
        of_all = plan.plan, plan.level, self.kind, tangents, frame.tile
        number = tiles.count(frame.batch, frame.tile)
        last = (*of_all, frame.batch - (number - 1) * frame.tile)
        return *[(*of_all, frame.tile)] * (number - 1), last


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
    #: By frame, of which there is one for each kind of work and size of batch.
    _works: dict[int, Work] = dataclasses.field(default_factory=dict)
    #: What was computed last, for each plan and kind: what a new worker rehearses.
    _recent: dict[tuple[int, Kind], Work] = dataclasses.field(default_factory=dict)

    def work(self, plan: protocol.Plan, frame: protocol.Frame, kind: Kind) -> Work:
        """The same for what is asked again."""
        known = self._works.get(frame.frame)
        if known is None or known.frame is not frame or known.plan is not plan:
            known = self._works[frame.frame] = Work(plan.model, plan, frame, kind)
        if next(reversed(self._recent.values()), None) is not known:
            self._recent.pop((plan.plan, kind), None)
            self._recent[plan.plan, kind] = known
            while len(self._recent) > _REHEARSED:
                del self._recent[next(iter(self._recent))]
        return known

    def perform(
        self, work: Work, number: int, message: Message, assignment: Assignment | None = None
    ) -> tuple[Step, list[Any]]:
        """Run a step of ``number`` tiles to its end, and return it with the replies."""
        of_tiles = work.kind is not None
        speeds = self.speeds if of_tiles else {}
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
                        raise failure_of(instruction, work.frame, of_tiles=of_tiles)
                    # A worker may have died since the instruction to send it something was given.
                    if step.expects(instruction.ticket):
                        todo += self._send(step, instruction, work, message)
                sent = time.perf_counter()
                self.sending += sent - began
                for event, reply in self.supervisor.events():
                    if isinstance(event, Finished):
                        replies.append(reply)
                        if speeds:
                            spent = seconds.get(event.worker, 0.0)
                            seconds[event.worker] = spent + reply.seconds
                    todo += step.on(event)
                self.waiting += time.perf_counter() - sent
        finally:
            self._ticket = step.next_ticket
            self.retried += step.retried

    def _send(
        self, step: Step, instruction: Send, work: Work, message: Message
    ) -> list[Instruction]:
        """Tell a worker what it lacks, then what to compute."""
        worker = self.supervisor.ready[instruction.worker]
        kinds = [work.kinds[n] for n in instruction.tiles] if work.kinds else []
        try:
            messages = self._news(worker, work)
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
        for (plan, kind), work in self._recent.items():
            assert work.frame is not None
            version = self.shared.models[work.model].version
            messages += self._news(worker, work)
            messages.append(protocol.Rehearse(kind, plan, work.frame.frame, version))
            worker.seen.add(work.kinds[0])
        return messages

    def forget_rehearsals(self, model: int | None = None) -> None:
        """Of a model that is no more; of all, when what lies in the arena has moved."""

        def kept(works: dict[Any, Work]) -> dict[Any, Work]:
            return {key: w for key, w in works.items() if model not in (None, w.model)}

        self._works, self._recent = kept(self._works), kept(self._recent)

    def _news(self, worker: WorkerProcess, work: Work) -> list[Any]:
        """What a worker has to be told before it can work on this; often nothing."""
        messages = self.model_news(worker, work.model)
        if (plan := work.plan) is not None and worker.told.get(("plan", plan.plan)) is not plan:
            worker.told["plan", plan.plan] = plan
            messages.append(plan)
        if (frame := work.frame) is not None and worker.told.get(
            ("frame", frame.frame)
        ) is not frame:
            worker.told["frame", frame.frame] = frame
            messages.append(frame)
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
