"""The strategy ``auto``: a guess at once, and others compared while the model's own steps run.

Owns which candidates are worth a try and when: a guess follows from the circuits that a first call
runs (``guess``); others are measured between steps, in a share of the time that the model has taken
so far (``course``), and the fastest goes on. Strategies agree to rounding, not to the bit: in a
graph, and in a run that is recorded, what was chosen first stays. ``autotuner`` measures;
``choices`` remembers, on disk, for the next run of the same model, size of batch and machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tensorflow as tf

from qpool import tiles
from qpool.bridge.arguments import argument_names, is_eager
from qpool.executors import executor_class, remote, topology
from qpool.executors.auto import guess
from qpool.executors.auto.arguments import (
    form_of,
    in_graph,
    left_as_it_was,
    plain_attributes,
    rows_of,
    stand_ins,
)
from qpool.executors.auto.autotuner import BUDGET, Autotuner, Within
from qpool.executors.auto.choices import Candidate, Choice, Memory
from qpool.executors.auto.course import Course
from qpool.executors.base import Executor, Options
from qpool.executors.processes import pool
from qpool.shipping import pack
from workers.errors import InputError, QPoolError
from workers.replica import serialization

log = logging.getLogger("qpool")

#: Seconds that a trial takes beside compiling; seconds that a pool may take to start.
_TRIAL_SECONDS, _POOL_STARTS = 1.0, 5.0

#: Calls for which an executor that was given up is kept: a tape of the caller's may need it yet.
_CALLS_LEFT = 16

#: What a pool costs a step at best, in seconds. Where a step in this process takes less, none is
#: started to be measured.
_POOL_SECONDS = 1e-3

#: Rows of the largest tile that is tried: XLA compiles one program for it.
_LARGEST_WHOLE = 1024


class AutoExecutor(Executor):
    """Delegates each size of batch (by powers of two) to what is best for it, as far as is known.

    With ``workers=`` or ``pool=`` it is ``processes``: workers were asked for.
    """

    def __init__(self, model: Any, options: Options) -> None:
        super().__init__(model, options)
        self._asked: Executor | None = None
        self._courses: dict[Any, Course] = {}
        self._executors: dict[Candidate, Executor] = {}
        self._pools: dict[tuple[int, int], Any] = {}
        self._retired: dict[Candidate, int] = {}
        self._used: Executor | None = None
        self._lock = threading.RLock()
        self._stop = threading.Event()
        if (options.workers, options.pool, options.devices) != (None, None, None):
            self._asked = executor_class("processes")(model, options)
        else:
            # What no strategy could take is said now, not at the first call.
            pool.check(1, options.threads, options.start_method, options.timeout)
            shipment = pack(model, options.factory)
            self._rows = shipment.rows
            remote.check_tile(options.tile, self._rows)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._asked is not None:
            return self._asked.call(method, args, kwargs)
        values = [*args, *kwargs.values()]
        if in_graph(values):
            return self._call_in_graph(method, args, kwargs)
        with self._lock:  # nobody else's call is under way when the executor is exchanged
            self._let_go()
            course = self._course(method, args, kwargs, "nothing")
            if course.is_due(self._expected_seconds(course)):
                self._compare(course, method, args, kwargs)
            began = time.perf_counter()
            if course.calls:
                result = self._use(course.candidate).call(method, args, kwargs)
            else:
                result = self._first_call(course, method, args, kwargs)
            course.note(time.perf_counter() - began)
            return result

    def loss_and_gradient(
        self, method: str, loss: Callable[..., Any], values: Sequence[Any]
    ) -> tuple[Any, Any, list[Any]]:
        if self._asked is not None:
            return self._asked.loss_and_gradient(method, loss, values)
        if in_graph([values[0]]):
            chosen = self._for_graph(method, (values[0],), {})
            return chosen.loss_and_gradient(method, loss, values)
        return super().loss_and_gradient(method, loss, values)

    def per_sample_gradients(self, z: Any, cotangent: Any) -> list[Any]:
        return self.executor_for(z).per_sample_gradients(z, cotangent)

    @property
    def calls(self) -> int:
        return max((executor.calls for executor in self._all()), default=0)

    @calls.setter
    def calls(self, number: int) -> None:
        for executor in self._all():
            executor.calls = number

    def stats(self) -> dict[str, Any]:
        if self._asked is not None:
            why = "workers= or pool= was given: nothing was measured"
            return {**self._asked.stats(), "auto": {"why": why, "choices": []}}
        used = {"strategy": "auto"} if self._used is None else self._used.stats()
        choices = [course.choice.as_dict() for course in self._courses.values()]
        why = "a guess first, then the fastest of those measured so far"
        return {**used, "auto": {"why": why, "choices": choices}}

    def close(self) -> None:
        for executor in self._all():
            executor.close()
        for made in self._pools.values():
            made.close()

    def _all(self) -> list[Executor]:
        return [*filter(None, [self._asked]), *self._executors.values()]

    # -- choosing --------------------------------------------------------------------------

    def _for_graph(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Executor:
        """The executor of a call that is being traced: it stays what it is."""
        with self._lock:
            if self._symbolic_constant(method, args, kwargs):  # what could stand in for it?
                stock = self.options.engine == "stock"
                return self._use(Candidate("sequential" if stock else "cpu_batch"))
            return self._use(self._course(method, args, kwargs, "graph").candidate)

    def _call_in_graph(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What refuses a call as it is traced, of a batch of unknown size, say, gives way to the
        next best."""
        try:
            return self._for_graph(method, args, kwargs).call(method, args, kwargs)
        except InputError as error:
            with self._lock:
                if self._symbolic_constant(method, args, kwargs):
                    raise
                course = self._course(method, args, kwargs, "graph")
                if not course.choice.others:
                    raise
                log.info("auto: %s cannot be: %s", course.candidate, error)
                course.choice = course.choice.without_first(error)
            return self._first_call(course, method, args, kwargs)

    def _course(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], within: Within
    ) -> Course:
        """What is known of calls like this one, beginning with a guess."""
        batch = rows_of([*args, *kwargs.values()])
        key = method, (batch - 1).bit_length(), within
        if key not in self._courses:
            memory = Memory(self._fingerprint(method, args, kwargs, batch, within))
            known = memory.read()
            if known is not None:
                log.info("auto: %s, as was measured on %s", known.candidate, known.measured)
                self._courses[key] = Course(
                    known, memory, within == "nothing" and not known.complete
                )
            else:
                choice = self._apart(self._guess, method, args, kwargs, batch)
                log.info("auto: begins with %s: %s", choice.candidate, choice.why)
                self._courses[key] = Course(choice, memory, within == "nothing")
        return self._courses[key]

    def _use(self, candidate: Candidate) -> Executor:
        if candidate not in self._executors:
            with tf.init_scope():  # executors are made out of the graph
                self._executor(candidate)
        self._used = self._executors[candidate]
        return self._used

    def _guess(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int
    ) -> Choice:
        args, kwargs = (stand_ins(part, batch) for part in (args, kwargs))
        with left_as_it_was(self.model, method):
            work = guess.work_of(self.model, self.options, method, args, kwargs)
        draws = bool(serialization.inspect(self.model, {}).draws)
        order = guess.in_order(
            work, batch, topology.budget(), self.options, self._rows, draws=draws
        )
        return Choice.guessed(order[0], batch, str(work), order[1:])

    def _first_call(
        self, course: Course, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """By a guess, which its strategy may refuse: then by the next one."""
        while course.choice.others:
            try:
                return self._use(course.candidate).call(method, args, kwargs)
            except QPoolError as error:
                log.info("auto: %s cannot be: %s", course.candidate, error)
                course.choice = course.choice.without_first(error)
        return self._use(course.candidate).call(method, args, kwargs)

    def _apart(self, function: Callable[..., Any], *args: Any) -> Any:
        """Measure in a thread of its own, which has no graph around it and no tapes: those of the
        caller would be paused, or see all that is measured."""
        self._stop.clear()
        with ThreadPoolExecutor(1, thread_name_prefix="qpool-auto") as thread:
            future = thread.submit(function, *args)
            try:
                return future.result()
            except BaseException:  # Ctrl-C: the thread ends after the step under way
                self._stop.set()
                raise

    def executor_for(self, z: Any) -> Executor:
        """The executor of batches like ``z``, which has values. It stays what it is."""
        if self._asked is not None:
            return self._asked
        method = "__call__" if callable(self.model) else "generate"
        with self._lock:
            course = self._course(method, (z,), {}, "nothing")
            course.settle()
            return self._use(course.candidate)

    def _expected_seconds(self, course: Course) -> float:
        """What the next trial will take, about: it compiles what the present executor has."""
        used = self._executors.get(course.candidate)
        found = used.stats().get("compiled", ()) if used is not None else ()
        compiling = sum(way.get("seconds", 0.0) for way in found)
        return _TRIAL_SECONDS + 2.0 * compiling + _POOL_STARTS

    def _compare(
        self, course: Course, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Have the next candidate tried; what goes wrong with that is not the caller's business."""
        before = course.candidate
        try:
            self._apart(self._challenge, course, method, args, kwargs)
        except Exception as error:
            log.info("auto: stays with %s, since comparing failed: %r", before, error)
            course.settle()
        if course.candidate != before:
            self._retired[before] = _CALLS_LEFT

    def _let_go(self) -> None:
        """Close what was given up so many calls ago that no tape will need it any more."""
        for candidate in list(self._retired):
            self._retired[candidate] -= 1
            if self._retired[candidate] <= 0:
                del self._retired[candidate]
                self._keep_only(None)

    def _challenge(
        self, course: Course, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Measure one other candidate beside the present one; the faster one goes on."""
        batch = rows_of([*args, *kwargs.values()])
        if course.autotuner is None:
            course.autotuner = Autotuner(
                self.model, self._executor, method, args, kwargs, "nothing", self._stop.is_set
            )
            course.candidates = self._candidates(batch, course.autotuner)
        autotuner, present = course.autotuner, course.candidate
        calls = {executor: executor.calls for executor in self._executors.values()}
        went = self._executors[present].calls
        with left_as_it_was(self.model, method):
            if present not in autotuner.entered:
                autotuner.enter(present)
            known = {
                *autotuner.entered,
                *(course.choice.milliseconds if not autotuner.empty else ()),
            }
            trial = next((c for c in course.candidates or () if not {c, str(c)} & known), None)
            if trial is not None:
                autotuner.enter(trial)
            choice = autotuner.decide(batch, self._executors)
        course.take(choice, complete=trial is None)
        self._keep_only(present)
        for executor in self._executors.values():  # draws follow from a call's number
            executor.calls = calls.get(executor, went)
        log.info("auto: %s after %s was tried", course.candidate, trial or "everything")

    def _symbolic_constant(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether an argument that is not sharded is a tensor of a graph that is being traced."""
        named = dict(zip(argument_names(self.model, method), args, strict=False)) | kwargs
        first = next(iter(named), None)
        return any(
            tf.is_tensor(part) and not is_eager(part)
            for name, x in named.items()
            if name not in (first, *self.options.sharded)
            for part in tf.nest.flatten(x)
        )

    def measure(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, within: Within
    ) -> Choice:
        """The fastest of all candidates, measured now, within the budget; nothing is computed."""
        memory = Memory(self._fingerprint(method, args, kwargs, batch, within))
        known = memory.read()
        if known is not None and known.complete:
            log.info("auto: %s, as was measured on %s", known.candidate, known.measured)
            return known
        log.info("auto: measuring strategies for batches of %d; up to %.0f s", batch, BUDGET)
        args, kwargs = (stand_ins(part, batch) for part in (args, kwargs))
        autotuner = Autotuner(
            self.model, self._executor, method, args, kwargs, within, self._stop.is_set
        )
        with left_as_it_was(self.model, method):
            for candidate in self._candidates(batch, autotuner):
                autotuner.enter(candidate)
            choice = autotuner.decide(batch, self._executors)
        memory.write(choice)
        log.info(
            "auto: %s for batches of %d; milliseconds a training step: %s",
            choice.candidate,
            batch,
            {name: round(ms, 3) for name, ms in choice.milliseconds.items()},
        )
        return choice

    def _candidates(self, batch: int, autotuner: Autotuner) -> Iterator[Candidate]:
        """What is worth a try, in turn; ``autotuner`` knows how the ones before did."""
        cores = topology.budget()
        tile = self.options.tile
        if self._rows and batch != self._rows:
            pass  # engines of a fixed batch size: only tiles can be filled up to it
        elif self.options.engine == "stock":
            yield Candidate("sequential")
        else:
            if not serialization.inspect(
                self.model, {}
            ).draws:  # in place, draws follow another order
                yield Candidate("cpu_batch")
            whole = 1 << (batch - 1).bit_length()
            if not self._rows:
                yield Candidate("threads", 1, tile=tile or min(whole, _LARGEST_WHOLE))
            if not self._rows and batch > 1 and cores.workers > 1:
                yield Candidate("threads", cores.workers, tile=tile)
            if autotuner.empty:
                return  # the model's own error: a pool would only repeat it
        workers = max(1, min(cores.workers // self.options.threads, batch))
        if autotuner.best < _POOL_SECONDS:
            autotuner.skipped["processes"] = "a step takes less than a pool's messages"
            return
        if workers == 1 and self.options.engine == "stock" and not autotuner.empty:
            autotuner.skipped["processes"] = "one core, or one sample: nothing to share"
            return
        yield Candidate("processes", workers, self.options.threads, tile)
        threads = 2 * self.options.threads
        while self.options.threads == 1 and cores.workers // threads >= 2:
            yield Candidate("processes", cores.workers // threads, threads, tile)
            threads *= 2
        if tile is None and not self._rows and not autotuner.empty:
            yield from self._other_tiles(batch, autotuner)

    def _other_tiles(self, batch: int, autotuner: Autotuner) -> Iterator[Candidate]:
        """Tiles twice and half as large, and on in that direction, while it pays."""
        for factor in (2.0, 0.5):
            while True:
                best = autotuner.leader
                size = autotuner.tile_of(best, batch)
                if best.workers is None or size is None:
                    return
                other = int(size * factor)
                fits = 1 <= other <= min(_LARGEST_WHOLE, 2 * batch - 1)
                shared = tiles.count(batch, max(other, 1)) >= min(best.workers, batch)
                if not fits or not shared:
                    break
                trial = dataclasses.replace(best, tile=other)
                yield trial
                if autotuner.leader != trial:
                    break

    # -- executors -------------------------------------------------------------------------

    def _executor(self, candidate: Candidate) -> Executor:
        if candidate not in self._executors:
            options = dataclasses.replace(
                self.options,
                workers=candidate.workers,
                threads=candidate.threads,
                tile=candidate.tile,
            )
            if candidate.strategy == "processes":
                options = dataclasses.replace(options, workers=None, pool=self._pool(candidate))
            self._executors[candidate] = executor_class(candidate.strategy)(self.model, options)
        return self._executors[candidate]

    def _pool(self, candidate: Candidate) -> Any:
        key = candidate.workers or 1, candidate.threads
        if key not in self._pools:
            self._keep_only(None, pools_alone=True)  # two at once would share cores and memory
            self._pools[key] = pool.Pool(
                key[0],
                threads=key[1],
                start_method=self.options.start_method,
                pin=self.options.pin,
                timeout=self.options.timeout,
                seed=self.options.seed,
            )
        return self._pools[key]

    def _keep_only(self, chosen: Candidate | None, *, pools_alone: bool = False) -> None:
        """Close what no choice uses; what an earlier one does use stays."""
        used = {*filter(None, [chosen]), *self._retired}
        used |= {course.candidate for course in self._courses.values()}
        for candidate in [c for c in self._executors if c not in used]:
            if candidate.strategy == "processes" or not pools_alone:
                self._executors.pop(candidate).close()
        pools = {(c.workers, c.threads) for c in used if c.strategy == "processes"}
        for key in [key for key in self._pools if key not in pools]:
            self._pools.pop(key).close()

    def _fingerprint(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch: int,
        within: Within,
    ) -> str:
        """What a choice is remembered by: model, size of batch, machine, versions, options."""
        cores = topology.budget()
        same = dataclasses.replace(self.options, factory=None, pool=None, seed=0)
        options = dataclasses.asdict(same)
        cls = type(self.model)
        parts = [
            f"{cls.__module__}.{cls.__qualname__}",
            [
                (tuple(v.shape), v.dtype.name)
                for v in serialization.inspect(self.model, {}).variables
            ],
            sorted(plain_attributes(self.model)),
            method,
            [form_of(value) for value in (*args, *(kwargs[name] for name in sorted(kwargs)))],
            (batch - 1).bit_length(),
            within,
            sorted(options.items(), key=lambda item: item[0]),
            (cores.cpus, cores.physical, cores.quota),
        ]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def choose(model: Any, z: Any, options: Options | None = None, *, within: Within) -> Choice:
    """The choice for batches like ``z``, without keeping anything but it.

    ``within``: what its calls will be part of. The trainer's steps are XLA's where they can be.
    """
    auto = AutoExecutor(model, options or Options())
    try:
        method = "__call__" if callable(model) else "generate"
        return auto.measure(method, (z,), {}, len(z), within)
    finally:
        auto.close()
