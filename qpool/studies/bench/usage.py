"""Models as users write them, and the first minutes of a program that trains one.

Owns the forms that are compared (an engine held or made in the call; a loop over the batch) and the
programs that are timed from their start, each in a process of its own that knows nothing of others.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qpool.studies.bench.alone import with_a_cache

#: Modes, layers, cutoff, read-out and batch of the circuits that programs train.
CIRCUITS = {
    "seed": (2, 2, 8, "quadratures", 16),
    "user": (2, 6, 12, "density", 8),
    "wide": (3, 6, 12, "density", 64),
}

#: What they train them by; "stock" is without qpool, "pool first" processes, in a pool that is made
#: before TensorFlow is imported.
WAYS = ("stock", "cpu_batch", "threads", "processes", "pool first", "auto")

#: Steps after which the time is taken. Stock is timed for the first of them, and goes on evenly.
MARKS = (1, 10, 60, 600)


def forms(turns: int = 5) -> dict[str, Any]:
    """The seed's circuit, batch 16 in one tile, by strategy: an engine that the model holds against
    one made in each call, and a loop over the batch against a call for all of it (seconds over
    seconds)."""
    import qpool
    from qpool.studies.bench.timing import ratio, turns_of

    found: dict[str, Any] = {"case": "forms"}
    with qpool.Pool() as pool:
        for strategy in ("cpu_batch", "threads", "processes"):
            shared = pool if strategy == "processes" else None
            models = dict(zip(("made", "held", "looped"), _models(16), strict=True))
            z = models["made"].z(16)
            generators = {
                name: qpool.parallelize(model, strategy=strategy, pool=shared, tile=16)
                for name, model in models.items()
            }
            contenders = {
                name: (model.step(generators[name], z), 50) for name, model in models.items()
            }
            for step, _ in contenders.values():
                step()
            seconds = turns_of(contenders, turns)
            found[strategy] = {
                "milliseconds": {name: 1e3 * statistics.median(s) for name, s in seconds.items()},
                "levels": {n: g.stats()["compiled"][0]["level"] for n, g in generators.items()},
                "held over made": ratio(seconds["held"], seconds["made"]),
                "looped over made": ratio(seconds["looped"], seconds["made"]),
            }
            for generator in generators.values():
                generator.close()
    return found


def first() -> dict[str, Any]:
    """Three circuits, each trained for 600 steps by every strategy in a program of its own, without
    anything cached: seconds from the program's start to the end of 1, 10, 60 and 600 steps. And
    once more, with what the first program left on disk."""
    cells: dict[str, Any] = {}
    for name in CIRCUITS:
        rows, again = {}, {}
        for way in WAYS:
            with tempfile.TemporaryDirectory(prefix="qpool-bench-") as folder:
                rows[way] = _program(name, way, folder)
                if way != "stock":
                    again[way] = _program(name, way, folder)
        best = {
            mark: min(rows[way][mark] for way in ("cpu_batch", "threads", "processes"))
            for mark in map(str, MARKS)
        }
        cells[name] = {
            "seconds": rows,
            "seconds, once more": again,
            "auto over the best fixed": {m: rows["auto"][m] / best[m] for m in best},
            "auto over stock": {m: rows["auto"][m] / rows["stock"][m] for m in best},
        }
    return {"case": "first", **cells}


def draw(found: dict[str, Any], picture: Path) -> None:
    """Seconds to the end of so many steps, by strategy; one panel a circuit."""
    if found["case"] != "first":
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(CIRCUITS), figsize=(4 * len(CIRCUITS), 3.5))
    for panel, name in zip(panels, CIRCUITS, strict=True):
        for way, row in found[name]["seconds"].items():
            panel.loglog(MARKS, [row[str(mark)] for mark in MARKS], marker="o", label=way)
        panel.set_title(name)
        panel.set_xlabel("training steps")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("seconds from the program's start")
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def _models(batch: int) -> tuple[Any, Any, Any]:
    """The same circuit, with an engine made in each call, held, and in a loop over the batch."""
    import tensorflow as tf

    from qpool.studies.bench.engine import Case, sf

    class Held(Case):
        def __init__(self) -> None:
            super().__init__(2, 2, 8)
            self.engine = sf.Engine("tf", backend_options={"cutoff_dim": 8, "batch_size": batch})

        def __call__(self, z: tf.Tensor) -> tf.Tensor:
            if self.engine.run_progs:
                self.engine.reset()
            return self.run(self.engine, z)

    class Looped(Case):
        def __init__(self) -> None:
            super().__init__(2, 2, 8)
            self.engine = sf.Engine("tf", backend_options={"cutoff_dim": 8})

        def __call__(self, z: tf.Tensor) -> tf.Tensor:
            found = []
            for row in z:
                if self.engine.run_progs:
                    self.engine.reset()
                args = dict(zip(self.names, self.weights, strict=True))
                args |= dict(zip(self.inputs, row, strict=True))
                ket = self.engine.run(self.program, args=args).state.ket()
                found.append(self._read(ket[None])[0])
            return tf.stack(found)

    return Case(2, 2, 8), Held(), Looped()


def _program(name: str, way: str, folder: str) -> dict[str, float]:
    """Run the program below, which keeps in ``folder`` what it compiles; what it printed."""
    found: dict[str, float] = with_a_cache(folder, __name__, name, way, repr(time.time()))
    return found


def _train(name: str, way: str, began: float) -> dict[str, float]:
    import qpool

    pool = qpool.Pool() if way == "pool first" else None
    import tensorflow as tf

    from qpool.studies.bench.engine import Case

    modes, layers, cutoff, read, batch = CIRCUITS[name]
    model = Case(modes, layers, cutoff, read)
    z = model.z(batch)
    call: Any = model
    if way != "stock":
        call = qpool.parallelize(model, strategy="processes" if pool else way, pool=pool)
    tf.get_logger().setLevel("ERROR")  # stock casts complex numbers to real ones, and says so
    step = model.step(call, z)
    marks: dict[str, float] = {}
    for number in range(1, MARKS[-1] + 1):
        model.weights.assign_sub(1e-3 * step())
        if number in MARKS:
            marks[str(number)] = time.time() - began
        if way == "stock" and number == MARKS[1]:
            each = (marks[str(MARKS[1])] - marks[str(MARKS[0])]) / (MARKS[1] - MARKS[0])
            for mark in MARKS[2:]:
                marks[str(mark)] = marks[str(number)] + each * (mark - number)
            break
    if way != "stock":
        call.close()
    if pool is not None:
        pool.close()
    return marks


if __name__ == "__main__":
    print(json.dumps(_train(sys.argv[1], sys.argv[2], float(sys.argv[3]))))
