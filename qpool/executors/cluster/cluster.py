"""The nodes of a cluster as one computer: a batch's tiles are shared out, and results put together.

Owns what each node is told and asked, and what to do when one is lost: its tiles run elsewhere. Who
takes part is ``membership``'s. A tile is computed as in a local pool, and partial
sums are added in tile order, so the bits are the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from qpool import tiles
from qpool.batches import Operands, Results, Task
from qpool.executors.cluster import connect
from qpool.executors.cluster.membership import Lost, Member, Membership, said
from qpool.executors.cluster.node import Build, Weights
from qpool.executors.devices import parse
from qpool.executors.processes.dispatch import MAX_ATTEMPTS
from qpool.executors.shares import Run, apportion, learn
from qpool.executors.worker_pool import Counters, WorkerPool
from workers.errors import ConfigurationError, PoolClosedError, WorkerLostError
from workers.exchange import protocol


@dataclasses.dataclass
class _Model:
    build: Build
    weights: Weights
    values: list[bytes]


#: A run of tiles, who has it (or had, in the forward pass), and that node's own assignment of them.
Assigned = tuple[Member, Run, Any]

#: Asks a member for a run of tiles: (member, run, its assignment) -> Ray's reference to the answer.
Ask = Callable[[Member, Run, Any], Any]


@dataclasses.dataclass
class ClusterCounters(Counters):
    """Those of batches that go to nodes."""

    retried_tiles: int = 0
    wait: float = 0.0

    PHASES = ("weights", "wait", "copy_out")


class Cluster(WorkerPool):
    """The nodes of a Ray cluster, each with a pool of its own, for any number of models
    (``parallelize(model, pool=cluster)``).

    ``address`` is the cluster's, as Ray takes it (None: see ``connect.connect``). ``workers``
    is how many each node has at most; default: one for each of its physical cores. Ray is asked for
    ``workers * threads`` CPUs of each node, or all that it has, and for the GPUs that ``devices``
    (of each node) names. Nodes that come later are used, up
    to ``nodes`` at a time; those whose versions differ are an error at first, and later left out,
    with a warning.

    Raises:
        ConfigurationError: no such number of nodes or workers.
        StartupError: no cluster at the address, or none of its nodes comes.
        WorkerLostError: a batch's nodes are lost, and those that come in their place.
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
        gpus = 0
        if devices is not None:
            if workers is not None:
                raise ConfigurationError(
                    f"devices= says how many workers there are; leave workers={workers} out"
                )
            seats = parse(devices, range(1 << 12), threads)  # which there are, nodes will say
            numbers = [int(s.device[4:]) for s in seats if s.device.startswith("gpu:")]
            gpus = max(numbers, default=-1) + 1
        if nodes is not None and nodes < 1:
            raise ConfigurationError(f"nodes must be at least 1, not {nodes!r}")
        super().__init__(seed)
        options: dict[str, Any] = {
            "workers": workers,
            "threads": threads,
            "start_method": start_method,
            "timeout": timeout,
            "seed": seed,
            "devices": devices,
        }
        self._models: dict[int, _Model] = {}
        self._counters = ClusterCounters()
        self._closed = False
        self._began = time.monotonic()
        cpus = None if workers is None else workers * threads
        connect.connect(address, cpus)
        self._ray = connect.ray()
        self._membership = Membership(options, cpus, gpus, nodes)
        try:
            self._membership.assemble()
        except BaseException:
            self.close()
            raise

    # -- life ------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        return sum(member.workers for member in self._membership.members)

    @property
    def closed(self) -> bool:
        """Whether the cluster was closed."""
        return self._closed

    @property
    def nodes(self) -> int:
        """How many nodes take part now."""
        return len(self._membership.members)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors, and their workers. Calling it again does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._membership.close()

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
                self._membership.ask_all(
                    lambda m: m.actor.tell.remote(self._tell(m, ("model", number), build))
                )
            except BaseException:
                self.discard(number)
                raise
            return number

    def discard(self, number: int) -> None:
        with self._lock:
            if self._closed or self._models.pop(number, None) is None:
                return
            self._drop_plans(number)
            for member in self._membership.members:
                gone = [k for k, d in member.told.items() if _model_of(d) == number]
                for key in gone:
                    del member.told[key]
                member.actor.discard.remote(number)

    # -- computing -------------------------------------------------------------------------

    def probe(
        self,
        plan: int,
        inputs: Sequence[np.ndarray],
        weights: Sequence[np.ndarray],
        purpose: protocol.Purpose,
    ) -> protocol.Probed:
        """What the first node reports; all of them do it, and are warm afterwards."""
        with self._lock:
            self._ready()
            self._weigh(plan, weights)
            few = self._first_rows(plan, inputs, purpose)
            found = self._membership.ask_all(
                lambda m: m.actor.probe.remote(self._news(m, plan), plan, few, purpose)
            )
            probed: protocol.Probed = next(iter(found.values()))
            self._learn(plan, probed)
            for member, other in found.items():
                if self._plans[plan].as_found(other) == self._plans[plan]:  # by itself
                    member.told["plan", plan] = self._plans[plan]
            return probed

    def compute(
        self,
        task: Task,
        operands: Operands,
        *,
        call: int | None = None,
        assignment: list[Assigned] | None = None,
        copy: Callable[[np.ndarray], Any] = np.array,
    ) -> Results:
        with self._lock:
            self._ready()
            self._weigh(task.plan, operands.weights)
            number = self.new_call() if call is None else call
            of_tiles = dataclasses.replace(task, per_tile=True)

            def ask(member: Member, run: Run, own: Any) -> Any:
                part = operands.part(_rows(run, task.tile))
                news = self._news(member, task.plan)
                return member.actor.compute.remote(news, of_tiles, number, run.first, own, part)

            found = self._perform(tiles.count(operands.batch, task.tile), ask, assignment)
            began = time.perf_counter()
            parts = _in_order(found)
            joined = [np.concatenate([part[n] for part in parts]) for n in range(len(parts[0]))]
            outputs = [copy(array) for array in joined[: len(task.outputs)]]
            gradients = joined[len(task.outputs) :]
            for place, (source, _) in enumerate(task.sources):
                if source >= len(operands.inputs) and not task.per_tile:
                    gradients[place] = tiles.sum_in_order(gradients[place])
            self._counters.batch(task.kind, time.perf_counter() - began)
            return Results(
                number, outputs, gradients, [(member, run, own) for member, run, (_, own) in found]
            )

    # -- measuring -------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """What was measured: of the cluster, each node, and each node's workers."""
        with self._lock:
            pools = (
                {} if self._closed else self._membership.ask_all(lambda m: m.actor.stats.remote())
            )
            numbers = itertools.count()
            return {
                "elapsed_seconds": time.monotonic() - self._began,
                **self._counters.by_name(),
                "lost_nodes": self._membership.lost,
                "replaced_workers": sum(pool["replaced_workers"] for pool in pools.values()),
                "nodes": [
                    {
                        "node": member.place.name,
                        "address": member.place.address,
                        "host": member.host,
                        "workers": member.workers,
                        "tiles": member.tiles,
                        "speed": self._membership.speeds[member],
                    }
                    for member in pools
                ],
                "workers": [
                    {**worker, "node": member.place.name, "worker": next(numbers)}
                    for member, pool in pools.items()
                    for worker in pool["workers"]
                ],
            }

    def _ready(self) -> None:
        if self._closed:
            raise PoolClosedError("the strategy's nodes were let go; parallelize the model again")
        self._membership.look_now_and_then()
        if forgotten := self._let_go_of_models_and_calls():
            for member in self._membership.members:
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

    def _news(self, member: Member, plan: int) -> list[Any]:
        """What a node has to be told before it can work on this; often nothing."""
        definition = self._plans[plan]
        model = self._models[definition.model]
        return [
            *self._tell(member, ("model", definition.model), model.build),
            *self._tell(member, ("weights", definition.model), model.weights),
            *self._tell(member, ("plan", plan), definition),
        ]

    @staticmethod
    def _tell(member: Member, key: Hashable, definition: Any) -> list[Any]:
        if member.told.get(key) is definition:
            return []
        member.told[key] = definition
        return [definition]

    def _perform(
        self, number: int, ask: Ask, assignment: list[Assigned] | None
    ) -> list[tuple[Member, Run, tuple[list[np.ndarray], Any]]]:
        """Have every tile computed; who computed what, and what came of it, in tile order."""
        self._counters.tiles += number
        pending: dict[Any, tuple[Member, Run, int]] = {}
        unassigned: list[tuple[Run, int]] = []
        if assignment is None:
            unassigned.append((Run(0, number), 0))
        with self._membership.unsure_of(self._membership.members):
            for member, run, own in assignment or ():
                if member in self._membership.members:
                    pending[ask(member, run, own)] = member, run, 0
                else:
                    unassigned.append((run, 0))
            return self._collect(ask, pending, unassigned)

    def _collect(
        self,
        ask: Ask,
        pending: dict[Any, tuple[Member, Run, int]],
        unassigned: list[tuple[Run, int]],
    ) -> list[tuple[Member, Run, tuple[list[np.ndarray], Any]]]:
        done: list[tuple[Member, Run, Any]] = []
        seconds: dict[Member, float] = {}
        while pending or unassigned:
            for run, attempts in unassigned:
                self._membership.someone()
                for member, part in apportion(run, self._membership.speeds).items():
                    pending[ask(member, part, None)] = member, part, attempts
            unassigned = []
            began = time.perf_counter()
            reference = self._membership.wait_for(
                list(pending), {r: of[0] for r, of in pending.items()}
            )
            member, run, attempts = pending.pop(reference)
            try:
                values, own, spent = self._membership.answer(reference)
            except Lost as lost:
                self._membership.lose(member, lost.error)
                self._counters.retried_tiles += run.tiles
                if attempts + 1 >= MAX_ATTEMPTS:
                    raise WorkerLostError(
                        f"tiles {run.first} to {run.stop - 1} took {attempts + 1} nodes with them, "
                        f"one after another; the last: {said(lost.error)}"
                    ) from lost.error
                unassigned.append((run, attempts + 1))
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
        self._membership.speeds = learn(self._membership.speeds, computed, seconds)
        return sorted(done, key=lambda item: item[1].first)


def _model_of(definition: Any) -> int:
    """The number of the model that a piece of news is about."""
    number: int = definition.model
    return number


def _rows(run: Run, tile: int) -> slice:
    return slice(run.first * tile, run.stop * tile)


def _in_order(found: list[tuple[Member, Run, tuple[list[np.ndarray], Any]]]) -> list[Any]:
    return [values for _, _, (values, _) in found]
