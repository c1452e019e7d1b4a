"""The seed's table, measured: what each way to compute its circuit makes of the machine.

Owns the ways that are no strategy of qpool's: stock Strawberry Fields one sample at a time, in
threads, and in processes of joblib's and Ray's. Every figure is of a forward pass and the weights'
gradient; CPU use is CPU seconds of this process and its children over wall seconds times cores.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import joblib
import numpy as np
import psutil
import tensorflow as tf

import qpool
from qpool.executors import topology
from qpool.measure.processes import cpu_seconds
from qpool.studies.bench.engine import Case
from qpool.studies.bench.timing import ratio, turns_of

#: Seconds a way is timed for in each of three turns, at least one step.
_SECONDS, _TURNS = 2.0, 3

_SEED_CIRCUIT = (2, 2, 8)


def strategies() -> dict[str, Any]:
    """The seed's circuit (2 modes, 2 layers, cutoff 8) in every strategy, and in peers."""
    batch = 16
    cores = topology.budget().workers
    case = Case(*_SEED_CIRCUIT)
    z = case.z(batch)
    expected = _one_at_a_time(case, z)
    rows: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        ways = dict(_ways(case, z, cores, stack))
        for way in ways.values():
            way()
        for _ in range(_TURNS):
            for name, way in ways.items():
                rate, use, gradient = _timed(way, batch, cores)
                row = rows.setdefault(name, {"samples_per_second": [], "cpu_use": []})
                row["samples_per_second"].append(rate)
                row["cpu_use"].append(use)
                error = float(np.abs(gradient - expected).max() / np.abs(expected).max())
                row["gradient_error"] = max(row.get("gradient_error", 0.0), error)
    return {
        "case": "strategies",
        "batch": batch,
        "cores": cores,
        **{
            name: {
                "samples_per_second": statistics.median(row["samples_per_second"]),
                "slowest_turn": min(row["samples_per_second"]),
                "fastest_turn": max(row["samples_per_second"]),
                "cpu_use": statistics.median(row["cpu_use"]),
                "gradient_error": row["gradient_error"],
            }
            for name, row in rows.items()
        },
    }


def _ways(
    case: Case, z: tf.Tensor, cores: int, stack: contextlib.ExitStack
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Name and step; a step returns the weights' gradient."""
    yield "stock, one at a time", lambda: _one_at_a_time(case, z)
    team = stack.enter_context(ThreadPoolExecutor(cores))
    own = [Case(*_SEED_CIRCUIT) for _ in range(cores)]  # each thread its own program and engines
    yield f"stock, {cores} threads", lambda: _threads(team, own, z)
    yield "stock, batch_size", _step(case, z)
    parallel = joblib.Parallel(cores, backend="loky")
    yield f"stock, batch_size, joblib, {cores} processes", lambda: _joblib(parallel, case, z, cores)
    of_ray = []
    if importlib.util.find_spec("ray"):
        import ray

        # CPUs for the tasks, and for the pool of our own that stays.
        options = {"num_cpus": 2 * cores, "include_dashboard": False, "log_to_driver": False}
        ray.init(**options, logging_level="ERROR")
        stack.callback(ray.shutdown)
        task = ray.remote(_in_process)
        yield f"stock, batch_size, Ray, {cores} tasks", lambda: _ray(ray, task, case, z, cores)
        of_ray = [("traced", "ray", cores)]
    for engine, strategy, workers in (
        *of_ray,
        ("stock", "processes", cores),
        ("traced", "processes", cores),
        ("traced", "threads", cores),
        ("traced", "cpu_batch", None),
        ("traced", "auto", None),
    ):
        made = qpool.parallelize(case, workers, strategy, engine=engine)
        name = f"qpool, {engine}, {strategy}"
        yield name, _step(stack.enter_context(made), z)


def _step(call: Any, z: tf.Tensor) -> Callable[[], np.ndarray]:
    def step() -> np.ndarray:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(call(z) ** 2)
        # In threads one run can meet the parameters that another has bound: then nothing depends
        # on these weights, which is part of the error that is reported.
        zero = tf.UnconnectedGradients.ZERO
        return tape.gradient(loss, call.weights, unconnected_gradients=zero).numpy()

    return step


def _one_at_a_time(case: Case, z: tf.Tensor) -> np.ndarray:
    return sum(_step(case, z[n : n + 1])() for n in range(len(z)))  # type: ignore[return-value]


def _threads(team: ThreadPoolExecutor, cases: list[Case], z: tf.Tensor) -> np.ndarray:
    """Each thread takes an equal part of the samples, one at a time, as the seed did it."""
    parts = [z[n :: len(cases)] for n in range(len(cases))]
    return sum(team.map(_one_at_a_time, cases, parts))  # type: ignore[return-value]


def _joblib(parallel: Any, case: Case, z: tf.Tensor, cores: int) -> np.ndarray:
    parts = np.array_split(z.numpy(), cores)
    weights = case.weights.numpy()
    return sum(parallel(joblib.delayed(_in_process)(weights, part) for part in parts))


def _ray(ray: Any, task: Any, case: Case, z: tf.Tensor, cores: int) -> np.ndarray:
    weights = ray.put(case.weights.numpy())
    return sum(ray.get([task.remote(weights, part) for part in np.array_split(z.numpy(), cores)]))


def _in_process(weights: np.ndarray, z: np.ndarray) -> np.ndarray:
    """In a process of joblib's or Ray's: the gradient of a part of the batch."""
    case = _case_of_process()
    case.weights.assign(weights)
    return _step(case, tf.constant(z))()


@functools.cache
def _case_of_process() -> Case:
    return Case(*_SEED_CIRCUIT)


def _timed(
    way: Callable[[], np.ndarray], batch: int, cores: int
) -> tuple[float, float, np.ndarray]:
    """Samples a second, CPU use, and the last gradient."""
    before, began = cpu_seconds(), time.perf_counter()
    done = 0
    while not done or time.perf_counter() - began < _SECONDS:
        gradient = way()
        done += 1
    seconds = time.perf_counter() - began
    return done * batch / seconds, (cpu_seconds() - before) / (seconds * cores), gradient


#: Modes, layers and cutoff of the circuits over which ``auto`` is tried.
_CIRCUITS = ((1, 4, 10), (2, 2, 8), (3, 2, 6))
_BATCHES = (1, 8, 64, 512)


def auto() -> dict[str, Any]:
    """What ``auto`` chose for three circuits, four batches and both engines, against each fixed
    strategy: the speed of the best of those over auto's, timed in turns afterwards."""
    turns = 5
    cells: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory(prefix="qpool-bench-") as folder,
        _environment(QPOOL_CACHE=folder),  # nothing is remembered from before
        qpool.Pool() as pool,
    ):
        for engine, (modes, layers, cutoff), batch in itertools.product(
            ("traced", "stock"), _CIRCUITS, _BATCHES
        ):
            cell = _auto_cell(Case(modes, layers, cutoff), engine, batch, pool, turns)
            cells[f"{engine}, {modes} modes, batch {batch}"] = cell
    return {"case": "auto", **cells}


