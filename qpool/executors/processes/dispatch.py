"""Which worker computes which tiles, and what to do when one is lost. Pure.

A ``Step`` takes events and returns instructions; the pool performs them. Nothing here
touches a process, a clock or memory, so every order of events can be tested.

    Sent shards --Finished--> done            (all done: Complete)
                --Raised----> failed          (when nothing is in flight: GiveUp)
                --Lost------> survivors, or the next Joined worker; after too many: GiveUp

A step ends only when no live worker is still writing: until then the arena is not free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qpool.executors.shares import Run, apportion
from qpool.tiles import shards

#: A tile that has taken this many workers with it is given up.
MAX_ATTEMPTS = 3


class Finished(NamedTuple):
    worker: int
    ticket: int


class Raised(NamedTuple):
    worker: int
    ticket: int
    error: BaseException


class Lost(NamedTuple):
    """The worker is dead: nothing more will come of what it was given, and it writes no more.

    ``finished`` is how many of its unanswered tiles it had finished, in the order sent; those
    are done. The one after them is the one it died in.
    """

    worker: int
    cause: str
    finished: int = 0


class Joined(NamedTuple):
    worker: int


Event = Finished | Raised | Lost | Joined


class Send(NamedTuple):
    worker: int
    ticket: int
    tiles: tuple[int, ...]


class Complete(NamedTuple):
    pass


class GiveUp(NamedTuple):
    """``error`` is what the model raised, or None: then ``tiles`` took workers with them."""

    error: BaseException | None
    tiles: tuple[int, ...]
    causes: tuple[str, ...]


Instruction = Send | Complete | GiveUp


class Step:
    """One batch on its way through the workers.

    ``tiles`` is how many there are, ``workers`` those that are ready, ``first_ticket`` the number
    of the first message (each message has its own, so that an answer to an older step is known).
    ``assignment`` may name, per worker, the tiles it should get: a backward pass goes where the
    forward pass was kept. ``speeds`` are the workers' against each other; those that have none
    are equal.
    """

    def __init__(
        self,
        tiles: int,
        workers: Sequence[int],
        first_ticket: int,
        assignment: dict[int, tuple[int, ...]] | None = None,
        speeds: Mapping[int, float] | None = None,
    ) -> None:
        self._workers = list(workers)
        self._next_ticket = first_ticket
        self._in_flight: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._waiting: list[int] = []
        #: For each tile, how the workers that died in it ended.
        self._causes: list[list[str]] = [[] for _ in range(tiles)]
        self._raised: BaseException | None = None
        self._given_up: tuple[int, ...] = ()
        self.done_by: dict[int, int] = {}
        #: Tiles that had to be given to another worker.
        self.retried = 0
        self._tiles = tiles
        self._assignment = assignment or {}
        self._speeds = speeds or {}

    @property
    def next_ticket(self) -> int:
        """The first ticket number this step has not used."""
        return self._next_ticket

    def expects(self, ticket: int) -> bool:
        """Whether an answer under this ticket is still awaited."""
        return ticket in self._in_flight

    def begin(self) -> list[Instruction]:
        """Send every tile where it is assigned to, and spread the unassigned evenly."""
        if not self._tiles:
            return [Complete()]
        if not self._assignment:
            return self._spread(range(self._tiles))
        assignment = {w: t for w, t in self._assignment.items() if w in self._workers and t}
        assigned = {tile for tiles in assignment.values() for tile in tiles}
        unassigned = [tile for tile in range(self._tiles) if tile not in assigned]
        sends: list[Instruction] = [self._send(w, tiles) for w, tiles in assignment.items()]
        return sends + self._spread(unassigned)

    def on(self, event: Event) -> list[Instruction]:
        """Take one event. Answers to messages that this step did not send change nothing."""
        if isinstance(event, Joined):
            if event.worker not in self._workers:
                self._workers.append(event.worker)
            waiting, self._waiting = self._waiting, []
            return self._spread(waiting)
        if isinstance(event, Lost):
            return self._on_lost(event)
        if self._in_flight.get(event.ticket, (None,))[0] != event.worker:
            return []
        worker, tiles = self._in_flight.pop(event.ticket)
        if isinstance(event, Raised):
            self._raised = self._raised or event.error
        else:
            self.done_by.update(dict.fromkeys(tiles, worker))
        return self._end()

    def _on_lost(self, event: Lost) -> list[Instruction]:
        if event.worker in self._workers:
            self._workers.remove(event.worker)
        mine = [t for t, (worker, _) in self._in_flight.items() if worker == event.worker]
        given = [tile for ticket in sorted(mine) for tile in self._in_flight.pop(ticket)[1]]
        self.done_by.update(dict.fromkeys(given[: event.finished], event.worker))
        lost = given[event.finished :]
        if not lost:
            return self._end()
        self.retried += len(lost)
        suspect = lost[0]
        self._causes[suspect].append(event.cause)
        if len(self._causes[suspect]) >= MAX_ATTEMPTS:
            self._given_up += (suspect,)
        if self._given_up or self._raised:
            self._waiting = []
            return self._end()
        return self._spread(lost)

    def _spread(self, tiles: Sequence[int]) -> list[Instruction]:
        if not tiles:
            return []
        if not self._workers:
            self._waiting += tiles
            return []
        # The least busy first: survivors that have finished take more than those that have not.
        order = self._workers
        if self._in_flight:
            load = dict.fromkeys(self._workers, 0)
            for worker, pending in self._in_flight.values():
                load[worker] += len(pending)
            order = sorted(order, key=lambda worker: load[worker])
        if self._speeds:
            cut = apportion(Run(0, len(tiles)), {n: self._speeds.get(n, 1.0) for n in order})
            bounds = [(n, run.first, run.stop) for n, run in cut.items()]
        else:
            even = shards(len(tiles), len(order))
            bounds = [(n, *span) for n, span in zip(order, even, strict=True)]
        return [self._send(n, tuple(tiles[a:b])) for n, a, b in bounds if a < b]

    def _send(self, worker: int, tiles: tuple[int, ...]) -> Send:
        ticket = self._next_ticket
        self._next_ticket += 1
        self._in_flight[ticket] = (worker, tiles)
        return Send(worker, ticket, tiles)

    def _end(self) -> list[Instruction]:
        if self._in_flight:
            return []
        if self._raised or self._given_up:
            causes = tuple(cause for tile in self._given_up for cause in self._causes[tile])
            return [GiveUp(self._raised, self._given_up, causes)]
        if len(self.done_by) == self._tiles:
            return [Complete()]
        return []
