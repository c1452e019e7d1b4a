"""``auto``: the strategy that was fastest when the model's own training step was measured.

Owns the candidates, the measurement and what is remembered of it: for as long as the executor
lives, and on disk for the next run of the same model, size of batch and machine. A choice is never
changed within a run: strategies agree to rounding, not to the bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import logging
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from qpool import tiles
from qpool.arguments import is_eager
from qpool.executors import executor_class, topology
from qpool.executors.base import Executor, Options
from qpool.shipping import pack
from workers import compile_cache, recipes

log = logging.getLogger("qpool")

#: Seconds that measuring one size of batch may take; no further candidate is begun after that.
BUDGET = 60.0

#: A candidate is measured in so many turns with the others, at least, each of so many seconds.
_TURNS, _TURN_SECONDS = 5, 0.2

#: What a pool costs a step at best, in seconds. Where a step in this process takes little more,
#: none is started to be measured.
_POOL_SECONDS = 1e-3

#: Another tile has to be so many times faster to be worth its other bits, and the ones after it.
_WORTH = 1.05


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to compute. ``workers`` and ``tile`` are None where the strategy has none, or chooses
    it itself; ``threads`` are the cores of each worker."""

    strategy: str
    workers: int | None = None
    threads: int = 1
    tile: int | None = None

    def __str__(self) -> str:
        parts = [self.strategy]
        if self.workers is not None:
            parts.append(f"workers={self.workers}")
        if self.threads != 1:
            parts.append(f"threads={self.threads}")
        if self.tile is not None:
            parts.append(f"tile={self.tile}")
        return " ".join(parts)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for a size of batch, and why: milliseconds of a training step by candidate.

    ``measured`` is when (ISO 8601); ``remembered`` whether that was in another process.
    """

    candidate: Candidate
    batch: int
    milliseconds: dict[str, float]
    not_measured: dict[str, str]
    seconds: float
    measured: str
    remembered: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self.candidate),
            "chosen": str(self.candidate),
            **{n: v for n, v in dataclasses.asdict(self).items() if n != "candidate"},
        }


class AutoExecutor(Executor):
    """Measures at the first call of each size of batch (by powers of two), and then delegates.

    With ``workers=`` or ``pool=`` it is ``processes``: workers were asked for.
    """

    def __init__(self, model: Any, options: Options) -> None:
        super().__init__(model, options)
        self._asked: Executor | None = None
        self._choices: dict[Any, Choice] = {}
        self._executors: dict[Candidate, Executor] = {}
        self._pools: dict[tuple[int, int], Any] = {}
        if options.workers is not None or options.pool is not None:
            self._asked = executor_class("processes")(model, options)
        else:
            self._rows = pack(model, options.factory).rows  # says now what no strategy could take

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._asked is not None:
            return self._asked.call(method, args, kwargs)
        return self._chosen(method, args, kwargs).call(method, args, kwargs)

    def per_sample_gradients(self, z: Any, cotangent: Any) -> list[Any]:
        method = "__call__" if callable(self.model) else "generate"
        executor = self._asked or self._chosen(method, (z,), {})
        return executor.per_sample_gradients(z, cotangent)

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
        used: dict[str, Any] = {"strategy": "auto"}
        if self._executors:
            used = list(self._executors.values())[-1].stats()
        choices = [choice.as_dict() for choice in self._choices.values()]
        return {**used, "auto": {"why": "the fastest of those measured", "choices": choices}}

    def close(self) -> None:
        for executor in self._all():
            executor.close()
        for pool in self._pools.values():
            pool.close()

    def _all(self) -> list[Executor]:
        return [*filter(None, [self._asked]), *self._executors.values()]

    # -- choosing --------------------------------------------------------------------------

    def _chosen(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Executor:
        values = [*args, *kwargs.values()]
        in_graph = not tf.executing_eagerly() or not all(
            is_eager(x) for x in values if tf.is_tensor(x)
        )
        batch = _rows(values)
        key = method, (batch - 1).bit_length(), in_graph
        if key not in self._choices:
            with tf.init_scope():
                self._choices[key] = self._choose(method, args, kwargs, batch, in_graph)
        return self._executor(self._choices[key].candidate)

    def _choose(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, in_graph: bool
    ) -> Choice:
        memory = _Memory(self._fingerprint(method, batch, in_graph))
        known = memory.read()
        if known is not None:
            log.info("auto: %s, as was measured on %s", known.candidate, known.measured)
            return known
        log.info("auto: measuring strategies for batches of %d; up to %.0f s", batch, BUDGET)
        args, kwargs = (_stand_ins(part, batch) for part in (args, kwargs))
        with _left_as_it_was(self.model):
            contest = _Contest(self, method, args, kwargs, in_graph)
            for candidate in self._candidates(batch, contest):
                contest.enter(candidate)
            choice = contest.decide(batch)
        self._keep_only(choice.candidate)
        memory.write(choice)
        log.info(
            "auto: %s for batches of %d; milliseconds a training step: %s",
            choice.candidate,
            batch,
            {name: round(ms, 3) for name, ms in choice.milliseconds.items()},
        )
        return choice

    def _candidates(self, batch: int, contest: _Contest) -> Iterator[Candidate]:
        """What is worth a try, in turn; ``contest`` knows how the ones before did."""
        cores = topology.budget()
        tile = self.options.tile
        if self.options.engine == "stock":
            yield Candidate("sequential")
        else:
            yield Candidate("cpu_batch")
            if not self._rows:
                whole = 1 << (batch - 1).bit_length()
                yield Candidate("threads", 1, tile=tile or min(whole, _LARGEST_WHOLE))
                if batch > 1 and cores.workers > 1:
                    yield Candidate("threads", cores.workers, tile=tile)
        workers = min(cores.workers, batch)
        if workers == 1 or contest.best * (1 - 1 / workers) < _POOL_SECONDS:
            contest.skipped["processes"] = (
                "one core, or one sample: nothing to share"
                if workers == 1
                else "a step takes less than a pool's messages"
            )
            return
        yield Candidate("processes", workers, self.options.threads, tile)
        threads = 2 * self.options.threads
        while self.options.threads == 1 and cores.workers // threads >= 2:
            yield Candidate("processes", cores.workers // threads, threads, tile)
            threads *= 2
        if tile is None and not self._rows:
            yield from self._other_tiles(batch, contest)

    def _other_tiles(self, batch: int, contest: _Contest) -> Iterator[Candidate]:
        """Tiles twice and half as large, and on in that direction, while it pays."""
        for factor in (2.0, 0.5):
            while True:
                best = contest.leader
                size = contest.tile_of(best, batch)
                if best.workers is None or size is None:
                    return
                other = int(size * factor)
                fits = 1 <= other <= min(_LARGEST_WHOLE, 2 * batch - 1)
                shared = tiles.count(batch, max(other, 1)) >= min(best.workers, batch)
                if not fits or not shared:
                    break
                trial = dataclasses.replace(best, tile=other)
                yield trial
                if contest.leader != trial:
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
                options = dataclasses.replace(options, pool=self._pool(candidate))
            self._executors[candidate] = executor_class(candidate.strategy)(self.model, options)
        return self._executors[candidate]

    def _pool(self, candidate: Candidate) -> Any:
        from qpool.executors.processes import Pool

        key = candidate.workers or 1, candidate.threads
        if key not in self._pools:
            self._pools[key] = Pool(
                key[0],
                threads=key[1],
                start_method=self.options.start_method,
                pin=self.options.pin,
                timeout=self.options.timeout,
                seed=self.options.seed,
            )
        return self._pools[key]

    def _keep_only(self, chosen: Candidate) -> None:
        """Close what no choice uses; what an earlier one does use stays."""
        used = {chosen, *(choice.candidate for choice in self._choices.values())}
        for candidate in [c for c in self._executors if c not in used]:
            self._executors.pop(candidate).close()
        pools = {(c.workers, c.threads) for c in used if c.strategy == "processes"}
        for key in [key for key in self._pools if key not in pools]:
            self._pools.pop(key).close()

    def _fingerprint(self, method: str, batch: int, in_graph: bool) -> str:
        """What a choice is remembered by: model, size of batch, machine, versions, options."""
        cores = topology.budget()
        options = dataclasses.asdict(dataclasses.replace(self.options, factory=None, pool=None))
        cls = type(self.model)
        parts = [
            f"{cls.__module__}.{cls.__qualname__}",
            [(tuple(v.shape), v.dtype.name) for v in recipes.inspect(self.model, {}).variables],
            sorted(_plain_attributes(self.model)),
            method,
            (batch - 1).bit_length(),
            in_graph,
            sorted(options.items(), key=lambda item: item[0]),
            (cores.cpus, cores.physical, cores.quota),
        ]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def choose(model: Any, z: Any, options: Options | None = None, *, in_graph: bool) -> Choice:
    """The choice for batches like ``z``, without keeping anything but it.

    ``in_graph``: the model will be called within a ``tf.function`` (``fit`` makes one).
    """
    auto = AutoExecutor(model, options or Options())
    try:
        method = "__call__" if callable(model) else "generate"
        return auto._choose(method, (z,), {}, len(z), in_graph)
    finally:
        auto.close()


#: Rows of the largest tile that is tried: XLA compiles one program for it.
_LARGEST_WHOLE = 1024


class _Contest:
    """Candidates that compute the same training step, timed in turns."""

    def __init__(
        self,
        auto: AutoExecutor,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        in_graph: bool,
    ) -> None:
        self._auto = auto
        self._step = lambda executor: _step(auto.model, executor, method, args, kwargs, in_graph)
        self._began = time.perf_counter()
        self._steps: dict[Candidate, Callable[[], Any]] = {}
        self._seconds: dict[Candidate, list[float]] = {}
        self._errors: list[Exception] = []
        self.skipped: dict[str, str] = {}

    @property
    def best(self) -> float:
        """Seconds of a step of the fastest so far."""
        return self._of(self.leader) if self._seconds else float("inf")

    @property
    def leader(self) -> Candidate:
        return min(self._seconds, key=self._of)

    def tile_of(self, candidate: Candidate, batch: int) -> int | None:
        """The rows of a tile that the candidate computes; None without tiles."""
        sizes = self._auto._executor(candidate).stats().get("tiles_by_batch", {})
        return candidate.tile or sizes.get(batch)

    def enter(self, candidate: Candidate) -> None:
        """Compile and time it, unless the budget is spent."""
        elapsed = time.perf_counter() - self._began
        if self._seconds and elapsed > BUDGET:
            self.skipped[str(candidate)] = f"the budget of {BUDGET:.0f} s was spent"
            return
        try:
            step = self._step(self._auto._executor(candidate))
            step()
            step()
        except Exception as error:  # the model's own, perhaps: another strategy may take it
            self._errors.append(error)
            self.skipped[str(candidate)] = f"{type(error).__name__}: {error}"
            return
        self._steps[candidate] = step
        self._seconds[candidate] = []
        for other in self._steps:  # in turns: a machine is not equally quick all the time
            self._turn(other)

    def _turn(self, candidate: Candidate) -> None:
        step, done, began = self._steps[candidate], 0, time.perf_counter()
        while not done or time.perf_counter() - began < _TURN_SECONDS:
            step()
            done += 1
        self._seconds[candidate].append((time.perf_counter() - began) / done)

    def _of(self, candidate: Candidate) -> float:
        return statistics.median(self._seconds[candidate])

    def decide(self, batch: int) -> Choice:
        if not self._seconds:
            raise self._errors[0]
        close = [c for c in self._seconds if self._of(c) < 1.5 * self.best]
        while len(close) > 1 and min(len(self._seconds[c]) for c in close) < _TURNS:
            if time.perf_counter() - self._began > 2 * BUDGET:
                break
            for candidate in close:
                self._turn(candidate)
        best = self.leader
        for candidate in self._seconds:  # the earlier of two that are as good: the simpler one
            if self._of(candidate) < _WORTH * self._of(best):
                best = candidate
                break
        return Choice(
            best,
            batch,
            {str(c): 1e3 * self._of(c) for c in self._seconds},
            self.skipped,
            time.perf_counter() - self._began,
            datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )


def _step(
    model: Any,
    executor: Executor,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    in_graph: bool,
) -> Callable[[], Any]:
    """A forward call and the gradient of a sum of it, for the model's variables."""
    variables = recipes.trainable_variables(model)

    def step() -> Any:
        with tf.GradientTape() as tape:
            outputs = [
                x
                for x in tf.nest.flatten(executor.call(method, args, kwargs))
                if tf.is_tensor(x) and (x.dtype.is_floating or x.dtype.is_complex)
            ]
        return tape.gradient(outputs, variables) if outputs else outputs

    return tf.function(step, autograph=False) if in_graph else step


