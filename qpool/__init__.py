"""qpool: a worker pool behind the generators of continuous-variable quantum GANs.

Importing it is light: TensorFlow and Strawberry Fields load when they are first needed. From then
on ``import strawberryfields`` works on current SciPy and setuptools (see ``workers.sf_compat``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from workers import cache, sf_compat

if TYPE_CHECKING:
    from qpool import errors, metrics, models, states
    from qpool.engine import Engine
    from qpool.executors import register_strategy
    from qpool.executors.cluster.cluster import Cluster
    from qpool.executors.processes.pool import Pool
    from qpool.generator import create_parallel_generator, parallelize
    from qpool.layers import CircuitLayer
    from qpool.measure.batch_size import suggest_batch
    from qpool.measure.gradient_flow import gradient_flow, gradient_norms
    from qpool.measure.monitor import Monitor, MonitorCallback
    from qpool.pooled import ParallelGenerator
    from qpool.training.trainer import QuantumGANTrainer

__version__ = "0.1.0"

__all__ = [
    "CircuitLayer",
    "Cluster",
    "Engine",
    "Monitor",
    "MonitorCallback",
    "ParallelGenerator",
    "Pool",
    "QuantumGANTrainer",
    "__version__",
    "create_parallel_generator",
    "errors",
    "gradient_flow",
    "gradient_norms",
    "metrics",
    "models",
    "parallelize",
    "register_strategy",
    "states",
    "suggest_batch",
]

#: Public name -> module that has it; loaded on first use.
_HOMES = {
    "CircuitLayer": "qpool.layers",
    "Cluster": "qpool.executors.cluster.cluster",
    "Engine": "qpool.engine",
    "ParallelGenerator": "qpool.pooled",
    "Monitor": "qpool.measure.monitor",
    "MonitorCallback": "qpool.measure.monitor",
    "Pool": "qpool.executors.processes.pool",
    "QuantumGANTrainer": "qpool.training.trainer",
    "create_parallel_generator": "qpool.generator",
    "errors": "qpool.errors",
    "gradient_flow": "qpool.measure.gradient_flow",
    "gradient_norms": "qpool.measure.gradient_flow",
    "metrics": "qpool.metrics",
    "models": "qpool.models",
    "parallelize": "qpool.generator",
    "register_strategy": "qpool.executors",
    "states": "qpool.states",
    "suggest_batch": "qpool.measure.batch_size",
}

sf_compat.install()
cache.keep_here()


def __getattr__(name: str) -> Any:
    try:
        home = _HOMES[name]
    except KeyError:
        raise AttributeError(f"module 'qpool' has no attribute {name!r}") from None
    module = importlib.import_module(home)
    value = module if home == f"qpool.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
