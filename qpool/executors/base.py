"""What a strategy is: a way to compute a model's pooled methods.

Owns the interface and the options that all strategies are given. A strategy is registered by
name (``qpool.register_strategy``) and made once per model.
"""

from __future__ import annotations

import abc
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qpool.executors.worker_pool import WorkerPool


@dataclass(frozen=True)
class Options:
    """How ``qpool.parallelize`` was called; see there. None means: the strategy's default."""

    workers: int | None = None
    threads: int = 1
    tile: int | None = None
    start_method: str | None = None
    pin: bool | None = None
    engine: str = "traced"
    sharded: tuple[str, ...] = ()
    pool: WorkerPool | None = None
    timeout: float | None = None
    seed: int = 0
    factory: Callable[[], Any] | None = None
    address: str | None = None
    nodes: int | None = None
    devices: tuple[str, ...] | None = None
    #: What this model's methods have been warned of, each once.
    warned: set[tuple[type[Warning], str]] = field(default_factory=set, compare=False, repr=False)


class Executor(abc.ABC):
    """Computes the pooled methods of one model.

    ``calls`` is how many calls there have been, where draws follow from a call's number: a run that
    is resumed sets it to where it was.
    """

    calls: int = 0
    _samples: int = 0
    _seconds: float = 0.0

    def __init__(self, model: Any, options: Options) -> None:
        self.model = model
        self.options = options

    @abc.abstractmethod
    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``getattr(model, method)(*args, **kwargs)`` returns, differentiable in the same way.

        ``method`` is ``"__call__"`` for the call itself. Works eagerly and in a graph.
        """

    @property
    def within_xla(self) -> bool:
        """Whether calls may be part of what XLA compiles, as far as it is known."""
        return False

    @abc.abstractmethod
    def per_sample_gradients(self, z: Any, cotangent: Any) -> list[Any]:
        """The gradient of each sample's outputs, contracted with its row of ``cotangent``.

        ``z`` is (batch, ...), ``cotangent`` has the structure and shapes of the outputs. Returns
        one tensor of shape (batch, *variable.shape) for each trainable variable.
        """

    def loss_and_gradient(
        self, method: str, loss: Callable[..., Any], values: Sequence[Any]
    ) -> tuple[Any, Any, list[Any]]:
        """What ``method`` returns for ``values[0]``; ``loss`` of that and of the further values, a
        number for each sample; and the gradient of its mean for each trainable variable."""
        from qpool.bridge.losses import on_a_tape

        return on_a_tape(self.model, self.call, method, loss, values)

    def stats(self) -> dict[str, Any]:
        """What the strategy measured."""
        return {}

    @contextlib.contextmanager
    def _counted(self, args: tuple[Any, ...]) -> Iterator[None]:
        """Count the samples and the seconds of a call that has values."""
        began = time.perf_counter()
        yield
        first = args[0] if args else None
        if isinstance(first, list | tuple | dict):
            first = next(iter(first.values() if isinstance(first, dict) else first), None)
        shape = getattr(first, "shape", None)
        if shape is not None and len(shape) and shape[0] is not None:
            self._samples += int(shape[0])
            self._seconds += time.perf_counter() - began

    def _rate(self) -> dict[str, Any]:
        """What has been counted."""
        rate = self._samples / self._seconds if self._seconds else 0.0
        return {
            "samples": self._samples,
            "call_seconds": self._seconds,
            "samples_per_second": rate,
        }

    def sibling(self) -> Executor:
        """Another one beside it, for the model as it is now, not as a factory made it."""
        return type(self)(self.model, replace(self.options, factory=None))

    @property
    def is_needed(self) -> bool:
        """Whether a sibling lives by what this one holds."""
        return False

    def close(self) -> None:  # noqa: B027 - optional: most strategies hold nothing
        """Give back what the strategy holds."""
