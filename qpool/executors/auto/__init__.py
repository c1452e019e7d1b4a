"""``auto``: the strategy that was fastest when the model's own training step was measured.

Owns which candidates are worth a try, and keeps to a choice for as long as the executor lives:
strategies agree to rounding, not to the bit. ``contest`` measures; ``choices`` remembers, on disk,
for the next run of the same model, size of batch and machine.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import logging
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow as tf

from qpool import tiles
from qpool.arguments import is_eager
from qpool.executors import executor_class, remote, topology
from qpool.executors.auto.choices import Candidate, Choice, Memory, remembered
from qpool.executors.auto.contest import BUDGET, Contest, Within
from qpool.executors.base import Executor, Options, argument_names
from qpool.executors.processes import pool
from qpool.shipping import pack
from workers import recipes
from workers.errors import InputError

__all__ = ["AutoExecutor", "Candidate", "Choice", "choose", "remembered"]

log = logging.getLogger("qpool")

#: What a pool costs a step at best, in seconds. Where a step in this process takes less, none is
#: started to be measured.
_POOL_SECONDS = 1e-3

#: Rows of the largest tile that is tried: XLA compiles one program for it.
_LARGEST_WHOLE = 1024


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
        used = {"strategy": "auto"} if self._used is None else self._used.stats()
        choices = [choice.as_dict() for choice in self._choices.values()]
        return {**used, "auto": {"why": "the fastest of those measured", "choices": choices}}

    def close(self) -> None:
        for executor in self._all():
            executor.close()
        for made in self._pools.values():
            made.close()

    def _all(self) -> list[Executor]:
        return [*filter(None, [self._asked]), *self._executors.values()]

    # -- choosing --------------------------------------------------------------------------

    def _chosen(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Executor:
        values = [*args, *kwargs.values()]
        tensors = [x for x in values if tf.is_tensor(x)]
        in_graph = not tf.executing_eagerly() or not all(map(is_eager, tensors))
        within: Within = "graph" if in_graph else "nothing"
        batch = _rows(values)
        key: Any = (method, (batch - 1).bit_length(), within)
        with self._lock:
            if in_graph and self._symbolic_constant(
                method, args, kwargs
            ):  # nobody else could be given it
                candidate = Candidate(
                    "sequential" if self.options.engine == "stock" else "cpu_batch"
                )
            else:
                if key not in self._choices:
                    self._choices[key] = self._apart(method, args, kwargs, batch, within)
                candidate = self._choices[key].candidate
            if candidate not in self._executors:
                with tf.init_scope():  # executors are made out of the graph
                    self._executor(candidate)
            self._used = self._executors[candidate]
            return self._used

    def _apart(self, method: str, *rest: Any) -> Choice:
        """Choose in a thread of its own, which has no graph around it and no tapes: those of the
        caller would be paused, or see all that is measured."""
        self._stop.clear()
        with ThreadPoolExecutor(1, thread_name_prefix="qpool-auto") as thread:
            future = thread.submit(self._choose, method, *rest)
            try:
                return future.result()
            except BaseException:  # Ctrl-C: the thread ends after the step under way
                self._stop.set()
                raise

    def executor_for(self, z: Any) -> Executor:
        """The executor of batches like ``z``, which has values."""
        method = "__call__" if callable(self.model) else "generate"
        return self._asked or self._chosen(method, (z,), {})

    def _symbolic_constant(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether an argument that is not sharded is a tensor of a graph that is being traced."""
        named = dict(zip(argument_names(self.model, method), args, strict=False)) | kwargs
        first = next(iter(named), None)
        return any(
            tf.is_tensor(x) and not is_eager(x) and name not in (first, *self.options.sharded)
            for name, x in named.items()
        )

    def _choose(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, within: Within
    ) -> Choice:
        memory = Memory(self._fingerprint(method, args, kwargs, batch, within))
        known = memory.read()
        if known is not None:
            log.info("auto: %s, as was measured on %s", known.candidate, known.measured)
            return known
        log.info("auto: measuring strategies for batches of %d; up to %.0f s", batch, BUDGET)
        args, kwargs = (_stand_ins(part, batch) for part in (args, kwargs))
        calls = {executor: executor.calls for executor in self._executors.values()}
        contest = Contest(
            self.model, self._executor, method, args, kwargs, within, self._stop.is_set
        )
        try:
            with _left_as_it_was(self.model):
                for candidate in self._candidates(batch, contest):
                    contest.enter(candidate)
                choice = contest.decide(batch, self._executors)
        except BaseException:
            self._keep_only(None)
            raise
        self._keep_only(choice.candidate)
        for executor in self._executors.values():  # draws follow from a call's number
            executor.calls = calls.get(executor, 0)
        memory.write(choice)
        log.info(
            "auto: %s for batches of %d; milliseconds a training step: %s",
            choice.candidate,
            batch,
            {name: round(ms, 3) for name, ms in choice.milliseconds.items()},
        )
        return choice

    def _candidates(self, batch: int, contest: Contest) -> Iterator[Candidate]:
        """What is worth a try, in turn; ``contest`` knows how the ones before did."""
        cores = topology.budget()
        tile = self.options.tile
        if self._rows:
            pass  # engines of a fixed batch size: only tiles can be filled up to it
        elif self.options.engine == "stock":
            yield Candidate("sequential")
        else:
            if not recipes.inspect(self.model, {}).draws:  # in place, draws follow another order
                yield Candidate("cpu_batch")
            whole = 1 << (batch - 1).bit_length()
            yield Candidate("threads", 1, tile=tile or min(whole, _LARGEST_WHOLE))
            if batch > 1 and cores.workers > 1:
                yield Candidate("threads", cores.workers, tile=tile)
            if contest.empty:
                return  # the model's own error: a pool would only repeat it
        workers = max(1, min(cores.workers // self.options.threads, batch))
        if contest.best < _POOL_SECONDS:
            contest.skipped["processes"] = "a step takes less than a pool's messages"
            return
        if workers == 1 and self.options.engine == "stock" and not contest.empty:
            contest.skipped["processes"] = "one core, or one sample: nothing to share"
            return
        yield Candidate("processes", workers, self.options.threads, tile)
        threads = 2 * self.options.threads
        while self.options.threads == 1 and cores.workers // threads >= 2:
            yield Candidate("processes", cores.workers // threads, threads, tile)
            threads *= 2
        if tile is None and not self._rows and not contest.empty:
            yield from self._other_tiles(batch, contest)

    def _other_tiles(self, batch: int, contest: Contest) -> Iterator[Candidate]:
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
        used = {*filter(None, [chosen]), *(choice.candidate for choice in self._choices.values())}
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
            [(tuple(v.shape), v.dtype.name) for v in recipes.inspect(self.model, {}).variables],
            sorted(_plain_attributes(self.model)),
            method,
            [_form(value) for value in (*args, *(kwargs[name] for name in sorted(kwargs)))],
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
        return auto._choose(method, (z,), {}, len(z), within)
    finally:
        auto.close()


def _rows(values: list[Any]) -> int:
    """The batch of a call; 64 where a graph does not know it, or nothing says it."""
    shape = values[0].shape if values and hasattr(values[0], "shape") else np.shape(values[:1])[1:]
    if isinstance(shape, tf.TensorShape) and (shape.rank is None or None in shape[1:]):
        raise InputError(
            f"an input of shape {shape} in a graph: expected (batch, ...), of which only the batch "
            "may be unknown; set its shape"
        )
    rows = shape[0] if len(shape) else None
    if rows == 0:
        raise InputError("a batch of no rows: expected at least one")
    return 64 if rows is None else int(rows)


def _form(value: Any) -> str:
    """What an argument is, but for its rows and its values."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{tuple(value.shape)[1:]}"
    return repr(value) if isinstance(value, bool | int | float | str) else type(value).__name__


@contextlib.contextmanager
def _left_as_it_was(model: Any) -> Iterator[None]:
    """Put back what calls of the model change: its variables, and where NumPy's and Python's
    global sources of random numbers stand."""
    shipped = recipes.inspect(model, {})
    variables = shipped.variables
    values = [variable.numpy() for variable in variables]
    states = np.random.get_state(), random.getstate()  # noqa: NPY002
    own = [draw for draw in shipped.draws if isinstance(draw, np.random.Generator)]
    places = [copy.deepcopy(draw.bit_generator.state) for draw in own]
    try:
        yield
    finally:
        for variable, value in zip(variables, values, strict=True):
            if variable.numpy().tobytes() != value.tobytes():
                variable.assign(value)
        for draw, place in zip(own, places, strict=True):
            draw.bit_generator.state = place
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
            found = {name: v for name, v in found.items() if name not in ("seed", "name")}
        for name, value in found.items():
            if isinstance(value, bool | int | float | str):
                yield f"{name}={value!r}"
