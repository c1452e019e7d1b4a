"""Quantum models made of Strawberry Fields programs, as Keras models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpool.models.generator import QuantumSFGenerator

__all__ = ["QuantumSFGenerator"]


def __getattr__(name: str) -> Any:
    if name == "QuantumSFGenerator":
        from qpool.models.generator import QuantumSFGenerator

        return QuantumSFGenerator
    raise AttributeError(f"module 'qpool.models' has no attribute {name!r}")
