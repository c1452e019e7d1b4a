"""Named benchmark cases: where each is, loaded when it is run."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

from workers.errors import ConfigurationError, nearest
from workers.logs import Once

#: Case -> the module here and the function that measure it.
CASES = {
    "speedup": "pool:speedup",
    "roundtrip": "roundtrip:roundtrip",
    "monitor": "pool:monitor",
    "trainer": "pool:trainer",
    "timeline": "timeline:timeline",
    "own-loop": "pool:loop_of_ones_own",
    "engine": "engine:engine",
    "wide": "engine:wide",
    "pooled": "engine:pooled",
    "loop": "engine:loop",
    "memory": "engine:memory",
    "accuracy": "engine:accuracy",
    "roofline": "roofline:roofline",
    "strategies": "strategies:strategies",
    "auto": "strategies:auto",
    "utilisation": "strategies:utilisation",
    "forms": "usage:forms",
    "first": "usage:first",
    "compiling": "compiling:compiling",
    "models": "models:models",
    "scaling": "scaling:scaling_model",
    "coordinator": "coordinator:coordinator",
    "campaign": "campaign:campaign",
    "natural": "natural:natural",
    "ray": "cluster:ray_overhead",
}

#: What is run where no case is named: the pool, and the engine.
USUAL = (
    "speedup",
    "roundtrip",
    "monitor",
    "engine",
    "wide",
    "pooled",
    "loop",
    "memory",
    "accuracy",
)


def run(name: str) -> dict[str, Any]:
    """Run a named case; ConfigurationError names the nearest known one."""
    module, function = _home(name)
    tensorflow = logging.getLogger("tensorflow")
    tensorflow.addFilter(once := Once())  # stock Strawberry Fields' casts, thousands of them
    try:
        found: dict[str, Any] = getattr(module, function)()
    finally:
        tensorflow.removeFilter(once)
    return found


def keep(name: str, found: dict[str, Any], out: Path) -> None:
    """Write what was found to the directory ``out``, with a picture where the case has one."""
    (out / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    module, _ = _home(name)
    if hasattr(module, "draw"):
        module.draw(found, out / f"{name}.png")


def check(name: str) -> None:
    """Raises ConfigurationError, with the nearest known name, where there is no such case."""
    if name not in CASES:
        raise ConfigurationError(f"unknown case {name!r}: {nearest(name, tuple(CASES))}")


def _home(name: str) -> tuple[ModuleType, str]:
    check(name)
    module, _, function = CASES[name].partition(":")
    return importlib.import_module(f"{__name__}.{module}"), function
