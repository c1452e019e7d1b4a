"""``qpool sweep``: a grid of measurements that can be stopped and gone on with.

    DIR/sweep.json    what was asked, the machine, versions
        cells.csv     one line for each cell that is done
        *.png report.md report.html

Owns the grid, a cell's measurement and the directory; ``report`` draws and tells. Each cell is a
training step (forward pass and the weights' gradient) of a CV-QNN with displacement encoding.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qpool.executors import executor_class
from workers.errors import CheckpointError, ConfigurationError

#: Counts up when a sweep directory comes to mean something else.
FORMAT = 2

#: Engines that a cell may have.
_ENGINES = ("traced", "stock")


@dataclasses.dataclass(frozen=True)
class Grid:
    """All combinations of these are measured. A ``tile`` of 0 leaves it to the model; ``nodes``
    are of a Ray cluster, each with so many workers."""

    workers: tuple[int, ...] = (1, 2)
    threads: tuple[int, ...] = (1,)
    batch: tuple[int, ...] = (64,)
    tile: tuple[int, ...] = (0,)
    modes: tuple[int, ...] = (2,)
    layers: tuple[int, ...] = (2,)
    cutoff: tuple[int, ...] = (8,)
    strategy: tuple[str, ...] = ("processes",)
    engine: tuple[str, ...] = ("traced",)
    nodes: tuple[int, ...] = (1,)
    seconds: float = 2.0
    turns: int = 3

    def check(self) -> None:
        """What can be refused before anything is measured."""
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if field.name in ("seconds", "turns"):
                if not values > 0:
                    raise ConfigurationError(f"{field.name} must be more than 0, not {values}")
            elif not values:
                raise ConfigurationError(
                    f"the grid has nothing to run: no value of {field.name} was given"
                )
        for name in ("workers", "threads", "batch", "modes", "layers", "nodes"):
            if min(getattr(self, name)) < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {getattr(self, name)}")
        if min(self.cutoff) < 2:
            raise ConfigurationError(f"cutoff must be at least 2, not {self.cutoff}")
        for tile in self.tile:
            if tile < 0 or tile & (tile - 1):
                raise ConfigurationError(f"tile must be a power of two, or 0, not {tile}")
        for strategy in self.strategy:
            executor_class(strategy)
        for engine in self.engine:
            if engine not in _ENGINES:
                raise ConfigurationError(f"engine must be one of {_ENGINES}, not {engine!r}")

    def cells(self) -> Iterator[Cell]:
        """Each combination once; those that share a pool follow each other.

        A strategy in one process has no workers to vary: it is measured once, as one worker.
        """
        seen = set()
        for (
            engine,
            strategy,
            threads,
            workers,
            modes,
            layers,
            cutoff,
            batch,
            tile,
            nodes,
        ) in itertools.product(
            self.engine,
            self.strategy,
            self.threads,
            self.workers,
            self.modes,
            self.layers,
            self.cutoff,
            self.batch,
            self.tile,
            self.nodes,
        ):
            if strategy in _IN_PLACE:
                workers, tile = 1, 0
            if strategy not in ("processes", "ray"):
                threads = 1
            if strategy != "ray":
                nodes = 1
            if engine == "stock" and strategy == "cpu_batch":
                continue  # it is the compiled engine
            cell = Cell(
                engine, strategy, workers, threads, modes, layers, cutoff, batch, tile, nodes
            )
            if cell not in seen:
                seen.add(cell)
                yield cell


#: Strategies that have no workers of their own.
_IN_PLACE = ("sequential", "cpu_batch", "auto")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the grid."""

    engine: str
    strategy: str
    workers: int
    threads: int
    modes: int
    layers: int
    cutoff: int
    batch: int
    tile: int
    nodes: int = 1

    @property
    def circuit(self) -> str:
        """What is computed, whoever computes it."""
        tile = f", tile {self.tile}" if self.tile else ""
        modes, layers = _count(self.modes, "mode"), _count(self.layers, "layer")
        return f"{modes}, {layers}, cutoff {self.cutoff}, batch {self.batch}{tile}, {self.engine}"

    def __str__(self) -> str:
        nodes = f"{_count(self.nodes, 'node')} of " if self.strategy == "ray" else ""
        return f"{self.circuit}, {self.strategy}, {nodes}{self.workers} x {self.threads} cores"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A cell's figures; medians of turns, with the slowest and the fastest turn.

    ``cpu_use`` is of the cores that the cell has, ``core_ms_per_sample`` the cost: cores times
    seconds, by sample. ``tile_ms`` is what a tile takes in a step, forward and back; it and
    ``tiles`` are 0 where a strategy does not tell.
    """

    samples_per_second: float
    slowest: float
    fastest: float
    step_ms: float
    cpu_use: float
    core_ms_per_sample: float
    tiles: int
    tile_ms: float
    memory_mib: float
    first_call_seconds: float


def sweep(
    grid: Grid, out: Path, say: Callable[[str], None], address: str | None = None
) -> list[dict[str, Any]]:
    """Measure every cell of the grid that is not done, and return the rows of all.

    ``address`` is of the Ray cluster that cells of strategy ray are measured on.

    Raises:
        ConfigurationError: a bad grid, or a directory with another one.
        CheckpointError: a sweep directory of another version.
    """
    grid.check()
    cells = list(grid.cells())
    if not cells:
        raise ConfigurationError(
            "the grid has nothing to run: cpu_batch is the compiled engine, so engine=stock rules "
            "it out"
        )
    _claim(grid, out)
    table = out / "cells.csv"
    rows = read(table)
    done = {_cell_of(row) for row in rows}
    if rows:  # all but a torn line
        beside = table.with_suffix(".part")
        beside.unlink(missing_ok=True)
        for row in rows:
            _append(beside, row)
        os.replace(beside, table)
    with _Pools() as pools:
        for number, cell in enumerate(cells, 1):
            if cell in done:
                continue
            measurement = measure(cell, pools, grid.seconds, grid.turns, address)
            row = {**dataclasses.asdict(cell), **dataclasses.asdict(measurement)}
            _append(table, row)
            say(
                f"{number} of {len(cells)}: {cell}: {measurement.samples_per_second:.0f} "
                f"samples/s, CPU {100 * measurement.cpu_use:.0f}%"
            )
    return read(table)


def read(table: Path) -> list[dict[str, Any]]:
    """The rows of ``cells.csv``; none where there is no such file yet."""
    if not table.exists():
        return []
    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    kinds: dict[str, Any] = {"str": str, "int": int, "float": float}
    types = {
        field.name: kinds[str(field.type)]
        for cls in (Cell, Measurement)
        for field in dataclasses.fields(cls)
    }
    rows = []
    for line in lines:
        with contextlib.suppress(TypeError, ValueError):  # the last one may be torn
            rows.append({name: types[name](value) for name, value in line.items()})
    return rows


def measure(
    cell: Cell, pools: _Pools, seconds: float, turns: int, address: str | None = None
) -> Measurement:
    """Time a cell's training step."""
    import tensorflow as tf

    import qpool
    from qpool.measure.processes import cpu_seconds, memory_bytes
    from qpool.studies.bench.engine import Case

    case = Case(cell.modes, cell.layers, cell.cutoff)
    z = case.z(cell.batch)
    options: dict[str, Any] = {"tile": cell.tile or None, "engine": cell.engine}
    if cell.strategy == "processes":
        options["pool"] = pools.of(cell.workers, cell.threads)
    elif cell.strategy not in _IN_PLACE:
        options["workers"] = cell.workers
    if cell.strategy == "ray":
        options |= {"threads": cell.threads, "nodes": cell.nodes, "address": address}
    with qpool.parallelize(case, strategy=cell.strategy, **options) as generator:

        def step() -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(generator(z))
            tape.gradient(loss, case.weights)

        if cell.strategy == "ray":
            _took_part(cell, generator.stats()["pool"]["nodes"])
        began = time.perf_counter()
        step()
        first = time.perf_counter() - began
        step()
        rates, uses = [], []
        before = _tiles(generator)
        # TensorFlow's own threads take all cores in this process, whatever is asked of it.
        own = cell.nodes * cell.workers * cell.threads
        cores = own if cell.strategy in ("processes", "ray") else pools.cores
        there = cores if cell.strategy == "ray" else pools.cores
        used = (lambda: _of_nodes(generator)[0]) if cell.strategy == "ray" else cpu_seconds
        for _ in range(turns):
            done, began, cpu = 0, time.perf_counter(), used()
            while not done or time.perf_counter() - began < seconds / turns:
                step()
                done += 1
            elapsed = time.perf_counter() - began
            rates.append(done * cell.batch / elapsed)
            uses.append((used() - cpu) / (elapsed * min(cores, there)))
        after = _tiles(generator)
        held = _of_nodes(generator)[1] if cell.strategy == "ray" else memory_bytes()
    rate = statistics.median(rates)
    tiles, tile = per_step(before, after)
    return Measurement(
        rate,
        min(rates),
        max(rates),
        1e3 * cell.batch / rate,
        statistics.median(uses),
        1e3 * cores / rate,
        tiles,
        1e3 * tile,
        held / 2**20,
        first,
    )


