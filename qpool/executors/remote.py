"""One model in a pool, in terms of arrays: which plans it has, how its batches are tiled.

Owns what is known of each way the model is called (its outputs' shapes, whether it draws, which
gradients exist) and the choice of tile, made once per batch size. Knows nothing of TensorFlow's
tapes (``gradient``) nor of how the pool computes.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qpool import notices, tiles
from qpool.batches import Operands, Results, Task
from qpool.executors.worker_pool import WorkerPool
from qpool.shipping import Shipment
from workers.errors import ConfigurationError, PoolClosedError
from workers.exchange.protocol import Form, Kind, Purpose
from workers.layout import ArraySpec
from workers.replica import classes

log = logging.getLogger("qpool")


@dataclasses.dataclass
class KnownPlan:
    """One way of calling one method, as a probe found it.

    ``outputs`` are specs of one row; ``tensors`` says which outputs are tensors (else ndarrays);
    ``arguments`` and ``as_tensor`` are its call's, see ``protocol.Plan``.
    ``connected`` says for each source, inputs first and then differentiable variables, whether any
    output depends on it, and is None until a gradient was asked for; ``leads`` which each output of
    several may depend on, if that is known.
    """

    number: int
    method: str
    arguments: bytes
    as_tensor: tuple[bool, ...]
    structure: Any
    outputs: tuple[ArraySpec, ...]
    tensors: tuple[bool, ...]
    draws: bool
    reproducible: bool
    fixed_cost: float
    connected: tuple[bool, ...] | None
    level: str
    form: Form
    reason: str
    compile_seconds: float
    with_loss: bool
    leads: tuple[tuple[bool, ...], ...]

    @functools.cached_property
    def flat(self) -> bool:
        """Whether the outputs are a list or a tuple, of nothing but outputs."""
        return type(self.structure) in (list, tuple) and all(
            isinstance(part, int) for part in self.structure
        )

    @functools.cached_property
    def sources(self) -> list[int]:
        """Those that gradients are computed for: the connected ones. Of a call that is not compiled
        all variables: its Python may use others for other data than the few rows of the probe."""
        variables = len(self.as_tensor) if self.level == "eager" else len(self.connected or ())
        flags = enumerate(self.connected or ())
        return [n for n, connected in flags if connected or n >= variables]

    def reached(self, asked: Sequence[bool]) -> list[int]:
        """Those of the sources that an output that is asked for may depend on."""
        if all(asked) or not any(asked) or not self.leads:
            return self.sources
        leads = [leads for leads, flag in zip(self.leads, asked, strict=True) if flag]
        return [n for n in self.sources if any(of_output[n] for of_output in leads)]

    def connects(self, source: int, gradient: Any) -> bool:
        """Whether an output depends on it, in this gradient or any before; else that is zero."""
        known = self.connected or ()
        if not known[source] and np.any(gradient):
            self.connected = (*known[:source], True, *known[source + 1 :])
            self.__dict__.pop("sources", None)
            return True
        return known[source]


class RemoteModel:
    """A model's replicas, called with arrays."""

    def __init__(
        self,
        pool: WorkerPool,
        shipment: Shipment,
        tile: int | None,
        engine: str,
        model: Any = None,
        options: Any = None,
        called: str = "",
    ) -> None:
        """``model`` and ``options`` are what it is warned of, and whether it has been; ``called``
        is the method that is spoken of, where it is not that of the replicas."""
        self.pool = pool
        self.variables = shipment.variables
        self.differentiable = shipment.differentiable
        self._shapes = tuple(tuple(variable.shape) for variable in self.variables)
        self._model, self._options, self._called = model, options, called
        self._closed = False
        self._rows = shipment.rows
        self._tile = check_tile(tile, self._rows)
        self._plans: dict[Any, KnownPlan] = {}
        self._tiles: dict[tuple[int, int], int] = {}
        self._tasks: dict[Any, Task] = {}
        self._samples = 0
        self._non_finite = 0
        self._seconds = 0.0
        self._probe_seconds = 0.0
        values = [np.asarray(variable) for variable in self.variables]
        self._number = pool.add(shipment.payload, values, engine)
        weakref.finalize(self, pool.abandon, self._number).atexit = False

    def plan(
        self,
        method: str,
        arguments: bytes,
        as_tensor: tuple[bool, ...],
        inputs: Sequence[np.ndarray],
        weights: Callable[[], Sequence[np.ndarray]],
        *,
        gradient: bool,
        wanted: tuple[int, ...] = (),
    ) -> KnownPlan:
        """The plan for this call; the first time, a worker runs the first rows to learn it, and
        ``weights`` are read for that. ``wanted``: see ``protocol.Purpose``."""
        key = _call(method, arguments, as_tensor, [(x.shape[1:], x.dtype) for x in inputs])
        known = self._plans.get(key)
        if known is not None and (known.connected is not None or not gradient):
            return known
        self._check_open()
        began = time.perf_counter()
        number = (
            known.number
            if known
            else self.pool.add_plan(
                self._number, method, arguments, as_tensor, self._rows, self._shapes
            )
        )
        largest = self._tile or tiles.largest_tile(len(inputs[0]))
        purpose = Purpose(gradient, largest, wanted)
        found = self.pool.probe(number, inputs, weights(), purpose)
        plan = KnownPlan(
            number=number,
            method=method,
            arguments=arguments,
            as_tensor=as_tensor,
            structure=classes.loads(found.structure),
            outputs=found.outputs,
            tensors=found.tensors,
            draws=found.draws,
            reproducible=found.reproducible,
            fixed_cost=known.fixed_cost if known else found.fixed_cost,
            connected=found.connected if gradient else None,
            level=found.level,
            form=found.form,
            reason=found.reason,
            compile_seconds=found.compile_seconds,
            with_loss=bool(wanted),
            leads=found.leads,
        )
        self._plans[key] = plan
        self._say(plan, found.circuits)
        notices.caught(self._model, method, found.caught, self._options)
        notices.not_set(self._model, method, found.attributes, self._options)
        self._probe_seconds += time.perf_counter() - began
        return plan

    @property
    def in_use(self) -> bool:
        """Whether there is a plan: a call that could be made."""
        return bool(self._plans)

    def find(
        self,
        method: str,
        arguments: bytes,
        as_tensor: tuple[bool, ...],
        specs: tuple[ArraySpec, ...],
    ) -> KnownPlan | None:
        """A plan that is known already, from the specs of one row of each input."""
        rows = [(spec.shape, np.dtype(spec.dtype)) for spec in specs]
        return self._plans.get(_call(method, arguments, as_tensor, rows))

    def tile(self, plan: KnownPlan, batch: int) -> int:
        """Rows of a tile: chosen once per plan and batch size, and never by the pool's size."""
        if self._tile is not None:
            return self._tile
        key = (plan.number, batch)
        if key not in self._tiles:
            self._tiles[key] = tiles.default_tile(batch, plan.fixed_cost)
        return self._tiles[key]

    def compute(
        self,
        plan: KnownPlan,
        kind: Kind,
        operands: Operands,
        *,
        call: int | None = None,
        assignment: Any = None,
        wanted: Sequence[int] = (),
        per_sample: bool = False,
        copy: Any = np.array,
    ) -> Results:
        """Compute a batch; see ``WorkerPool.compute``. Gradients are those for ``wanted``."""
        self._check_open()
        began = time.perf_counter()
        batch = operands.batch
        task = self._task(plan, kind, operands, tuple(wanted), per_sample)
        results = self.pool.compute(task, operands, call=call, assignment=assignment, copy=copy)
        if kind.makes_outputs:
            self._samples += batch
            self._non_finite += _non_finite_rows(operands.inputs)
        self._seconds += time.perf_counter() - began
        return results

    def _task(
        self,
        plan: KnownPlan,
        kind: Kind,
        operands: Operands,
        wanted: tuple[int, ...],
        per_sample: bool,
    ) -> Task:
        """Made once for what is asked again and again."""
        given = tuple(cotangent is not None for cotangent in operands.cotangents)
        tangents = tuple(source for source, _ in operands.tangents)
        tile = 1 if per_sample else self.tile(plan, operands.batch)
        key = plan.number, kind, tile, wanted, given, tangents, per_sample
        if key not in self._tasks:
            self._tasks[key] = Task(
                plan.number,
                kind,
                tile,
                plan.outputs if kind.makes_outputs else (),
                tuple((n, self._source_spec(n, operands.inputs)) for n in wanted),
                given,
                tangents,
                per_sample,
            )
        return self._tasks[key]

    def _source_spec(self, source: int, inputs: Sequence[np.ndarray]) -> ArraySpec:
        """Shape and dtype of a source: of one row for an input, of all of a variable."""
        if source < len(inputs):
            array = inputs[source]
            return ArraySpec(array.shape[1:], array.dtype.str)
        variable = self.variables[self.differentiable[source - len(inputs)]]
        return ArraySpec(tuple(variable.shape), np.dtype(variable.dtype.as_numpy_dtype).str)

    def stats(self, others: Sequence[RemoteModel] = ()) -> dict[str, Any]:
        """Samples, seconds inside calls, and what the probes found; of ``others`` too, which are
        the same model with a loss each."""
        every = (self, *others)
        told = [(remote._called or p.method, p) for remote in every for p in remote._plans.values()]
        plans = [plan for _, plan in told]
        samples = sum(remote._samples for remote in every)
        seconds = sum(remote._seconds for remote in every)
        randomness = "none"
        if any(plan.draws for plan in plans):
            seeded = all(plan.reproducible for plan in plans if plan.draws)
            randomness = "seeded" if seeded else "not seedable: the same bits are not promised"
        sizes = {batch: tile for remote in every for (_, batch), tile in remote._tiles.items()}
        return {
            "samples": samples,
            "non_finite_samples": sum(remote._non_finite for remote in every),
            "call_seconds": seconds,
            "probe_seconds": sum(remote._probe_seconds for remote in every),
            "samples_per_second": samples / seconds if seconds else 0.0,
            "random_draws": randomness,
            "compiled": [
                {
                    "method": method,
                    "with_loss": p.with_loss,
                    "level": p.level,
                    "by_rows": any(p.form.by_rows),
                    "together": p.form.together,
                    "why_not_better": p.reason,
                    "seconds": p.compile_seconds,
                }
                for method, p in told
            ],
            "fixed_cost_in_rows": [plan.fixed_cost for plan in plans],
            "tiles_by_batch": dict(sorted(sizes.items())),
        }

    def close(self) -> None:
        """Have the workers forget the model; a call after that is a PoolClosedError."""
        self._closed = True
        self.pool.discard(self._number)

    def _say(self, plan: KnownPlan, circuits: int) -> None:
        """Tell once what a method was compiled to; aloud, if it stays slow."""
        method = self._called or plan.method
        if plan.level == "eager":
            log.info("%s runs eagerly in the workers: %s", method, plan.reason)
            notices.not_compiled(self._model, method, plan, circuits, self._options)
            return
        better = f" (not better: {plan.reason})" if plan.reason else ""
        log.info(
            "%s was compiled in %.1f s: %s%s", method, plan.compile_seconds, plan.level, better
        )

    def _check_open(self) -> None:
        if self._closed:
            raise PoolClosedError("this generator was closed; parallelize the model again")


