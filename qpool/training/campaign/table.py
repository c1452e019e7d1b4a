"""A campaign for the eyes: one live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

#: Seconds between plain lines about the whole, and between frames of the table.
_LINE_SECONDS = 15.0
_FRAME_SECONDS = 0.5

#: Runs shown beneath each other; of more, the first ones.
_ROWS = 40


class Board:
    """Shows runs that are under way, and how far the whole is. ``whole`` and rows are told to it;
    it computes nothing."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._last = 0.0

    def __enter__(self) -> Board:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def due(self) -> bool:
        """Whether it is time to ``show`` again."""
        period = _LINE_SECONDS if self._live is None else _FRAME_SECONDS
        return time.monotonic() - self._last >= period

    def show(self, whole: str, rows: Sequence[dict[str, Any]]) -> None:
        """The whole as a sentence, and a row for each run under way: name, step, steps, rate,
        left, and figures."""
        self._last = time.monotonic()
        if self._live is None:
            self.say(whole)
            return
        names = list(dict.fromkeys(name for row in rows for name in row["figures"]))[:5]
        table = Table(box=None, pad_edge=False)
        for title in ("run", "step", "steps/s", "left", *names):
            table.add_column(title, justify="left" if title == "run" else "right")
        for row in rows[:_ROWS]:
            figures = [row["figures"].get(name) for name in names]
            table.add_row(
                Text(row["name"], overflow="ellipsis", no_wrap=True),
                f"{row['step']}/{row['steps']}" if row["steps"] else "-",
                f"{row['rate']:.1f}" if row["rate"] else "-",
                duration(row["left"]),
                *("" if value is None else f"{value:.3g}" for value in figures),
            )
        more = [Text(f"and {len(rows) - _ROWS} more")] if len(rows) > _ROWS else []
        self._live.update(Group(table, *more, Text(whole)), refresh=True)


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 42 s, 7 min, 3 h 20 min."""
    if seconds is None:
        return "-"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
