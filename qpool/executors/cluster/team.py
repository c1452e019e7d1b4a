"""The nodes of a cluster as one computer: a batch's tiles are shared out, and results put together.

Owns which nodes take part (those that are there, as they come and go), what each was told, and what
to do when one is lost: its tiles run elsewhere. A tile is computed as in a local pool, and partial
sums are added in tile order, so the bits are the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import re
import sys
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qpool import tiles
from qpool.executors.cluster import connect
from qpool.executors.cluster.connect import Place
from qpool.executors.cluster.node import Build, Node, Part, Weights
from qpool.executors.computer import Computer
from qpool.executors.devices import parse
from qpool.executors.processes.dispatch import MAX_ATTEMPTS
from qpool.executors.shares import Run, apportion, learn
from workers import protocol
from workers.errors import (
    ConfigurationError,
    PoolClosedError,
    QPoolError,
    RemoteError,
    StartupError,
    WorkerLostError,
)
from workers.layout import ArraySpec

log = logging.getLogger("qpool")

#: Seconds in which a node has to give an actor its CPUs and start it. Where they are taken, it
#: never does; it is asked again later.
_ROOM = 20.0
_AGAIN = 30.0

#: Seconds for which the start waits for such a node when others have come.
_LATE = 5.0

#: Seconds in which a node's workers have to be up.
_START = 300.0

#: Seconds between two looks at which nodes there are.
_LOOK = 1.0

#: Seconds that a step waits for a node when all are lost.
_NOBODY = 120.0

#: Seconds without an answer after which nodes are asked whether they live, and in which they have
#: to say so. A node's own pool sees to its workers; this is for its actor.
_SILENCE = 10.0


@dataclasses.dataclass(eq=False)
class _Member:
    """A node that takes part, or is on its way: ``awaits`` is then what it has been asked."""

    place: Place
    actor: Any
    since: float
    awaits: Any = None
    greeted: bool = False
    asked: int = 0
    host: str = ""
    workers: int = 1
    tiles: int = 0
    told: dict[Hashable, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Model:
    build: Build
    weights: Weights
    values: list[bytes]


#: A run of tiles, who has it (or had, in the forward pass), and that node's own homes of them.
Home = tuple[_Member, Run, Any]

#: Asks a member for a run of tiles: (member, run, its homes) -> Ray's reference to the answer.
Ask = Callable[[_Member, Run, Any], Any]


@dataclasses.dataclass
class Counters:
    """What is measured; floats are seconds of wall time."""

    forward_calls: int = 0
    backward_calls: int = 0
    tiles: int = 0
    weight_updates: int = 0
    retried_tiles: int = 0
    lost_nodes: int = 0
    slowest_shard_seconds: float = 0.0
    mean_shard_seconds: float = 0.0
    weights: float = 0.0
    wait: float = 0.0
    copy_out: float = 0.0


class Cluster(Computer):
    """The nodes of a Ray cluster, each with a pool of its own, for any number of models
    (``parallelize(model, pool=cluster)``).

    ``address`` is the cluster's, as Ray takes it (None: see :func:`connect.connect`). ``workers``
    is how many each node has at most; default: one for each of its physical cores. Ray is asked for
    ``workers * threads`` CPUs of each node, or all that it has, and for the GPUs that ``devices``
    (of each node) names. Nodes that come later are used, up
    to ``nodes`` at a time; those whose versions differ are an error at first, and later left out,
    with a warning.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        workers: int | None = None,
        threads: int = 1,
        nodes: int | None = None,
        start_method: str | None = None,
        timeout: float | None = None,
        seed: int = 0,
        devices: Sequence[str] | None = None,
    ) -> None:
        from qpool.executors.processes.pool import check

        check(1 if workers is None else workers, threads, start_method, timeout)
        self._gpus = 0
        if devices is not None:
            if workers is not None:
                raise ConfigurationError(
                    f"devices= says how many workers there are; leave workers={workers} out"
                )
            seats = parse(devices, range(1 << 12), threads)  # which there are, nodes will say
            numbers = [int(s.device[4:]) for s in seats if s.device.startswith("gpu:")]
            self._gpus = max(numbers, default=-1) + 1
        if nodes is not None and nodes < 1:
            raise ConfigurationError(f"nodes must be at least 1, not {nodes!r}")
        super().__init__(seed)
        self._most = nodes
        self._workers, self._threads = workers, threads
        self._options: dict[str, Any] = {
            "workers": workers,
            "threads": threads,
            "start_method": start_method,
            "timeout": timeout,
            "seed": seed,
            "devices": devices,
        }
        self._members: list[_Member] = []
        self._coming: dict[str, _Member] = {}
        #: Nodes that are left out, why, and until when.
        self._refused: dict[str, tuple[str, float]] = {}
        self._speeds: dict[_Member, float] = {}
        self._models: dict[int, _Model] = {}
        self._counters = Counters()
        self._looked = 0.0
        self._closed = False
        self._began = time.monotonic()
        connect.connect(address, workers and workers * threads)
        self._ray = connect.ray()
        self._actor = self._ray.remote(concurrency_groups={"watch": 1})(Node)
        self._finalizer = weakref.finalize(self, _let_go, self._members, self._coming)
        try:
            self._assemble()
        except BaseException:
            self.close()
            raise

    # -- life ------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        return sum(member.workers for member in self._members)

    @property
    def nodes(self) -> int:
        """How many nodes take part now."""
        return len(self._members)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors, and their workers. Calling it again does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._finalizer()

    # -- models ----------------------------------------------------------------------------

    def add(self, shipment: bytes, weights: Sequence[np.ndarray], engine: str) -> int:
        with self._lock:
            self._ready()
            number = next(self._numbers)
            weights = [np.array(weight) for weight in weights]
            reference = self._ray.put(weights)
            build = Build(number, self._ray.put(shipment), reference, engine)
            first = Weights(number, 0, reference)
            self._models[number] = _Model(build, first, [w.tobytes() for w in weights])
            try:
                self._all(lambda m: m.actor.tell.remote(self._tell(m, ("model", number), build)))
            except BaseException:
                self.discard(number)
                raise
            return number

    def discard(self, number: int) -> None:
        with self._lock:
            if self._closed or self._models.pop(number, None) is None:
                return
            self._drop_plans(number)
            for member in self._members:
                gone = [k for k, d in member.told.items() if _model_of(d) == number]
                for key in gone:
                    del member.told[key]
                member.actor.discard.remote(number)

    # -- computing -------------------------------------------------------------------------

    def survey(
        self,
        plan: int,
        inputs: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        *,
        gradient: bool,
        largest_tile: int,
    ) -> protocol.Surveyed:
        """What the first node reports; all of them do it, and are warm afterwards."""
        with self._lock:
            self._ready()
            self._weigh(plan, weights)
            few = [array[: max(8, largest_tile, self._plans[plan].rows)] for array in inputs]
            options = {"gradient": gradient, "largest_tile": largest_tile}
            found = self._all(
                lambda m: m.actor.survey.remote(self._news(m, plan), plan, few, options)
            )
            surveyed: protocol.Surveyed = next(iter(found.values()))
            self._learn(plan, surveyed)
            for member, other in found.items():
                if _of_bits(other) == _of_bits(surveyed):  # it learned the same by itself
                    member.told["plan", plan] = self._plans[plan]
            return surveyed

    def forward(
        self,
        plan: int,
        tile: int,
        inputs: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        outputs: Sequence[ArraySpec],
        *,
        keep: bool,
        copy: Callable[[np.ndarray], Any] = np.array,
    ) -> tuple[int, list[Any], list[Home]]:
        with self._lock:
            self._ready()
            self._weigh(plan, weights)
            call, batch = self.new_call(), len(inputs[0])

            def ask(member: _Member, run: Run, _: Any) -> Any:
                rows = _rows(run, tile)
                return member.actor.forward.remote(
                    self._news(member, plan),
                    plan,
                    tile,
                    Part(call, run.first),
                    [array[rows] for array in inputs],
                    outputs,
                    keep,
                )

            found = self._perform(tiles.count(batch, tile), ask, None)
            began = time.perf_counter()
            parts = _in_order(found)
            joined = [np.concatenate([part[n] for part in parts]) for n in range(len(outputs))]
            results = [copy(array) for array in joined]
            self._counters.copy_out += time.perf_counter() - began
            self._counters.forward_calls += 1
            return call, results, [(member, run, homes) for member, run, (_, homes) in found]

    def backward(
        self,
        plan: int,
        tile: int,
        call: int,
        homes: list[Home] | None,
        inputs: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        cotangents: Sequence[np.ndarray | None],
        sources: Sequence[tuple[int, ArraySpec]],
        *,
        per_tile: bool = False,
        tangents: Sequence[tuple[int, np.ndarray]] = (),
    ) -> list[np.ndarray]:
        with self._lock:
            self._ready()
            self._weigh(plan, weights)
            width = len(inputs)

            def ask(member: _Member, run: Run, own: Any) -> Any:
                rows = _rows(run, tile)
                return member.actor.backward.remote(
                    self._news(member, plan),
                    plan,
                    tile,
                    Part(call, run.first),
                    own,
                    [array[rows] for array in inputs],
                    [None if array is None else array[rows] for array in cotangents],
                    sources,
                    [(n, array[rows] if n < width else array) for n, array in tangents],
                )

            found = self._perform(tiles.count(len(inputs[0]), tile), ask, homes)
            began = time.perf_counter()
            parts = _in_order(found)
            joined = [np.concatenate([part[n] for part in parts]) for n in range(len(parts[0]))]
            if not per_tile:
                for place, (source, _) in enumerate(sources):
                    if source >= width:
                        joined[place] = tiles.sum_in_order(joined[place])
            self._counters.copy_out += time.perf_counter() - began
            self._counters.backward_calls += 1
            return joined

    # -- measuring -------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """What was measured: of the cluster, each node, and each node's workers."""
        with self._lock:
            counters = dataclasses.asdict(self._counters)
            seconds = {phase: counters.pop(phase) for phase in ("weights", "wait", "copy_out")}
            pools = {} if self._closed else self._all(lambda m: m.actor.stats.remote())
            numbers = itertools.count()
            return {
                "elapsed_seconds": time.monotonic() - self._began,
                "seconds": seconds,
                **counters,
                "replaced_workers": sum(pool["replaced_workers"] for pool in pools.values()),
                "nodes": [
                    {
                        "node": member.place.name,
                        "address": member.place.address,
                        "host": member.host,
                        "workers": member.workers,
                        "tiles": member.tiles,
                        "speed": self._speeds[member],
                    }
                    for member in pools
                ],
                "workers": [
                    {**worker, "node": member.place.name, "worker": next(numbers)}
                    for member, pool in pools.items()
                    for worker in pool["workers"]
                ],
            }

    # -- nodes -----------------------------------------------------------------------------

    def _assemble(self) -> None:
        """Wait until the nodes that have room take part; raise if none does."""
        began = time.monotonic()
        self._look(strict=True)
        while self._coming:
            waiting = [member.awaits for member in self._coming.values()]
            self._ray.wait(waiting, num_returns=1, timeout=_LOOK)
            self._look(strict=True)
            started = any(member.greeted for member in self._coming.values())
            if self._members and not started and time.monotonic() - began > _LATE:
                break  # the others may still come
        if not self._members:
            why = "; ".join(
                f"{place.address} {self._refused[name][0]}"
                for name, place in connect.places().items()
                if name in self._refused
            )
            raise StartupError(
                f"no node of the Ray cluster can take part: {why or 'none has CPUs'}. `ray status` "
                "shows what is free; workers= asks for less"
            )

    def _look(self, *, strict: bool = False) -> None:
        """Take in the nodes that have come; ``strict`` raises where one has other versions."""
        now = time.monotonic()
        places = connect.places()
        here = {m.place.name for m in self._members} | set(self._coming)
        for name, place in places.items():
            full = len(self._members) + len(self._coming) >= (self._most or len(places))
            if name not in here and not full and self._refused.get(name, ("", 0.0))[1] < now:
                self._coming[name] = self._invite(place)
        for name, member in list(self._coming.items()):
            ready, _ = self._ray.wait([member.awaits], timeout=0)
            late = now - member.since > (_START if member.greeted else _ROOM)
            try:
                if ready and member.greeted:
                    self._ray.get(member.awaits)
                    del self._coming[name]
                    self._members.append(member)
                    self._speeds[member] = float(member.workers)
                elif ready:
                    self._greet(member)
                elif late and member.greeted:
                    self._turn_away(name, f"has not had its workers up within {_START:.0f} s")
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
                self._turn_away(name, f"cannot take part: {_said(error)}")

    def _invite(self, place: Place) -> _Member:
        asked = place.cpus
        if self._workers is not None:
            asked = min(asked, self._workers * self._threads)
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
        return _Member(place, actor, time.monotonic(), actor.hello.remote(), asked=asked)

    def _greet(self, member: _Member) -> None:
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

    def _lose(self, member: _Member, error: BaseException) -> None:
        if member in self._members:
            self._members.remove(member)
            del self._speeds[member]
            self._counters.lost_nodes += 1
            log.warning("node %s is lost: %s", member.place.address, _said(error))
            self._ray.kill(member.actor)  # if it lives and only the way to it is gone

    def _ready(self) -> None:
        if self._closed:
            raise PoolClosedError("the strategy's nodes were let go; parallelize the model again")
        if time.monotonic() - self._looked > _LOOK:
            self._looked = time.monotonic()
            self._look()
        if forgotten := self._let_go_of_models_and_calls():
            for member in self._members:
                member.actor.forget.remote(forgotten)

    # -- within ----------------------------------------------------------------------------

    def _weigh(self, plan: int, weights: Sequence[np.ndarray]) -> None:
        """Put the values in Ray's store if any bit has changed; nodes fetch them once."""
        began = time.perf_counter()
        number = self._plans[plan].model
        model = self._models[number]
        values = [np.asarray(weight).tobytes() for weight in weights]
        if values != model.values:
            reference = self._ray.put([np.array(weight) for weight in weights])
            model.weights = Weights(number, model.weights.version + 1, reference)
            model.values = values
            self._counters.weight_updates += 1
        self._counters.weights += time.perf_counter() - began

    def _news(self, member: _Member, plan: int) -> list[Any]:
        """What a node has to be told before it can work on this; often nothing."""
        definition = self._plans[plan]
        model = self._models[definition.model]
        return [
            *self._tell(member, ("model", definition.model), model.build),
            *self._tell(member, ("weights", definition.model), model.weights),
            *self._tell(member, ("plan", plan), definition),
        ]

    @staticmethod
    def _tell(member: _Member, key: Hashable, definition: Any) -> list[Any]:
        if member.told.get(key) is definition:
            return []
        member.told[key] = definition
        return [definition]

    def _all(self, ask: Callable[[_Member], Any]) -> dict[_Member, Any]:
        """Ask every node for the same; nodes that are lost are left out, unless all are."""
        found: dict[_Member, Any] = {}
        while not found:
            members = self._someone()
            with self._unsure_of(members):
                asked = [(member, ask(member)) for member in members]
                for member, reference in asked:
                    try:
                        self._await([reference], {reference: member})
                        found[member] = self._answer(member, reference)
                    except _Lost as lost:
                        self._lose(member, lost.error)
        return found

    @contextlib.contextmanager
    def _unsure_of(self, members: Sequence[_Member]) -> Iterator[None]:
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

    def _await(self, pending: Sequence[Any], of: Mapping[Any, _Member]) -> Any:
        """A reference that is answered; ``_Lost`` if a node that is waited for does not live."""
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

    def _perform(
        self, number: int, ask: Ask, homes: list[Home] | None
    ) -> list[tuple[_Member, Run, tuple[list[np.ndarray], Any]]]:
        """Have every tile computed; who computed what, and what came of it, in tile order."""
        self._counters.tiles += number
        pending: dict[Any, tuple[_Member, Run, int]] = {}
        homeless: list[tuple[Run, int]] = []
        if homes is None:
            homeless.append((Run(0, number), 0))
        with self._unsure_of(self._members):
            for member, run, own in homes or ():
                if member in self._members:
                    pending[ask(member, run, own)] = member, run, 0
                else:
                    homeless.append((run, 0))
            return self._collect(ask, pending, homeless)

    def _collect(
        self,
        ask: Ask,
        pending: dict[Any, tuple[_Member, Run, int]],
        homeless: list[tuple[Run, int]],
    ) -> list[tuple[_Member, Run, tuple[list[np.ndarray], Any]]]:
        done: list[tuple[_Member, Run, Any]] = []
        seconds: dict[_Member, float] = {}
        while pending or homeless:
            for run, attempts in homeless:
                self._someone()
                for member, part in apportion(run, self._speeds).items():
                    pending[ask(member, part, None)] = member, part, attempts
            homeless = []
            began = time.perf_counter()
            reference = self._await(list(pending), {r: of[0] for r, of in pending.items()})
            member, run, attempts = pending.pop(reference)
            try:
                values, own, spent = self._answer(member, reference)
            except _Lost as lost:
                self._lose(member, lost.error)
                self._counters.retried_tiles += run.tiles
                if attempts + 1 >= MAX_ATTEMPTS:
                    raise WorkerLostError(
                        f"tiles {run.first} to {run.stop - 1} took {attempts + 1} nodes with them, "
                        f"one after another; the last: {_said(lost.error)}"
                    ) from lost.error
                homeless.append((run, attempts + 1))
                continue
            finally:
                self._counters.wait += time.perf_counter() - began
            done.append((member, run, (values, own)))
            seconds[member] = seconds.get(member, 0.0) + spent
            member.tiles += run.tiles
        self._counters.slowest_shard_seconds += max(seconds.values())
        self._counters.mean_shard_seconds += sum(seconds.values()) / len(seconds)
        computed = dict.fromkeys(seconds, 0)
        for member, run, _ in done:
            computed[member] += run.tiles
        self._speeds = learn(self._speeds, computed, seconds)
        return sorted(done, key=lambda item: item[1].first)

    def _someone(self) -> list[_Member]:
        """The nodes that take part; waits for one, if all are lost."""
        deadline = time.monotonic() + _NOBODY
        while not self._members:
            if time.monotonic() > deadline:
                raise WorkerLostError(
                    f"all nodes of the Ray cluster are lost, and none came within {_NOBODY:.0f} s"
                )
            self._look()
            waiting = [member.awaits for member in self._coming.values()]
            if waiting:
                self._ray.wait(waiting, timeout=_LOOK)
            else:
                time.sleep(_LOOK / 10)
        return list(self._members)

    def _answer(self, member: _Member, reference: Any) -> Any:
        """What came of it; ``_Lost`` if the node is."""
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
            raise _Lost(error) from error


class _OtherVersions(Exception):
    """A node that would compute other bits."""


class _Lost(Exception):
    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


def _model_of(definition: Any) -> int:
    """The number of the model that a piece of news is about."""
    number: int = definition.model
    return number


def _rows(run: Run, tile: int) -> slice:
    return slice(run.first * tile, run.stop * tile)


def _in_order(found: list[tuple[_Member, Run, tuple[list[np.ndarray], Any]]]) -> list[Any]:
    return [values for _, _, (values, _) in found]


def _of_bits(surveyed: protocol.Surveyed) -> Any:
    """What of a survey the plan is made of."""
    return (
        surveyed.least_rows,
        surveyed.draws,
        surveyed.reproducible,
        surveyed.level,
        surveyed.outputs,
    )


def _said(error: BaseException) -> str:
    """What Ray says, in a line: the error at the end of a traceback, or else how it begins."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return raised[-1] if raised else " ".join(lines[:4]) or type(error).__name__


def _let_go(members: list[_Member], coming: dict[str, _Member]) -> None:
    ray = connect.ray()
    if ray.is_initialized():
        for member in (*members, *coming.values()):
            ray.kill(member.actor)
    connect.disconnect()
