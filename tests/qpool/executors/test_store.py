"""What lies in the arena."""

from __future__ import annotations

import numpy as np
import pytest

from qpool.executors.store import Store


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
    store = Store(1)
    old, new = [[np.full(3, value), np.full(2, value)] for value in (1.0, 2.0)]
    store.add(1, b"", old, "stock")
    assert not store.write_weights(1, old)
    before = store.models[1].version
    broken: list = list(new)
    broken[which] = Interrupted(new[which])
    with pytest.raises(KeyboardInterrupt):
        store.write_weights(1, broken)
    store.write_weights(1, new)
    assert store.models[1].version > before
    views = [placed.view(store.buffer) for placed in store.models[1].places]
    for view, weight in zip(views, new, strict=True):
        np.testing.assert_array_equal(view, weight)
    del views
    del view
    store.arena.close()
