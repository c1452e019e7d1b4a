"""Keras metrics of kets, for layers that read the state itself out (``readout="ket"``).

Each is the mean over samples of a measure of ``qpool.states``. Owns the way from an array to it.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from qpool import states
from workers.errors import InputError


def _state(ket: Any) -> Any:
    """Strawberry Fields' state of a batch of kets, (batch, D, ..., D)."""
    from workers.engine.backend import TracedFockState

    ket = tf.convert_to_tensor(ket)
    if not ket.dtype.is_complex or ket.shape.rank is None or ket.shape.rank < 2:
        raise InputError(
            f"expected kets, (batch, D, ..., D), complex; came {ket.dtype.name} of shape "
            f"{ket.shape}. A layer gives them with readout='ket'"
        )
    modes = ket.shape.rank - 1
    return TracedFockState(ket, modes, True, ket.shape[-1], batched=True, dtype=ket.dtype)


@keras.saving.register_keras_serializable("qpool")
class KetNorm(keras.metrics.Mean):
    """Mean weight of the predicted kets inside the cutoff: 1, unless the cutoff is too low."""

    def __init__(self, name: str = "ket_norm", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        return super().update_state(states.ket_norm(_state(y_pred)), sample_weight)


@keras.saving.register_keras_serializable("qpool")
class Fidelity(keras.metrics.Mean):
    """Mean fidelity of the predicted kets with the true ones: ``y_pred`` complex
    (batch, D, ..., D), an axis a mode, ``y_true`` the same, or one ket for all."""

    def __init__(self, name: str = "fidelity", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        return super().update_state(states.fidelity(_state(y_pred), y_true), sample_weight)


@keras.saving.register_keras_serializable("qpool")
class Purity(keras.metrics.Mean):
    """Mean purity of one mode of the predicted kets: less than 1 where it is entangled."""

    def __init__(self, mode: int = 0, name: str = "purity", **kwargs: Any) -> None:
        super().__init__(name=name, **kwargs)
        self.mode = mode

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        return super().update_state(states.purity(_state(y_pred), self.mode), sample_weight)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "mode": self.mode}


class LeakageWarning(keras.callbacks.Callback):
    """Says in the log when ``KetNorm`` falls below ``enough`` at the end of an epoch."""

    def __init__(self, metric: str = "ket_norm", enough: float = 0.99) -> None:
        super().__init__()
        self.metric, self.enough = metric, enough

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """See ``keras.callbacks.Callback``."""
        known = logs or {}
        if self.metric not in known:
            raise InputError(
                f"no metric {self.metric!r} among {sorted(known)}: compile the model with "
                "metrics=[qpool.metrics.KetNorm()]"
            )
        states.warn_of_leakage(known[self.metric], self.enough)
