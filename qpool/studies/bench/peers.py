"""What other libraries need to stand beside qpool in a benchmark."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
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


def has_piquasso() -> bool:
    """Whether Piquasso and JAX are installed (``pip install 'qpool-sf[peers]'``)."""
    return all(importlib.util.find_spec(name) for name in ("piquasso", "jax"))


def piquasso_step(case: Any, z: Any) -> Callable[[], Any]:
    """The CV-QNN of ``case`` in Piquasso: value and weight gradient, jitted, vmapped over z.

    Its cutoff bounds the photons of all modes together, so its states are smaller than ours.
    """
    import warnings

    import jax
    import jax.numpy as jnp
    import numpy as np
    import piquasso
    from piquasso import cvqnn

    config = piquasso.Config(cutoff=case.cutoff, dtype=np.float32)
    simulator = piquasso.PureFockSimulator(
        d=case.modes, config=config, connector=piquasso.JaxConnector()
    )
    weights = cvqnn.generate_random_cvqnn_weights(layer_count=case.layers, d=case.modes)

    def sample(weights: Any, row: Any) -> Any:
        layers = cvqnn.create_layers(weights)
        with piquasso.Program() as program:
            piquasso.Q() | piquasso.Vacuum()
            for mode in range(case.modes):
                piquasso.Q(mode) | piquasso.Displacement(r=row[2 * mode], phi=row[2 * mode + 1])
            piquasso.Q() | layers
        state = simulator.execute(program).state
        return jnp.stack([state.mean_position(mode) for mode in range(case.modes)])

    def loss(weights: Any, z: Any) -> Any:
        return jnp.mean(jax.vmap(lambda row: sample(weights, row))(z) ** 2)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = jax.jit(jax.value_and_grad(loss))
        weights = np.asarray(weights)
        jax.block_until_ready(step(weights, z))
    return lambda: jax.block_until_ready(step(weights, z))
