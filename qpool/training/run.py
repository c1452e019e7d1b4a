"""A training run, its directory, and going on with one.

    RUN/run.json              what was asked, versions, host
        metrics.csv           losses, gradient norm, ket norm of each step
        evaluations.csv       distance to the real data and coverage, now and then
        workers.csv           CPU use of each worker over time
        tensorboard/          the same for TensorBoard
        checkpoints/          the last few, and the best
        samples.png losses.png workers.png wigner.png
        summary.json          distances, samples/s, CPU use of each worker

Owns the order of a run and what its directory holds. Heavy imports happen in ``train``, so
that the command line answers at once.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpool.training import building, directory
from qpool.training.config import Config
from workers.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    import numpy as np

    from qpool.training.building import Kept
    from qpool.training.checkpoints import Checkpoint, Folder
    from qpool.training.data import DataSet
    from qpool.training.journal import Journal, Watch

#: Strategies that compute the same tiles in the same way.
_SAME_BITS = {"processes", "ray"}


def train(
    config: Config,
    out: Path,
    console: Any = None,
    watch: Watch | None = None,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """Train as ``config`` says, fill the directory ``out`` and return the summary.

    ``watch`` is told of each step, once it has been written down; with ``kept``, the trainer of a
    run before in this process is taken over where it can be.

    The summary has ``stopped``, the name of a signal, if one ended the run before its time; it can
    be gone on with then (``resume``).
    """
    config.check()
    if Path(config.data).suffix:  # a file: found from anywhere
        config = dataclasses.replace(config, data=str(Path(config.data).resolve()))
    if out.exists() and (
        not out.is_dir() or any(not directory.left_over(p) for p in out.iterdir())
    ):
        go_on = f", or go on with it: qpool resume {out}" if (out / "run.json").exists() else ""
        raise ConfigurationError(
            f"{out} exists and is not an empty directory; choose another --out{go_on}"
        )
    rows = _rows(config)
    asked = {
        "format": directory.FORMAT,
        "config": dataclasses.asdict(config),
        "data": rows.fingerprint,
        "host": directory.host(),
    }
    out.mkdir(parents=True, exist_ok=True)
    with directory.alone(out):
        return _run(config, out, rows, console, watch, kept, asked=asked)


def resume(
    out: Path,
    *,
    workers: int | None = None,
    start_method: str | None = None,
    strategy: str | None = None,
    address: str | None = None,
    console: Any = None,
    watch: Watch | None = None,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """Go on with the run in ``out`` from its newest checkpoint, with other workers if need be.

    It ends with the same bits as a run that was never interrupted. With ``strategy`` it changes
    from a pool of this machine (processes) to a Ray cluster (ray), or back.
    """
    asked = directory.asked(out)
    config = dataclasses.replace(Config.of(asked["config"]), workers=workers)
    if "chosen" in asked:  # by measurement, when the run was begun: it goes on as it began
        fixed = {name: asked["chosen"][name] for name in ("strategy", "tile", "threads")}
        config = dataclasses.replace(config, workers=workers or asked["chosen"]["workers"], **fixed)
    if start_method is not None:
        config = dataclasses.replace(config, start_method=start_method)
    if address is not None:
        strategy = strategy or "ray"
    if config.strategy == "auto":  # with ``workers``: nothing was measured
        config = dataclasses.replace(config, strategy="processes")
    if strategy not in (None, config.strategy):
        if not {strategy, config.strategy} <= _SAME_BITS:
            raise ConfigurationError(
                f"this run is of strategy {config.strategy}, and {strategy} would not give its "
                f"bits: only {' and '.join(sorted(_SAME_BITS))} can take each other's place"
            )
        config = dataclasses.replace(config, strategy=strategy, address=None)
    if address is not None:
        config = dataclasses.replace(config, address=address)
    config.check()
    rows = _rows(config, asked["data"])
    with directory.alone(out):
        now = directory.host()
        changed = {
            name: (was, now[name]) for name, was in asked["host"].items() if now[name] != was
        }
        return _run(config, out, rows, console, watch, kept, resumed=True, changed=changed)


def sample(
    out: Path, count: int, *, checkpoint: str = "newest", seed: int = 0
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Samples of a run's generator in the data's own units: (count, columns), and their names.

    ``checkpoint`` is ``"newest"``, ``"best"`` or a file.
    """
    if count < 1:
        raise ConfigurationError(f"count must be at least 1, not {count}")
    asked = directory.asked(out)
    config = Config.of(asked["config"])
    rows = _rows(config, asked["data"])
    from qpool.training import checkpoints, sampling

    folder = checkpoints.Folder(out / "checkpoints")
    if checkpoint == "newest":
        found = folder.newest()[0]
    else:
        found = checkpoints.read(folder.best if checkpoint == "best" else Path(checkpoint))
    config = dataclasses.replace(config, strategy="cpu_batch")
    with building.trainer(config, rows.rows.shape[1]) as trainer:
        trainer.restore(found.arrays)
        trainer.gan.take_averages()
        generated = sampling.samples(trainer.generator, count, config.batch_size, seed)
    return rows.in_units(generated), rows.columns


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


# -- within ------------------------------------------------------------------------------------


