"""The folder in which what is compiled or traced outlives a process, for the next worker or run.

Owns the place, what makes a place of its own necessary, its size, that one process at a time makes
what is to be kept, and what is done about a damaged file. The files are code that this user's
processes wrote and this user's processes run: the folder is theirs alone.

``QPOOL_CACHE`` names another folder; ``QPOOL_CACHE=off`` keeps nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import stat
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("qpool")

_VARIABLE = "QPOOL_CACHE"
_FLAG = "--tf_xla_persistent_cache_directory="

#: Packages that TensorFlow comes in.
_PACKAGES = ("tensorflow", "tensorflow-cpu", "tensorflow-intel", "tensorflow-macos", "tf-nightly")

#: What names of places begin with.
_PLACE = "tensorflow-"

#: What the names of their folders begin with that hold what is traced.
_TRACES = "traces-"

#: What names of the files begin with that say who compiles, and what has been compiled.
_TURN = "turn-"

#: What names of files begin with that TensorFlow writes, and that ``kept`` writes.
_COMPILED, _KEPT = "xla_compile_cache_", "kept-"

#: Bytes of the digest that a kept file begins with.
_DIGEST = 32

#: Bytes of a place above which the oldest files go.
_LARGEST = 512 * 2**20

#: Seconds that a process waits for another one to compile a program that it needs too: that one
#: may be stopped. Afterwards it compiles for itself.
_LONGEST_TURN = 60.0


def environment(threads: int) -> dict[str, str]:
    """Variables for a process that has not loaded TensorFlow yet; none if nothing can be kept."""
    try:
        place = place_of(threads)
    except metadata.PackageNotFoundError as error:  # TensorFlow by another name
        log.info("compiled code is not kept: there is no package %s", error.name)
        return {}
    if place is None:
        return {}
    if len(str(place).split()) != 1:  # TensorFlow would read two flags
        log.info("compiled code is not kept: %r has a blank in it (QPOOL_CACHE=)", str(place))
        return {}
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _ours_alone(place):
            log.warning("compiled code is not kept: %s may be written to by others", place)
            return {}
        _prune(place)
        _prune(_of_traces(place))
    except OSError as error:
        log.info("compiled code is not kept: %s", error)
        return {}
    return {"TF_XLA_FLAGS": " ".join([*_other_flags(), f"{_FLAG}{place}"])}


def _other_flags() -> list[str]:
    return [flag for flag in os.environ.get("TF_XLA_FLAGS", "").split() if _FLAG not in flag]


def keep_here() -> None:
    """Have this process keep what it compiles, and find it again, if TensorFlow is not at work yet:
    it reads once where to. A place that is the user's own choice stays."""
    tensorflow = sys.modules.get("tensorflow.python.eager.context")
    if tensorflow is not None and tensorflow.context()._initialized:
        return
    place = in_use()
    if place is None or place.name.startswith(_PLACE):  # none, or that of the process before
        flags = " ".join(_other_flags())
        os.environ.update(environment(0) or ({"TF_XLA_FLAGS": flags} if place else {}))


def place_of(threads: int) -> Path | None:
    """A folder for what must not mix: other versions, other processors, other flags. ``threads`` of
    a process, 0 where they are TensorFlow's own choice."""
    chosen = os.environ.get(_VARIABLE, "")
    if chosen.lower() == "off":
        return None
    import platformdirs

    root = Path(chosen) if chosen else platformdirs.user_cache_path("qpool", appauthor=False)
    told = (_processor(), threads, os.environ.get("XLA_FLAGS"), _other_flags())
    digest = _digest(repr(told).encode())
    return root / f"{_PLACE}{tensorflow_version()}-{digest}"


def _of_traces(place: Path) -> Path:
    """Where that is kept which is the same for any number of threads, flags and processor."""
    ours = place.name.startswith(_PLACE)
    return place.with_name(f"{_TRACES}{tensorflow_version()}") if ours else place


def _digest(told: bytes) -> str:
    return hashlib.sha256(told).hexdigest()[:16]


@functools.cache
def tensorflow_version() -> str:
    """TensorFlow's, by whichever name it was installed; it is not imported for that."""
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    raise metadata.PackageNotFoundError(_PACKAGES[0])


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return line
    return f"{platform.machine()} {platform.processor()}"


