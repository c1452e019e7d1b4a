"""What can be chosen, what was chosen and why, and what is remembered of it on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workers import cache


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

    ``measured`` is when (ISO 8601), empty for a guess, for which ``why`` says what it is made from;
    ``remembered`` whether that was in another process; ``complete`` whether all candidates have
    been tried. ``others`` are to be taken where a guess cannot be.
    """

    candidate: Candidate
    batch: int
    milliseconds: dict[str, float]
    not_measured: dict[str, str]
    seconds: float
    measured: str
    remembered: bool = False
    complete: bool = True
    why: str = ""
    others: tuple[Candidate, ...] = ()

    @staticmethod
    def guessed(candidate: Candidate, batch: int, why: str, others: Sequence[Candidate]) -> Choice:
        """One that nothing was measured for."""
        return Choice(candidate, batch, {}, {}, 0.0, "", False, False, why, tuple(others))

    def without_first(self, error: Exception) -> Choice:
        """The next one of a guess, since the first cannot be for the reason that ``error`` says."""
        first, *others = self.others
        refused = {**self.not_measured, str(self.candidate): f"{type(error).__name__}: {error}"}
        return dataclasses.replace(
            self, candidate=first, others=tuple(others), not_measured=refused
        )

    def as_dict(self) -> dict[str, Any]:
        hidden = ("candidate", "others")
        return {
            **dataclasses.asdict(self.candidate),
            "chosen": str(self.candidate),
            **{n: v for n, v in dataclasses.asdict(self).items() if n not in hidden},
        }


def remembered() -> list[Choice]:
    """What was measured on this machine before, the newest first."""
    place = cache.place_of(0)
    files = [] if place is None else (place.parent / "choices").glob(f"{place.name}-*.json")
    choices = [_read(file) for file in files]
    known = [choice for choice in choices if choice is not None]
    return sorted(known, key=lambda choice: choice.measured, reverse=True)


def _read(file: Path) -> Choice | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(file.read_text())
        found["candidate"] = Candidate(**found["candidate"])
        found["others"] = ()
        return dataclasses.replace(Choice(**found), remembered=True)
    return None


class Memory:
    """A choice on disk, beside the compiled code; nothing where that is turned off."""

    def __init__(self, fingerprint: str) -> None:
        place = cache.place_of(0)  # which tells versions and processors apart
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
