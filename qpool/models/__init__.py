"""Quantum models made of Strawberry Fields programs, as Keras models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpool.models.discriminator import QuantumSFDiscriminator
    from qpool.models.encodings import Encoding, register_encoding
    from qpool.models.generator import QuantumSFGenerator
    from qpool.models.readouts import Density, Homodyne, Readout

__all__ = [
    "Density",
    "Encoding",
    "Homodyne",
    "QuantumSFDiscriminator",
    "QuantumSFGenerator",
    "Readout",
    "register_encoding",
]

_HOMES = {
    "Density": "readouts",
    "Encoding": "encodings",
    "Homodyne": "readouts",
    "Readout": "readouts",
    "QuantumSFDiscriminator": "discriminator",
    "QuantumSFGenerator": "generator",
    "register_encoding": "encodings",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"qpool.models.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'qpool.models' has no attribute {name!r}")
