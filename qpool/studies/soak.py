"""The soak: training runs with faults at random, against the same runs without any.

Each episode trains a small quantum generator for some steps, twice with the same seed: once in one
worker that nobody disturbs, once in a pool whose workers are killed, stopped, crashed and starved
at points drawn from the seed. The weights after each step must be the same bits; nothing may be
left when the episode ends. ``memory`` trains for long without faults and records how much memory
each process holds.

Run by ``scripts/soak``. Owns what is injected and what is counted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import statistics
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from workers.errors import PoolError
from workers.exchange.faults import Fault

#: What an episode can be: engine, rows of a batch (one, prime, ragged in its last tile, full).
ENGINES = ("traced", "stock")
BATCHES = (1, 7, 13, 16)
WORKERS = (1, 2, 3, 5)

_TILE = 4

#: Seconds of silence after which a stopped worker is replaced.
_TIMEOUT = 3.0

#: Steps of an episode: a successor needs seconds to come up, in which compiled steps are quick.
_STEPS = {"traced": 600, "stock": 60}

#: How many steps of an episode are disturbed on average, and by what: in a worker at a named point,
#: from outside at a random instant, at the process that forks workers, or in a worker that is just
#: being started.
_FAULTS = 20
_WAYS = {"point": 0.55, "signal": 0.25, "forkserver": 0.08, "start": 0.12}
_STEP_POINTS = ("load", "forward", "backward", "written", "answer", "loop")
_START_POINTS = ("start", "hello", "build", "load")
_ACTIONS = {"kill": 4, "segv": 2, "abort": 1, "exit": 2, "raise": 2, "memory": 2, "stop": 1}

#: Faults that wait to strike. More could hit one tile three times, which is rightly an error.
_MOST = 2


@dataclasses.dataclass(frozen=True)
class Episode:
    """One training run."""

    seed: int
    engine: str
    batch: int
    workers: int
    start_method: str
    steps: int

    def __str__(self) -> str:
        return (
            f"{self.engine}, batch {self.batch}, {self.workers} workers, {self.start_method}, "
            f"seed {self.seed}"
        )


@dataclasses.dataclass
class Found:
    """What the episodes showed.

    ``recovery``: seconds outside computing that a step which lost workers took beyond the median of
    those that lost none; apart are steps in which no worker was left, so that one had to come up
    first, and those in which one was silent, so that the pool had to wait for its timeout.
    """

    episodes: int = 0
    steps: int = 0
    injected: dict[str, int] = dataclasses.field(default_factory=dict)
    workers_lost: int = 0
    steps_lost: int = 0
    bits_changed: int = 0
    left_over: int = 0
    disturbed: int = 0
    recovery: list[float] = dataclasses.field(default_factory=list)
    recovery_of_all: list[float] = dataclasses.field(default_factory=list)
    recovery_from_silence: list[float] = dataclasses.field(default_factory=list)
    full_strength: list[float] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return {
            "episodes": self.episodes,
            "faults_injected": sum(self.injected.values()),
            "injected": dict(sorted(self.injected.items())),
            "workers_lost": self.workers_lost,
            "steps_run": self.steps,
            "steps_that_lost_a_worker": self.disturbed,
            "steps_lost": self.steps_lost,
            "bits_changed": self.bits_changed,
            "left_over": self.left_over,
            "seconds_to_recover": _spread(self.recovery),
            "seconds_to_recover_with_no_worker_left": _spread(self.recovery_of_all),
            f"seconds_to_recover_from_silence_{_TIMEOUT:g}_s": _spread(self.recovery_from_silence),
            "seconds_to_full_strength": _spread(self.full_strength),
            "errors": self.errors,
        }

    @property
    def failed(self) -> bool:
        return bool(self.steps_lost or self.bits_changed or self.left_over or self.errors)


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"median": statistics.median(values), "worst": max(values), "count": len(values)}


def episodes(seed: int) -> Iterator[Episode]:
    """Without end; every combination of engine, batch and workers comes once in 32."""
    rng = random.Random(seed)
    while True:
        grid = [(e, b, w) for e in ENGINES for b in BATCHES for w in WORKERS]
        rng.shuffle(grid)
        for engine, batch, workers in grid:
            method = "spawn" if rng.random() < 0.1 else "forkserver"
            seed = rng.randrange(1 << 30)
            yield Episode(seed, engine, batch, workers, method, _STEPS[engine])


class Training:
    """A generator and the steps that train it; the weights' digest after each step."""

    def __init__(self, episode: Episode, pool: Any) -> None:
        import keras

        import qpool

        model = qpool.models.QuantumSFGenerator(2, 4, 1, 4, seed=episode.seed)
        self.generator = qpool.parallelize(model, pool=pool, engine=episode.engine, tile=_TILE)
        self._optimizer = keras.optimizers.Adam(0.05)
        self._rng = np.random.default_rng(episode.seed)
        self._batch = episode.batch
        self._steps = 0

    def step(self, batch: int | None = None) -> str:
        """One update, by a tape or in one exchange, in turn; the digest of samples, gradients and
        weights."""
        import tensorflow as tf

        z = tf.constant(self._rng.normal(size=(batch or self._batch, 4)), tf.float32)
        digest = hashlib.sha256()
        weights = self.generator.trainable_variables
        self._steps += 1
        if self._steps % 2:
            with tf.GradientTape() as tape:
                tape.watch(z)
                samples = self.generator(z)
                loss = tf.reduce_mean(_losses(samples))
            gradients = tape.gradient(loss, [*weights, z])
        else:
            step = self.generator.loss_and_gradient(z, _losses)
            samples, gradients = step.outputs, [*step.gradient, step.loss]
        self._optimizer.apply_gradients(zip(gradients, weights, strict=False))
        for array in (samples, *gradients, *weights):
            digest.update(np.asarray(array).tobytes())
        return digest.hexdigest()


