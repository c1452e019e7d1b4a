"""Numbers in TensorFlow's names: by program, not by what a process did before."""

from __future__ import annotations

import textwrap

import programs
import tensorflow as tf
from tensorflow.python.framework import ops

from workers import names

CODE = """
    import tensorflow as tf
    from tensorflow.python.framework import ops
    from workers import names

    found = {{}}
    for program in {order}:
        names.begin(program)
        found[program] = ops.uid()
    print(sorted(found.items()))
"""


def told(*order: str) -> str:
    code = textwrap.dedent(CODE).format(order=order)
    return programs.run(code).stdout


def test_a_program_has_the_same_numbers_in_another_process_and_order() -> None:
    assert told("call", "vjp", "other") == told("other", "vjp", "call")


def test_no_number_comes_twice() -> None:
    seen = set()
    for program in ("a program", "a program", "another one"):
        names.begin(program)
        found = [ops.uid() for _ in range(3)]
        assert found == list(range(found[0], found[0] + 3))
        seen.update(found)
    assert len(seen) == 9
    names.rounded()
    assert ops.uid() % 1024 == 1


def test_a_layers_number_is_no_part_of_its_name() -> None:
    def scopes() -> list[str]:
        with tf.Graph().as_default():
            found = []
            for name in ("layer_12", "layer_3", "layer", "v2", "whole/"):
                with tf.name_scope(name) as scope:
                    found.append(scope)
                    tf.constant(1.0, name="x")
            return found

    with names.unnumbered():
        assert scopes() == ["layer/", "layer_1/", "layer_2/", "v2/", "whole/"]
    assert scopes() == ["layer_12/", "layer_3/", "layer/", "v2/", "whole/"]


def test_a_tape_tells_tensors_apart_by_them() -> None:
    """Those of a trace are numbered so, eager ones by TensorFlow."""
    x = tf.constant([1.0, 2.0])

    @tf.function
    def cubed(x: tf.Tensor) -> tf.Tensor:
        return tf.while_loop(lambda n, _: n < 2, lambda n, y: (n + 1, y * x), (0, x))[1]

    with tf.GradientTape() as tape:
        tape.watch(x)
        names.begin("within a tape")
        total = tf.reduce_sum(cubed(x) * x)
    assert tape.gradient(total, x).numpy().tolist() == [4.0, 32.0]
