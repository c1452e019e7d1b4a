"""Arrays as tensors: of every dtype and shape, and a copy."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import tensorflow as tf

from workers.tensors import matmul, matvec, tensor_of, tensors_of, vjp

#: NumPy's names, with and without the other byte order.
DTYPES = ("?", "u1", "u2", "i4", "i8", "f2", "f4", "f8", "c8", "c16", ">f4", ">i8", "S3")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (3, 5), (2, 1, 2)])
def test_it_is_what_constant_makes(dtype: str, shape: tuple[int, ...]) -> None:
    array = (np.arange(np.prod(shape, dtype=int)).reshape(shape) % 3).astype(dtype)
    ours, theirs = tensor_of(array), tf.constant(array)
    assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device)
    np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_many_at_once_are_what_each_is() -> None:
    rng = np.random.default_rng(0)
    shapes = [(), (2, 3), (), (), (0, 2), (), (2, 3), (2,), (2, 3), (2, 3), (2, 3)]
    arrays = [
        np.asarray(rng.normal(size=shape), "f8f4"[2 * (n % 2) :][:2])
        for n, shape in enumerate(shapes)
    ]
    arrays += [np.asarray(n, dtype) for n in range(5) for dtype in ("?", "c8", ">f4")]
    found = tensors_of(arrays)
    assert tensors_of([]) == []
    for tensor, array in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(tensor, array)
        assert (tensor.dtype, tensor.shape) == (tf.constant(array).dtype, array.shape)
    before = found[0].numpy()
    arrays[0][...] = 7
    np.testing.assert_array_equal(found[0], before)  # copies


@pytest.mark.parametrize("made", ["transposed", "every second", "read only", "not aligned"])
def test_any_layout(made: str) -> None:
    array = np.arange(24.0).reshape(4, 6)
    if made == "transposed":
        array = array.T
    elif made == "every second":
        array = array[::2, ::2]
    elif made == "read only":
        array.flags.writeable = False
    else:
        array = np.frombuffer(b"x" + array.tobytes(), "f8", 24, 1).reshape(4, 6)
    np.testing.assert_array_equal(tensor_of(array).numpy(), array)
    assert float(tf.reduce_sum(tf.matmul(tensor_of(array), tensor_of(array.T)))) == pytest.approx(
        float(np.sum(array @ array.T))
    )


def test_it_is_a_copy_that_lives_as_long_as_the_tensor() -> None:
    array = np.zeros((64, 64))
    first = tensor_of(array)
    array[...] = 1.0
    many = [tensor_of(np.full((64, 64), float(n))) for n in range(100)]
    gc.collect()
    assert not first.numpy().any()
    assert all((tensor.numpy() == n).all() for n, tensor in enumerate(many))


def test_a_tape_takes_it_as_any_tensor() -> None:
    x = tensor_of(np.array([1.0, 2.0]))
    with tf.GradientTape() as tape:
        tape.watch(x)
        total = tf.reduce_sum(x**2)
    np.testing.assert_array_equal(tape.gradient(total, x), [2.0, 4.0])


@pytest.mark.parametrize("graph", [False, True])
def test_a_vjp_is_that_of_a_tape_in_a_graph_too(graph: bool) -> None:
    x, y, seed = tf.constant([0.3, 0.5]), tf.constant(2.0), tf.constant([1.0, -2.0])

    def twice(x: tf.Tensor, y: tf.Tensor) -> list[tf.Tensor]:
        once = vjp(lambda x, y: tf.sin(x) * y, [x, y], [seed])
        return [*once, *vjp(lambda x, y: vjp(lambda x: x**3, [x], [y * seed]), [x, y], [seed])]

    found = tf.function(twice)(x, y) if graph else twice(x, y)
    expected = [2 * seed * np.cos(x), np.sum(seed * np.sin(x)), 6 * x * 2 * seed**2]
    for ours, theirs in zip(found, [*expected, np.sum(3 * x**2 * seed**2)], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    unused = (tf.function(vjp) if graph else vjp)(lambda x, y: x, [x, y], [seed])
    np.testing.assert_array_equal(unused[1], 0.0)


def test_stacks_of_one_are_multiplied_as_matrices() -> None:
    """Else, in a vectorised Jacobian, oneDNN writes where it may not."""
    a, b = (tf.random.stateless_normal(shape, (0, 1)) for shape in ((1, 5, 5), (1, 5, 1)))
    np.testing.assert_allclose(matmul(a, b), tf.matmul(a, b), atol=1e-5)
    np.testing.assert_allclose(matmul(b, b, adjoint_b=True), b * b[:, None, :, 0], atol=1e-5)
    np.testing.assert_allclose(matvec(a, b[..., 0]), tf.linalg.matvec(a, b[..., 0]), atol=1e-5)

    @tf.function
    def gradient(a: tf.Tensor, b: tf.Tensor) -> list[tf.Tensor]:
        return vjp(matmul, [a, b], [tf.ones([1, 5, 1])])

    kinds = {op.type for op in gradient.get_concrete_function(a, b).graph.get_operations()}
    assert "MatMul" in kinds
    assert not any(kind.startswith("BatchMatMul") for kind in kinds)