def _losses(samples: Any) -> Any:
    return (samples - 1.0) ** 2


class Saboteur:
    """Draws faults and puts them in a pool's way."""

    def __init__(self, pool: Any, episode: Episode, found: Found) -> None:
        self._pool = pool
        self._rng = random.Random(episode.seed)
        self._chance = min(0.5, _FAULTS / episode.steps)
        self._found = found
        self._marked: set[int] = set()

    def prepare(self, step_seconds: float) -> threading.Timer | None:
        """Perhaps have something go wrong in the next step; a timer for what comes from outside."""
        rng, supervisor = self._rng, self._pool._supervisor
        pids = {worker.pid: number for number, worker in supervisor.ready.items()}
        self._marked &= set(pids)
        if (
            not pids
            or rng.random() > self._chance
            or len(self._marked) + len(supervisor.faults_at_start) >= _MOST
        ):
            return None
        way = rng.choices(list(_WAYS), list(_WAYS.values()))[0]
        action = rng.choices(list(_ACTIONS), list(_ACTIONS.values()))[0]
        if way == "start":
            self._count(way, action := "kill" if action == "stop" else action)
            supervisor.faults_at_start.append((Fault(rng.choice(_START_POINTS), action),))
            return None
        pid = rng.choice(sorted(pids))
        if way == "forkserver":
            forkserver = getattr(supervisor.launcher, "server", None)
            if forkserver is None:
                return None
            number = rng.choice((signal.SIGKILL, signal.SIGSTOP))
            self._count(way, number.name)
            os.kill(forkserver.pid, number)
            return None
        self._marked.add(pid)
        if way == "signal":
            number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGABRT, signal.SIGSTOP))
            self._count(way, number.name)
            timer = threading.Timer(rng.random() * step_seconds, _send, (pid, number))
            timer.start()
            return timer
        point = rng.choice(_STEP_POINTS)
        self._count(point, action)
        self._pool.inject(pids[pid], Fault(point, action, rng.randrange(3)))
        return None

    def _count(self, where: str, what: str) -> None:
        name = f"{where}: {what}"
        self._found.injected[name] = self._found.injected.get(name, 0) + 1


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # a fault at a point was quicker


