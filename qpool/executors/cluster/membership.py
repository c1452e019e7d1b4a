"""Who takes part: the nodes of the cluster as they come, are asked, and are lost.

Owns the actors' lives: inviting a node, the handshake, waiting for answers and telling a lost node
from a slow one. What nodes are asked to compute is ``cluster``'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import sys
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

from qpool.executors.cluster import connect
from qpool.executors.cluster.connect import Place
from qpool.executors.cluster.node import Node
from workers.errors import QPoolError, RemoteError, StartupError, WorkerLostError

log = logging.getLogger("qpool")

#: Seconds in which a node whose CPUs are taken has to give an actor those that it asks for. It may
#: never do so; it is asked again later.
_ROOM = 60.0
_AGAIN = 30.0

#: Seconds for which the start waits for such a node when others have come.
_LATE = 5.0

#: Seconds in which a node has to start the actor where it has the CPUs, and in which the node's
#: workers have to be up: other programs may keep it busy.
_START = 300.0

#: Seconds between two looks at which nodes there are.
_LOOK = 1.0

#: Seconds that a step waits for a node when all are lost.
_NOBODY = 120.0

#: Seconds without an answer after which nodes are asked whether they live, and in which they have
#: to say so. A node's own pool sees to its workers; this is for its actor.
_SILENCE = 10.0


@dataclasses.dataclass(eq=False)
class Member:
    """A node that takes part, or is on its way: ``awaits`` is then what it has been asked."""

    place: Place
    actor: Any
    since: float
    awaits: Any = None
    greeted: bool = False
    asked: int = 0
    #: The CPUs that it asks for were free.
    free: bool = False
    host: str = ""
    workers: int = 1
    tiles: int = 0
    told: dict[Hashable, Any] = dataclasses.field(default_factory=dict)


class _OtherVersions(Exception):
    """A node that would compute other bits."""


class Lost(Exception):
    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class Membership:
    """The nodes that take part, and those on their way.

    ``options`` are those of a node's pool; Ray is asked for ``cpus`` of each node (None: all) and
    ``gpus``. At most ``most`` nodes take part.
    """

    def __init__(
        self, options: dict[str, Any], cpus: int | None, gpus: int, most: int | None
    ) -> None:
        self.members: list[Member] = []
        self.lost = 0
        #: Speeds of the members, against each other.
        self.speeds: dict[Member, float] = {}
        self._coming: dict[str, Member] = {}
        #: Nodes that are left out, why, and until when.
        self._refused: dict[str, tuple[str, float]] = {}
        self._options, self._cpus, self._gpus, self._most = options, cpus, gpus, most
        self._looked = 0.0
        self._ray = connect.ray()
        self._actor = self._ray.remote(concurrency_groups={"watch": 1})(Node)
        self.close = weakref.finalize(self, _let_go, self.members, self._coming)

    def assemble(self) -> None:
        """Wait until the nodes that have room take part; raise if none does."""
        began = time.monotonic()
        self.look(strict=True)
        while self._coming:
            waiting = [member.awaits for member in self._coming.values()]
            self._ray.wait(waiting, num_returns=1, timeout=_LOOK)
            self.look(strict=True)
            started = any(member.greeted for member in self._coming.values())
            if self.members and not started and time.monotonic() - began > _LATE:
                break  # the others may still come
        if not self.members:
            why = "; ".join(
                f"{place.address} {self._refused[name][0]}"
                for name, place in connect.places().items()
                if name in self._refused
            )
            raise StartupError(
                f"no node of the Ray cluster can take part: {why or 'none has CPUs'}. `ray status` "
                "shows what is free; workers= asks for less"
            )

    def look(self, *, strict: bool = False) -> None:
        """Take in the nodes that have come; ``strict`` raises where one has other versions."""
        now = time.monotonic()
        places = connect.places()
        here = {m.place.name for m in self.members} | set(self._coming)
        free: dict[str, float] | None = None  # asked for where somebody is invited
        for name, place in places.items():
            full = len(self.members) + len(self._coming) >= (self._most or len(places))
            if name not in here and not full and self._refused.get(name, ("", 0.0))[1] < now:
                free = connect.free() if free is None else free
                self._coming[name] = self._invite(place, free.get(name, 0.0))
        for name, member in list(self._coming.items()):
            ready, _ = self._ray.wait([member.awaits], timeout=0)
            patience = _START if member.greeted or member.free else _ROOM
            late = now - member.since > patience
            try:
                if ready and member.greeted:
                    self._ray.get(member.awaits)
                    del self._coming[name]
                    self.members.append(member)
                    self.speeds[member] = float(member.workers)
                elif ready:
                    self._greet(member)
                elif late and member.greeted:
                    self._turn_away(name, f"has not had its workers up within {_START:.0f} s")
                elif late and member.free:
                    self._turn_away(name, f"has not started an actor within {_START:.0f} s")
                elif late:
                    asked = f"{member.asked} CPUs" + (f", {self._gpus} GPUs" if self._gpus else "")
                    self._turn_away(
                        name, f"has not started an actor: the {asked} it is asked for are not free"
                    )
            except _OtherVersions as error:
                self._turn_away(name, str(error), for_good=True)
                if strict:
                    raise StartupError(f"node {member.place.address} {error}") from error
            except (QPoolError, self._ray.exceptions.RayError) as error:
                self._turn_away(name, f"cannot take part: {said(error)}")

    def _invite(self, place: Place, free: float) -> Member:
        asked = min(place.cpus, self._cpus or place.cpus)
        where = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            place.name, soft=False
        )
        actor = self._actor.options(
            num_cpus=asked,
            num_gpus=self._gpus,
            scheduling_strategy=where,
            max_restarts=0,
            max_task_retries=0,
        ).remote(asked, self._options, sys.path)
        awaits = actor.hello.remote()
        enough = free >= asked and not self._gpus
        return Member(place, actor, time.monotonic(), awaits, asked=asked, free=enough)

    def _greet(self, member: Member) -> None:
        """The handshake: a node of other versions would compute other bits."""
        hello = self._ray.get(member.awaits)
        ours = connect.versions()
        other = {n: (v, hello["versions"].get(n)) for n, v in ours.items()}
        other = {n: pair for n, pair in other.items() if pair[0] != pair[1]}
        if other:
            raise _OtherVersions(
                "has other versions than the coordinator: "
                + ", ".join(f"{n} {theirs} (here {here})" for n, (here, theirs) in other.items())
                + ". Install the same on all nodes"
            )
        member.host, member.workers = hello["host"], hello["workers"]
        member.greeted, member.since = True, time.monotonic()
        member.awaits = member.actor.start.remote()

    def _turn_away(self, name: str, why: str, *, for_good: bool = False) -> None:
        member = self._coming.pop(name)
        until = float("inf") if for_good else time.monotonic() + _AGAIN
        if name not in self._refused:
            log.warning("node %s %s; it is left out", member.place.address, why)
        self._refused[name] = why, until
        self._ray.kill(member.actor)

    def lose(self, member: Member, error: BaseException) -> None:
        if member in self.members:
            self.members.remove(member)
            del self.speeds[member]
            self.lost += 1
            log.warning("node %s is lost: %s", member.place.address, said(error))
            self._ray.kill(member.actor)  # if it lives and only the way to it is gone

    def look_now_and_then(self) -> None:
        """Look, if the last time is some while ago."""
        if time.monotonic() - self._looked > _LOOK:
            self._looked = time.monotonic()
            self.look()

    def someone(self) -> list[Member]:
        """The nodes that take part; waits for one, if all are lost."""
        deadline = time.monotonic() + _NOBODY
        while not self.members:
            if time.monotonic() > deadline:
                raise WorkerLostError(
                    f"all nodes of the Ray cluster are lost, and none came within {_NOBODY:.0f} s"
                )
            self.look()
            waiting = [member.awaits for member in self._coming.values()]
            if waiting:
                self._ray.wait(waiting, timeout=_LOOK)
            else:
                time.sleep(_LOOK / 10)
        return list(self.members)

    def ask_all(self, ask: Callable[[Member], Any]) -> dict[Member, Any]:
        """Ask every node for the same; nodes that are lost are left out, unless all are."""
        found: dict[Member, Any] = {}
        while not found:
            members = self.someone()
            with self.unsure_of(members):
                asked = [(member, ask(member)) for member in members]
                for member, reference in asked:
                    try:
                        self.wait_for([reference], {reference: member})
                        found[member] = self.answer(reference)
                    except Lost as lost:
                        self.lose(member, lost.error)
        return found

    @contextlib.contextmanager
    def unsure_of(self, members: Sequence[Member]) -> Iterator[None]:
        """Should this end before its time, what the nodes were told is told them again.

        What has been sent is not known then: an interruption may have come before it was, and a
        node that raised an error has not taken in what followed.
        """
        try:
            yield
        except BaseException:
            for member in members:
                member.told.clear()
            raise

    def wait_for(self, pending: Sequence[Any], of: Mapping[Any, Member]) -> Any:
        """A reference that is answered; ``Lost`` if a node that is waited for does not live."""
        while True:
            ready, _ = self._ray.wait(list(pending), num_returns=1, timeout=_SILENCE)
            if ready:
                return ready[0]
            pings = {
                member: member.actor.alive.options(concurrency_group="watch").remote()
                for member in {of[reference] for reference in pending}
            }
            self._ray.wait(list(pings.values()), num_returns=len(pings), timeout=_SILENCE)
            for member, ping in pings.items():
                if not self._ray.wait([ping], timeout=0)[0]:
                    silent = TimeoutError(f"no sign of life for {2 * _SILENCE:.0f} seconds")
                    self._ray.kill(member.actor)  # its answers become errors, which are dealt with
                    log.warning("node %s: %s", member.place.address, silent)

    def answer(self, reference: Any) -> Any:
        """What came of it; ``Lost`` if the node is."""
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except exceptions.RayTaskError as error:
            cause = error.cause
            if not isinstance(cause, BaseException):
                raise
            if isinstance(cause, RemoteError) and cause.original is not None:
                raise cause from cause.original
            raise cause from None
        except exceptions.RayError as error:
            raise Lost(error) from error


def said(error: BaseException) -> str:
    """What Ray says, in a line: the error at the end of a traceback, or else how it begins."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return raised[-1] if raised else " ".join(lines[:4]) or type(error).__name__


def _let_go(members: list[Member], coming: dict[str, Member]) -> None:
    ray = connect.ray()
    if ray.is_initialized():
        for member in (*members, *coming.values()):
            ray.kill(member.actor)
    connect.disconnect()
