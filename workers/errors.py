"""The exception tree. Every error crosses process boundaries, so every error pickles.

QPoolError
├── ConfigurationError (ValueError)   an option, a count or a name that cannot be used
├── InputError (ValueError)           an argument of a call: rank, width, dtype, batch
│   └── BatchAxisError                an output without a row for each sample
├── ModelError (TypeError)            an object that cannot be pooled as it is
│   ├── ShippingError                 part of it cannot be sent to another process
│   ├── StatefulCallError             calling it changes variables that the pool keeps in step
│   ├── AttributeNotSetError (AttributeError)  what a call left is read, and it was computed without
│   └── UntraceableError              an operation that a tf.function cannot hold
│       └── NotForXLAError            or that XLA cannot compile
├── GradientError                     a derivative that cannot be had
│   └── SecondOrderGradientError      a derivative of a derivative through the pool
├── PoolError
│   ├── PoolClosedError               the pool was closed
│   ├── StartupError                  a worker did not come up
│   ├── WorkerLostError               workers died, or went silent, on the same tiles
│   ├── ArenaError (MemoryError)      no room for the shared segment
│   └── RemoteError                   the model raised in a worker; carries its traceback
├── DataError (ValueError)            training data that cannot be used
├── DivergedError                     a training run came to numbers that are none
└── CheckpointError                   a checkpoint that cannot be written, read or gone on from

NotCompiledWarning (UserWarning)  a method that computes circuits and stays slow, and why
CircuitFailedWarning (UserWarning)  a circuit failed, and the model went on without it
AttributeNotSetWarning (UserWarning)  the call sets an attribute, and not where it is computed

This module owns the tree and the wording that all errors share; it knows no other module.
"""

from __future__ import annotations

from typing import Any


class QPoolError(Exception):
    """Root of everything that qpool raises on purpose."""

    #: AutoGraph would wrap an error raised while a graph is traced into one of its own; errors
    #: with this mark reach the caller as they are.
    ag_pass_through = True


class ConfigurationError(QPoolError, ValueError):
    """An option, a count or a name that cannot be used."""


class InputError(QPoolError, ValueError):
    """An argument of a pooled call has the wrong rank, width, dtype or batch."""


class BatchAxisError(InputError):
    """An output of a pooled method has no row for each sample."""


class ModelError(QPoolError, TypeError):
    """An object that cannot be pooled as it is."""


class ShippingError(ModelError):
    """Part of a model cannot be sent to another process."""


class StatefulCallError(ModelError):
    """Calling the model changed variables, which a replica cannot hand back."""


class UntraceableError(ModelError):
    """An operation needs numbers, where a graph has only tensors."""


class NotForXLAError(UntraceableError):
    """An operation has a place in a graph, and none in a program of XLA's."""


class NotCompiledWarning(UserWarning):
    """A method computes circuits and could not be compiled: it is as slow as it was."""


class CircuitFailedWarning(UserWarning):
    """A circuit failed, and the model caught that: what it returned is not the circuit's."""


class AttributeNotSetError(ModelError, AttributeError):
    """What a call would have left in an attribute is asked for, and it was computed without."""


class AttributeNotSetWarning(UserWarning):
    """A call sets attributes of the model, which are not handed back from where it is computed."""


class GradientError(QPoolError):
    """A derivative that cannot be had."""


class SecondOrderGradientError(GradientError):
    """A derivative of a derivative was asked of the pool."""


class PoolError(QPoolError):
    """The pool could not do its work."""


class PoolClosedError(PoolError):
    """The pool was closed before the call."""


class StartupError(PoolError):
    """A worker did not come up."""


class WorkerLostError(PoolError):
    """Workers died, or went silent, again and again on the same tiles."""


class ArenaError(PoolError, MemoryError):
    """There is no room for the shared segment."""


class DataError(QPoolError, ValueError):
    """Training data that cannot be used."""


class DivergedError(QPoolError):
    """A training run came to numbers that it cannot go on from."""


class CheckpointError(QPoolError):
    """A checkpoint that cannot be written, is damaged, or is of another program or model."""


class RemoteError(PoolError):
    """The model raised in a worker.

    ``worker`` is the worker's number, ``where`` says what it was doing, ``traceback`` is the
    worker's own traceback as text. ``original`` is the exception itself where it could be
    pickled, else None; it is the ``__cause__`` too.
    """

    def __init__(
        self,
        message: str,
        *,
        worker: int,
        where: str,
        traceback: str,
        original: BaseException | None = None,
    ) -> None:
        super().__init__(message)
        self.worker = worker
        self.where = where
        self.traceback = traceback
        self.original = original

    def __reduce__(self) -> tuple[Any, ...]:
        details = {
            "worker": self.worker,
            "where": self.where,
            "traceback": self.traceback,
            "original": self.original,
        }
        return _rebuild_remote_error, (self.args[0], details)

    def __str__(self) -> str:
        return (
            f"{self.args[0]} (worker {self.worker}, {self.where})\n"
            f"--- traceback in the worker ---\n{self.traceback.rstrip()}"
        )


def _rebuild_remote_error(message: str, details: dict[str, Any]) -> RemoteError:
    return RemoteError(message, **details)


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """The tail of a message about an unknown name: the nearest known one, and all of them."""
    import difflib

    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(sorted(known))}"
