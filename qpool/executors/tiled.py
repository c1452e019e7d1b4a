"""Strategies that cut a batch into tiles: one model, with whoever computes the tiles.

Owns what ``processes`` and ``threads`` have in common as strategies: the model's shipment, the
bridge to TensorFlow's tapes.
"""

from __future__ import annotations

import abc
from typing import Any

from qpool.executors.base import Executor, Options
from qpool.executors.computer import Computer
from qpool.executors.remote import RemoteModel
from qpool.gradient import Bridge
from qpool.shipping import pack


class TiledExecutor(Executor):
    """Computes a model's tiles. A subclass makes the ``computer`` in ``_make``."""

    def __init__(self, model: Any, options: Options) -> None:
        super().__init__(model, options)
        shipment = pack(model, options.factory)
        self._owns = options.pool is None
        self.computer: Computer = self._make(options)
        try:
            self._remote = RemoteModel(
                self.computer, shipment, options.tile, options.engine, model, options
            )
        except BaseException:
            if self._owns:
                self.computer.close()
            raise
        self._bridge = Bridge(model, self._remote, options.sharded)

    @abc.abstractmethod
    def _make(self, options: Options) -> Computer:
        """What computes the tiles; closed with the executor unless it was given."""

    @property
    def calls(self) -> int:
        return self.computer.calls

    @calls.setter
    def calls(self, number: int) -> None:
        self.computer.calls = number

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._bridge.call(method, args, kwargs)

    def per_sample_gradients(self, z: Any, cotangent: Any) -> list[Any]:
        return self._bridge.per_sample_gradients(z, cotangent)

    def stats(self) -> dict[str, Any]:
        return {**self._remote.stats(), "pool": self.computer.stats()}

    def close(self) -> None:
        self._remote.close()
        if self._owns:
            self.computer.close()
