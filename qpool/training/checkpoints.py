"""Checkpoints: all that a run's next step depends on, in one file that is whole or is not there.

A NumPy archive: arrays and one JSON text, nothing that could run code. Written beside its place,
flushed to disk and renamed; each array carries a checksum (the archive's own), so a damaged file
is known. Owns that file and the folder of the last few; what the arrays mean is the caller's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from workers.errors import CheckpointError

#: Counts up when a checkpoint comes to mean something else.
FORMAT = 1

_NAME = re.compile(r"step-(\d+)\.npz")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a run stands after ``step`` steps.

    ``calls`` is how many calls its pool had made (a model's random draws follow from it),
    ``best`` the least distance found so far.
    """

    step: int
    calls: int
    best: float
    arrays: dict[str, np.ndarray]


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint to ``path``, whole or not at all.

    Raises:
        CheckpointError: the disk is full, or something else is wrong with it. What was at ``path``
            is still there.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "step": checkpoint.step,
        "calls": checkpoint.calls,
        "best": checkpoint.best,
        "arrays": sorted(checkpoint.arrays),
    }
    text = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
    beside = path.with_suffix(".part")
    try:
        with beside.open("wb") as file:
            np.savez(file, manifest=text, **checkpoint.arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise CheckpointError(
            f"the checkpoint {path} could not be written: {error}. The last one is intact; make "
            "room and resume"
        ) from error


def read(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        CheckpointError: it is damaged, of another program, or of a newer version of qpool.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            manifest = json.loads(archive["manifest"].tobytes())
            if not isinstance(manifest, dict) or "format" not in manifest:
                raise KeyError("format")
            if manifest["format"] != FORMAT:
                raise CheckpointError(
                    f"{path} is of format {manifest['format']}; this version of qpool reads "
                    f"format {FORMAT}. Resume with the version that wrote it"
                )
            arrays = {name: archive[name] for name in manifest["arrays"]}
        return Checkpoint(manifest["step"], manifest["calls"], manifest["best"], arrays)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except KeyError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of qpool: it has no {error} in it"
        ) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"the checkpoint {path} is damaged ({error}); resume from an older one, or from a copy"
        ) from error


class Folder:
    """A folder of checkpoints: the last ``keep`` of them, and the best one."""

    def __init__(self, path: Path, keep: int = 3) -> None:
        self.path = path
        self.best = path / "best.npz"
        self._keep = keep

    def steps(self) -> dict[int, Path]:
        """The checkpoints by step, the newest first."""
        found = {
            int(match[1]): file
            for file in self.path.glob("step-*.npz")
            if (match := _NAME.fullmatch(file.name))
        }
        return dict(sorted(found.items(), reverse=True))

    def write(self, checkpoint: Checkpoint, *, best: bool = False) -> Path:
        """Write one more; the oldest goes when there are too many."""
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / f"step-{checkpoint.step:08d}.npz"
        write(path, checkpoint)
        if best:
            write(self.best, checkpoint)
        for old in list(self.steps().values())[self._keep :]:
            old.unlink(missing_ok=True)
        return path

    def newest(self) -> tuple[Checkpoint, list[CheckpointError]]:
        """The newest one that is whole, and what is wrong with those that are newer.

        A run that goes on from an older one comes to the same end.
        """
        damaged: list[CheckpointError] = []
        for path in self.steps().values():
            try:
                return read(path), damaged
            except CheckpointError as error:
                damaged.append(error)
        if damaged:
            raise damaged[0]
        raise CheckpointError(f"there are no checkpoints in {self.path}")


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and need not be
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
