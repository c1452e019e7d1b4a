"""A step carried out: what ``dispatch`` instructs, done with the ``crew`` and the ``store``.

Owns telling a worker what it lacks before it is sent work (segment, model, plan, frame), and the
loop from instructions to events and back. Decides nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from qpool.executors.processes.crew import Crew
from qpool.executors.processes.dispatch import Complete, GiveUp, Instruction, Send, Step
from qpool.executors.processes.process import WorkerProcess
from qpool.executors.processes.store import Store
from workers import protocol
from workers.errors import RemoteError, WorkerLostError

#: What is sent for a shard: (ticket, tiles) -> message.
Message = Callable[[int, tuple[int, ...]], Any]

#: Worker -> the tiles it computed, and keeps for the backward pass.
Homes = dict[int, tuple[int, ...]]


@dataclasses.dataclass
class Performer:
    """Carries out steps. ``sending`` and ``waiting`` are seconds of wall time spent so."""

    crew: Crew
    store: Store
    seed: int
    sending: float = 0.0
    waiting: float = 0.0
    _ticket: int = 1

    def perform(
        self,
        plan: protocol.Plan,
        frame: protocol.Frame,
        number: int,
        message: Message,
        homes: Homes | None,
    ) -> tuple[Step, list[Any]]:
        """Run a step of ``number`` tiles to its end, and return it with the replies."""
        step = Step(number, list(self.crew.ready), self._ticket, homes)
        replies: list[Any] = []
        todo: list[Instruction] = step.begin()
        try:
            while True:
                began = time.perf_counter()
                while todo:
                    instruction = todo.pop(0)
                    if isinstance(instruction, Complete):
                        return step, replies
                    if isinstance(instruction, GiveUp):
                        raise failure_of(instruction, frame)
                    # A worker may have died since the instruction to send it something was given.
                    if step.expects(instruction.ticket):
                        todo += self._send(step, instruction, plan, frame, message)
                sent = time.perf_counter()
                self.sending += sent - began
                for event, reply in self.crew.events():
                    if reply is not None:
                        replies.append(reply)
                    todo += step.on(event)
                self.waiting += time.perf_counter() - sent
        finally:
            self._ticket = step.next_ticket

    def _send(
        self,
        step: Step,
        instruction: Send,
        plan: protocol.Plan,
        frame: protocol.Frame,
        message: Message,
    ) -> list[Instruction]:
        """Tell a worker what it lacks, then what to compute."""
        worker = self.crew.ready[instruction.worker]
        messages = self.model_news(worker, plan.model)
        for key, definition in (
            (("plan", plan.plan), plan),
            (("frame", frame.frame), frame),
        ):
            if worker.told.get(key) is not definition:
                worker.told[key] = definition
                messages.append(definition)
        messages.append(message(instruction.ticket, instruction.tiles))
        try:
            self.crew.send(worker, instruction.ticket, messages)
        except OSError:
            return step.on(self.crew.bury(worker))
        return []

    def model_news(self, worker: WorkerProcess, number: int) -> list[Any]:
        """What a worker has to be told before it can work on a model; often nothing."""
        store = self.store
        news: list[Any] = []
        if worker.told["segment"] != store.segment:
            worker.told["segment"] = store.segment
            news.append(protocol.Remap(store.segment))
        model, key = store.models[number], ("model", number)
        if worker.told.get(key) is not model.places:
            if key in worker.told:
                news.append(protocol.Place(number, model.places))
            else:
                news.append(
                    protocol.Build(number, model.shipment, model.places, self.seed, model.engine)
                )
            worker.told[key] = model.places
        return news


def failure_of(instruction: GiveUp, frame: protocol.Frame) -> BaseException:
    if instruction.error is not None:
        return with_cause(instruction.error)
    rows = ", ".join(
        f"{tile * frame.tile} to {min((tile + 1) * frame.tile, frame.batch) - 1}"
        for tile in instruction.tiles
    )
    attempts = "\n".join(f"  {cause}" for cause in instruction.causes)
    return WorkerLostError(
        f"samples {rows} took {len(instruction.causes)} workers with them, one after another; the "
        f"pool is usable, these samples are not:\n{attempts}"
    )


def with_cause(error: BaseException) -> BaseException:
    if isinstance(error, RemoteError) and error.original is not None:
        error.__cause__ = error.original
    return error
