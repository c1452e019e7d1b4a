"""What libraries say again and again, said once."""

from __future__ import annotations

import logging


class Once(logging.Filter):
    """Lets a warning, or less, of the same words through once; errors always; nothing below those
    if ``silent``.

    Made for TensorFlow's logger: stock Strawberry Fields casts a complex tensor to a real one in
    each gate, and TensorFlow warns of it each time.
    """

    def __init__(self, *, silent: bool = False) -> None:
        super().__init__()
        self._silent = silent
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is let through."""
        if record.levelno > logging.WARNING:
            return True
        message = record.getMessage()
        new = not self._silent and message not in self._said
        self._said.add(message)
        return new