class _Pools:
    """One pool at a time, kept while cells ask for the same workers."""

    def __init__(self) -> None:
        from qpool.executors import topology

        self.cores = topology.budget().workers
        self._key: tuple[int, int] | None = None
        self._stack = contextlib.ExitStack()

    def of(self, workers: int, threads: int) -> Any:
        from qpool.executors.processes.pool import Pool

        if self._key != (workers, threads):
            self._stack.close()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*share cores.*")
                self._pool = self._stack.enter_context(Pool(workers, threads=threads))
            self._key = workers, threads
        return self._pool

    def __enter__(self) -> _Pools:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _took_part(cell: Cell, nodes: list[dict[str, Any]]) -> None:
    """ConfigurationError unless the cluster is as large as the cell says."""
    found = [node["workers"] for node in nodes]
    if found != [cell.workers] * cell.nodes:
        raise ConfigurationError(
            f"{cell}: the cluster has {len(found)} nodes with {found} workers free; add nodes, or "
            "ask for fewer. Cells that are done are kept"
        )


def _of_nodes(generator: Any) -> tuple[float, int]:
    """CPU seconds so far, and bytes held, of the workers on all nodes."""
    workers = generator.stats()["pool"]["workers"]
    return sum(w["cpu_seconds"] for w in workers), sum(w["memory_bytes"] for w in workers)


