"""Where the time of one warm training step goes: coordinator and workers on one axis.

    step   | both: write, send, wait, read | critic, updates |
    worker |         | weights | tile | tile |   idle        |

Watches a pool from outside: a pool that nobody watches does nothing for it. The clock is the
machine's monotonic one, which all its processes share. Owns the spans, their trace (Chrome's
format, which Perfetto and TensorBoard read) and their picture.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

#: Steps that are watched, once warm; the picture shows the one of median length.
_STEPS = 200

#: Of the picture.
_COLOURS = {
    "step": "#d9d9d9",
    "both": "#9ecae1",
    "write": "#f26419",
    "send": "#7a9e7e",
    "wait": "#f0f0f0",
    "weights": "#f6ae2d",
    "tile": "#33658a",
}

#: The coordinator's rows, the outermost first; each worker has one more.
_ROWS = {"step": 0, "both": 1, "write": 2, "send": 2, "wait": 2}


class Span(NamedTuple):
    """What was done from when to when, in seconds of the machine's clock; ``row`` is where."""

    row: int
    name: str
    began: float
    ended: float


def timeline() -> dict[str, Any]:
    """A step of the trainer with two workers, batch 64: what the coordinator and the workers do
    when. The file that ``--out`` writes can be opened in Perfetto."""
    found: dict[str, Any] = {"case": "timeline", "batch": 64, "workers": 2}
    for number, (modes, layers) in enumerate(((2, 2), (3, 4))):
        name = f"{modes} modes, {layers} layers, cutoff 8"
        steps = _steps(_watched_training(modes, layers))
        lengths = [step[0].ended - step[0].began for step in steps]
        typical = steps[sorted(range(len(steps)), key=lengths.__getitem__)[len(steps) // 2]]
        found[name] = {"microseconds": _parts(steps)}
        found.setdefault("traceEvents", []).extend(_events(typical, number, name))
    return found


def _watched_training(modes: int, layers: int) -> list[Span]:
    import keras
    import numpy as np

    import qpool

    rows = np.random.default_rng(0).normal(size=(64 * (_STEPS + 50), modes))
    model = qpool.models.QuantumSFGenerator(
        n_modes=modes, latent_dim=2 * modes, layers=layers, cutoff_dim=8, seed=1
    )
    spans: list[Span] = []
    with qpool.Pool(2) as pool, qpool.QuantumGANTrainer(model, seed=1, pool=pool) as trainer:
        trainer.prepare(modes, "processes")
        trainer.train(rows[: 64 * 50], epochs=1, batch_size=64)
        began = [0.0]

        def begin(batch: int, logs: Any = None) -> None:
            began[0] = time.perf_counter()

        def end(batch: int, logs: Any = None) -> None:
            spans.append(Span(0, "step", began[0], time.perf_counter()))

        watch = keras.callbacks.LambdaCallback(on_train_batch_begin=begin, on_train_batch_end=end)
        with watched(pool, spans):
            trainer.train(rows, epochs=1, batch_size=64, callbacks=[watch])
    return spans


@contextlib.contextmanager
def watched(pool: Any, spans: list[Span]) -> Iterator[None]:
    """Within, append what a started pool and its workers do to ``spans``."""
    performer, supervisor = pool._performing(), pool._supervisor
    wrapped = [
        (pool, "both", "both"),
        (pool, "_write", "write"),
        (performer, "_send", "send"),
        (supervisor, "events", "wait"),
    ]

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spans.append(Span(_ROWS[name], name, began, time.perf_counter()))

        return call

    measure = supervisor._measure

    def measured(worker: Any, reply: Any, kinds: Any) -> None:
        received, *moments = reply.moments
        row = max(_ROWS.values()) + 1 + worker.number
        spans.append(Span(row, "weights", received, moments[0]))
        spans.extend(Span(row, "tile", a, b) for a, b in itertools.pairwise(moments))
        measure(worker, reply, kinds)

    for owner, attribute, name in wrapped:
        setattr(owner, attribute, timed(getattr(owner, attribute), name))
    supervisor._measure = measured
    try:
        yield
    finally:
        for owner, attribute, _ in wrapped:
            delattr(owner, attribute)
        del supervisor._measure


def _steps(spans: list[Span]) -> list[list[Span]]:
    """The spans of each step, itself first; those of other than the usual number are left out:
    another worker was started, say."""
    found = []
    for step in (span for span in spans if span.name == "step"):
        within = [s for s in spans if s is not step and step.began <= s.began <= step.ended]
        found.append([step, *within])
    usual = statistics.mode(len(step) for step in found)
    return [step for step in found if len(step) == usual]


def _parts(steps: list[list[Span]]) -> dict[str, float]:
    """Medians over steps, in microseconds."""
    found: dict[str, list[float]] = {}
    for spans in steps:
        seconds: dict[str, float] = {"step": spans[0].ended - spans[0].began}
        for span in spans[1:]:
            own = f"{span.name} (worker {span.row - 3})" if span.row > 2 else span.name
            seconds[own] = seconds.get(own, 0.0) + span.ended - span.began
        at_work = [s for s in spans if s.row > 2]
        busy = max(s.ended for s in at_work) - min(s.began for s in at_work)
        seconds["exchange, beside workers' work"] = seconds["both"] - busy
        seconds["outside the pool"] = seconds["step"] - seconds["both"]
        for name, value in seconds.items():
            found.setdefault(name, []).append(1e6 * value)
    return {name: statistics.median(values) for name, values in found.items()}


def _events(spans: list[Span], process: int, title: str) -> list[dict[str, Any]]:
    """Complete events of Chrome's trace format, in microseconds from the step's beginning."""
    first = spans[0].began
    rows = {span.row for span in spans}
    names = [
        {"ph": "M", "pid": process, "name": "process_name", "args": {"name": title}},
        *(
            {
                "ph": "M",
                "pid": process,
                "tid": row,
                "name": "thread_name",
                "args": {"name": f"worker {row - 3}" if row > 2 else "coordinator"},
            }
            for row in sorted(rows)
        ),
    ]
    return names + [
        {
            "ph": "X",
            "pid": process,
            "tid": span.row,
            "name": span.name,
            "ts": 1e6 * (span.began - first),
            "dur": 1e6 * (span.ended - span.began),
        }
        for span in spans
    ]


def draw(found: dict[str, Any], path: Path) -> None:
    """The typical step of each circuit: bars on one time axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    events = [e for e in found["traceEvents"] if e["ph"] == "X"]
    titles = {e["pid"]: e["args"]["name"] for e in found["traceEvents"] if "tid" not in e}
    figure, axes = plt.subplots(len(titles), 1, figsize=(10, 2.4 * len(titles)), squeeze=False)
    for axis, (process, title) in zip(axes[:, 0], titles.items(), strict=True):
        for event in (e for e in events if e["pid"] == process):
            axis.barh(
                -event["tid"],
                event["dur"] / 1e3,
                left=event["ts"] / 1e3,
                height=0.8,
                color=_COLOURS[event["name"]],
                edgecolor="white",
                linewidth=0.4,
            )
        rows = sorted({e["tid"] for e in events if e["pid"] == process})
        labels = {0: "step", 1: "exchange", 2: "coordinator"}
        axis.set_yticks([-row for row in rows])
        axis.set_yticklabels([labels.get(row, f"worker {row - 3}") for row in rows])
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("milliseconds")
        axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in _COLOURS.values()]
    figure.legend(handles, _COLOURS, ncols=len(_COLOURS), loc="lower center", fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
