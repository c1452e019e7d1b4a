"""Which runs a campaign is of: a base of settings, a grid over any of them, and a list of cells.

Pure, but for reading a file. Owns how runs are named and grouped; what a setting means is
``config.Config``'s, or the user's function's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qpool.training.config import read_toml
from workers.errors import ConfigurationError, nearest

#: The setting that tells runs of one group apart.
SEED = "seed"

_LONGEST_NAME = 100

_TABLES = ("grid", "cells", "search", "campaign")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run. ``settings`` are all that it is given, ``own`` those that tell it from others."""

    name: str
    settings: dict[str, Any]
    own: dict[str, Any]

    @property
    def group(self) -> str:
        """What it has in common with runs that differ in their seed alone."""
        return label({name: value for name, value in self.own.items() if name != SEED})


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a campaign's file asks for; ``options`` are of the campaign, not of its runs."""

    base: dict[str, Any]
    grid: dict[str, list[Any]]
    cells: list[dict[str, Any]]
    search: dict[str, Any]
    options: dict[str, Any]


def read(path: Path) -> Asked:
    """A TOML file: settings of every run at its top, ``[grid]`` with lists, ``[[cells]]``, and
    ``[search]`` with ranges.

    Raises:
        ConfigurationError: it cannot be read, or has a table of another name.
    """
    found = read_toml(
        path,
        "campaign",
        "TOML: settings of `qpool train`, then [grid] with a list for each setting that varies",
    )
    strange = [n for n, v in found.items() if _is_table(v) and n not in _TABLES]
    if strange:
        raise ConfigurationError(
            f"unknown table [{strange[0]}] in {path}: {nearest(strange[0], _TABLES)}"
        )
    grid, listed, search, options = (found.pop(name, {}) for name in _TABLES)
    if not all(isinstance(x, dict) for x in (grid, search)) or not isinstance(listed or [], list):
        raise ConfigurationError(
            f"{path}: expected one table [grid] with lists, one [search] with ranges, and a table "
            "[[cells]] for each cell"
        )
    return Asked(found, grid, list(listed or []), search, dict(options))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)
    )


def cells(
    base: Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]],
    listed: Sequence[Mapping[str, Any]] = (),
    drawn: Sequence[Mapping[str, Any]] = (),
) -> tuple[Cell, ...]:
    """The product of the grid, for each of the listed cells (or once) with each of the drawn ones;
    later ones go over the base.

    Raises:
        ConfigurationError: a list is empty or none, or two cells are of the same settings.
    """
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ConfigurationError(f"grid.{name} must be a list of values; came {values!r}")
        if not values:
            raise ConfigurationError(f"the grid has nothing to run: grid.{name} is empty")
    places = {
        "the grid": {*grid},
        "a cell": set().union(*listed),
        "the search": set().union(*drawn),
    }
    for one, other in itertools.combinations(places, 2):
        if twice := sorted(places[one] & places[other]):
            raise ConfigurationError(f"{twice[0]} is in {one} and in {other}: expected it in one")
    found: dict[str, Cell] = {}
    seen: dict[str, str] = {}
    for cell, trial in itertools.product(listed or ({},), drawn or ({},)):
        for values in itertools.product(*grid.values()):
            own = {**cell, **trial, **dict(zip(grid, values, strict=True))}
            settings = {**base, **own}
            name = name_of(own)
            same = json.dumps(settings, sort_keys=True, default=repr)
            if same in seen:
                raise ConfigurationError(
                    f"two cells have the same settings: {seen[same]} and {name}; leave one out"
                )
            seen[same] = name
            found[name] = Cell(name, settings, own)
    return tuple(found.values())


def label(own: Mapping[str, Any]) -> str:
    """The settings as a person reads them: ``data=iris, layers=2``."""
    return ", ".join(f"{name}={_short(value)}" for name, value in own.items())


def name_of(own: Mapping[str, Any]) -> str:
    """A name for a directory, which tells these settings from others: ``data=iris,seed=1``."""
    said = ",".join(f"{name}={_short(value)}" for name, value in own.items()) or "run"
    safe = re.sub(r"[^\w=,.+-]", "-", said)
    exact = all(
        isinstance(value, int | float | bool) or _short(value) == value for value in own.values()
    )
    if safe == said and len(safe) <= _LONGEST_NAME and exact:
        return safe
    digest = hashlib.sha256(json.dumps(own, sort_keys=True, default=repr).encode()).hexdigest()
    return f"{safe[:_LONGEST_NAME]}-{digest[:8]}"


def _short(value: Any) -> str:
    """A value in a name: of a file, its own."""
    text = value if isinstance(value, str) else json.dumps(value, default=repr)
    return (
        Path(text).stem
        if isinstance(value, str) and Path(text).suffix in (".csv", ".npy")
        else text
    )
