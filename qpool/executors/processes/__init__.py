"""``processes``: a persistent pool of worker processes, and a model's place in it.

gradient.py (TensorFlow) -> remote.py (one model, arrays) -> pool.py (workers, arena)
                                                               |-- dispatch.py   what next
                                                               |-- process.py    start, kill
                                                               `-- topology.py   which cores
"""

from __future__ import annotations

from typing import Any

from qpool.executors.base import Executor, Options
from qpool.executors.processes.pool import Pool
from qpool.executors.processes.remote import RemoteModel
from qpool.gradient import Bridge
from workers.errors import ConfigurationError

__all__ = ["Pool", "ProcessExecutor"]


class ProcessExecutor(Executor):
    """Computes a model's tiles in a pool's workers."""

    def __init__(self, model: Any, options: Options) -> None:
        super().__init__(model, options)
        from qpool.shipping import pack

        shipment = pack(model, options.factory)
        self._owns_pool = options.pool is None
        self._pool = options.pool or Pool(
            options.workers,
            threads=options.threads,
            start_method=options.start_method,
            pin=options.pin,
            timeout=options.timeout,
            seed=options.seed,
        )
        if options.pool is not None and options.workers not in (None, options.pool.workers):
            raise ConfigurationError(
                f"workers={options.workers}, but the pool given has {options.pool.workers}; "
                "leave workers= out"
            )
        try:
            self._remote = RemoteModel(self._pool, shipment, options.tile, options.engine)
        except BaseException:
            if self._owns_pool:
                self._pool.close()
            raise
        self._bridge = Bridge(model, self._remote, options.sharded)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._bridge.call(method, args, kwargs)

    def per_sample_gradients(self, z: Any, cotangent: Any) -> list[Any]:
        return self._bridge.per_sample_gradients(z, cotangent)

    def stats(self) -> dict[str, Any]:
        return {"strategy": "processes", **self._remote.stats(), "pool": self._pool.stats()}

    def close(self) -> None:
        self._remote.close()
        if self._owns_pool:
            self._pool.close()
