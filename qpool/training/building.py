"""From a configuration to a trainer that is ready to train: model, pool, critic, rates.

Owns what of a configuration is made into a program, and keeping one for a run that needs the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from qpool.training.config import Config

#: Settings that are no part of what is compiled.
_NOT_COMPILED = (
    "seed",
    "data",
    "steps",
    "generator_rate",
    "critic_rate",
    "checkpoint_every",
    "evaluate_every",
    "keep",
    "workers",
)


def program(config: Config) -> str:
    """Names what is compiled for a run: equal for runs that can share it."""
    said = dataclasses.asdict(config)
    for name in _NOT_COMPILED:
        del said[name]
    return json.dumps(said, sort_keys=True)


class Kept:
    """The trainer of the last run in this process, for the next one of an equal program.

    It starts from the weights, optimizers and draws that a new one of its seed has, and so makes
    the same bits.
    """

    def __init__(self) -> None:
        self._of: tuple[str, int] | None = None
        self._open = contextlib.ExitStack()
        self._trainer: Any = None
        self._first: tuple[dict[str, Any], int] = ({}, 0)

    def close(self) -> None:
        """Let it go."""
        self._of = self._trainer = None
        self._open.close()

    def keep(self, config: Config, width: int, trainer: Any, opened: contextlib.ExitStack) -> None:
        """Keep a trainer that has not trained yet, and what is open with it."""
        self.close()
        self._of, self._trainer, self._open = (program(config), width), trainer, opened
        self._first = (trainer.arrays(), trainer.generator._qpool.executor().calls)

    def again(self, config: Config, width: int) -> Any:
        """The trainer as a new one of ``config`` is; None if what is kept is another program."""
        if self._of != (program(config), width):
            return None
        import keras

        from qpool.training import rates
        from qpool.training.gan import default_critic

        keras.utils.set_random_seed(config.seed)
        critic = default_critic(width, config.seed, config.critic_units, config.critic_layers)
        arrays, calls = self._first
        parts = {
            "generator": _model(config).variables,
            "critic": critic.variables,
            "draws": [keras.random.SeedGenerator(config.seed).state],
        }
        new = {
            f"{part}/{number}": keras.ops.convert_to_numpy(variable)
            for part, variables in parts.items()
            for number, variable in enumerate(variables)
        }
        self._trainer.begin_again({**arrays, **new}, config.seed)
        gan = self._trainer.gan
        for optimizer, rate in zip(
            (gan.generator_optimizer, gan.critic_optimizer), _rates(config), strict=True
        ):
            rates.change(optimizer, *rate)
        self._trainer.generator._qpool.executor().calls = calls
        return self._trainer


def _can_be_kept(config: Config) -> bool:
    """Whether all that a run changes is in the trainer's arrays: not with a pool, or draws."""
    from qpool.models import readouts

    draws = readouts.find(config.readout).draws(config.modes)
    return config.strategy == "cpu_batch" and not draws


@contextlib.contextmanager
def trainer(config: Config, width: int, kept: Kept | None = None) -> Iterator[Any]:
    """The trainer over a pooled generator, prepared for samples of that ``width``.

    It is closed at the end, unless it can be ``kept`` for the next run.
    """
    known = None if kept is None else kept.again(config, width)
    if known is not None:
        yield known
        return
    with contextlib.ExitStack() as stack:
        made = _make(config, width, stack)
        if kept is not None and _can_be_kept(config):
            kept.keep(config, width, made, stack.pop_all())
        yield made


def _make(config: Config, width: int, stack: contextlib.ExitStack) -> Any:
    import qpool

    pool = None
    if config.strategy in ("auto", "processes"):
        # First of all: the pool loads TensorFlow in the background while we load it here.
        pooled = qpool.Pool(
            config.workers,
            threads=config.threads,
            start_method=config.start_method,
            seed=config.seed,
        )
        pool = stack.enter_context(pooled)
    import keras

    from qpool.training import rates
    from qpool.training.gan import default_critic
    from qpool.training.trainer import QuantumGANTrainer

    keras.utils.set_random_seed(config.seed)
    generator = qpool.parallelize(
        _model(config),
        config.workers if pool is None else None,
        config.strategy,
        pool=pool,
        tile=config.tile,
        threads=config.threads,
        start_method=config.start_method if pool is None else None,
        seed=config.seed,
        address=config.address,
    )

    of_generator, of_critic = (rates.of(config.schedule, *rate) for rate in _rates(config))
    made = QuantumGANTrainer(
        stack.enter_context(generator),
        default_critic(width, config.seed, config.critic_units, config.critic_layers),
        generator_rate=of_generator,
        critic_rate=of_critic,
        critic_steps=config.critic_steps,
        loss=config.loss,
        penalty=config.penalty,
        norm_penalty=config.norm_penalty,
        ema_momentum=config.ema_momentum,
        clip_norm=config.clip_norm,
        seed=config.seed,
    )
    made.prepare(width)
    return made


def _rates(config: Config) -> tuple[tuple[float, int], tuple[float, int]]:
    """Of the generator and of the critic: where each begins, and in how many updates it ends."""
    return (
        (config.generator_rate, config.steps),
        (config.critic_rate, config.steps * config.critic_steps),
    )


def _model(config: Config) -> Any:
    """The generator, not pooled."""
    import qpool
    from qpool.models import encodings

    return qpool.models.QuantumSFGenerator(
        n_modes=config.modes,
        latent_dim=encodings.find(config.encoding).width(config.modes, config.layers),
        layers=config.layers,
        cutoff_dim=config.cutoff,
        encoding_strategy=config.encoding,
        readout=config.readout,
        seed=config.seed,
    )


def chosen(config: Config) -> tuple[Config, dict[str, Any]]:
    """The configuration with the strategy that was measured to be fastest, and why."""
    import tensorflow as tf

    from qpool.executors import Options
    from qpool.executors.auto.executor import choose

    model = _model(config)
    z = tf.random.stateless_normal((config.batch_size, model.latent_dim), (1, 2))
    options = Options(
        threads=config.threads,
        tile=config.tile,
        start_method=config.start_method,
        seed=config.seed,
    )
    choice = choose(model, z, options, within="xla").as_dict()
    fixed = {name: choice[name] for name in ("strategy", "workers", "threads", "tile")}
    return dataclasses.replace(config, **fixed), choice
