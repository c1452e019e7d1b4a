"""What can be chosen, what was chosen and why, and what is remembered of it on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from workers import compile_cache


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to compute. ``workers`` and ``tile`` are None where the strategy has none, or chooses
    it itself; ``threads`` are the cores of each worker."""

    strategy: str
    workers: int | None = None
    threads: int = 1
    tile: int | None = None

    def __str__(self) -> str:
        parts = [self.strategy]
        if self.workers is not None:
            parts.append(f"workers={self.workers}")
        if self.threads != 1:
            parts.append(f"threads={self.threads}")
        if self.tile is not None:
            parts.append(f"tile={self.tile}")
        return " ".join(parts)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for a size of batch, and why: milliseconds of a training step by candidate.

    ``measured`` is when (ISO 8601); ``remembered`` whether that was in another process.
    """

    candidate: Candidate
    batch: int
    milliseconds: dict[str, float]
    not_measured: dict[str, str]
    seconds: float
    measured: str
    remembered: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self.candidate),
            "chosen": str(self.candidate),
            **{n: v for n, v in dataclasses.asdict(self).items() if n != "candidate"},
        }


def remembered() -> list[Choice]:
    """What was measured on this machine before, the newest first."""
    place = compile_cache.place_of(0)
    files = [] if place is None else (place.parent / "choices").glob(f"{place.name}-*.json")
    choices = [_read(file) for file in files]
    known = [choice for choice in choices if choice is not None]
    return sorted(known, key=lambda choice: choice.measured, reverse=True)


def _read(file: Path) -> Choice | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(file.read_text())
        found["candidate"] = Candidate(**found["candidate"])
        return dataclasses.replace(Choice(**found), remembered=True)
    return None


class Memory:
    """A choice on disk, beside the compiled code; nothing where that is turned off."""

    def __init__(self, fingerprint: str) -> None:
        place = compile_cache.place_of(0)  # which tells versions and processors apart
        self._file: Path | None = None
        if place is not None:
            self._file = place.parent / "choices" / f"{place.name}-{fingerprint}.json"

    def read(self) -> Choice | None:
        return None if self._file is None else _read(self._file)

    def write(self, choice: Choice) -> None:
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            beside = self._file.with_suffix(f".{os.getpid()}")
            beside.write_text(json.dumps(dataclasses.asdict(choice), indent=2))
            os.replace(beside, self._file)