def run(episode: Episode, quiet: Any, found: Found) -> None:
    """Run one episode, in the pool ``quiet`` and disturbed, and add to what was found."""
    import psutil

    import qpool

    training = Training(episode, quiet)
    expected = [training.step() for _ in range(episode.steps)]
    training.generator.close()
    here = psutil.Process()
    others, before = here.children(recursive=True), here.num_fds()
    with qpool.Pool(
        workers=episode.workers, start_method=episode.start_method, timeout=_TIMEOUT
    ) as pool:
        training = Training(episode, pool)
        training.generator.warm_up(episode.batch)
        saboteur = Saboteur(pool, episode, found)
        watch = _Watch(pool)
        for number in range(episode.steps):
            timer = saboteur.prepare(watch.usual_seconds())
            watch.begin()
            try:
                digest = training.step()
            except PoolError as error:
                found.steps_lost += 1
                found.errors.append(f"{episode}, step {number}: {error}")
                break
            finally:
                if timer is not None:
                    timer.join()
            watch.end()
            found.steps += 1
            found.bits_changed += digest != expected[number]
        watch.report(found)
        training.generator.close()
    if episode.start_method == "forkserver":
        from qpool.children import forkserver

        forkserver.end_unused()  # one that took the place of the quiet pool's
    left = [process for process in here.children(recursive=True) if process not in others]
    found.left_over += len(psutil.wait_procs(left, 2.0)[1]) + max(0, here.num_fds() - before)
    found.episodes += 1


