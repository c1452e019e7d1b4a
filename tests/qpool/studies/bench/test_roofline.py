"""The reading of compiled programs, and the picture of what bounds them."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from qpool.studies.bench import roofline


def compiled(function, *arguments) -> list[roofline.Operation]:
    made = tf.function(function, jit_compile=True, autograph=False)
    return roofline.operations(made.experimental_get_compiler_ir(*arguments)("optimized_hlo"))


def test_a_product_is_its_multiplications_and_touches_its_arrays() -> None:
    a, b = tf.ones((3, 32, 48)), tf.ones((3, 48, 64))
    found = [o for o in compiled(lambda a, b: a @ b, a, b) if o.kind == "products"]
    assert sum(o.flop for o in found) == 2 * 3 * 32 * 48 * 64
    assert sum(o.bytes for o in found) == 4 * 3 * (32 * 48 + 48 * 64 + 32 * 64)


def test_a_gather_touches_the_rows_that_it_takes() -> None:
    index = np.array([5, 0, 7])
    (found,) = compiled(lambda x: tf.gather(x, index), tf.ones((1000, 64)))
    assert found.kind == "gathers"
    assert found.flop == 0
    assert 2 * 3 * 64 * 4 <= found.bytes < 2 * 3 * 64 * 4 + 200  # and the index


def test_sums_count_and_what_is_fused_is_touched_once() -> None:
    (found,) = compiled(lambda x, y: tf.sin(x * y + 1.0), tf.ones((500,)), tf.ones((500,)))
    assert found.kind == "elementwise"
    assert found.flop == 3 * 500
    assert found.bytes == 3 * 500 * 4


def test_seconds_are_those_of_operations_that_there_are() -> None:
    x = tf.random.stateless_normal((256, 256), (1, 2))
    step = tf.function(lambda x: x @ x, jit_compile=True)
    step(x)
    names = {o.name for o in compiled(lambda x: x @ x, x)}
    found = roofline.seconds_by_operation(lambda: step(x).numpy(), names, 3)
    assert set(found) <= names
    assert all(seconds > 0 for seconds in found.values())


def test_the_picture(tmp_path) -> None:
    kinds = ("products", "gathers", "elementwise")
    found = {
        "machine": {"gflop_per_second": 100.0, "gigabytes_per_second": {"1": 50.0, "256": 10.0}},
        "milliseconds": 2.0,
        "kinds": {k: {"milliseconds": 0.5, "milliseconds_at_the_limits": 0.1} for k in kinds},
        "operations": [{"kind": k, "flop": 1e6, "bytes": 2e5, "seconds": 3e-4} for k in kinds],
    }
    roofline.draw(found, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
