"""Which cores the pools of this machine have taken, so that two pools do not pin to the same ones.

Owns the claims. A claim on a core is a bound socket with the core's number in its name, in Linux's
abstract namespace: it is in no file system, it does not listen, and the kernel gives it back when
the process ends, however it ends. Other systems have no such thing (nor are workers pinned there).
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import weakref
from collections.abc import Sequence

#: What the names begin with. Who sets another one is in a world of its own.
PREFIX = f"qpool/{os.getuid() if hasattr(os, 'getuid') else ''}"


class Claims:
    """Cores that are held until ``release``, or the end of the process."""

    def __init__(self) -> None:
        self._held: dict[int, socket.socket] = {}
        _all.add(self)

    def take(self, cpus: Sequence[int], wanted: int) -> tuple[int, ...]:
        """Claim ``wanted`` of ``cpus``, the first ones that are free; none if there are too few."""
        if not sys.platform.startswith("linux"):
            return tuple(cpus[:wanted]) if wanted <= len(cpus) else ()
        taken: dict[int, socket.socket] = {}
        for cpu in cpus:
            if len(taken) == wanted:
                break
            claim = _bind(cpu)
            if claim is not None:
                taken[cpu] = claim
        if len(taken) < wanted:
            for claim in taken.values():
                claim.close()
            return ()
        self._held |= taken
        return tuple(taken)

    def release(self) -> None:
        """Give all cores back."""
        while self._held:
            _, claim = self._held.popitem()
            with contextlib.suppress(OSError):
                claim.close()


#: A fork of this process has copies of the sockets, and must not hold the cores with them.
_all: weakref.WeakSet[Claims] = weakref.WeakSet()


def _release_all() -> None:
    for claims in list(_all):
        claims.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_all)


def _bind(cpu: int) -> socket.socket | None:
    """A socket under this core's name; None if somebody has one."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0{PREFIX}/cpu/{cpu}")
    except OSError:
        claim.close()
        return None
    return claim
