"""A model with a loss of what it returns: what a worker computes in one go, values and gradient.

Owns the two as one call. Knows nothing of tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from workers.errors import InputError


class WithLoss:
    """Called with a batch (and further ones, of as many rows), it returns what the model's
    ``method`` returns for the first, and the loss of each sample.

    ``loss`` is called with the outputs and the further batches, and what it returns is averaged
    over all axes but the first. Its variables travel along, and are kept in step; gradients are for
    the model's own.
    """

    def __init__(self, model: Any, method: str, loss: Callable[..., Any]) -> None:
        self.model = model
        self.loss = loss
        self._method = method
        for name in ("latent_dim", "input_dim"):
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))

    @property
    def trainable_variables(self) -> list[Any]:
        return list(self.model.trainable_variables)

    def __call__(self, z: Any, *data: Any) -> tuple[Any, Any]:
        call = self.model if self._method == "__call__" else getattr(self.model, self._method)
        outputs = call(z)
        losses = tf.convert_to_tensor(self.loss(outputs, *data))
        if not losses.dtype.is_floating or losses.shape.rank == 0:
            raise InputError(
                "the loss must be real, with a row for each sample: expected a tensor of shape "
                f"({z.shape[0]},), came {losses.dtype.name} of shape {losses.shape}. The mean over "
                "samples is what is differentiated"
            )
        return outputs, tf.reduce_mean(losses, range(1, losses.shape.rank))
