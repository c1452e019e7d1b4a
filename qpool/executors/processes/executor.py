"""The strategy ``processes``: which pool computes a model's tiles."""

from __future__ import annotations

import dataclasses
from typing import Any

from qpool.executors.base import Options
from qpool.executors.processes.pool import Pool
from qpool.executors.tiled import TiledExecutor
from workers.errors import ConfigurationError


class ProcessExecutor(TiledExecutor):
    """Computes a model's tiles in a pool's workers."""

    def _make(self, options: Options) -> Pool:
        if options.pool is None:
            return Pool(
                options.workers,
                threads=options.threads,
                start_method=options.start_method,
                pin=options.pin,
                timeout=options.timeout,
                seed=options.seed,
                devices=options.devices,
            )
        if not isinstance(options.pool, Pool):
            raise ConfigurationError(
                f"strategy 'processes' takes a qpool.Pool; came {type(options.pool).__name__}"
            )
        if options.devices is not None:
            raise ConfigurationError(
                "devices= is the pool's own: leave it out where pool= is given"
            )
        if options.workers not in (None, options.pool.workers):
            raise ConfigurationError(
                f"workers={options.workers}, but the pool given has {options.pool.workers}; "
                "leave workers= out"
            )
        return options.pool

    def sibling(self) -> ProcessExecutor:
        """In the same pool."""
        alone = dataclasses.replace(self.options, factory=None, workers=None, devices=None)
        return ProcessExecutor(self.model, dataclasses.replace(alone, pool=self.pool))

    @property
    def is_needed(self) -> bool:
        """It owns the pool."""
        return self._owns

    def stats(self) -> dict[str, Any]:
        return {"strategy": "processes", **super().stats()}