def _ours_alone(place: Path) -> bool:
    if os.name != "posix":
        return True
    found = place.stat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _prune(place: Path) -> None:
    files = []
    for file in place.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process has renamed it since
            found = file.stat()
            files.append((found.st_mtime, found.st_size, file))
    size = sum(own for _, own, _ in files)
    for _, own, file in sorted(files):
        if size <= _LARGEST:
            return
        size -= own
        file.unlink(missing_ok=True)


def in_use(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where a process of that environment keeps compiled code, if it does."""
    for flag in environment.get("TF_XLA_FLAGS", "").split():
        if flag.startswith(_FLAG):
            return Path(flag.removeprefix(_FLAG))
    return None


def clear(place: Path | None) -> None:
    """Delete all that is kept in ``place``."""
    if place is not None:
        with contextlib.suppress(OSError):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in (place, _of_traces(place)):
                for beginning in (_COMPILED, _KEPT, _TURN):
                    for file in folder.glob(f"{beginning}*"):
                        file.unlink(missing_ok=True)


class Turn:
    """One process of this machine at a time compiles a program: the others find what it made.

    Owns a lock on a file in ``place``, which the system lets go of when its process dies, and that
    file's length: 1 once the program is made, and nobody needs to wait any more.
    """

    def __init__(self, place: Path) -> None:
        self._place = place
        self._lock: IO[bytes] | None = None

    def take(self, program: bytes) -> None:
        """Wait until no other process compiles that program; not where there are no such locks."""
        if fcntl is None:
            return
        end = time.monotonic() + _LONGEST_TURN
        try:
            lock = (self._place / f"{_TURN}{_digest(program)}").open("ab", buffering=0)
        except OSError:
            return
        while time.monotonic() < end and not _made(lock):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
            else:
                if _made(lock):
                    break
                self._lock = lock
                return
        lock.close()

    def give(self, *, made: bool) -> None:
        """Let the next one compile, or, where it is ``made``, find it."""
        lock, self._lock = self._lock, None
        if lock is not None:
            with contextlib.suppress(OSError), lock:
                if made:
                    lock.write(b"1")
                else:
                    os.unlink(lock.name)


def _made(lock: IO[bytes]) -> bool:
    return os.fstat(lock.fileno()).st_size > 0


def kept(name: str, make: Callable[[], bytes], check: Callable[[bytes], Any]) -> bytes:
    """What ``make`` makes, which is the same in every process under that name: made by one, and
    read by all others.

    What does not pass the ``check``, or is not whole, is made anew.
    """
    place = in_use()
    if place is None:
        return make()
    place = _of_traces(place)
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        if not _ours_alone(place):
            log.warning("traces are not kept: %s may be written to by others", place)
            return make()
    except OSError as error:
        log.info("traces are not kept: %s", error)
        return make()
    file = place / f"{_KEPT}{_digest(name.encode())}"
    found = _read(file, check)
    if found is not None:
        return found
    turn, made = Turn(place), False
    turn.take(file.name.encode())
    try:
        found = _read(file, check)
        if found is None:
            found = make()
            _write(file, found)
        made = True
        return found
    finally:
        turn.give(made=made)


def _read(file: Path, check: Callable[[bytes], Any]) -> bytes | None:
    try:
        whole = file.read_bytes()
    except OSError:
        return None
    digest, found = whole[:_DIGEST], whole[_DIGEST:]
    try:
        if hashlib.sha256(found).digest() != digest:
            raise ValueError("it is not what was written")
        check(found)
    except Exception as error:  # of another version, or damaged
        log.warning("what is kept in %s is made anew: %s", file, error)
        with contextlib.suppress(OSError):
            file.unlink()
        return None
    return found


def _write(file: Path, found: bytes) -> None:
    """Whole or not at all; not where the disk is full or may not be written to."""
    own = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        own.write_bytes(hashlib.sha256(found).digest() + found)
        own.replace(file)
    except OSError as error:
        log.info("not kept: %s", error)
        with contextlib.suppress(OSError):
            own.unlink()
