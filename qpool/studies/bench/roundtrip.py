"""The round trip of a call in which nothing is computed: the pool's own part of every call.

Beside it, in the same run, the step of Gymnasium's AsyncVectorEnv, and the least that two processes
could do for the same: a program of its own each, which takes 32 rows out of a shared file, makes
them a tensor, and puts what comes out back.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from qpool.studies.bench.alone import answer, obey, side_by_side
from qpool.studies.bench.timing import ratio, turns_of
from workers.errors import ConfigurationError

_BATCH, _WIDTH = 64, 4


class _Identity:
    """An empty eager model: what is left of a call is the pool's own."""

    def __init__(self) -> None:
        import tensorflow as tf

        self.w = tf.Variable(1.0)
        self.trainable_variables = [self.w]

    def __call__(self, z: Any) -> Any:
        return z


def roundtrip() -> dict[str, Any]:
    """A forward call of an empty eager model, z 64x4, two tiles, no tape, beside the step of
    Gymnasium's AsyncVectorEnv with two environments, and beside two bare processes."""
    turns = 15
    import tensorflow as tf

    import qpool

    try:
        import gymnasium
    except ImportError:
        raise ConfigurationError(
            "the roundtrip case compares with Gymnasium: pip install 'qpool-sf[test]'"
        ) from None

    from qpool.bridge.variables import TapedReader
    from qpool.studies.bench.peers import empty_environment
    from workers.tensors import tensor_of

    z = tf.random.stateless_normal((_BATCH, _WIDTH), (1, 2))
    actions: Any = np.zeros((2, _BATCH // 2, _WIDTH), np.float32)
    environments = gymnasium.vector.AsyncVectorEnv([empty_environment] * 2)
    model = _Identity()
    read = TapedReader(model.trainable_variables)
    try:
        environments.reset()
        with (
            tempfile.TemporaryDirectory() as folder,
            qpool.parallelize(model, workers=2, tile=_BATCH // 2, engine="stock") as generator,
        ):
            file = Path(folder) / "rows"
            file.write_bytes(bytes(2 * actions.nbytes))
            rows = _rows(file)
            with side_by_side(2, __name__, str(file)) as work:

                def bare() -> Any:
                    rows[0] = np.asarray(z)
                    read()
                    work()
                    return tensor_of(rows[1])

                before = generator.stats()["pool"]["seconds"]
                seconds = turns_of(
                    {
                        "pooled call": (lambda: generator(z), 300),
                        "AsyncVectorEnv step": (lambda: environments.step(actions), 300),
                        "two bare processes": (bare, 300),
                    },
                    turns,
                )
                after = generator.stats()["pool"]["seconds"]
    finally:
        environments.close()
    calls = 300 * turns + 1
    return {
        "case": "roundtrip",
        "microseconds": {n: 1e6 * statistics.median(s) for n, s in seconds.items()},
        "microseconds_by_phase": {p: 1e6 * (after[p] - before[p]) / calls for p in after},
        **{
            f"pooled call against {other}": ratio(seconds["pooled call"], seconds[other])
            for other in ("AsyncVectorEnv step", "two bare processes")
        },
    }


def _rows(file: Path) -> np.ndarray:
    """Inputs and outputs of the bare processes."""
    return np.memmap(file, np.float32, "r+", shape=(2, _BATCH, _WIDTH))


def _bare(file: str) -> None:
    from workers.tensors import tensor_of

    inputs, outputs = _rows(Path(file))[:, : _BATCH // 2]

    def work() -> None:
        outputs[...] = np.asarray(tensor_of(inputs))

    obey(work)


if __name__ == "__main__":
    answer(_bare)
