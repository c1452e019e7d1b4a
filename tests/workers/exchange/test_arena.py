"""The shared segment: created, attached, grown, refused; and gone with its last holder."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from workers.errors import ArenaError
from workers.exchange.arena import Arena, Segment
from workers.layout import ArraySpec, Placed


def test_two_mappings_show_the_same_bytes() -> None:
    ours = Arena.create(100)
    theirs = Arena.attach(ours.segment)
    ours.buffer[:3] = b"abc"
    assert bytes(theirs.buffer[:3]) == b"abc"
    theirs.close()
    ours.close()
    ours.close()  # again does nothing


def test_growing_keeps_what_is_there_and_older_views_alive() -> None:
    arena = Arena.create(1)
    view = Placed(ArraySpec((4,), "|u1"), 0).view(arena.buffer)
    view[...] = 7
    other = Arena.attach(arena.segment)
    arena.grow(1 << 20)
    assert arena.size == 1 << 20
    assert bytes(arena.buffer[:4]) == b"\x07" * 4
    view[0] = 9
    assert arena.buffer[0] == 9
    other.remap(arena.segment)
    other.buffer[-1] = 5
    assert arena.buffer[-1] == 5
    arena.grow(10)
    assert arena.size == 1 << 20
    other.close()
    arena.close()


def test_more_than_the_machine_has_is_an_error_with_sizes() -> None:
    arena = Arena.create(1)
    with pytest.raises(ArenaError, match=r"needs \d+\.\d MiB .*smaller batch"):
        arena.grow(1 << 50)
    arena.buffer[0] = 1  # still usable
    arena.close()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_full_file_system_is_an_error_never_a_signal() -> None:
    code = """
        import resource, signal
        from workers.exchange.arena import Arena
        from workers.errors import ArenaError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        arena = Arena.create(1 << 19)
        try:
            arena.grow(1 << 22)
        except ArenaError as error:
            arena.buffer[-1] = 1
            print(arena.size == 1 << 19, "4.0 MiB" in str(error))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "True True", done.stderr


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux")
def test_the_segment_is_private_and_has_no_name() -> None:
    arena = Arena.create(1)
    assert isinstance(arena.segment, Segment)
    assert "memfd:qpool" in os.readlink(f"/proc/self/fd/{arena.segment.handle}")
    assert not os.get_inheritable(arena.segment.handle)
    arena.close()


def test_where_there_is_no_memfd_an_unlinked_file_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.exchange.arena._LINUX", False)
    arena = Arena.create(100)
    arena.buffer[:1] = b"x"
    arena.grow(1 << 16)
    assert arena.buffer[0] == ord("x")
    assert os.fstat(arena.segment.handle).st_nlink == 0
    arena.close()