class _Watch:
    """Times the steps of an episode, and how long the pool is short of workers."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._supervisor = pool._supervisor
        self._seconds: list[float] = []
        self._outside: list[float] = []
        self._disturbed: list[tuple[float, bool, bool]] = []
        self._weak_since: float | None = None
        self._strong: list[float] = []
        self._lost = self._supervisor.replaced

    def usual_seconds(self) -> float:
        return statistics.median(self._seconds) if self._seconds else 0.05

    def begin(self) -> None:
        self._computed = {n: m.compute for n, m in self._supervisor.measured.items()}
        self._before = self._supervisor.replaced
        self._there = len(self._supervisor.ready)
        self._silenced = self._supervisor.silenced
        self._began = time.monotonic()

    def end(self) -> None:
        """Take a step's end."""
        now = time.monotonic()
        busiest = max(m.compute - self._computed[n] for n, m in self._supervisor.measured.items())
        outside = now - self._began - busiest
        lost = self._supervisor.replaced - self._before
        if lost:
            silent = self._supervisor.silenced > self._silenced
            self._disturbed.append((outside, silent, lost >= self._there))
        else:
            self._seconds.append(now - self._began)
            self._outside.append(outside)
        whole = len(self._supervisor.ready) == self._pool.workers
        if not whole and self._weak_since is None:
            self._weak_since = self._began
        elif whole and self._weak_since is not None:
            self._strong.append(now - self._weak_since)
            self._weak_since = None

    def report(self, found: Found) -> None:
        usual = statistics.median(self._outside) if self._outside else 0.0
        found.workers_lost += self._supervisor.replaced - self._lost
        found.disturbed += len(self._disturbed)
        found.full_strength += self._strong
        for outside, silent, all_of_them in self._disturbed:
            if silent:
                found.recovery_from_silence.append(outside - usual)
            elif all_of_them:
                found.recovery_of_all.append(outside - usual)
            else:
                found.recovery.append(outside - usual)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def soak() -> None:
    """Try to break the pool, for minutes or hours."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", message=".*share cores.*")


@soak.command()
@click.option("--minutes", default=30.0, help="How long; the episode under way is finished.")
@click.option("--seed", default=0, help="Of everything that is drawn.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def faults(minutes: float, seed: int, as_json: bool) -> None:
    """Training runs with workers killed, stopped and starved at random: the same bits?"""
    import logging

    from rich.console import Console

    import qpool

    logging.getLogger("qpool").setLevel(logging.ERROR)
    console = Console(stderr=True, highlight=False)
    found = Found()
    end = time.monotonic() + 60 * minutes
    with qpool.Pool(workers=1) as quiet:
        for episode in episodes(seed):
            began = time.monotonic()
            run(episode, quiet, found)
            now = time.monotonic()
            console.print(
                f"{episode}: {now - began:.0f} s; in all {found.steps} steps, "
                f"{found.workers_lost} workers lost, {found.steps_lost} steps lost, "
                f"{found.bits_changed} changed, {max(0.0, end - now) / 60:.0f} min left",
                soft_wrap=True,
            )
            if now > end:
                break
    _report(found.summary(), as_json)
    if found.failed:
        raise SystemExit(1)


@soak.command()
@click.option("--steps", default=10_000, help="Training steps.")
@click.option("--workers", default=2, help="Worker processes.")
@click.option("--engine", default="traced", type=click.Choice(ENGINES), help="Of the workers.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to draw the curves (a PNG).")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def memory(steps: int, workers: int, engine: str, out: Path | None, as_json: bool) -> None:
    """A long training run: how much memory do coordinator and workers hold?"""
    import psutil
    from rich.progress import track

    import qpool

    def own(pid: int) -> float:
        return psutil.Process(pid).memory_full_info().uss / 2**20

    curves: dict[str, list[float]] = {"step": []}
    with qpool.Pool(workers=workers) as pool:
        training = Training(Episode(0, engine, 16, workers, "forkserver", steps), pool)
        every = max(1, steps // 200)
        for number in track(range(steps + 1), "training"):
            if number % every == 0:
                curves["step"].append(number)
                curves.setdefault("coordinator", []).append(own(os.getpid()))
                for worker in pool.stats()["workers"]:
                    name = f"worker {worker['worker']}"
                    curves.setdefault(name, []).append(own(worker["pid"] or os.getpid()))
            training.step()
        replaced = pool.stats()["replaced_workers"] + pool.stats()["outgrown_workers"]
    _report({"steps": steps, "replaced_workers": replaced, **flatness(curves)}, as_json)
    if out is not None:
        _draw(out, curves)


def flatness(curves: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """MiB of each process after a tenth of the run and at its end, and the slope between, fitted
    by least squares, in MiB per 1,000 steps."""
    steps = np.asarray(curves["step"])
    warm = steps >= steps[-1] / 10
    found = {}
    for name, values in curves.items():
        if name == "step":
            continue
        after = np.asarray(values)[warm]
        slope = np.polyfit(steps[warm], after, 1)[0] * 1000
        found[name] = {
            "warm_MiB": float(after[0]),
            "end_MiB": float(after[-1]),
            "MiB_per_1000_steps": float(slope),
        }
    return found


def _draw(path: Path, curves: dict[str, list[float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for name, values in curves.items():
        if name != "step":
            axes.plot(curves["step"], values, label=name)
    axes.set(xlabel="training step", ylabel="memory of its own (USS), MiB", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


@soak.command()
@click.option("--kills", default=20, help="Kills in all.")
@click.option("--seed", default=0, help="Of the moments and the worker counts.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def resume(kills: int, seed: int, as_json: bool) -> None:
    """Training runs killed at random and gone on with, with other workers: the same bits?"""
    from qpool.studies.resume_soak import kill_and_resume

    found = kill_and_resume(kills, seed, lambda line: click.echo(line, err=True))
    _report(found, as_json)
    if found["different"]:
        raise SystemExit(1)


@soak.command()
@click.option("--kills", default=10, help="Of the campaign, at random instants.")
@click.option("--seed", default=0, help="Of the instants.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def campaign(kills: int, seed: int, as_json: bool) -> None:
    """A campaign killed at random and gone on with, on other cores: the same bits?"""
    from qpool.studies.campaign_soak import kill_and_go_on

    found = kill_and_go_on(kills, seed, lambda line: click.echo(line, err=True))
    _report(found, as_json)
    if found["different"] or found["processes_left"] or found["finished"] < found["runs"]:
        raise SystemExit(1)


def _report(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            figures = "  ".join(
                f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items()
            )
            click.echo(f"{name.replace('_', ' ')}: {figures}")
        else:
            click.echo(f"{name.replace('_', ' ')}: {value}")


if __name__ == "__main__":
    soak()
