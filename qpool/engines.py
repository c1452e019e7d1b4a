"""The Strawberry Fields engines that a model holds, and whether they are still the ones it held.

Owns where they hang. A replica, and what is compiled, has an engine as it was when it was made.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from workers.replica import serialization


@dataclass(frozen=True, eq=False)
class HeldEngine:
    """An engine, the container that it hangs in, and the options that it was made with."""

    engine: Any
    container: Any
    key: Any
    options: dict[str, Any]

    @property
    def backend(self) -> str:
        return str(self.engine.backend_name)

    def is_there(self) -> bool:
        """Whether the container holds it, or one of the same backend and options: a model may make
        its engine anew in each call."""
        try:
            found = self.container[self.key]
        except (KeyError, IndexError):
            return False
        alike = found is self.engine or getattr(found, "backend_name", None) == self.backend
        return bool(alike and found.backend_options == self.options)

    def __str__(self) -> str:
        return f"the engine of the {self.backend!r} backend in {self.key!r}"


def held_engines(model: Any) -> list[HeldEngine]:
    """All that attributes, lists and dicts of the model lead to."""
    return list(_engines(model)) if "strawberryfields.engine" in sys.modules else []


def _engines(model: Any) -> Iterator[HeldEngine]:
    kind = sys.modules["strawberryfields.engine"].BaseEngine
    for part in serialization.walk(model):
        if isinstance(part, kind):
            continue  # what an engine holds is its own
        container = part if isinstance(part, dict | list) else getattr(part, "__dict__", {})
        places = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in list(places):
            if isinstance(value, kind):
                options = dict(getattr(value, "backend_options", {}))
                yield HeldEngine(value, container, key, options)
