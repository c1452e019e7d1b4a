"""One segment of memory that the coordinator and its workers share.

Owns the segment's life: created by the coordinator, attached by workers, grown in place. It has
no name in any file system, so nothing is left behind however a process ends: the kernel frees it
with the last process that holds it. Its pages are allocated when it is made or grown, so a full
machine is an error here and never a SIGBUS later.

- Linux: ``memfd_create``. Not bound by the size of /dev/shm.
- other POSIX systems: an unlinked temporary file.
- Windows: a page-file mapping, found by an unguessable tag; each growth makes a new one.

Knows nothing of what the bytes mean (see ``layout``).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import sys
import tempfile
from dataclasses import dataclass

from workers.errors import ArenaError
from workers.layout import Views

_LINUX = sys.platform.startswith("linux")
_WINDOWS = sys.platform == "win32"


@dataclass(frozen=True)
class Segment:
    """How to find the segment: a file descriptor (POSIX) or a tag (Windows), and its size."""

    handle: int | str
    size: int


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


class Arena:
    """A growable shared segment. ``buffer`` is the current mapping, ``views`` arrays over it.

    After ``grow`` or ``remap`` arrays over the former buffer still read the same memory
    on POSIX (both mappings show the same file), yet must be made anew to reach past their end.
    """

    def __init__(self, segment: Segment, *, owner: bool) -> None:
        self._owner = owner
        self._closed = False
        self._maps: list[mmap.mmap] = []
        self._map(segment)

    # -- made by the coordinator -----------------------------------------------------------

    @classmethod
    def create(cls, size: int) -> Arena:
        """Make a segment of ``size`` bytes, allocated for real; ArenaError if there is no room."""
        size = _round_to_pages(size)
        if _WINDOWS:
            return cls(Segment(f"qpool-{secrets.token_hex(16)}", size), owner=True)
        if _LINUX:
            handle = os.memfd_create("qpool", os.MFD_CLOEXEC)
        else:
            handle, path = tempfile.mkstemp(prefix="qpool-")
            os.unlink(path)
        try:
            _allocate(handle, 0, size)
            return cls(Segment(handle, size), owner=True)
        except BaseException:
            os.close(handle)
            raise

    def grow(self, size: int) -> None:
        """Make room for ``size`` bytes in all, keeping contents; ArenaError leaves it as it was."""
        size = _round_to_pages(size)
        if size <= self.size:
            return
        if isinstance(self.segment.handle, int):
            _allocate(self.segment.handle, self.size, size)
            self._map(Segment(self.segment.handle, size))
        else:
            former = bytes(self.buffer)
            self._map(Segment(f"qpool-{secrets.token_hex(16)}", size))
            self.buffer[: len(former)] = former

    # -- attached by a worker --------------------------------------------------------------

    @classmethod
    def attach(cls, segment: Segment) -> Arena:
        """Map a segment made by another process; the descriptor must be open in this one."""
        return cls(segment, owner=False)

    def remap(self, segment: Segment) -> None:
        """Follow the coordinator's growth."""
        self._map(segment)

    # -- both ------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        return self.segment.size

    def close(self) -> None:
        """Let go of the segment. Mappings that arrays still show stay until those are gone."""
        if self._closed:
            return
        self._closed = True
        self.views.clear()
        with contextlib.suppress(BufferError):
            self.buffer.release()
        self._maps = [mapping for mapping in self._maps if not _closed(mapping)]
        if self._owner and isinstance(self.segment.handle, int):
            os.close(self.segment.handle)

    def _map(self, segment: Segment) -> None:
        if isinstance(segment.handle, int):
            mapping = mmap.mmap(segment.handle, segment.size)
        else:
            mapping = mmap.mmap(-1, segment.size, tagname=segment.handle)  # type: ignore[call-arg]
        self.segment = segment
        self.buffer = memoryview(mapping)
        self.views = Views(self.buffer)
        self._maps = [former for former in self._maps if not _closed(former)] + [mapping]


def _closed(mapping: mmap.mmap) -> bool:
    """Close a mapping, unless an array still shows it."""
    try:
        mapping.close()
    except BufferError:
        return False
    return True


def _round_to_pages(size: int) -> int:
    return max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE


def _allocate(handle: int, former: int, size: int) -> None:
    """Give the file ``size`` bytes of real memory, or leave it at ``former`` bytes and raise."""
    available = _available_memory()
    if available is not None and size - former > available:
        raise ArenaError(_no_room(former, size, f"only {_mebibytes(available)} are free"))
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
        else:
            # macOS has no posix_fallocate: writing zeros is what allocates.
            with os.fdopen(os.dup(handle), "r+b") as file:
                file.seek(former)
                remaining = size - former
                while remaining:
                    remaining -= file.write(bytes(min(remaining, 1 << 20)))
    except OSError as error:
        with contextlib.suppress(OSError):
            os.ftruncate(handle, former)
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT):
            raise ArenaError(_no_room(former, size, os.strerror(error.errno))) from error
        raise


def _no_room(former: int, size: int, reason: str) -> str:
    return (
        f"the pool's shared segment needs {_mebibytes(size)} ({_mebibytes(size - former)} more "
        f"than it has), but {reason}; use a smaller batch or free memory (containers: "
        "raise the memory limit)"
    )


def _available_memory() -> int | None:
    """Bytes the kernel would give without swapping, under the cgroup's limit; None if unknown."""
    import psutil

    available = int(psutil.virtual_memory().available)
    for folder, limit, usage, cache in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        (
            "/sys/fs/cgroup/memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        try:
            bound = int(_read(f"{folder}/{limit}"))
            used = int(_read(f"{folder}/{usage}"))
            lines = (line.split() for line in _read(f"{folder}/memory.stat").splitlines())
            reclaimable = next((int(value) for key, value in lines if key == cache), 0)
        except (OSError, ValueError):  # no such cgroup, or "max"
            continue
        available = min(available, bound - used + reclaimable)
    return max(available, 0)


def _read(path: str) -> str:
    with open(path) as file:
        return file.read().strip()