def _rows(values: list[Any]) -> int:
    """The batch of a call; 64 where a graph does not know it, or nothing says it."""
    shape = values[0].shape if values and hasattr(values[0], "shape") else np.shape(values[:1])[1:]
    rows = shape[0] if len(shape) else None
    return 64 if not rows else int(rows)


@contextlib.contextmanager
def _left_as_it_was(model: Any) -> Iterator[None]:
    """Put back what calls of the model change: its variables, and where NumPy's and Python's
    global sources of random numbers stand."""
    variables = recipes.inspect(model, {}).variables
    values = [variable.numpy() for variable in variables]
    states = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        for variable, value in zip(variables, values, strict=True):
            if variable.numpy().tobytes() != value.tobytes():
                variable.assign(value)
        np.random.set_state(states[0])  # noqa: NPY002
        random.setstate(states[1])


def _stand_ins(values: Any, batch: int) -> Any:
    """Arguments with values: standard normal draws for symbolic tensors."""

    def value(x: Any) -> Any:
        if not tf.is_tensor(x) or is_eager(x):
            return x
        shape = [batch, *x.shape[1:]]
        if not x.dtype.is_floating:
            return tf.zeros(shape, x.dtype)
        draws = np.random.default_rng(0).standard_normal(shape)
        return tf.constant(np.abs(draws), x.dtype)

    return tf.nest.map_structure(value, values)


