"""What other libraries need to stand beside qpool in a benchmark."""

from __future__ import annotations

from typing import Any


def empty_environment() -> Any:
    """A Gymnasium environment that hands its (32, 4) action back as its observation."""
    import gymnasium
    import numpy as np

    class Empty(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (32, 4), np.float32)
        action_space = gymnasium.spaces.Box(-1, 1, (32, 4), np.float32)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            return np.zeros((32, 4), np.float32), {}

        def step(self, action: Any) -> Any:
            return action, 0.0, False, False, {}

    return Empty()