def _call(
    method: str, arguments: bytes, as_tensor: tuple[bool, ...], rows: Sequence[tuple[Any, np.dtype]]
) -> tuple[Any, ...]:
    """What calls of one plan have in common; ``rows``: shape and dtype of one row of each input."""
    return method, arguments, as_tensor, *rows


def check_tile(tile: int | None, rows: int) -> int | None:
    """The rows of a tile that are fixed; ``rows`` are those of the model's own engines, or 0."""
    if tile is None:
        return rows or None
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
        raise ConfigurationError(f"tile must be a whole number of at least 1, not {tile!r}")
    if rows and tile != rows:
        raise ConfigurationError(
            f"tile={tile}, but the model's engine was built with batch_size={rows}, which fixes "
            "the tile; leave tile= out"
        )
    if not rows and tile & (tile - 1):
        raise ConfigurationError(f"tile must be a power of two, not {tile}")
    return tile


def _non_finite_rows(inputs: Sequence[np.ndarray]) -> int:
    """How many samples have a NaN or an infinity in any of their inputs."""
    bad: Any = None
    for array in inputs:
        # A sum of squares is finite only if all are: one quick pass, for what is nearly always so.
        if array.dtype.kind in "fc" and not np.isfinite(np.vdot(array, array)):
            rows = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
            bad = rows if bad is None else bad | rows
    return 0 if bad is None else int(bad.sum())
