"""A campaign against the same runs one after another: wall time, CPU use, and the bits of each."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from qpool.executors import topology
from qpool.training.campaign import packing

#: The seed's circuit: 2 modes, 2 layers, cutoff 8, batch 16.
_BASE = {"cutoff": 8, "batch_size": 16, "checkpoint_every": 1000}

_DATA = ("breast-cancer", "iris", "wine")

_SEEDS = 4

#: A short run, which is mostly its beginning, and a longer one; against what, one after another.
_AGAINST = {250: ("cpu_batch", "processes"), 2000: ("cpu_batch",)}


#: Cores for which it is said what a campaign would take.
_PREDICTED = (2, 16, 64)


def campaign() -> dict[str, Any]:
    """Three data sets with four seeds each, by a campaign and by `qpool train` one after another.

    The latter with its default (a pool of all cores), and compiled in one process with
    TensorFlow's threads, which is the faster of the two for this circuit.
    """
    cores = topology.budget().workers
    found: dict[str, Any] = {"case": "campaign", "cores": cores, "runs": len(_DATA) * _SEEDS}
    for steps in _AGAINST:
        with tempfile.TemporaryDirectory(prefix="qpool-campaign-") as folder:
            found[f"{steps} steps"] = _compare(Path(folder), steps, cores)
    return found


def _compare(folder: Path, steps: int, cores: int) -> dict[str, Any]:
    config = folder / "campaign.toml"
    lines = [f"{name} = {value}" for name, value in {**_BASE, "steps": steps}.items()]
    seeds = list(range(1, _SEEDS + 1))
    lines += ["[grid]", f"data = {json.dumps(_DATA)}", f"seed = {seeds}"]
    config.write_text("\n".join(lines))
    # Both find what they compile on disk: that is once a machine, not once a campaign.
    _qpool("campaign", "--config", str(config), "--out", str(folder / "before"), "--cores", "1")
    side_by_side, use = _qpool("campaign", "--config", str(config), "--out", str(folder / "all"))
    result: dict[str, Any] = {"campaign": {"seconds": side_by_side, "cpu_use": use / cores}}
    for strategy in _AGAINST[steps]:
        began, used = time.perf_counter(), 0.0
        for data in _DATA:
            for seed in seeds:
                options = {**_BASE, "steps": steps, "data": data, "seed": seed}
                words = [f"--{name.replace('_', '-')}={v}" for name, v in options.items()]
                out = folder / strategy / f"data={data},seed={seed}"
                seconds, share = _qpool(
                    "train", *words, f"--strategy={strategy}", "--out", str(out)
                )
                used += seconds * share
        seconds = time.perf_counter() - began
        result[f"one after another, {strategy}"] = {
            "seconds": seconds,
            "cpu_use": used / seconds / cores,
            "over_campaign": seconds / side_by_side,
        }
    with (folder / "all" / "results.csv").open() as file:
        runs = [float(row["seconds"]) for row in csv.DictReader(file)]
    result["predicted"] = {str(n): _predicted(runs, side_by_side, cores, n) for n in _PREDICTED}
    result["runs_of_other_bits"] = sum(
        (folder / "cpu_batch" / run.name / name).read_bytes() != (run / name).read_bytes()
        for run in (folder / "all" / "runs").iterdir()
        for name in ("metrics.csv", "evaluations.csv")
    )
    return result


def _predicted(runs: list[float], seconds: float, cores: int, more: int) -> dict[str, float]:
    """A campaign of as many runs a core, and one of these runs, on ``more`` cores.

    The model: what a campaign takes beyond its runs (it begins, and ends with its report) it takes
    once, and a run takes as long on its core however many others compute: on sixteen cores eight at
    once made 0.95 to 0.99 of what one made alone. ``times_one_core`` is against one core's time.
    """
    beyond = seconds - packing.seconds_left(runs, cores)
    many = runs * max(1, more // cores)
    there = beyond + packing.seconds_left(many, more)
    return {
        "runs": len(many),
        "seconds": there,
        "times_one_core": (beyond + sum(many)) / there,
        "seconds_of_these_runs": beyond + packing.seconds_left(runs, more),
    }


def _qpool(*words: str) -> tuple[float, float]:
    """Run a command; its seconds, and how many cores it and its children kept busy."""
    before, began = _children_cpu(), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "qpool", *words],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    seconds = time.perf_counter() - began
    return seconds, (_children_cpu() - before) / seconds


def _children_cpu() -> float:
    times = psutil.Process().cpu_times()
    return float(times.children_user + times.children_system)
