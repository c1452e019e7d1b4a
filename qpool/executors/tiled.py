"""Strategies that cut a batch into tiles: one model, with whoever computes the tiles.

Owns what ``processes`` and ``threads`` have in common as strategies: the model's shipment, the
bridge to TensorFlow's tapes.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Sequence
from typing import Any

from qpool.bridge.gradient import Bridge
from qpool.bridge.losses import LossBridge, Losses
from qpool.bridge.weighted import Weighted
from qpool.executors.base import Executor, Options
from qpool.executors.remote import RemoteModel
from qpool.executors.worker_pool import WorkerPool
from qpool.shipping import pack
from workers.errors import InputError, ModelError, QPoolError, RemoteError
from workers.replica.with_loss import WithLoss
from workers.replica.with_weights import WithWeights

log = logging.getLogger("qpool")


class TiledExecutor(Executor):
    """Computes a model's tiles. A subclass makes the ``pool`` in ``_make``."""

    def __init__(self, model: Any, options: Options) -> None:
        super().__init__(model, options)
        shipment = pack(model, options.factory)
        self._owns = options.pool is None
        self.pool: WorkerPool = self._make(options)
        try:
            self._remote = RemoteModel(
                self.pool, shipment, options.tile, options.engine, model, options
            )
        except BaseException:
            if self._owns:
                self.pool.close()
            raise
        self._bridge = Bridge(model, self._remote, options.sharded, self._in_place)
        self._whole: Executor | None = None
        self._losses = Losses(model, self._bridge_of)
        self._weighted = Weighted(model, options.sharded, self._bridge_of_weighted, self._in_place)

    @abc.abstractmethod
    def _make(self, options: Options) -> WorkerPool:
        """What computes the tiles; closed with the executor unless it was given."""

    @property
    def calls(self) -> int:
        return self.pool.calls

    @calls.setter
    def calls(self, number: int) -> None:
        self.pool.calls = number

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._weighted.has_no_batch(method, args, kwargs):
            return self._in_place(method, args, kwargs)
        if len(args) != 1 or kwargs or self._weighted.may_be(args[0]):
            weighted = self._weighted.find(method, args, kwargs)
            if weighted is not None:
                return weighted()
        try:
            return self._bridge.call(method, args, kwargs)
        except Exception as error:
            own = isinstance(error, QPoolError)
            due_to_rows = not own or isinstance(error, InputError | ModelError | RemoteError)
            if not (due_to_rows and self._weighted.may_be_weights(args, kwargs)):
                raise
            return self._without_batch(method, args, kwargs, error)

    def _without_batch(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
    ) -> Any:
        """A call that failed with some of its rows, made with all of what may be weights."""
        try:
            found = self._in_place(method, args, kwargs)
        except Exception:
            raise error from None
        log.info("%s is computed here: with some of the rows it failed: %s", method, error)
        self._weighted.are_weights(method, args)
        return found

    def loss_and_gradient(
        self, method: str, loss: Callable[..., Any], values: Sequence[Any]
    ) -> tuple[Any, Any, list[Any]]:
        """One exchange: workers compute the loss too, and its gradient, in one program. Where a
        loss cannot go there it takes two, as a tape around the call would."""
        bridge = self._losses.find(method, loss)
        if bridge is not None:
            try:
                return bridge.loss_and_gradient(values)
            except Exception as error:
                bridge.check(values)  # what is wrong with the call is so wherever it is computed
                if bridge.in_use or not self._losses.refuse(method, loss, error):
                    raise
        return super().loss_and_gradient(method, loss, values)

    def _bridge_of(self, judged: WithLoss) -> LossBridge:
        """Workers' replicas of a model with a loss."""
        return LossBridge(judged, self._remote_of(judged), ())

    def _bridge_of_weighted(self, model: WithWeights) -> Bridge:
        """Workers' replicas of a model that calls give weights."""
        return Bridge(model, self._remote_of(model, model.method), self.options.sharded)

    def _remote_of(self, model: Any, called: str = "") -> RemoteModel:
        return RemoteModel(
            self.pool,
            pack(model),
            self.options.tile,
            self.options.engine,
            self.model,
            self.options,
            called,
        )

    def _in_place(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call computed here, differentiable any number of times."""
        if self._whole is None:
            from qpool.executors.in_place.cpu_batch import CpuBatchExecutor

            self._whole = CpuBatchExecutor(self.model, self.options)
        return self._whole.call(method, args, kwargs)

    def per_sample_gradients(self, z: Any, cotangent: Any) -> list[Any]:
        return self._bridge.per_sample_gradients(z, cotangent)

    def stats(self) -> dict[str, Any]:
        bridges = [*self._losses.bridges, *self._weighted.bridges]
        found = self._remote.stats([bridge.remote for bridge in bridges])
        if self._whole is not None:
            found["compiled"] += self._whole.stats()["compiled"]
        return {
            **found,
            "losses": self._losses.stats(),
            "pool": self.pool.stats(),
        }

    def close(self) -> None:
        if self._whole is not None:
            self._whole.close()
        self._losses.close()
        self._weighted.close()
        self._remote.close()
        if self._owns:
            self.pool.close()
