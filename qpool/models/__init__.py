"""Quantum models made of Strawberry Fields programs, as Keras models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpool.models.discriminator import QuantumSFDiscriminator
    from qpool.models.encodings import Encoding, register_encoding
    from qpool.models.generator import QuantumSFGenerator

__all__ = ["Encoding", "QuantumSFDiscriminator", "QuantumSFGenerator", "register_encoding"]

_HOMES = {
    "Encoding": "encodings",
    "QuantumSFDiscriminator": "discriminator",
    "QuantumSFGenerator": "generator",
    "register_encoding": "encodings",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"qpool.models.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'qpool.models' has no attribute {name!r}")
