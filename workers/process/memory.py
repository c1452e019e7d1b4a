"""How much memory this process holds for itself."""

from __future__ import annotations

import os
import time

#: Seconds for which a reading is good: asking costs more than a small tile.
_GOOD_FOR = 0.5


class Memory:
    """Reads the resident memory of this process that it shares with nobody."""

    def __init__(self) -> None:
        self._read = 0.0
        self._bytes = 0

    def own(self) -> int:
        """Bytes, up to half a second old. The arena is not counted, where the system can tell."""
        now = time.monotonic()
        if now - self._read > _GOOD_FOR:
            import psutil

            found = psutil.Process(os.getpid()).memory_info()
            self._bytes = int(found.rss - getattr(found, "shared", 0))
            self._read = now
        return self._bytes