def _tiles(generator: Any) -> dict[str, float]:
    """Tiles and calls so far, and the seconds that workers spent computing."""
    pool = generator.stats().get("pool", {})
    found = {name: pool.get(name, 0) for name in ("tiles", "forward_calls", "backward_calls")}
    computing = sum(worker["compute_seconds"] for worker in pool.get("workers", ()))
    return {**found, "computing": computing}


def per_step(before: dict[str, float], after: dict[str, float]) -> tuple[int, float]:
    """Tiles of a step, and seconds that one takes in it: forward, and then back."""
    done = {name: after[name] - before[name] for name in after}
    calls = done["forward_calls"] + done["backward_calls"]
    if not done["tiles"]:
        return 0, 0.0
    tiles = done["tiles"] / calls
    return round(tiles), done["computing"] / (done["forward_calls"] * tiles)


def _cell_of(row: dict[str, Any]) -> Cell:
    return Cell(**{field.name: row[field.name] for field in dataclasses.fields(Cell)})


def _append(table: Path, row: dict[str, Any]) -> None:
    new = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def _claim(grid: Grid, out: Path) -> None:
    """Make the directory, or see that it holds this very sweep."""
    from qpool.training.directory import host

    asked = json.loads(json.dumps({"format": FORMAT, "grid": dataclasses.asdict(grid)}))
    said = out / "sweep.json"
    if said.exists():
        try:
            known = json.loads(said.read_text())
            found = known["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{said} cannot be read: {error}") from error
        if found != FORMAT:
            raise CheckpointError(
                f"the sweep in {out} is of format {found}; this version of qpool reads format "
                f"{FORMAT}. Choose another --out"
            )
        if known["grid"] != asked["grid"]:
            different = [n for n, v in asked["grid"].items() if known["grid"].get(n) != v]
            raise ConfigurationError(
                f"the sweep in {out} has another grid ({', '.join(different)}); give the same one "
                "to go on with it, or choose another --out"
            )
        return
    left = [] if not out.is_dir() else [path for path in out.iterdir() if path.suffix != ".part"]
    if out.exists() and (not out.is_dir() or left):
        raise ConfigurationError(
            f"{out} exists and is not an empty directory; choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    from qpool.executors import topology
    from qpool.measure.host import processor

    machine = {"processor": processor(), "cores": topology.budget().workers, **host()}
    beside = said.with_suffix(".part")
    beside.write_text(json.dumps({**asked, "host": machine}, indent=2) + "\n")
    os.replace(beside, said)