def _auto_cell(case: Case, engine: str, batch: int, pool: Any, turns: int) -> dict[str, Any]:
    z = case.z(batch)
    names: tuple[str, ...] = ("sequential", "processes")
    if engine == "traced":
        names = ("cpu_batch", "threads", "processes")
    with contextlib.ExitStack() as stack:
        # Pinned as the others are, whose turn it is not: this one's pool would find no core free.
        measured = stack.enter_context(qpool.parallelize(case, engine=engine, pin=True))
        steps = {"auto": _step(measured, z)}
        for name in names:
            given = pool if name == "processes" else None
            fixed = qpool.parallelize(case, strategy=name, engine=engine, pool=given)
            steps[name] = _step(stack.enter_context(fixed), z)
        contenders = {}
        for name, step in steps.items():
            step()
            began = time.perf_counter()
            step()
            calls = max(1, min(200, int(0.2 / (time.perf_counter() - began))))
            contenders[name] = (step, calls)
        seconds = turns_of(contenders, turns if contenders["auto"][1] > 1 else 2)
        (choice,) = measured.stats()["auto"]["choices"]
    best = min(names, key=lambda name: statistics.median(seconds[name]))
    return {
        "chosen": choice["chosen"],
        "seconds_of_choosing": choice["seconds"],
        "best_fixed": best,
        "milliseconds": {name: 1e3 * statistics.median(s) for name, s in seconds.items()},
        "auto against the best fixed": ratio(seconds[best], seconds["auto"]),
    }


def utilisation() -> dict[str, Any]:
    """The three-mode case (6 layers, cutoff 12, density) in a pool of all cores, for a minute: how
    busy its workers and their cores are; and how much faster it is than one worker, in turns."""
    seconds = 60.0
    batch = 256
    turns = 7
    cores = topology.budget().workers
    case = Case(3, 6, 12, "density")
    z = case.z(batch)

    def step_of(generator: Any) -> Callable[[], Any]:
        def step() -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(generator(z))
            return tape.gradient(loss, case.weights)

        return step

    with qpool.parallelize(case, cores, pin=True) as all_of_them:
        step = step_of(all_of_them)
        step()
        step()
        pinned = [c for w in all_of_them.stats()["pool"]["workers"] for c in w["cores"]]
        watch, busy = qpool.Monitor(all_of_them), _busy_seconds(pinned)
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            step()
        elapsed = time.perf_counter() - began
        busy = _busy_seconds(pinned) - busy
        sample = watch.sample()
        with qpool.parallelize(case, 1, pin=True) as one:
            alone = step_of(one)
            alone()
            took = turns_of({"one": (alone, 3), "all": (step, 3)}, turns)
    speed_up = ratio(took["one"], took["all"])
    return {
        "case": "utilisation",
        "batch": batch,
        "workers": cores,
        "seconds": elapsed,
        "samples_per_second": sample.samples_per_second,
        "cpu_use_of_workers": sample.cpu_use,
        "busy_share_of_their_cores": busy / (elapsed * len(pinned)),
        "slowest_shard": sample.slowest_shard,
        "coordinator": sample.coordinator,
        "speed_up": speed_up,
        "parallel_efficiency": {name: value / cores for name, value in speed_up.items()},
    }


def _busy_seconds(cores: list[int]) -> float:
    """Seconds that these cores have spent on anything at all, as the system counts them."""
    times = psutil.cpu_times(percpu=True)
    idle = ("idle", "iowait")
    return sum(
        value for core in cores for name, value in times[core]._asdict().items() if name not in idle
    )


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
