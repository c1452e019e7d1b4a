"""A training run from start to end, and the directory that holds it.

    RUN/config.json           what was asked, versions, host
        history.csv           losses per epoch
        generator.weights.h5  critic.weights.h5
        samples.png           real and generated samples side by side
        losses.png
        summary.json          distances, samples/s, CPU use of each worker

Owns the directory's contents and the order of a run. Heavy imports happen in :func:`train`, so
that the command line answers at once.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    import numpy as np

    from qpool.training.data import DataSet

#: Generated samples for the distances and the picture.
_SAMPLES = 512


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    data: str = "breast-cancer"
    steps: int = 250
    batch_size: int = 32
    modes: int = 2
    layers: int = 2
    cutoff: int = 6
    encoding: str = "coherent_state"
    generator_rate: float = 0.01
    critic_rate: float = 0.01
    critic_steps: int = 5
    penalty: float = 1.0
    workers: int | None = None
    strategy: str = "auto"
    tile: int | None = None
    start_method: str | None = None
    seed: int = 1


def train(config: Config, out: Path, console: Any = None) -> dict[str, Any]:
    """Train as ``config`` says, fill the directory ``out`` and return the summary."""
    from rich.console import Console

    console = console or Console(stderr=True)
    _check(config, out)
    from qpool.training import data, distance

    rows = data.load(config.data)
    data.check(rows.rows, width=config.modes, batch_size=config.batch_size)
    began = time.monotonic()
    console.print("starting the workers (TensorFlow and Strawberry Fields load) ...")
    with _trainer(config) as trainer:
        out.mkdir(parents=True, exist_ok=True)
        _write_json(out / "config.json", {**dataclasses.asdict(config), "host": _host()})
        distances = {
            "before": distance.mean_distance(_generate(config, trainer.generator), rows.rows),
            "floor": distance.real_against_real(rows.rows),
        }
        console.print(f"ready after {time.monotonic() - began:.0f} s")
        history, figures = _fit(config, rows, trainer, console)
        generated = _generate(config, trainer.generator)
        distances["after"] = distance.mean_distance(generated, rows.rows)
        trainer.generator.save_weights(out / "generator.weights.h5")
        trainer.critic.save_weights(out / "critic.weights.h5")
    from qpool.training import plots

    _write_history(out / "history.csv", history)
    plots.samples(out / "samples.png", rows, generated, distances)
    plots.losses(out / "losses.png", history)
    summary = {"energy_distance": distances, **figures, "directory": str(out)}
    _write_json(out / "summary.json", summary)
    return summary


@contextlib.contextmanager
def _trainer(config: Config) -> Iterator[Any]:
    """The trainer over a pooled generator, closed again at the end."""
    import qpool

    with contextlib.ExitStack() as stack:
        pool = None
        if config.strategy != "sequential":
            # First of all: the pool loads TensorFlow in the background while we load it here.
            made = qpool.Pool(config.workers, start_method=config.start_method)
            pool = stack.enter_context(made)
        import keras

        from qpool.models import encodings
        from qpool.training.trainer import QuantumGANTrainer

        keras.utils.set_random_seed(config.seed)
        generator = qpool.create_parallel_generator(
            qpool.models.QuantumSFGenerator,
            n_modes=config.modes,
            latent_dim=encodings.find(config.encoding).width(config.modes, config.layers),
            layers=config.layers,
            cutoff_dim=config.cutoff,
            encoding_strategy=config.encoding,
            seed=config.seed,
            strategy=config.strategy,
            pool=pool,
            tile=config.tile,
        )
        yield QuantumGANTrainer(
            stack.enter_context(generator),
            generator_rate=config.generator_rate,
            critic_rate=config.critic_rate,
            critic_steps=config.critic_steps,
            penalty=config.penalty,
            seed=config.seed,
        )


def _fit(
    config: Config, rows: DataSet, trainer: Any, console: Any
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Train; return the history and what was measured meanwhile."""
    from qpool.training.display import Display

    per_epoch = len(rows.rows) // config.batch_size
    epochs = -(-config.steps // per_epoch)
    display = Display(trainer.generator, epochs * per_epoch, config.batch_size, console)
    before, began = _cpu_seconds(trainer.generator), time.monotonic()
    try:
        history = trainer.train(rows.rows, epochs, config.batch_size, callbacks=[display])
    finally:
        display.close()
    seconds = time.monotonic() - began
    after = _cpu_seconds(trainer.generator)
    return history.history, {
        "steps": epochs * per_epoch,
        "training_seconds": seconds,
        "samples_per_second": epochs * per_epoch * config.batch_size / seconds,
        "cpu_use_of_workers": [(b - a) / seconds for a, b in zip(before, after, strict=True)],
        "tiles_by_batch": trainer.generator.stats().get("tiles_by_batch", {}),
    }


def _generate(config: Config, generator: Any) -> np.ndarray:
    """The same latent draws every time, through the generator."""
    import numpy as np

    draws = np.random.default_rng(config.seed).standard_normal((_SAMPLES, generator.latent_dim))
    z = draws.astype(np.float32)
    chunks = range(0, _SAMPLES, config.batch_size)
    return np.concatenate([generator(z[n : n + config.batch_size]) for n in chunks])


def sentence(summary: dict[str, Any]) -> str:
    """One line that says how close the generated samples are."""
    d = summary["energy_distance"]
    return (
        f"energy distance to the real data: {d['before']:.3f} before training, "
        f"{d['after']:.3f} after; real against real: {d['floor']:.3f}"
    )


def default_directory() -> Path:
    """A fresh name under ``runs/``."""
    return Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")


def _check(config: Config, out: Path) -> None:
    """What can be refused before anything heavy is loaded or written."""
    from qpool.executors import strategies

    for name in ("steps", "batch_size", "modes", "layers"):
        if getattr(config, name) < 1:
            raise ConfigurationError(f"{name} must be at least 1, not {getattr(config, name)}")
    if config.strategy not in strategies():
        raise ConfigurationError(
            f"unknown strategy {config.strategy!r}: {nearest(config.strategy, strategies())}"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(
            f"{out} exists and is not an empty directory; choose another --out"
        )


def _cpu_seconds(generator: Any) -> list[float]:
    workers = generator.stats().get("pool", {}).get("workers", [])
    return [worker["cpu_seconds"] for worker in workers]


def _host() -> dict[str, Any]:
    import numpy
    import scipy
    import strawberryfields
    import tensorflow

    import qpool

    return {
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "qpool": qpool.__version__,
        "tensorflow": tensorflow.__version__,
        "strawberryfields": strawberryfields.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _write_history(path: Path, history: dict[str, list[float]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", *history])
        for epoch, values in enumerate(zip(*history.values(), strict=True), 1):
            writer.writerow([epoch, *(float(value) for value in values)])
