"""Losses of a pooled model that are computed where its outputs are: one exchange a step.

Owns which losses a model has met, each with a replica of its own in the workers, and what is done
where a loss cannot go there.
"""

from __future__ import annotations

import logging
import types
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from qpool.gradient import Bridge
from workers.errors import InputError, ModelError, RemoteError, ShippingError, StatefulCallError
from workers.replica.judged import Judged

log = logging.getLogger("qpool")

#: Losses that are kept, with what is compiled for them; the one used longest ago is let go.
_KEPT = 8

#: What says that a loss is none that workers can compute: those of the coordinator's process can.
_NOT_THERE = (ShippingError, ModelError, InputError, StatefulCallError, RemoteError)


class Losses:
    """The losses of one model. ``bridge`` makes a bridge to workers of a ``Judged`` model."""

    def __init__(self, model: Any, bridge: Callable[[Judged], Bridge]) -> None:
        self._model = model
        self._bridge = bridge
        #: By method and loss: what is kept alive for the key, and the bridge or why there is none.
        self._known: OrderedDict[Any, tuple[Any, Bridge | str]] = OrderedDict()
        self._let_go = 0

    def find(self, method: str, loss: Callable[..., Any]) -> Bridge | None:
        """The bridge for this loss; None where it has to be computed in this process."""
        identity, alive = _identity(loss)
        key = method, identity
        if key not in self._known:
            try:
                with tf.init_scope():  # variables have values there, also where a step is traced
                    found: Bridge | str = self._bridge(Judged(self._model, method, loss))
            except _NOT_THERE as error:
                found = self._refused(error)
            self._known[key] = alive, found
            self._keep_few()
        self._known.move_to_end(key)
        found = self._known[key][1]
        return None if isinstance(found, str) else found

    def refuse(self, method: str, loss: Callable[..., Any], error: Exception) -> bool:
        """Whether this error of a first call means that the loss cannot be computed by workers."""
        if not isinstance(error, _NOT_THERE):
            return False
        identity, alive = _identity(loss)
        self._close(self._known.pop((method, identity), None))
        self._known[method, identity] = alive, self._refused(error)
        return True

    def stats(self) -> list[dict[str, Any]]:
        """For each loss: the method, and where it is computed."""
        return [
            {"method": method, "in_workers": not isinstance(found, str), "why_not": found}
            if isinstance(found, str)
            else {"method": method, "in_workers": True, "why_not": ""}
            for (method, _), (_, found) in self._known.items()
        ]

    @property
    def bridges(self) -> list[Bridge]:
        """Those of the losses that workers compute."""
        return [found for _, found in self._known.values() if isinstance(found, Bridge)]

    def close(self) -> None:
        for entry in self._known.values():
            self._close(entry)
        self._known.clear()

    def _keep_few(self) -> None:
        while len(self._known) > _KEPT:
            self._close(self._known.popitem(last=False)[1])
            self._let_go += 1
            if self._let_go == 1:
                log.warning(
                    "%d losses were given to one model; each is compiled anew. What changes from "
                    "step to step belongs in a further batch, or in a variable that the loss holds",
                    _KEPT + 1,
                )

    @staticmethod
    def _close(entry: tuple[Any, Bridge | str] | None) -> None:
        if entry is not None and isinstance(entry[1], Bridge):
            entry[1].close()

    @staticmethod
    def _refused(error: Exception) -> str:
        log.info("a loss is computed in this process, not by the workers: %s", error)
        return f"{type(error).__name__}: {error}"


def _identity(loss: Callable[..., Any]) -> tuple[Any, Sequence[Any]]:
    """What is the same for a function that is made anew by the same line with the same around it,
    and what must be kept so that it stays the same."""
    if not isinstance(loss, types.FunctionType):
        return id(loss), [loss]
    around = [cell.cell_contents for cell in loss.__closure__ or ()]
    around += [*(loss.__defaults__ or ()), *(loss.__kwdefaults__ or {}).values()]
    return (loss.__code__, *map(id, around)), [loss, *around]
