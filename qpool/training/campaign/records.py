"""A campaign's directory: what it is of, and what has become of each run.

    DIR/campaign.json      the runs, and how they are computed
        runs/NAME/         a run's own directory, as `qpool train` makes it
        logs/NAME.txt      what it said
        states/NAME.json   how it ended, with the reason; its seconds on how many cores
        results.csv        a line a run
        report.html        the same for people
        tensorboard/       the same for TensorBoard's HParams

Each fact is in one file, written whole or not at all, so a campaign can be killed between any two.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qpool.training import directory
from qpool.training.campaign.grid import Cell
from workers.errors import CheckpointError, ConfigurationError

#: Counts up when a campaign's directory comes to mean something else.
FORMAT = 1

#: How a run may have ended, or not.
FINISHED, FAILED, DIVERGED, PRUNED, WAITING = "finished", "failed", "diverged", "pruned", "waiting"


@dataclasses.dataclass(frozen=True)
class State:
    """What has become of a run: of its ``steps``, ``step`` are done; ``seconds`` it has taken so
    far, from the start of its process, and ``core_seconds`` that its cores were its own."""

    state: str = WAITING
    reason: str = ""
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    core_seconds: float = 0.0


class Records:
    """The directory ``out`` of a campaign of these cells."""

    def __init__(self, out: Path, cells: Sequence[Cell]) -> None:
        self.out = out
        self.cells = tuple(cells)

    def run(self, name: str) -> Path:
        """A run's own directory."""
        return self.out / "runs" / name

    def log(self, name: str) -> Path:
        """What it said."""
        return self.out / "logs" / f"{name}.txt"

    def begin(self, what: str) -> dict[str, Any]:
        """Begin, or go on: returns what was decided (``decide``) in an earlier life.

        ``what`` is run: "qpool train", or the name of the user's function.
        """
        path = self.out / "campaign.json"
        runs = {
            cell.name: json.loads(json.dumps(cell.settings, default=repr)) for cell in self.cells
        }
        decided: dict[str, Any] = {}
        if path.exists():
            said = self._said(path)
            if said["of"] != what:
                raise ConfigurationError(
                    f"{self.out} is a campaign of {said['of']}, not of {what}; choose another --out"
                )
            for name, settings in said["runs"].items():
                if runs.get(name) != settings:
                    raise ConfigurationError(
                        f"{self.out} is another campaign's: its run {name} is "
                        + ("not among these" if name not in runs else "of other settings here")
                        + ". Choose another --out; runs may be added to a campaign, not changed"
                    )
            decided = said["decided"]
        elif self.out.exists() and (
            not self.out.is_dir() or any(not directory.left_over(p) for p in self.out.iterdir())
        ):
            raise ConfigurationError(
                f"{self.out} exists and is not a campaign; choose another --out"
            )
        for folder in ("runs", "logs", "states"):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        self._asked = {"format": FORMAT, "of": what, "runs": runs}
        self.decide(decided)
        return decided

    def _said(self, path: Path) -> dict[str, Any]:
        try:
            said: dict[str, Any] = json.loads(path.read_text())
            found = said["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error!r}") from error
        if found != FORMAT:
            raise CheckpointError(
                f"the campaign in {self.out} is of format {found}; this version of qpool reads "
                f"format {FORMAT}. Go on with the version that wrote it"
            )
        return said

    def decide(self, decided: dict[str, Any]) -> None:
        """Write down what holds for all lives of this campaign."""
        directory.write_json(self.out / "campaign.json", {**self._asked, "decided": decided})

    def state(self, name: str) -> State:
        """What has become of a run, as far as is written down."""
        path = self.out / "states" / f"{name}.json"
        try:
            found = State(**json.loads(path.read_text()))
        except FileNotFoundError:
            found = State()
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error!r}); without it the run begins where its directory "
                "stands: delete the file"
            ) from error
        if found.state != FINISHED and self.result(name) is not None:
            found = dataclasses.replace(found, state=FINISHED, reason="")
        return found

    def note(self, name: str, state: State) -> None:
        """Write down what has become of it."""
        directory.write_json(self.out / "states" / f"{name}.json", dataclasses.asdict(state))

    def result(self, name: str) -> dict[str, Any] | None:
        """A finished run's numbers, flat: a training run's summary, or what a function gave."""
        for file in ("summary.json", "result.json"):
            try:
                found = json.loads((self.run(name) / file).read_text())
            except FileNotFoundError:
                continue
            except ValueError as error:
                raise CheckpointError(f"{self.run(name) / file} is damaged: {error}") from error
            return _flat(found)
        return None

    def table(self) -> list[dict[str, Any]]:
        """A row a run: its own settings, its state, its result. Written to ``results.csv`` too."""
        rows = []
        for cell in self.cells:
            state = self.state(cell.name)
            rows.append(
                {
                    "run": cell.name,
                    **cell.own,
                    "state": state.state,
                    "reason": state.reason.split("\n")[0],
                    "step": state.step,
                    "seconds": state.seconds,
                    "core_hours": state.core_seconds / 3600,
                    **(self.result(cell.name) or {}),
                }
            )
        columns = list(dict.fromkeys(name for row in rows for name in row))
        beside = self.out / "results.part"
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(beside, self.out / "results.csv")
        return rows


def _flat(found: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Numbers of a nested dictionary, under names joined by underscores."""
    flat: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{before}{name}_")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{before}{name}"] = value
    return flat
