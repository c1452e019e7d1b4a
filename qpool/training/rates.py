"""Learning rates that are no part of what is compiled: their numbers are variables."""

from __future__ import annotations

from typing import Any

import keras


@keras.saving.register_keras_serializable("qpool")
class Cosine(keras.optimizers.schedules.CosineDecay):
    """Keras's ``CosineDecay``, from ``initial_learning_rate`` to 0 in ``decay_steps`` updates; both
    may be given other values, and an optimizer that is compiled goes on with those."""

    def __init__(
        self, initial_learning_rate: float, decay_steps: int, name: str = "CosineDecay"
    ) -> None:
        super().__init__(
            keras.Variable(initial_learning_rate, trainable=False, name="initial_learning_rate"),
            keras.Variable(decay_steps, trainable=False, dtype="float32", name="decay_steps"),
            name=name,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            "initial_learning_rate": float(self.initial_learning_rate),
            "decay_steps": int(self.decay_steps),
            "name": self.name,
        }


def of(schedule: str, start: float, updates: int) -> Any:
    """What an optimizer takes: a number, or a schedule over so many ``updates``."""
    return start if schedule == "constant" else Cosine(start, updates)


def change(optimizer: Any, start: float, updates: int) -> None:
    """Have an optimizer, whose rate ``of`` made, begin with another one."""
    schedule = optimizer._learning_rate
    if isinstance(schedule, Cosine):
        schedule.initial_learning_rate.assign(start)
        schedule.decay_steps.assign(updates)
    else:
        optimizer.learning_rate = start
