"""The pooled object stands where the model stood: methods, attributes, graphs, structures."""

from __future__ import annotations

import copy

import models
import numpy as np
import pytest
import tensorflow as tf
from pooling import parallelize

import qpool
from workers.exchange.protocol import Kind

Z = tf.constant(np.random.default_rng(3).normal(size=(9, 2)), tf.float32)


@pytest.fixture(scope="module")
def several(pool):
    model = models.Several()
    with parallelize(
        model, pool=pool, methods=("generate_batch", "conditional"), sharded=("labels",)
    ) as generator:
        yield model, generator


def test_it_is_the_model_for_everything_else(pool) -> None:
    model = models.Displaced(cutoff=3)
    with parallelize(model, pool=pool) as generator:
        assert isinstance(generator, models.Displaced)
        assert isinstance(generator, qpool.ParallelGenerator)
        assert generator.trainable_variables is model.trainable_variables
        assert generator.note == "an attribute like any other"
        generator.note = "changed"
        assert model.note == "changed"
        assert type(copy.copy(generator)) is models.Displaced


def test_nested_and_complex_outputs_and_their_gradients(several) -> None:
    model, generator = several
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(Z)
        pairs = [(generator(Z), model(Z))]
        losses = [
            tf.reduce_sum(out["real"] ** 2) + tf.reduce_sum(tf.abs(out["complex"]) ** 2)
            for out in pairs[0]
        ]
    for name in ("real", "complex"):
        np.testing.assert_allclose(pairs[0][0][name], pairs[0][1][name], rtol=1e-6)
        assert pairs[0][0][name].dtype == pairs[0][1][name].dtype
    for source in (model.w, model.c, Z):
        ours, theirs = (tape.gradient(loss, source) for loss in losses)
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=2e-6)
    assert tape.gradient(losses[0], model.unused) is None


def test_constants_reach_every_worker_as_they_are(several) -> None:
    model, generator = several
    grid = np.linspace(-1, 1, 5)
    for flag in (False, True):
        ours = generator.generate_batch(Z, grid, return_norm=flag)
        theirs = model.generate_batch(Z, grid, return_norm=flag)
        assert type(ours) is type(theirs)
        tf.nest.map_structure(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs
        )
    known = len(generator.stats()["fixed_cost_in_rows"])
    generator.generate_batch(Z, grid.copy(), return_norm=True)
    assert len(generator.stats()["fixed_cost_in_rows"]) == known  # the same content: known


