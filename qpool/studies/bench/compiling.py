"""What a step costs before it runs for the first time: by depth, and with what an earlier one left.

Each program is a process of its own. Owns the phases: tracing, lowering to XLA's operations,
compiling, and the step itself, warm.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qpool.studies.bench.alone import with_a_cache

#: Modes, cutoff, read-out and batch of the circuits; each at these numbers of layers.
CIRCUITS = {"2 modes": (2, 8, "quadratures", 16), "3 modes": (3, 12, "density", 8)}
LAYERS = (2, 6, 12, 24)

#: The phases, in their order; seconds.
PHASES = ("trace", "lower", "compile")


def compiling() -> dict[str, Any]:
    """A loss and its gradient as one function, for circuits of 2 to 24 layers: seconds to trace,
    lower and compile it, the same in a second process that finds the first one's code, and warm."""
    cells: dict[str, Any] = {}
    for name in CIRCUITS:
        for layers in LAYERS:
            with tempfile.TemporaryDirectory(prefix="qpool-bench-") as folder:
                cold, again = (with_a_cache(folder, __name__, name, layers) for _ in range(2))
            cells[f"{name}, {layers} layers"] = {"cold": cold, "again": again}
    return {"case": "compiling", "cells": cells}


def draw(found: dict[str, Any], picture: Path) -> None:
    """Stacked bars: the phases, cold and in a second process."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(CIRCUITS), figsize=(4.5 * len(CIRCUITS), 3.5))
    for panel, name in zip(panels, CIRCUITS, strict=True):
        for which, shift, shade in (("cold", -0.2, 1.0), ("again", 0.2, 0.5)):
            bottom = [0.0] * len(LAYERS)
            for phase, colour in zip(PHASES, ("C0", "C1", "C2"), strict=True):
                rows = [found["cells"][f"{name}, {n} layers"][which][phase] for n in LAYERS]
                places = [place + shift for place in range(len(LAYERS))]
                label = phase if which == "cold" else f"{phase}, second process"
                panel.bar(places, rows, 0.38, bottom, color=colour, alpha=shade, label=label)
                bottom = [a + b for a, b in zip(bottom, rows, strict=True)]
        panel.set_xticks(range(len(LAYERS)), [str(n) for n in LAYERS])
        panel.set_title(name)
        panel.set_xlabel("layers")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("seconds before the first step")
    panels[-1].legend(frameon=False, fontsize="small", loc="upper left")  # over shallow circuits
    figure.tight_layout()
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def _measure(name: str, layers: int) -> dict[str, float]:
    import tensorflow as tf

    from qpool.studies.bench.engine import Case
    from workers import names

    modes, cutoff, read, batch = CIRCUITS[name]
    case = Case(modes, layers, cutoff, read)
    z = case.z(batch)
    tf.function(lambda x: x + 1, jit_compile=True)(tf.zeros(3))  # XLA itself, started
    names.begin(name)
    function = case.function()
    seconds, began = {}, time.perf_counter()

    def done(phase: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[phase], began = now - began, now

    step = function.get_concrete_function(z)
    done("trace")
    function.experimental_get_compiler_ir(z)(stage="hlo")
    done("lower")
    step(z)
    done("compile")  # with lowering, which TensorFlow does again
    seconds["compile"] -= seconds["lower"]
    turns = 30
    for _ in range(5):
        step(z)
    began = time.perf_counter()
    for _ in range(turns):
        step(z)
    done("warm")
    seconds["warm"] /= turns
    return seconds


if __name__ == "__main__":
    import qpool  # noqa: F401 - which says where compiled code is kept

    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]))))
