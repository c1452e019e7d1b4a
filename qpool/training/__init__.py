"""Training a quantum GAN through the pool.

data.py      real data sets, checked and standardised      distance.py   two-sample distances
gan.py       the adversarial step, as a keras.Model         trainer.py    generator, critic, fit
run.py       a run from start to end                        directory.py  what is in its directory
building.py  from settings to a trainer                     journal.py    what is written down, when
plots.py     pictures of a run                              display.py    progress for people
campaign/    many runs at once
"""

from __future__ import annotations

from typing import Any

__all__ = ["Campaign", "report", "run_directory"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'qpool.training' has no attribute {name!r}")
    from qpool.training import campaign

    value = getattr(campaign, "report_progress" if name == "report" else name)
    globals()[name] = value
    return value