def _plain_attributes(model: Any) -> Iterator[str]:
    """Numbers and names that the model and its parts hold, engines' options among them."""
    for part in recipes.walk(model):
        options = getattr(part, "backend_options", None)
        found = dict(options) if isinstance(options, dict) else {}
        if part is model:
            found |= {name: v for name, v in vars(model).items() if not name.startswith("_")}
        for name, value in found.items():
            if isinstance(value, bool | int | float | str):
                yield f"{name}={value!r}"


def remembered() -> list[Choice]:
    """What was measured on this machine before, the newest first."""
    place = compile_cache.place_of(0)
    files = [] if place is None else (place.parent / "choices").glob(f"{place.name}-*.json")
    choices = [_read(file) for file in files]
    known = [choice for choice in choices if choice is not None]
    return sorted(known, key=lambda choice: choice.measured, reverse=True)


def _read(file: Path) -> Choice | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(file.read_text())
        found["candidate"] = Candidate(**found["candidate"])
        return dataclasses.replace(Choice(**found), remembered=True)
    return None


class _Memory:
    """A choice on disk, beside the compiled code; nothing where that is turned off."""

    def __init__(self, fingerprint: str) -> None:
        place = compile_cache.place_of(0)  # which tells versions and processors apart
        self._file: Path | None = None
        if place is not None:
            self._file = place.parent / "choices" / f"{place.name}-{fingerprint}.json"

    def read(self) -> Choice | None:
        return None if self._file is None else _read(self._file)

    def write(self, choice: Choice) -> None:
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            beside = self._file.with_suffix(f".{os.getpid()}")
            beside.write_text(json.dumps(dataclasses.asdict(choice), indent=2))
            os.replace(beside, self._file)
