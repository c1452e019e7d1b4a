"""What lies in the arena."""

from __future__ import annotations

import numpy as np
import pytest

from qpool.executors.shared_arrays import SharedArrays


class Interrupted:
    """A weight whose copying is interrupted, as by Ctrl-C."""

    def __init__(self, value: np.ndarray) -> None:
        self.value = value
        self.shape, self.dtype = value.shape, value.dtype

    def tobytes(self) -> bytes:
        return self.value.tobytes()

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise KeyboardInterrupt


@pytest.mark.parametrize("which", [0, 1])
def test_an_interrupted_update_is_never_taken_for_the_old_weights(which: int) -> None:
    shared = SharedArrays(1)
    old, new = [[np.full(3, value), np.full(2, value)] for value in (1.0, 2.0)]
    shared.add(1, b"", old, "stock")
    assert not shared.write_weights(1, old)
    before = shared.models[1].version
    broken: list = list(new)
    broken[which] = Interrupted(new[which])
    with pytest.raises(KeyboardInterrupt):
        shared.write_weights(1, broken)
    shared.write_weights(1, new)
    assert shared.models[1].version > before
    views = [placed.view(shared.buffer) for placed in shared.models[1].places]
    for view, weight in zip(views, new, strict=True):
        np.testing.assert_array_equal(view, weight)
    del views
    del view
    shared.arena.close()
