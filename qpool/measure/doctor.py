"""``qpool doctor``: what the machine is, and whether qpool works on it from end to end.

Owns the checks that run something; ``host`` reads the machine. Each check compares with stock
Strawberry Fields, and takes seconds.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

from qpool.measure.host import Finding, findings

#: How far compiled single precision may lie from stock Strawberry Fields.
_CLOSE = 1e-4


def examine(workers: int | None = None, address: str | None = None) -> Iterator[Finding]:
    """All findings, as they come: those that are read at once, then those that compute.

    With ``address``, those of the Ray cluster there too.
    """
    yield from findings()
    yield _versions()
    for name, check in (
        ("Strawberry Fields", _strawberry_fields),
        ("traced engine", _traced),
        ("compile cache", _cache),
        ("parallel step", lambda: _parallel(workers)),
        ("auto", _auto),
    ):
        yield _checked(name, check)
    if address is not None:
        yield _checked("Ray cluster", lambda: _cluster(address))


def _checked(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # whatever is wrong here is what is asked for
        advice = "this has to work before anything else does; the error says what is missing"
        return Finding(name, f"{type(error).__name__}: {error}", "wrong", advice)


def _versions() -> Finding:
    names = ("qpool-sf", "tensorflow", "keras", "strawberryfields", "numpy", "scipy")
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} (not installed)")
    return Finding("versions", ", ".join([f"Python {platform.python_version()}", *found]))


def _strawberry_fields() -> Finding:
    began = time.perf_counter()
    found = abs(complex(_ket("stock")[1, 0]))
    if not 0.2 < found < 0.3:  # a beamsplitter's half of a weak coherent state
        return Finding("Strawberry Fields", f"a wrong amplitude, {found}", "wrong", "reinstall it")
    return Finding("Strawberry Fields", f"imports and runs ({time.perf_counter() - began:.1f} s)")


def _ket(engine: str) -> Any:
    import strawberryfields as sf
    from strawberryfields import ops

    from workers.engine.scope import traced_engines

    program = sf.Program(2)
    with program.context as q:
        ops.Dgate(0.4) | q[0]
        ops.BSgate() | (q[0], q[1])
    with traced_engines(engine == "traced"):
        made = sf.Engine("tf", backend_options={"cutoff_dim": 4})
        return made.run(program).state.ket().numpy()


def _traced() -> Finding:
    apart = abs(_ket("traced") - _ket("stock")).max()
    if not apart < _CLOSE:
        advice = "please report this, with the versions above; engine='stock' avoids it"
        return Finding("traced engine", f"{apart:.1e} from stock", "wrong", advice)
    return Finding("traced engine", f"{apart:.0e} from stock")


def _cache() -> Finding:
    from workers import cache

    place = cache.in_use(cache.environment(1))
    if place is None:
        advice = "each start compiles anew; QPOOL_CACHE names a folder that is yours alone"
        return Finding("compile cache", "none", "advice", advice)
    size = sum(file.stat().st_size for file in place.iterdir() if file.is_file())
    return Finding("compile cache", f"{place} ({size / 2**20:.0f} MiB)")


def _parallel(workers: int | None) -> Finding:
    """A training step through a pool, beside the same in place."""
    from qpool.executors import topology

    count = workers or min(2, topology.budget().workers)
    apart, first, again, stats = _step_apart({"workers": count, "strategy": "processes"})
    pool = stats["pool"]
    pinned = sum(bool(worker["pinned"]) for worker in pool["workers"])
    value = (
        f"{count} workers ({pool['start_method']}, {pinned} pinned): {apart:.0e} from in place; "
        f"first {first:.1f} s, then {1e3 * again:.1f} ms"
    )
    if not apart < _CLOSE:
        return Finding("parallel step", value, "wrong", "please report this, with the versions")
    if not pinned and hasattr(os, "sched_setaffinity"):
        advice = "workers are not pinned: another pool has the cores, or there are too few"
        return Finding("parallel step", value, "advice", advice)
    return Finding("parallel step", value)


def _cluster(address: str) -> Finding:
    """The same over the nodes of a cluster."""
    apart, first, again, stats = _step_apart({"strategy": "ray", "address": address})
    nodes = ", ".join(f"{n['host']} with {n['workers']} workers" for n in stats["pool"]["nodes"])
    value = f"{nodes}: {apart:.0e} from in place; first {first:.1f} s, then {1e3 * again:.1f} ms"
    if not apart < _CLOSE:
        return Finding("Ray cluster", value, "wrong", "please report this, with the versions")
    return Finding("Ray cluster", value)


def _step_apart(options: dict[str, Any]) -> tuple[float, float, float, dict[str, Any]]:
    """How far a pooled training step is from the same in place; seconds of the first, and of
    another; stats."""
    import tensorflow as tf

    import qpool

    model = qpool.models.QuantumSFGenerator(latent_dim=4, layers=1, cutoff_dim=4, seed=1)
    z = tf.random.stateless_normal((8, 4), (1, 2))

    def step(call: Any) -> list[Any]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(call(z) ** 2)
        return [loss, *tape.gradient(loss, model.trainable_variables)]

    expected = step(model)
    began = time.perf_counter()
    with qpool.parallelize(model, **options) as generator:
        found = step(generator)
        first = time.perf_counter() - began
        began = time.perf_counter()
        step(generator)
        again = time.perf_counter() - began
        stats = generator.stats()
    apart = max(float(tf.reduce_max(tf.abs(a - b))) for a, b in zip(found, expected, strict=True))
    return apart, first, again, stats


def _auto() -> Finding:
    """What ``auto`` has measured here and remembers."""
    from qpool.executors.auto.choices import remembered

    choices = remembered()
    if not choices:
        return Finding("auto", "nothing measured yet")
    last = [f"{choice.candidate} for batches of {choice.batch}" for choice in choices[:3]]
    return Finding("auto", f"{len(choices)} choices remembered; the last: {'; '.join(last)}")
