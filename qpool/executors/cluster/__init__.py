"""``ray``: the pool's tiles, computed by the nodes of a Ray cluster.

bridge (TensorFlow) -> remote.py (one model, arrays) -> cluster.py (nodes) -> node.py: a Pool
                                                          |-- ../shares.py   who gets what
                                                          |-- membership.py  who takes part
                                                          `-- connect.py     Ray itself

A node is one Ray actor that owns a local pool over that node's cores. Starting, placing, watching
and moving data are Ray's; what is here is which tiles go where.
"""

from __future__ import annotations

from typing import Any

from qpool.executors.base import Options
from qpool.executors.cluster.cluster import Cluster
from qpool.executors.tiled import TiledExecutor
from workers.errors import ConfigurationError

__all__ = ["Cluster", "RayExecutor"]


class RayExecutor(TiledExecutor):
    """Computes a model's tiles on the nodes of a cluster."""

    def _make(self, options: Options) -> Cluster:
        if isinstance(options.pool, Cluster):
            if (options.workers, options.devices, options.nodes) != (None, None, None):
                raise ConfigurationError(
                    "workers=, devices= and nodes= are the Cluster's own: leave them out where "
                    "pool= is given"
                )
            return options.pool
        self._owns = True  # any other pool that was given is for ``processes``
        return Cluster(
            options.address,
            workers=options.workers,
            threads=options.threads,
            nodes=options.nodes,
            start_method=options.start_method,
            timeout=options.timeout,
            seed=options.seed,
            devices=options.devices,
        )

    def stats(self) -> dict[str, Any]:
        return {"strategy": "ray", **super().stats()}