def test_several_sharded_inputs(several) -> None:
    model, generator = several
    labels = tf.constant([0, 1, 1, 0, 1, 0, 0, 1, 1])
    with tf.GradientTape(persistent=True) as tape:
        ours = generator.conditional(Z, labels=labels, scale=3.0)
        theirs = model.conditional(Z, labels=labels, scale=3.0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    gathered = tf.convert_to_tensor(tape.gradient(theirs, model.w))  # from IndexedSlices
    np.testing.assert_allclose(tape.gradient(ours, model.w), gathered, rtol=1e-6)
    with pytest.raises(qpool.errors.InputError, match="differ in their leading"):
        generator.conditional(Z, labels[:4])


def test_weights_go_over_once_per_change(several) -> None:
    model, generator = several
    generator(Z)
    before = generator.stats()["pool"]["weight_updates"]
    generator(Z)
    generator(Z)
    assert generator.stats()["pool"]["weight_updates"] == before
    model.shift.assign(1.5)  # not trainable, and kept in step all the same
    np.testing.assert_allclose(generator(Z)["real"], model(Z)["real"], rtol=1e-6)
    assert generator.stats()["pool"]["weight_updates"] == before + 1


def test_batches_that_change_and_grow(several) -> None:
    model, generator = several
    for batch in (1, 2, 5, 100, 3, 20000, 1):
        z = tf.random.stateless_normal((batch, 2), (batch, 1))
        np.testing.assert_allclose(generator(z)["real"], model(z)["real"], rtol=1e-5, atol=1e-6)


def test_within_a_graph(several) -> None:
    model, generator = several

    @tf.function
    def step(call_pooled, z):
        with tf.GradientTape() as tape:
            tape.watch(z)
            out = generator(z) if call_pooled else model(z)
            loss = tf.reduce_sum(out["real"] ** 2) + tf.reduce_sum(tf.abs(out["complex"]))
        return loss, tape.gradient(loss, [model.w, model.c, z])

    for batch in (4, 7):
        ours, theirs = step(True, Z[:batch]), step(False, Z[:batch])
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
        for a, b in zip(ours[1], theirs[1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_graph_with_an_unknown_batch_and_no_call_before(pool) -> None:
    model = models.Scale(3.0)
    with parallelize(model, pool=pool) as generator:

        @tf.function(input_signature=[tf.TensorSpec((None, 2))])
        def call(z):
            out = generator(z)
            assert out.shape.as_list() == [None, 2]
            return out

        np.testing.assert_allclose(call(Z), 3 * Z, rtol=1e-6)
        np.testing.assert_allclose(call(Z[:1]), 3 * Z[:1], rtol=1e-6)
        model.w.assign(4.0)
        np.testing.assert_allclose(call(Z), 4 * Z, rtol=1e-6)


def test_an_outer_tape_around_a_graph(pool) -> None:
    model = models.Scale(3.0)
    with parallelize(model, pool=pool) as generator:
        call = tf.function(lambda z: generator(z))
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(call(Z) ** 2)
        np.testing.assert_allclose(tape.gradient(loss, model.w), 6 * tf.reduce_sum(Z**2), rtol=1e-5)


def test_a_persistent_tape_gives_the_same_gradient_again(pool) -> None:
    model = models.Scale(3.0)
    with parallelize(model, pool=pool) as generator:
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_sum(generator(Z) ** 2)
        first = tape.gradient(loss, model.w)
        model.w.assign(7.0)  # the tape's values are those of its time
        generator(Z)
        again = tape.gradient(loss, model.w)
    assert first.numpy().tobytes() == again.numpy().tobytes()


def test_second_derivatives_are_refused(pool) -> None:
    model = models.Scale(3.0)
    with parallelize(model, pool=pool) as generator:
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                loss = tf.reduce_sum(generator(Z) ** 2)
            gradient = inner.gradient(loss, model.w)
        with pytest.raises(qpool.errors.SecondOrderGradientError, match="sequential"):
            outer.gradient(gradient, model.w)

        @tf.function
        def in_graph():
            with tf.GradientTape() as outer:
                with tf.GradientTape() as inner:
                    loss = tf.reduce_sum(generator(Z) ** 2)
                gradient = inner.gradient(loss, model.w)
            return outer.gradient(gradient, model.w)

        with pytest.raises(qpool.errors.SecondOrderGradientError):
            in_graph()


def test_generate_where_the_model_has_only_that(pool) -> None:
    model = models.Generating()
    z = tf.ones((5, 3))
    with parallelize(model, pool=pool) as generator:
        np.testing.assert_allclose(generator.generate(z), model.generate(z))
        np.testing.assert_allclose(generator.generate(z, strategy="sequential"), model.generate(z))
        generator.warm_up(6)
        assert generator.stats()["samples"] >= 11
        with pytest.raises(qpool.errors.InputError, match=r"\(batch, 3\)"):
            generator.generate(tf.ones((5, 2)))


def test_a_factory_makes_the_model_in_every_worker(pool) -> None:
    generator = parallelize(lambda: models.Locked(), pool=pool)
    generator.w.assign(5.0)
    np.testing.assert_allclose(generator(Z), 5 * Z)
    generator.close()


def test_create_parallel_generator(pool) -> None:
    generator = qpool.create_parallel_generator(
        models.Scale, 4.0, pool=pool, tile=2, engine="stock"
    )
    np.testing.assert_allclose(generator(Z), 4 * Z)
    generator.close()


def test_arrays_lists_and_nan(pool) -> None:
    with parallelize(models.Scale(), pool=pool) as generator:
        ours = generator(np.ones((3, 2), np.float32))
        np.testing.assert_allclose(ours, 2.0)
        np.testing.assert_allclose(generator([[1.0, 2.0]]), [[2.0, 4.0]])
        bad = np.ones((5, 2), np.float32)
        bad[1, 0], bad[3] = np.nan, np.inf
        out = generator(tf.constant(bad)).numpy()
        np.testing.assert_array_equal(out, 2 * bad)
        assert generator.stats()["non_finite_samples"] == 2
        generator(np.full((3, 2), 1e30, np.float32))  # whose squares are not finite; they are
        assert generator.stats()["non_finite_samples"] == 2


def test_draws_follow_seed_call_and_tile(pool_of) -> None:
    def outputs(workers: int) -> list[bytes]:
        found = []
        with parallelize(models.Drawing(), pool=pool_of(workers), tile=2) as generator:
            pool_of(workers).calls = 10
            for _ in range(2):
                with tf.GradientTape() as tape:
                    out = generator(Z)
                    loss = tf.reduce_sum(out)
                # The gradient for w is the sum of what was drawn: pulled back through that draw.
                np.testing.assert_allclose(
                    tape.gradient(loss, generator.w), tf.reduce_sum(out), rtol=1e-5
                )
                found.append(out.numpy().tobytes())
            assert generator.stats()["random_draws"] == "seeded"
        return found

    one, two = outputs(1), outputs(2)
    assert one == two
    assert one[0] != one[1]


def test_a_call_that_changes_variables_is_refused(pool) -> None:
    with (
        parallelize(models.Counting(), pool=pool) as generator,
        pytest.raises(qpool.errors.StatefulCallError, match="seen"),
    ):
        generator(Z)


def test_two_models_share_a_pool_and_move_within_it(pool) -> None:
    first = models.Scale(2.0)
    with parallelize(first, pool=pool) as one:
        one(Z)
        with parallelize(models.Several(), pool=pool) as two:
            two(Z)
            np.testing.assert_allclose(one(Z), 2 * Z)
        with parallelize(models.Scale(3.0), pool=pool) as three:
            np.testing.assert_allclose(three(one(Z)), 6 * Z, rtol=1e-6)


def test_gradients_of_inputs_are_computed_where_a_tape_watches_them(pool) -> None:
    """A gradient that nobody asks for costs as much as one that somebody does."""
    model = models.Displaced(tf.complex128, cutoff=4)
    z = tf.constant(np.random.default_rng(0).normal(size=(5, 2)) * 0.4)
    with parallelize(model, pool=pool) as generator:

        def gradients(call, watch: bool, outer: bool = False):
            with tf.GradientTape() as tape:
                source = z
                if watch:
                    tape.watch(z)
                    source = 2.0 * z  # what is watched may lie further back
                loss = tf.reduce_sum(tf.sin(call(source)))
            wanted = [*model.trainable_variables, *([z] if watch else [])]
            if outer:  # an eager call, pulled back within a graph
                return tf.function(lambda: tape.gradient(loss, wanted))()
            return tape.gradient(loss, wanted)

        for watch in (False, True):
            for outer in (False, True):
                found = gradients(generator, watch, outer)
                for a, b in zip(found, gradients(model, watch), strict=True):
                    np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)
        tasks = [task for task, *_ in pool._performing().shared._frames]
        kinds = {task.sources for task in tasks if task.kind is Kind.BACKWARD}
        assert len(kinds) >= 2  # with z's gradient, and without


@pytest.mark.parametrize("of", ["eager", "graph", "loop"])
def test_what_one_worker_has_compiled_the_others_find(tmp_path, monkeypatch, of) -> None:
    """By the names in it, though the first one has traced what they have not; and nothing is
    compiled that no step calls."""
    monkeypatch.setenv("QPOOL_CACHE", str(tmp_path))
    other = qpool.models.QuantumSFGenerator(2, 4, layers=1, cutoff_dim=2, seed=1)
    in_graph = of == "graph"
    model = qpool.models.QuantumSFGenerator(2, 4, layers=3 + in_graph, cutoff_dim=3, seed=1)
    z = tf.constant(np.random.default_rng(0).normal(size=(8, 4)), tf.float32)
    if of == "loop":  # which each worker looks at before it traces it the first time
        model = models.Displaced()
    with qpool.Pool(workers=2) as pool:
        with parallelize(other, pool=pool, engine="traced") as generator:
            generator(z[:1])  # one tile
        before = set(tmp_path.glob("*/*"))
        assert len([file for file in before if file.suffix == ".pb"]) == 1
        assert len([file for file in before if file.name.startswith("kept-")]) == 1
        with parallelize(model, pool=pool, engine="traced") as generator:

            def step(z: tf.Tensor) -> list[tf.Tensor]:
                with tf.GradientTape() as tape:
                    loss = tf.reduce_sum(generator(z) ** 2)
                return tape.gradient(loss, model.trainable_variables)

            (tf.function(step) if in_graph else step)(z[:, :2] if of == "loop" else z)
    # The call and its vjp, of two workers; and that each was some worker's to compile.
    found = set(tmp_path.glob("*/*")) - before
    compiled = [file.suffix for file in found if file.parent.name.startswith("tensorflow-")]
    assert sorted(compiled) == ["", "", ".pb", ".pb"]
    # Its circuit, in both of these, and that it was some worker's to trace.
    traced = [file.name.split("-")[0] for file in found if file.parent.name.startswith("traces-")]
    assert sorted(traced) == ["kept", "turn"]


def test_a_model_made_again_is_found_by_new_workers(tmp_path, monkeypatch) -> None:
    """Though Keras numbers it, and names what it computes by that."""
    monkeypatch.setenv("QPOOL_CACHE", str(tmp_path))
    names, files = set(), []
    for _ in range(2):
        model = qpool.models.QuantumSFGenerator(1, 2, layers=1, cutoff_dim=3, seed=1)
        names.add(model.name)
        with parallelize(model, workers=1, engine="traced") as generator:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(generator(tf.ones((2, 2))))
            tape.gradient(loss, model.trainable_variables)
        files.append({file.name for file in tmp_path.glob("*/*.pb")})
    assert len(names) == 2
    assert files[0] == files[1] != set()
