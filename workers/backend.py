"""The traced backend, under the name by which programs outside know it."""

from __future__ import annotations

from workers.engine.backend import TracedTFBackend

__all__ = ["TracedTFBackend"]
