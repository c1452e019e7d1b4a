"""How training runs compute where nobody said it: settled once for a campaign, since the bits of a
run depend on it. Owns what a step's cost depends on, and the measuring.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qpool.training.campaign.grid import Cell
from qpool.training.campaign.job import Ended, Job
from qpool.training.campaign.records import FINISHED
from qpool.training.campaign.runners import Runners
from qpool.training.config import Config
from workers.errors import ConfigurationError

#: Settings on which the cost of a step depends.
_COST = (
    "modes",
    "layers",
    "cutoff",
    "encoding",
    "readout",
    "batch_size",
    "critic_steps",
    "critic_units",
    "critic_layers",
)


def cost(cell: Cell) -> str:
    """Names what the time of a step depends on."""
    usual = {field.name: field.default for field in dataclasses.fields(Config)}
    return json.dumps({name: cell.settings.get(name, usual[name]) for name in _COST})


def program(settings: Mapping[str, Any]) -> str:
    """Names what is compiled, where a process can keep it for the next run."""
    from qpool.training import building

    config = Config.of(settings)
    return building.program(config) if config.strategy == "cpu_batch" else ""


def cores_asked(settings: Mapping[str, Any]) -> int:
    """How many cores a run wants by its own settings."""
    if settings.get("strategy") not in ("processes", "threads"):
        return 1
    return int(settings.get("workers") or 1) * int(settings.get("threads", 1))


def undecided(cells: Sequence[Cell], known: Mapping[str, Any]) -> dict[str, Cell]:
    """A run of each kind for which it is neither said nor known how it computes."""
    found: dict[str, Cell] = {}
    for cell in cells:
        if cell.settings.get("strategy", "auto") == "auto" and cost(cell) not in known:
            found.setdefault(cost(cell), cell)
    return found


def settle(cell: Cell, known: Mapping[str, Any], cores: int) -> tuple[dict[str, Any], int | None]:
    """A run's settings with all of them said, and how many workers its own pool has, if any."""
    settings = dict(cell.settings)
    if Path(settings.get("data", "")).suffix:  # a file: found from anywhere
        settings["data"] = str(Path(settings["data"]).resolve())
    if settings.get("strategy", "auto") == "auto":
        settings |= {n: v for n, v in known.get(cost(cell), {}).items() if n != "why"}
    if settings.get("strategy") not in ("processes", "threads"):
        return settings, None
    return settings, settings.get("workers") or max(1, cores // settings.get("threads", 1))


def measure(
    jobs: Mapping[str, Job], where: Runners, say: Callable[[str], None], over: Callable[[], bool]
) -> dict[str, Any]:
    """Which strategy is fastest for each kind, tried at its place; less where it is ``over``.

    Raises:
        ConfigurationError: it could not be measured.
    """
    say(
        f"{where.cores_each} cores for each run: measuring whether a pool of them is faster than "
        f"one ({len(jobs)} circuits)"
    )
    waiting, asked, found = list(jobs), dict[str, str](), dict[str, Any]()
    while (waiting or asked) and not over():
        while waiting and len(asked) < where.count:
            job = jobs[waiting[-1]]
            trial = dataclasses.replace(job, name=f"choose {job.name}", choose=True, program="")
            if not where.ready(trial):
                break
            asked[trial.name] = waiting.pop()
            where.start(trial)
        for name, message in where.wait(0.2):
            if isinstance(message, Ended):
                kind = asked.pop(name)
                job = jobs[kind]
                if message.state != FINISHED or message.result is None:
                    raise ConfigurationError(
                        f"which strategy is fastest for runs like {job.name} could not be "
                        f"measured: {message.reason}. See {job.log}, or name a strategy"
                    )
                found[kind] = message.result
                say(f"{job.name}: {message.result['why']}")
    return found
