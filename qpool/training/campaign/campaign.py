"""A campaign: which run is begun next, what is heard of those under way, and when all is over.

Owns the order of things. What runs there are is ``grid``'s, what has become of them ``records``',
where they are ``runners``'.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qpool.executors import topology
from qpool.training import directory
from qpool.training.campaign import grid as grids
from qpool.training.campaign import packing, placing, records, strategy_choice
from qpool.training.campaign import search as searches
from qpool.training.campaign.grid import Cell
from qpool.training.campaign.halving import Halving
from qpool.training.campaign.job import DISK, STOPPED, Ended, Job, Report
from qpool.training.campaign.pace import Pace
from qpool.training.campaign.records import Records, State
from qpool.training.campaign.runners import Runners
from qpool.training.campaign.table import Board, duration
from qpool.training.config import Config
from workers.errors import CheckpointError, ConfigurationError, QPoolError, nearest

#: What is said of a campaign without a function.
_TRAINING = "qpool train"

#: Seconds for a run that was asked to end: it may be compiling, or writing its checkpoint.
_GRACE = 120.0


@dataclasses.dataclass
class _UnderWay:
    """A run that is at its place."""

    cell: Cell
    before: State
    began: float
    heard: float
    step: int = 0
    steps: int = 0
    first: Report | None = None
    last: Report | None = None
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    #: Why it was asked to end, and until when it may.
    ending: str = ""
    until: float = float("inf")

    @property
    def per_step(self) -> float | None:
        """Seconds a step, once that can be told."""
        if self.first is None or self.last is None or self.last.step <= self.first.step:
            return None
        return (self.last.at - self.first.at) / (self.last.step - self.first.step)


class Campaign:
    """Many trainings at once, as many side by side as the cores hold.

    Each run has a process and cores of its own, and a directory ``out/runs/NAME`` that `qpool
    resume`, `sample` and the plots work on. Killed at any instant, the same call goes on; each run
    ends with the bits that it has by itself.

    Args:
        train: ``settings -> {figure: number}``, a function of your own, for trainers that are not
            qpool's; it may call ``qpool.training.report`` and ``run_directory``. None: each run is
            what `qpool train` does with those settings.
        out: the campaign's directory.
        base: settings of all runs.
        grid: a list of values for each setting that varies; all combinations are run.
        cells: settings that go together, one mapping a cell; with a grid, each over the grid.
        search: ranges that each of ``trials`` is drawn from at random (``search.draw``), by name;
            with a grid, each over the grid.
        trials: how many of them.
        cores: how many of this machine's cores to use. Default: the physical ones that this
            process may use.
        together: how many runs go side by side at most. Default: a core each, as memory allows;
            with fewer runs than cores, each has several.
        retry: run those again that failed, diverged or were pruned, from their last checkpoint.
        timeout: seconds in which a run must say something, after which it is ended as hanging;
            None: for ever. A training run says something twice a second, once it has compiled.
        halving: ``{"first": 500, "factor": 3, "objective": "energy_distance"}`` ends hopeless runs
            early (``Halving``); None: none.
        start_method: of the runs' processes, "forkserver" or "spawn"; default: the system's best.
        strategy: "ray" places runs on the nodes of a Ray cluster, which must see ``out`` under the
            same path.
        address: of that cluster.
        console: where progress is shown; default: standard error.

    Raises:
        ConfigurationError, DataError: a cell that cannot be run is named, before anything starts.
    """

    def __init__(
        self,
        train: Callable[[dict[str, Any]], Mapping[str, float]] | None = None,
        *,
        out: str | Path,
        base: Mapping[str, Any] | None = None,
        grid: Mapping[str, Sequence[Any]] | None = None,
        cells: Sequence[Mapping[str, Any]] = (),
        search: Mapping[str, Any] | None = None,
        trials: int | None = None,
        cores: int | None = None,
        together: int | None = None,
        retry: bool = False,
        timeout: float | None = 600.0,
        halving: Mapping[str, Any] | None = None,
        start_method: str | None = None,
        strategy: str | None = None,
        address: str | None = None,
        console: Any = None,
    ) -> None:
        for name, value in (("cores", cores), ("together", together), ("timeout", timeout)):
            if value is not None and not value > 0:
                raise ConfigurationError(f"{name} must be more than 0, not {value}")
        if strategy not in (None, "ray"):
            raise ConfigurationError(
                f"a campaign's strategy is ray or none, not {strategy!r}; how a run computes is a "
                "setting of the run"
            )
        if (trials is None) != (not search):
            raise ConfigurationError(
                "a search has ranges and a number of trials: expected both or none; in a file, "
                "[search] and trials = 20 under [campaign]"
            )
        drawn = searches.draw(search, trials) if search and trials is not None else ()
        self.cells = grids.cells(base or {}, grid or {}, cells, drawn)
        self._train = train
        self._retry = retry
        self._timeout = timeout
        self._halving = Halving(**halving) if halving else None
        self._options: dict[str, Any] = {
            "start_method": start_method,
            "address": address,
            "ray": strategy == "ray",
        }
        self._cores, self._most = cores, together
        self._console = console
        self._records = Records(Path(out).resolve(), self.cells)
        self._pace = Pace()
        self._asked = ""
        self._under_way: dict[str, _UnderWay] = {}
        self._full_disk = ""
        self._function: bytes | None = None
        if train is None:
            self._check()
        else:
            import cloudpickle

            self._function = cloudpickle.dumps(train)

    @classmethod
    def read(cls, path: Path, **options: Any) -> Campaign:
        """Of a TOML file (see ``grid.read``); ``options`` go over those of its ``[campaign]``."""
        asked = grids.read(path)
        known = ("cores", "together", "trials", "retry", "timeout", "halving", "start_method")
        for name in asked.options:
            if name not in known:
                raise ConfigurationError(
                    f"unknown option {name!r} in [campaign] of {path}: {nearest(name, known)}"
                )
        options = {**asked.options, **{n: v for n, v in options.items() if v is not None}}
        return cls(
            base=asked.base, grid=asked.grid, cells=asked.cells, search=asked.search, **options
        )

    def run(self) -> dict[str, Any]:
        """Run all that is not done, and return what came of it.

        ``runs`` are the rows of ``results.csv``; ``finished``, ``failed``, ``diverged``, ``pruned``
        and ``waiting`` count them; ``stopped`` is the signal that ended it before its time.
        """
        from rich.console import Console

        what = _TRAINING if self._train is None else getattr(self._train, "__qualname__", "train")
        began = time.monotonic()
        self._records.out.mkdir(parents=True, exist_ok=True)
        with directory.alone(self._records.out):
            decided = self._records.begin(what)
            queue = [cell for cell in self.cells if self._is_to_run(cell)]
            console = self._console or Console(stderr=True)
            with Board(console) as board:
                if queue:
                    self._remember()
                    with self._signals(), self._places(queue) as where:
                        self._decide(queue, decided, where, board)
                        self._work(queue, decided["strategies"], where, board)
            rows = self._records.table()
            counts = {
                state: sum(row["state"] == state for row in rows)
                for state in (records.FINISHED, records.FAILED, records.DIVERGED, records.PRUNED,
                              records.WAITING)
            }  # fmt: skip
            summary = {
                **counts,
                "seconds": time.monotonic() - began,
                "core_hours": sum(row["core_hours"] for row in rows),
                "directory": str(self._records.out),
                "runs": rows,
            }
            if self._full_disk:
                raise CheckpointError(
                    f"the disk is full: {self._full_disk}. Nothing is lost; make room, and run the "
                    "same command again"
                )
            if self._asked:
                return {**summary, "stopped": self._asked}
            from qpool.training.campaign import report

            report.write(self._records, rows)
            return summary

    # -- before anything starts ------------------------------------------------------------

    def _check(self) -> None:
        """Refuse what cannot be run, with the name of its cell."""
        from qpool.training import run

        loaded: dict[str, Any] = {}
        for cell in self.cells:
            try:
                config = Config.of(cell.settings)
                config.check()
                run.check_data(config, loaded)
            except QPoolError as error:
                raise type(error)(f"the run {cell.name}: {error}") from error

    def _is_to_run(self, cell: Cell) -> bool:
        state = self._records.state(cell.name).state
        return state == records.WAITING or (self._retry and state != records.FINISHED)

    def _remember(self) -> None:
        """Tell what is known of earlier lives to what ends hopeless runs."""
        if self._halving is None:
            return
        from qpool.training.journal import read_table

        for cell in self.cells:
            table = self._records.run(cell.name) / "evaluations.csv"
            for row in read_table(table) if table.exists() else ():
                self._halving.hopeless(cell.name, int(row["step"]), row)

    @contextlib.contextmanager
    def _places(self, queue: Sequence[Cell]) -> Iterator[Runners]:
        budget = topology.budget()
        cores = budget.cpus[: self._cores or budget.workers]
        together = min(len(queue), self._most or len(queue))
        each = packing.cores_each(together, len(cores))
        for cell in queue:
            asked = strategy_choice.cores_asked(cell.settings) if self._train is None else 1
            each = max(each, min(len(cores), asked))
        where = placing.make(
            cores=cores,
            each=each,
            most=self._most,
            threads=1 if self._train is None else each,
            **self._options,
        )
        with contextlib.closing(where):
            yield where

    def _decide(
        self, queue: list[Cell], decided: dict[str, Any], where: Runners, board: Board
    ) -> None:
        """How runs compute of which nobody said it, once for all lives of the campaign: their bits
        depend on it. With a core each, compiled in their own process; with more, as measured."""
        known = decided.setdefault("strategies", {})
        if self._train is None:
            kinds = strategy_choice.undecided(queue, known)
            if where.cores_each == 1 or self._options["ray"]:
                known.update({kind: {"strategy": "cpu_batch"} for kind in kinds})
            elif kinds:
                jobs = {kind: self._job(cell, {}, where) for kind, cell in kinds.items()}
                known.update(
                    strategy_choice.measure(jobs, where, board.say, lambda: bool(self._asked))
                )
        if not self._asked:
            self._records.decide(decided)

    def _job(self, cell: Cell, strategies: Mapping[str, Any], where: Runners) -> Job:
        """The run as it is given to a place."""
        settings, workers = dict(cell.settings), None
        if self._train is None:
            settings, workers = strategy_choice.settle(cell, strategies, where.cores_each)
        return Job(
            cell.name,
            str(self._records.run(cell.name)),
            str(self._records.log(cell.name)),
            settings,
            self._function,
            strategy_choice.program(settings) if self._train is None else "",
            workers,
        )

    # -- while runs are under way ----------------------------------------------------------

    def _work(
        self,
        queue: list[Cell],
        strategies: Mapping[str, Any],
        where: Runners,
        board: Board,
    ) -> None:
        board.say(
            f"{len(queue)} runs, {where.count} side by side on {where.cores_each} "
            f"core{'s' if where.cores_each > 1 else ''} each; in {self._records.out}"
        )
        while self._under_way or (queue and not self._over):
            while not self._over and len(self._under_way) < where.count:
                job = self._next(queue, strategies, where)
                if job is None:
                    break
                cell = next(cell for cell in queue if cell.name == job.name)
                queue.remove(cell)
                now = time.monotonic()
                before = self._records.state(cell.name)
                self._under_way[cell.name] = _UnderWay(cell, before, now, now)
                where.start(job)
            for name, message in where.wait(0.2):
                self._hear(name, message, where, board)
            self._judge(where, board)
            if board.due():
                board.show(*self._told(queue, where))

    @property
    def _over(self) -> bool:
        return bool(self._asked or self._full_disk)

    def _next(
        self, queue: Sequence[Cell], strategies: Mapping[str, Any], where: Runners
    ) -> Job | None:
        """Of the runs that can begin now, the one that takes longest, as far as is known."""
        seconds = {cell.name: self._expected(cell) or 0.0 for cell in queue}
        cells = {cell.name: cell for cell in queue}
        seen = set()
        for name in packing.longest_first(list(cells), seconds):
            job = self._job(cells[name], strategies, where)
            if not job.program or job.program not in seen:
                if where.ready(job):
                    return job
                seen.add(job.program)
        return None

    def _expected(self, cell: Cell) -> float | None:
        return self._pace.expected(strategy_choice.cost(cell), self._steps(cell))

    def _steps(self, cell: Cell) -> int:
        return 0 if self._train else int(cell.settings.get("steps", Config.steps))

    def _hear(self, name: str, message: Report | Ended, where: Runners, board: Board) -> None:
        live = self._under_way.get(name)
        if live is None:
            return  # it was killed, and had said this before
        live.heard = time.monotonic()
        if isinstance(message, Report):
            live.step, live.steps, live.figures = message.step, message.steps, message.figures
            live.first, live.last = live.first or message, message
            told = message.evaluated if self._halving and not live.ending else None
            if told and self._halving and self._halving.hopeless(name, message.step, told):
                self._end(live, records.PRUNED, where)
            return
        self._ended(live, message, where, board)

    def _ended(self, live: _UnderWay, ended: Ended, where: Runners, board: Board) -> None:
        """Write down how a run ended."""
        name = live.cell.name
        del self._under_way[name]
        took = time.monotonic() - live.began
        state, reason = ended.state, ended.reason
        if state == DISK:
            self._full_disk = reason
        elif state != records.FINISHED and live.ending:
            state = live.ending  # whatever came of it, it was asked to
        if state == records.PRUNED:
            reason = "hopeless"
        elif state in (STOPPED, DISK):
            state, reason = records.WAITING, ""
        done = State(
            state,
            reason,
            live.step or live.before.step,
            live.steps or live.before.steps,
            live.before.seconds + took,
            live.before.core_seconds + took * where.cores_each,
        )
        self._records.note(name, done)
        if self._halving:
            self._halving.ended(name, pruned=state == records.PRUNED)
        if state == records.FINISHED:
            made = live.step - live.first.step if live.first else 0
            self._pace.finished(strategy_choice.cost(live.cell), took, made, live.per_step)
        if state != records.WAITING:
            figures = self._records.result(name) or live.figures
            said = _figures(figures) if state == records.FINISHED else reason.split("\n")[0]
            board.say(f"{state}: {name} after {duration(done.seconds)}. {said}")

    def _judge(self, where: Runners, board: Board) -> None:
        """End runs that say nothing, and all of them if that was asked for."""
        now = time.monotonic()
        for live in list(self._under_way.values()):
            if self._over and not live.ending:
                self._end(live, STOPPED, where)
            silent = self._timeout is not None and now - live.heard > self._timeout
            if now > live.until or (silent and not live.ending):
                where.kill(live.cell.name)
                reason = f"it hung: nothing was heard of it for {now - live.heard:.0f} s"
                self._ended(live, Ended(records.FAILED, reason), where, board)

    def _end(self, live: _UnderWay, why: str, where: Runners) -> None:
        live.ending, live.until = why, time.monotonic() + _GRACE
        where.stop(live.cell.name)

    def _told(self, queue: Sequence[Cell], where: Runners) -> tuple[str, list[dict[str, Any]]]:
        """For the board: the whole in a sentence, and a row for each run under way."""
        rows, remaining = [], [self._expected(cell) for cell in queue]
        samples = 0.0
        for live in self._under_way.values():
            each = live.per_step
            left = self._pace.expected(
                strategy_choice.cost(live.cell), live.steps - live.step, each
            )
            remaining.append(left)
            rate = 1 / each if each else 0.0
            samples += rate * live.cell.settings.get("batch_size", Config.batch_size)
            rows.append(
                {"name": live.cell.name, "step": live.step, "steps": live.steps, "rate": rate,
                 "left": left, "figures": live.figures}
            )  # fmt: skip
        known = [seconds for seconds in remaining if seconds is not None]
        whole = None
        if known:
            mean = sum(known) / len(known)
            whole = packing.seconds_left(
                [mean if seconds is None else seconds for seconds in remaining], where.count
            )
        done = len(self.cells) - len(queue) - len(self._under_way)
        speed = f", {samples:.0f} samples/s" if samples and self._train is None else ""
        return (
            f"{done} of {len(self.cells)} done, {len(rows)} under way{speed}, "
            f"{duration(whole)} left",
            rows,
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Within, Ctrl-C and SIGTERM end the campaign with a checkpoint of each run; again: now."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self._asked:
                raise KeyboardInterrupt
            self._asked = signal.Signals(number).name

        self._asked = ""
        before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _figures(figures: Mapping[str, Any]) -> str:
    """The few that a line has room for."""
    shown = [name for name in ("energy_distance_after", "coverage", "ket_norm") if name in figures]
    return ", ".join(f"{name} {figures[name]:.3g}" for name in shown or list(figures)[:4])
