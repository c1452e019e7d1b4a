"""Strawberry Fields' engine, backend and state, as ones that are traced, batched and compiled.

Owns how a circuit is computed. Knows nothing of models, processes or messages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workers.engine.engine import TracedEngine

__all__ = ["TracedEngine"]


def __getattr__(name: str) -> Any:
    if name != "TracedEngine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from workers.engine import engine  # loads Strawberry Fields, which plans need not

    return engine.TracedEngine
