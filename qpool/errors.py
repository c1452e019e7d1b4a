"""The exception tree, drawn and defined in :mod:`workers.errors`."""

from workers.errors import (
    ArenaError,
    ConfigurationError,
    DataError,
    GradientError,
    InputError,
    ModelError,
    PoolClosedError,
    PoolError,
    QPoolError,
    RemoteError,
    SecondOrderGradientError,
    ShippingError,
    StartupError,
    StatefulCallError,
    UntraceableError,
    WorkerLostError,
)

__all__ = [
    "ArenaError",
    "ConfigurationError",
    "DataError",
    "GradientError",
    "InputError",
    "ModelError",
    "PoolClosedError",
    "PoolError",
    "QPoolError",
    "RemoteError",
    "SecondOrderGradientError",
    "ShippingError",
    "StartupError",
    "StatefulCallError",
    "UntraceableError",
    "WorkerLostError",
]
