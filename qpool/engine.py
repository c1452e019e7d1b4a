"""``qpool.Engine``: the drop-in for ``sf.Engine("tf")``, its runs spread over a pool.

Owns which runs go to the pool and what of a program is shared out (the parameters with a batch
axis) and what goes to every worker (the others). The physics is the traced engine's, here and in
the workers; the pooled run's state is put where a run in place would have left it, so that all
else is Strawberry Fields' own.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import sympy
import tensorflow as tf
from strawberryfields import ops
from strawberryfields.parameters import FreeParameter

from qpool import programs
from qpool.bridge.gradient import Bridge
from qpool.executors.processes.pool import Pool
from qpool.executors.remote import RemoteModel
from qpool.shipping import pack
from workers.engine import TracedEngine
from workers.errors import ConfigurationError, PoolClosedError
from workers.replica import serialization

#: Programs whose replicas are kept in the workers; the one not used for longest goes first.
_KEPT = 16


class Engine(TracedEngine):
    """``sf.Engine("tf", ...)`` whose batches are computed by a pool of processes.

    ``run(program, args=...)`` returns Strawberry Fields' ``Result``; its ``state`` is batched and
    differentiable with respect to the arguments, twice, in a tape and inside ``tf.function``.
    Arguments with a batch axis are shared out among the workers; scalars go to all of them.

    A run is computed in this process, by the traced engine, if there is nothing to share out (no
    argument has a batch axis) or if it cannot be: it continues a former run, measures, or adds or
    removes modes.

    Args:
        backend: "tf".
        backend_options: as for ``sf.Engine``: ``cutoff_dim``, and optionally ``dtype``, ``pure``,
            ``batch_size`` (which the arguments must then have).
        workers: how many processes; see ``qpool.Pool`` for this and the next five.
        threads: threads and cores of each.
        start_method: "forkserver" or "spawn".
        pin: whether workers are pinned to cores.
        timeout: seconds without progress after which a worker is replaced.
        seed: of the workers' random draws.
        pool: a ``qpool.Pool`` to share, in place of one of the engine's own.
        tile: rows computed at once, a power of two; default: from the program and the batch.

    Raises:
        ConfigurationError: another backend, options that it has not, or ``workers`` beside a pool.
        PoolClosedError: it is run after ``close``.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def __init__(
        self,
        backend: str = "tf",
        *,
        backend_options: dict[str, Any] | None = None,
        workers: int | None = None,
        pool: Pool | None = None,
        tile: int | None = None,
        threads: int = 1,
        start_method: str | None = None,
        pin: bool | None = None,
        timeout: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(backend, backend_options=backend_options)
        if pool is not None and workers not in (None, pool.workers):
            raise ConfigurationError(
                f"workers={workers}, but the pool given has {pool.workers}; leave workers= out"
            )
        self._owns_pool = pool is None
        self._pool = pool or Pool(
            workers,
            threads=threads,
            start_method=start_method,
            pin=pin,
            timeout=timeout,
            seed=seed,
        )
        self._tile = tile
        self._bridges: OrderedDict[Any, tuple[RemoteModel, Bridge]] = OrderedDict()
        self._runs = {"pooled": 0, "here": 0}
        self._closed = False

    def stats(self) -> dict[str, Any]:
        """What was measured: runs, each program's samples and compilation, and the pool."""
        return {
            "runs": dict(self._runs),
            "programs": [remote.stats() for remote, _ in self._bridges.values()],
            "pool": self._pool.stats(),
        }

    def close(self) -> None:
        """Free what the workers hold; a pool of the engine's own ends."""
        if not self._closed:
            self._closed = True
            while self._bridges:
                self._bridges.popitem()[1][0].close()
            if self._owns_pool:
                self._pool.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run_program(self, prog: Any, **kwargs: Any) -> Any:
        if self._closed:
            raise PoolClosedError("this engine was closed; make a new one")
        arguments = self._to_share(prog)
        self._runs["here" if arguments is None else "pooled"] += 1
        if arguments is None:
            return super()._run_program(prog, **kwargs)
        batched = {name: value for name, value in arguments.items() if value.shape.rank == 1}
        single = {name: value for name, value in arguments.items() if name not in batched}
        bridge = self._bridge(prog, tuple(batched), tuple(single))
        rows = tf.stack(list(batched.values()), axis=1)
        weights = tf.stack(list(single.values())) if single else tf.zeros([1], rows.dtype)
        self.backend.circuit.adopt(bridge.call("__call__", (rows,), {}, weights=[weights]))
        combined, samples = self._combine_and_sort_samples({})
        return list(prog.circuit), combined, samples

    def _to_share(self, prog: Any) -> dict[str, Any] | None:
        """The values of the free parameters, real tensors by name; None if the run stays here."""
        if not self.backend.circuit.untouched or not _is_shareable(prog):
            return None
        values = {}
        for name in sorted(_used(prog)):
            parameter = prog.free_params[name]
            value = parameter.default if parameter.val is None else parameter.val
            if value is None:
                return None  # the run in place says what is missing
            value = tf.convert_to_tensor(value)
            if value.shape.rank is None or value.shape.rank > 1 or value.dtype.is_complex:
                return None
            values[name] = tf.cast(value, self._real)
        sizes = {value.shape[0] for value in values.values() if value.shape.rank == 1}
        asked = self.backend_options.get("batch_size")
        return values if sizes and (asked is None or sizes == {asked}) else None

    @property
    def _real(self) -> tf.DType:
        return tf.as_dtype(self.backend_options.get("dtype", tf.complex64)).real_dtype

    def _bridge(self, prog: Any, batched: tuple[str, ...], single: tuple[str, ...]) -> Bridge:
        options = {k: v for k, v in self.backend_options.items() if k != "batch_size"}
        # What changes a state beside the program.
        settings = {**serialization.settings(), **options}
        key = (programs.fingerprint(prog), batched, single, str(sorted(settings.items())))
        if key not in self._bridges:
            with tf.init_scope():  # variables have values there
                self._bridges[key] = self._build(prog, options, batched, single)
            if len(self._bridges) > _KEPT:
                # Not closed: a tape may still need it. The workers forget it when nobody does.
                self._bridges.popitem(last=False)
        self._bridges.move_to_end(key)
        return self._bridges[key][1]

    def _build(
        self,
        prog: Any,
        options: dict[str, Any],
        batched: tuple[str, ...],
        single: tuple[str, ...],
    ) -> tuple[RemoteModel, Bridge]:
        circuit = _Circuit(prog, options, batched, single, self._real)
        held = {parameter: parameter.val for parameter in prog.free_params.values()}
        try:
            for parameter in held:  # this run's values stay here
                parameter.val = None
            shipment = pack(circuit)
        finally:
            for parameter, value in held.items():
                parameter.val = value
        remote = RemoteModel(self._pool, shipment, self._tile, "traced")
        return remote, Bridge(circuit, remote, ())


class _Circuit:
    """A program as a model: rows of its batched parameters -> the state's array.

    The other parameters are its one variable, whose value is given with each call.
    """

    def __init__(
        self,
        program: Any,
        options: dict[str, Any],
        batched: tuple[str, ...],
        single: tuple[str, ...],
        dtype: tf.DType,
    ) -> None:
        self.program, self.options = program, options
        self.batched, self.single = batched, single
        self.weights = tf.Variable(tf.zeros([max(1, len(single))], dtype))
        self.trainable_variables = [self.weights]

    def __call__(self, rows: tf.Tensor) -> tf.Tensor:
        args = dict(zip(self.batched, tf.unstack(rows, axis=1), strict=True))
        args |= dict(zip(self.single, tf.unstack(self.weights), strict=False))
        engine = TracedEngine("tf", backend_options=self.options)
        return engine.run(self.program, args=args).state.data


def _used(prog: Any) -> set[str]:
    """Names of the free parameters that the program's gates depend on."""
    parameters = [p for command in prog.circuit for p in command.op.p]
    atoms = [a for p in parameters if isinstance(p, sympy.Basic) for a in p.atoms(FreeParameter)]
    return {atom.name for atom in atoms}


def _is_shareable(prog: Any) -> bool:
    changes_modes = (ops._Delete, ops._New_modes)
    return type(prog).__name__ == "Program" and not any(
        isinstance(command.op, (ops.Measurement, *changes_modes)) or command.op.measurement_deps
        for command in prog.circuit
    )