def _run(
    config: Config,
    out: Path,
    rows: DataSet,
    console: Any,
    watch: Watch | None,
    kept: Kept | None,
    *,
    asked: dict[str, Any] | None = None,
    resumed: bool = False,
    changed: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """``asked`` is written down once everything has been made of it: a run that could not be
    begun leaves nothing that could be gone on with."""
    from rich.console import Console

    console = console or Console(stderr=True)
    for name, (was, now) in (changed or {}).items():
        console.print(
            f"{name} was {was} and is {now}: the same bits are not promised", soft_wrap=True
        )
    began = time.monotonic()
    console.print("starting the workers (TensorFlow and Strawberry Fields load) ...")
    if asked is not None and config.strategy == "auto" and config.workers is None:
        config, asked["chosen"] = _chosen(config, console)
    with building.trainer(config, rows.rows.shape[1], kept) as trainer:
        if asked is not None:
            directory.write_json(out / "run.json", asked)
        from qpool.training import checkpoints
        from qpool.training.journal import Journal

        folder = checkpoints.Folder(out / "checkpoints", config.keep)
        journal = Journal(config, out, rows, trainer, folder, watch)
        journal.begin(_checkpoint(folder, console) if resumed else None)
        console.print(f"ready after {time.monotonic() - began:.0f} s")
        began, first = time.monotonic(), journal.step
        if first < config.steps:
            _train(config, out, rows, console, trainer, journal)
        seconds = time.monotonic() - began
        journal.finish()
        summary = {
            **journal.summary(),
            "steps": journal.step,
            "training_seconds": seconds,
            "samples_per_second": (journal.step - first) * config.batch_size / seconds,
            "tiles_by_batch": trainer.generator.stats().get("tiles_by_batch", {}),
            "directory": str(out),
        }
        if journal.stopped:
            return {**summary, "stopped": journal.stopped}
        trainer.gan.take_averages()
        _draw(out, rows, trainer.generator, config, summary)
    directory.write_json(out / "summary.json", summary)
    return summary


def _chosen(config: Config, console: Any) -> tuple[Config, dict[str, Any]]:
    """The configuration with the fastest strategy, and what was measured."""
    from qpool.executors.auto.autotuner import BUDGET

    console.print(f"measuring which strategy is fastest, for {BUDGET:.0f} s or so at most ...")
    config, measured = building.chosen(config)
    console.print(f"chosen: {measured['chosen']}", soft_wrap=True)
    return config, measured


def _train(
    config: Config, out: Path, rows: DataSet, console: Any, trainer: Any, journal: Journal
) -> None:
    """From the journal's step to the last one, or until somebody stops it."""
    import keras

    from qpool.training.display import Display

    display = Display(trainer.generator, config.steps, config.batch_size, console, journal.step)
    board = keras.callbacks.TensorBoard(out / "tensorboard", write_graph=False, profile_batch=0)
    try:
        trainer.train(
            rows.rows,
            batch_size=config.batch_size,
            steps=config.steps,
            callbacks=[journal, display, board],
            first_step=journal.step,
        )
    finally:
        display.close()
        journal.close()


def _draw(
    out: Path, rows: DataSet, generator: Any, config: Config, summary: dict[str, Any]
) -> None:
    from qpool.training import plots, sampling
    from qpool.training.journal import SAMPLES

    generated = sampling.samples(generator, SAMPLES, config.batch_size, config.seed)
    plots.samples(out / "samples.png", rows, generated, summary["energy_distance"])
    plots.losses(out / "losses.png", out / "metrics.csv", out / "evaluations.csv")
    plots.workers(out / "workers.png", out / "workers.csv")
    plots.wigner(out / "wigner.png", generator, config.seed)


def _checkpoint(folder: Folder, console: Any) -> Checkpoint | None:
    """The newest that is whole; None where the run had not come to its first one."""
    if not folder.steps():
        return None
    found, damaged = folder.newest()
    for error in damaged:
        console.print(f"{error}. Going on from step {found.step}", soft_wrap=True)
    return found


def check_data(config: Config, loaded: dict[str, DataSet] | None = None) -> DataSet:
    """The data of a run, if it can be trained on them; ``loaded`` are sets that were read already.

    Raises:
        DataError: there are none, or they are not as wide as a sample.
        ConfigurationError: what the circuit makes are no rows.
    """
    from qpool.training import data

    known = {} if loaded is None else loaded
    rows = known.get(config.data) or data.load(config.data)
    known[config.data] = rows
    width = config.modes
    if config.readout != "positions":
        from qpool.models import readouts

        shape = readouts.find(config.readout).shape(config.modes, config.cutoff)
        if len(shape) != 1 or config.readout == "ket":
            raise ConfigurationError(
                f"readout={config.readout!r} makes samples of shape {shape}; expected one that "
                "makes rows: positions, quadratures, photons, homodyne"
            )
        width = shape[0]
    data.check(rows.rows, width=width, batch_size=config.batch_size)
    return rows


def _rows(config: Config, fingerprint: str | None = None) -> DataSet:
    """The data; with ``fingerprint``, those that a run was begun with."""
    rows = check_data(config)
    if fingerprint not in (None, rows.fingerprint):
        raise DataError(
            f"the data {config.data} are not those that this run was begun with; put those back"
        )
    return rows
