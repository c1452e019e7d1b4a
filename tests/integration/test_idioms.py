"""Models as public programs write them: compiled by every strategy, and as stock computes them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import idioms
import keras
import numpy as np
import pytest
import strawberryfields as sf
import tensorflow as tf
from idioms import BATCH, IDIOMS

import qpool
from qpool.executors.auto import course
from workers import errors
from workers.engine import TracedEngine
from workers.replica import serialization

ROWS = np.random.default_rng(1).normal(0, 0.5, (BATCH, 2))


def rows_of(idiom):
    return ROWS if idiom is idioms.Arrays else tf.constant(ROWS.astype("float32"))


def made(idiom):
    model = idiom()
    if idiom is idioms.Within:
        model(rows_of(idiom))  # built
    return model


def step(call, z, model):
    variables = serialization.trainable_variables(model)
    with tf.GradientTape() as tape:
        found = call(z)
        loss = tf.reduce_sum(tf.sin(found))
    return [found, *tape.gradient(loss, variables)]


def call_of(model):
    return model if callable(model) else model.generate


def assert_like_stock(ours, stock) -> None:
    for a, b in zip(ours, stock, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(b).max()))


@pytest.mark.filterwarnings("ignore::qpool.errors.AttributeNotSetWarning")  # of KeptInAttributes
@pytest.mark.parametrize("idiom", IDIOMS, ids=lambda idiom: idiom.__name__)
def test_in_place_it_is_compiled_and_the_model_is_left_as_it_was(idiom) -> None:
    model = made(idiom)
    z = rows_of(idiom)
    stock = step(call_of(model), z, model)
    parts = serialization.walk(model)
    engines = [part for part in parts if isinstance(part, sf.engine.LocalEngine)]
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        for _ in range(2):
            assert_like_stock(step(generator.generate, z, model), stock)
        (way,) = generator.stats()["compiled"]
        assert way["level"] == "xla"
        assert way["by_rows"] == (idiom in LOOPS)
        assert ("loop over rows traced once" in str(generator)) == way["by_rows"]
    assert [type(engine) for engine in engines] == [sf.Engine] * len(engines)
    assert_like_stock(step(call_of(model), z, model), stock)


LOOPS = {
    idioms.LoopByIndex,
    idioms.LoopBySlices,
    idioms.LoopIntoAnArray,
    idioms.LoopByRows,
    idioms.MapFn,
    idioms.KeptInAttributes,
    idioms.OfKets,
    idioms.Memory,
    idioms.OfTheModule,
    idioms.InAList,
    idioms.Arrays,
    idioms.Heralded,
}


@pytest.mark.parametrize(
    ("strategy", "idiom"),
    [
        ("processes", idioms.FixedBatch),
        ("processes", idioms.Arrays),
        ("threads", idioms.LoopByIndex),
        ("auto", idioms.InAList),
    ],
    ids=str,
)
def test_every_strategy_compiles_it(worker, monkeypatch, strategy: str, idiom) -> None:
    monkeypatch.setattr(course, "SHARE", 0.0)
    model = made(idiom)
    z = rows_of(idiom)
    stock = step(call_of(model), z, model)
    options = {"processes": {"pool": worker}, "threads": {"workers": 2}, "auto": {}}[strategy]
    with qpool.parallelize(model, strategy=strategy, **options) as generator:
        for _ in range(2):
            assert_like_stock(step(generator.generate, z, model), stock)
        (way,) = generator.stats()["compiled"]
    assert (way["level"], way["by_rows"]) == ("xla", idiom in LOOPS)


class Tracking(idioms.LoopByIndex):
    """Beside its samples it returns what it was asked to track: here nothing."""

    def __call__(self, z, track_states=False):
        return super().__call__(z), [] if track_states else None


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes", "threads"])
def test_what_is_none_beside_the_samples_stays_none(worker, strategy: str) -> None:
    model = Tracking()
    z = rows_of(Tracking)
    stock = step(lambda z: model(z)[0], z, model)
    options = {"processes": {"pool": worker}, "threads": {"workers": 2}}.get(strategy, {})
    with qpool.parallelize(model, strategy=strategy, **options) as generator:
        for call in (generator, tf.function(generator)):
            assert_like_stock(step(lambda z, call=call: call(z)[0], z, model), stock)
            assert call(z)[1] is None
        generator.warm_up(z)
        assert {way["level"] for way in generator.stats()["compiled"]} == {"xla"}


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes", "threads", "auto"])
def test_noise_from_the_global_generator_is_drawn_in_compiled_code(
    worker, monkeypatch, strategy: str
) -> None:
    monkeypatch.setattr(course, "SHARE", 0.0)
    model, z = idioms.Noisy(), rows_of(idioms.Noisy)
    quiet = idioms.Noisy()
    quiet.NOISE = 0.0

    def of_sum(call, variables):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(call(z))
        return tape.gradient(loss, variables)

    options = {"processes": {"pool": worker}, "threads": {"workers": 2}}.get(strategy, {})
    with qpool.parallelize(model, strategy=strategy, tile=BATCH, **options) as generator:
        # Added noise is in no gradient of a sum.
        found = of_sum(generator.generate, generator.trainable_variables)
        assert_like_stock(found, of_sum(quiet.generate, quiet.trainable_variables))
        drawn = np.stack([generator.generate(z).numpy() for _ in range(200)])
        (way,) = generator.stats()["compiled"]
    assert (way["level"], way["by_rows"]) == ("xla", True)
    noise = (drawn - quiet.generate(z).numpy()).reshape(200, -1) / idioms.Noisy.NOISE
    np.testing.assert_allclose(noise.mean(0), 0, atol=0.4)  # of 200, 5.6 standard errors
    np.testing.assert_allclose(noise.std(0), 1, atol=0.3)
    apart = np.corrcoef(noise.T) - np.eye(2 * BATCH)  # of rows, and of numbers in a row
    assert np.abs(apart).max() < 0.4
    assert np.abs([np.corrcoef(n[1:], n[:-1])[0, 1] for n in noise.T]).max() < 0.4


class Shifted(idioms.Noisy):
    """All samples of a call are moved by the same draw."""

    def generate(self, z):
        shift = tf.random.normal([2])
        return tf.stack([self.sample(z[n]) + shift for n in range(tf.shape(z)[0])])

    NOISE = 0.0


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes"])
def test_what_is_drawn_once_for_all_rows_stays_one_draw(worker, strategy: str) -> None:
    model, z = Shifted(), rows_of(Shifted)
    options = {"pool": worker} if strategy == "processes" else {}
    with qpool.parallelize(model, strategy=strategy, tile=BATCH, **options) as generator:
        drawn = [generator.generate(z).numpy() for _ in range(3)]
        (way,) = generator.stats()["compiled"]
    quiet = idioms.Noisy()
    quiet.NOISE = 0.0
    shifts = np.stack(drawn) - quiet.generate(z).numpy()
    np.testing.assert_allclose(shifts - shifts[:, :1], 0, atol=1e-5)
    assert np.abs(np.diff(shifts[:, 0], axis=0)).min() > 1e-4  # another one in each call
    assert not way["by_rows"]


def test_noise_follows_the_tile_in_a_pool_and_the_global_seed_in_place(pool_of) -> None:
    model, z = idioms.Noisy(), rows_of(idioms.Noisy)
    found = []
    for workers in (1, 2):
        pool_of(workers).calls = 1000  # that of the next call, which draws follow
        with qpool.parallelize(model, pool=pool_of(workers), tile=1) as generator:
            found.append([generator.generate(z).numpy() for _ in range(2)])
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0][0], found[0][1])
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        generator.generate(z)
        again = []
        for _ in range(2):
            tf.random.set_seed(3)
            again.append([generator.generate(z).numpy() for _ in range(2)])
    np.testing.assert_array_equal(again[0], again[1])
    assert not np.array_equal(again[0][0], again[0][1])


@pytest.mark.parametrize("strategy", ["cpu_batch", "threads", "processes"])
def test_outcomes_are_drawn_in_compiled_code(worker, monkeypatch, strategy: str) -> None:
    monkeypatch.setattr(course, "SHARE", 0.0)
    model, z = idioms.Sampled(), rows_of(idioms.Sampled)
    options = {"processes": {"pool": worker}, "threads": {"workers": 2}}.get(strategy, {})
    with qpool.parallelize(model, strategy=strategy, tile=BATCH, **options) as generator:
        drawn = []
        for _ in range(300):
            with tf.GradientTape() as tape:
                samples = generator(z)
                loss = tf.reduce_sum(samples)
            drawn.append(samples.numpy())
        (way,) = generator.stats()["compiled"]
        gradient = tape.gradient(loss, model.w)
    assert (way["level"], way["by_rows"]) == ("xla", True)
    # The weight behind the outcomes has a gradient, and those before them none, as in stock.
    np.testing.assert_allclose(gradient[1], loss / model.w[1], rtol=1e-5)
    assert np.count_nonzero(gradient) == 1
    outcomes = np.stack(drawn) / model.w[1].numpy()
    photons = outcomes[..., 1]
    np.testing.assert_allclose(photons, photons.round(), atol=1e-4)
    assert photons.round().max() >= 1
    for row in range(BATCH):
        if model.engine.run_progs:
            model.engine.reset()
        quiet = idioms.sf.Program(2)
        with quiet.context as q:
            idioms.ops.Dgate(float(z[row, 0]), 0.4) | q[0]
            idioms.ops.Sgate(float(model.w[0])) | q[0]
            idioms.ops.BSgate(0.6, 0.2) | (q[0], q[1])
        state = model.engine.run(quiet).state
        for column, (mean, variance) in enumerate(
            (state.quad_expectation(0, float(model.w[2])), state.mean_photon(1))
        ):
            found = outcomes[:, row, column]
            error = np.sqrt(float(tf.math.real(variance)) / len(found)) + 1e-3
            assert abs(found.mean() - float(tf.math.real(mean))) < 4 * error
    apart = np.corrcoef(outcomes[..., 0].T) - np.eye(BATCH)  # each row draws its own
    assert np.abs(apart).max() < 0.4


def test_outcomes_follow_the_tile_and_not_the_worker(pool_of) -> None:
    model, z = idioms.Sampled(), rows_of(idioms.Sampled)
    found = []
    for workers in (1, 2):
        pool_of(workers).calls = 2000
        with qpool.parallelize(model, pool=pool_of(workers), tile=1) as generator:
            found.append([generator(z).numpy() for _ in range(2)])
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0][0], found[0][1])


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes"])
def test_a_failure_that_a_model_catches_is_told(worker, strategy: str) -> None:
    model, z = idioms.Caught(), rows_of(idioms.Caught)
    options = {"pool": worker} if strategy == "processes" else {}
    told = r"a circuit of Caught\.generate failed, and the model caught that.*Cannot convert 1j"
    with qpool.parallelize(model, strategy=strategy, **options) as generator:
        with pytest.warns(qpool.errors.CircuitFailedWarning, match=told):
            generator.generate(z)
        generator.generate(z)  # told once


def test_an_engine_that_is_replaced_is_the_new_one_from_the_next_call_on() -> None:
    model = idioms.FixedBatch()
    z = rows_of(idioms.FixedBatch)
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        for _ in range(2):
            generator(z)
        model.engine = idioms.new(batch_size=BATCH, cutoff_dim=7)
        stock = model(z)
        for _ in range(2):
            np.testing.assert_allclose(generator(z), stock, atol=1e-5)
        model.engine.backend_options["cutoff_dim"] = 3
        model.engine.reset()
        stock = model(z)
        np.testing.assert_allclose(generator(z), stock, atol=1e-5)


class Mixed(idioms.FixedBatch):
    """Beside its own, an engine of another backend, and methods for a trainer's validation."""

    def __init__(self) -> None:
        super().__init__()
        self.single = idioms.new()
        self.gaussian = sf.Engine("gaussian")
        self.seen = 0
        self.counter = tf.Variable(0.0, trainable=False)

    def distribution(self, row, scale=1.0):
        return scale * tf.abs(self.state(row[0], row[1], self.single).ket()) ** 2

    def squeezed(self, row):
        program = sf.Program(1)
        with program.context as q:
            ops_squeeze(q)
        variance = self.gaussian.run(program).state.quad_expectation(0)[1]
        self.gaussian.reset()
        return self.distribution(row) * variance

    def printed(self, row):
        print("looking")
        return self.distribution(row)

    def counted(self, row):
        self.seen += 1
        return self.distribution(row)

    def assigned(self, row):
        self.counter.assign_add(1.0)
        return self.distribution(row)

    def pooled(self, z):
        return 2 * self(z)

    def classical(self, row):
        return 2.0 * row

    def several(self, count):
        yield from range(count)


def ops_squeeze(q) -> None:
    idioms.ops.Sgate(0.2) | q[0]


def test_methods_that_nobody_named_are_compiled_when_they_are_called_again(capsys) -> None:
    model = Mixed()
    z = rows_of(Mixed)
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        expected = model.distribution(z[0])
        for n in range(4):
            np.testing.assert_allclose(generator.distribution(z[0]), expected, atol=1e-6)
            assert bool(generator.stats()["unpooled"]) == (n > 0)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(generator.distribution(z[1], scale=2.0) ** 2)
        with tf.GradientTape() as stock:
            same = tf.reduce_sum(model.distribution(z[1], scale=2.0) ** 2)
        np.testing.assert_allclose(
            tape.gradient(loss, model.w), stock.gradient(same, model.w), atol=1e-5
        )
        for name in ("printed", "counted", "assigned", "squeezed"):
            for _ in range(3):
                theirs = getattr(model, name)(z[0])
                np.testing.assert_allclose(getattr(generator, name)(z[0]), theirs, atol=1e-6)
        assert capsys.readouterr().out.count("looking") == 6
        assert (model.seen, float(model.counter)) == (6, 6.0)
        for _ in range(3):
            np.testing.assert_allclose(generator.pooled(z), 2 * model(z), atol=1e-5)
            assert generator.classical(3.0) == 6.0
        assert list(generator.several(2)) == [0, 1]
        levels = {way["method"]: way["level"] for way in generator.stats()["unpooled"]}
        reasons = {way["method"]: way["why_not_better"] for way in generator.stats()["unpooled"]}
        assert levels["distribution"] in ("graph", "xla")
        assert {n for n, level in levels.items() if level == "eager"} >= {"printed", "pooled"}
        assert "prints" in reasons["printed"]
        assert "attributes" in reasons["counted"]
        assert "variable" in reasons["assigned"]
        assert "pooled" in reasons["pooled"]
        assert "'gaussian'" in str(generator)
    assert type(model.single) is sf.Engine
    np.testing.assert_allclose(generator.distribution(z[0]), expected, atol=1e-6)


class Scaled(idioms.LoopByIndex):
    scale = 1.0

    def distribution(self, row):
        return self.scale * tf.abs(self.state(row[0], row[1]).ket()) ** 2


def test_attributes_that_change_between_calls_of_what_is_not_pooled_are_seen() -> None:
    model = Scaled()
    z = rows_of(Scaled)
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        for scale in (1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 1.0, 4.0, 5.0, 5.0):
            model.scale = scale
            theirs = model.distribution(z[0])
            np.testing.assert_allclose(generator.distribution(z[0]), theirs, atol=1e-5)
        (way,) = generator.stats()["unpooled"]
        assert "again and again" in way["why_not_better"]


class Spectral(idioms.LoopByIndex):
    """A power iteration in each call, batch normalisation and dropout; what was seen is counted."""

    def __init__(self) -> None:
        super().__init__()
        keras.utils.set_random_seed(1)
        self.u = tf.Variable([[1.0, 0.5]], trainable=False)
        self.kernel = tf.Variable([[0.5, 0.2], [-0.3, 0.6]])
        self.norm = keras.layers.BatchNormalization()
        self.dropout = keras.layers.Dropout(0.3, seed=2)
        self.norm(tf.zeros((1, 2)))
        self.seen = tf.Variable(0)

    @property
    def trainable_variables(self):
        return [self.w, self.kernel, *self.norm.trainable_variables]

    @property
    def kept(self):
        return [self.u, *self.norm.non_trainable_variables, self.seen]

    def generate(self, z, drop=False):
        self.seen.assign_add(tf.shape(z)[0])
        v = tf.math.l2_normalize(tf.matmul(self.u, self.kernel, transpose_b=True))
        u = tf.math.l2_normalize(tf.matmul(v, self.kernel))
        self.u.assign(u)
        sigma = tf.matmul(tf.matmul(v, self.kernel), u, transpose_b=True)
        found = self(self.norm(tf.matmul(z, self.kernel / sigma), training=True))
        return self.dropout(found, training=drop)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_variables_that_calls_update_are_those_of_the_loop(graph) -> None:
    def train(call, model):
        found = []
        for n in range(4):
            values, *gradients = step(call, (1 + n / 4) * z, model)
            found += [values, *gradients, *map(np.asarray, model.kept)]
            for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
                variable.assign_sub(0.1 * gradient)
        return found

    z = rows_of(idioms.LoopByIndex)
    stock, model = Spectral(), Spectral()
    expected = train(stock.generate, stock)
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        call = tf.function(generator.generate) if graph else generator.generate
        assert_like_stock(train(call, model), expected)
        (way,) = generator.stats()["compiled"]
        assert (way["level"], way["together"]) == ("xla", True)


def test_dropout_in_place_draws_anew_with_each_call_and_the_same_again_from_its_seed() -> None:
    z = rows_of(idioms.LoopByIndex)

    def draws():
        model = Spectral()
        with qpool.parallelize(model, strategy="cpu_batch") as generator:
            found = [np.asarray(generator.generate(z, drop=True)) for _ in range(4)]
            (way,) = generator.stats()["compiled"]
            assert way["level"] == "xla"
        return [tuple((x == 0).ravel()) for x in found[1:]]

    first = draws()
    assert len(set(first)) == 3
    assert draws() == first


def test_what_was_chosen_in_a_graph_is_not_chosen_again_there() -> None:
    """As in a trainer whose steps are functions of TensorFlow: each of them calls the generator."""
    model = idioms.LoopByIndex()
    z = rows_of(idioms.LoopByIndex)
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        for _ in range(2):
            assert_like_stock(
                tf.function(lambda z: step(generator, z, model))(z), step(model, z, model)
            )
        assert len(generator.stats()["compiled"]) == 1


class CountsRows(idioms.LoopByIndex):
    def __call__(self, z):
        found = super().__call__(z)
        return found if len(z) <= 4 else 2 * found


def test_another_number_of_rows_is_another_call_of_a_loop() -> None:
    model = CountsRows()
    z = rows_of(CountsRows)
    more = tf.concat([z, z[:2]], 0)
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        for rows in (z, z, more, more, z, z[:0]):
            np.testing.assert_allclose(generator(rows), model(rows) if len(rows) else 0, atol=1e-5)
        arrays = np.asarray(z)
        for dtype in ("float32", "float64", "float32"):
            np.testing.assert_allclose(
                generator(arrays.astype(dtype)), model(arrays.astype(dtype)), atol=1e-5
            )


class DoublesTwo(idioms.LoopByIndex):
    def __call__(self, z):
        found = super().__call__(z)
        return found if len(z) != 2 else 2 * found


def test_fewer_rows_of_a_loop_are_computed_by_what_was_compiled_for_more() -> None:
    """The last ones of an epoch, episodes of any length; if that gives what the model gives."""
    model = DoublesTwo()
    z = rows_of(DoublesTwo)
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        for rows in (4, 3, 2, 4, 3, 2):
            found, expected = (step(f, z[:rows], model) for f in (generator, model))
            assert_like_stock(found, expected)
        ways = generator.stats()["compiled"]
        assert [way["by_rows"] for way in ways] == [True, True, False]
        assert [way["seconds"] > 0 for way in ways] == [True, False, True]
        many = tf.concat([z, z[:2]], 0)
        for rows, ways in ((z[:3], 3), (many, 4)):
            found = tf.function(lambda rows: step(generator, rows, model))(rows)
            assert_like_stock(found, step(model, rows, model))
            assert len(generator.stats()["compiled"]) == ways


class TakesLists(idioms.Base):
    def __call__(self, z):
        return tf.stack([idioms.photons(self.state(x, y)) for x, y in z])


def test_a_list_of_numbers_is_computed_as_it_is_and_that_is_said() -> None:
    model, z = TakesLists(), np.asarray(rows_of(TakesLists))
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        with pytest.warns(qpool.errors.NotCompiledWarning, match="Instead: hand over an array"):
            found = generator(z.tolist())
        np.testing.assert_allclose(found, model(z), atol=1e-5)


def test_what_one_row_does_not_show_is_seen_with_more() -> None:
    model = idioms.LoopByIndex()
    z = rows_of(idioms.LoopByIndex)
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        for rows in (1, 4, 1, 3, 2):
            assert_like_stock(step(generator, z[:rows], model), step(model, z[:rows], model))
        ways = generator.stats()["compiled"]
        assert [way["by_rows"] for way in ways] == [False, True, True, True]
        assert [way["seconds"] > 0 for way in ways] == [True, True, False, False]


class SharedMean(idioms.LoopByIndex):
    """Each row has a little of the mean of all of them, and noise."""

    NOISE = 0.0

    def __call__(self, z):
        z = 0.9 * z + 0.1 * tf.reduce_mean(z, axis=0)
        found = []
        for n in range(tf.shape(z)[0]):
            x = z[n] + self.NOISE * tf.random.normal(tf.shape(z[n]))
            found.append(idioms.photons(self.state(x[0], x[1])))
        return tf.stack(found)


class SharedMeanAndNoise(SharedMean):
    NOISE = 1e-3


@pytest.mark.parametrize("idiom", [SharedMean, SharedMeanAndNoise])
def test_rows_that_share_what_is_made_of_all_are_computed_together_and_not_in_tiles(
    worker, monkeypatch, idiom
) -> None:
    monkeypatch.setattr(course, "SHARE", 0.0)
    model, quiet = idiom(), SharedMean()
    z = rows_of(idiom)
    stock = step(quiet, z, quiet)
    for strategy in ("cpu_batch", "auto"):
        with qpool.parallelize(model, strategy=strategy) as generator:
            for _ in range(2):
                ours = step(generator, z, model)
                if not model.NOISE:
                    assert_like_stock(ours, stock)
                np.testing.assert_allclose(ours[0], stock[0], atol=0.02)
            (way,) = generator.stats()["compiled"]
            assert (way["level"], way["by_rows"], way["together"]) == ("xla", False, True)
            assert "circuits that do not wait for each other as one" in str(generator)
    with pytest.raises(errors.InputError, match="when others changed"):
        qpool.parallelize(model, pool=worker)(z)


class Conditional(idioms.LoopByIndex):
    """A tf.cond in each row's turn, of numbers that are the same for all."""

    def __call__(self, z):
        found = []
        for row in tf.unstack(z):
            numbers = idioms.photons(self.state(row[0], row[1]))
            weight = tf.constant(0.5) + 1.0
            found.append(tf.cond(weight > 1e-8, lambda: numbers / weight, lambda: numbers))  # noqa: B023
        return tf.stack(found)


@pytest.mark.parametrize("strategy", ["cpu_batch", "threads"])
def test_a_loop_with_a_condition_of_the_graph_has_its_gradient(strategy: str) -> None:
    model, z = Conditional(), rows_of(Conditional)
    stock = step(model, z, model)
    with qpool.parallelize(model, strategy=strategy) as generator:
        for _ in range(2):
            assert_like_stock(step(generator, z, model), stock)


class HomodyneLoop(idioms.Base):
    def __init__(self) -> None:
        super().__init__()
        self.measured = sf.Program(2)
        x = self.measured.params("x")
        with self.measured.context as q:
            idioms.ops.Dgate(x, 0.2) | q[0]
            idioms.ops.BSgate(0.4, 0.1) | (q[0], q[1])
            idioms.ops.MeasureHomodyne(0.3, select=0.2) | q[1]

    def __call__(self, z):
        found = []
        for row in z:
            if self.engine.run_progs:
                self.engine.reset()
            args = {"x": row[0] * self.w[0]}
            found.append(self.engine.run(self.measured, args=args).state.mean_photon(0)[0])
        return tf.stack(found)


class Normed(idioms.LoopByIndex):
    """Rows that are apart as long as the numbers are small."""

    def __call__(self, z):
        return super().__call__(tf.clip_by_norm(z, 4.0))


@pytest.mark.parametrize(("idiom", "by_rows"), [(HomodyneLoop, True), (Normed, False)])
def test_a_loop_is_vectorised_where_its_graph_shows_that_rows_are_apart(idiom, by_rows) -> None:
    model = idiom()
    z = rows_of(idiom)[:3]
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        for scale in (1.0, 1.0, 8.0):
            assert_like_stock(step(generator, scale * z, model), step(model, scale * z, model))
        (way,) = generator.stats()["compiled"]
    assert way["by_rows"] == by_rows
    assert ("may depend on other rows" in way["why_not_better"]) != by_rows


class LooksAtNumbers(idioms.Base):
    def __call__(self, z):
        x = [float(v) for v in z[:, 0].numpy()]
        return tf.stack([photons_of(self, v) for v in x])


def photons_of(model, value):
    return idioms.photons(model.state(value, 0.1))


@pytest.mark.parametrize("strategy", ["cpu_batch", "threads"])
def test_what_stays_slow_is_warned_of_once_with_the_line_and_what_to_write(strategy: str) -> None:
    model = LooksAtNumbers()
    z = rows_of(LooksAtNumbers)
    with qpool.parallelize(model, strategy=strategy) as generator:
        with pytest.warns(qpool.errors.NotCompiledWarning) as caught:
            generator(z)
        for _ in range(3):
            step(generator, z, model)  # without a further one, which would be an error
        ours = [one for one in caught if one.category is qpool.errors.NotCompiledWarning]
        assert len(ours) == 1
        said = str(ours[0].message)
        assert "LooksAtNumbers is not compiled" in said
        assert "test_idioms.py" in said
        assert ".numpy()" in said
        assert "Instead" in said
        assert ours[0].filename == __file__
        assert "not compiled" in str(generator)


class OnItsBackend:
    """Gates that are asked of a backend itself, without an engine or a program."""

    def __init__(self):
        self.w = tf.Variable(0.2)
        self.trainable_variables = [self.w]
        self.backend = sf.backends.load_backend("tf")
        self.backend.begin_circuit(1, cutoff_dim=4)

    def __call__(self, z):
        rows = []
        for row in tf.unstack(z):
            self.backend.reset()
            self.backend.displacement(row[0], 0.0, 0)
            self.backend.squeeze(self.w, 0.0, 0)
            rows.append(self.backend.state().mean_photon(0)[0])
        return tf.stack(rows)


def test_circuits_without_an_engine_are_warned_of_and_computed_as_before() -> None:
    model, z = OnItsBackend(), tf.constant([[0.3], [-0.1]])
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        with pytest.warns(qpool.errors.NotCompiledWarning, match="have an engine run a program"):
            found = generator(z)
        np.testing.assert_array_equal(found, model(z))


class Branching(idioms.Base):
    """Rows whose Python takes other variables, by their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.shifts = [tf.Variable(0.3), tf.Variable(-0.4)]
        self.unused = tf.Variable(0.0)

    @property
    def trainable_variables(self) -> list[tf.Variable]:
        return [self.w, *self.shifts, self.unused]

    def is_low(self, x):
        return x < 0

    def __call__(self, z):
        found = []
        for row in z:
            shift = self.shifts[0] if self.is_low(row[0]) else tf.sqrt(row[0]) * self.shifts[1]
            found.append(idioms.photons(self.state(row[0] + shift, row[1])))
        return tf.stack(found)


class BranchingEagerly(Branching):
    def is_low(self, x):
        return float(x) < 0


def test_whose_loss_the_workers_compute(worker) -> None:
    model, z = Branching(), rows_of(Branching)[:3]

    def loss(found):
        return tf.sin(found)

    with qpool.parallelize(model, pool=worker) as generator:
        for rows in (abs(z), z):  # the first of which go one way
            ours = generator.loss_and_gradient(rows, loss)
            with tf.GradientTape() as tape:
                mean = tf.reduce_mean(loss(model(rows)))
            stock = [mean, *tape.gradient(mean, model.trainable_variables)]
            found = [ours.loss, *ours.gradient]
            assert_like_stock(none_as_zero(found, model), none_as_zero(stock, model))
        assert [way["level"] for way in generator.stats()["compiled"]] == ["xla"]


def none_as_zero(found, model):
    like = [found[0], *model.trainable_variables]
    return [tf.zeros_like(v) if x is None else x for x, v in zip(found, like, strict=True)]


@pytest.mark.filterwarnings("ignore::qpool.errors.NotCompiledWarning")  # of BranchingEagerly
@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("processes", Branching),
        ("processes", BranchingEagerly),
        ("threads", BranchingEagerly),
        ("cpu_batch", Branching),
    ],
)
def test_a_row_may_decide_which_variables_it_takes(worker, strategy: str, kind) -> None:
    model = kind()
    z = abs(rows_of(kind)[:2])
    options = {"processes": {"pool": worker}, "threads": {"workers": 2}}.get(strategy, {})
    with qpool.parallelize(model, strategy=strategy, **options) as generator:
        for signs in ([1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]):
            rows = z * tf.constant(signs)[:, None]
            ours, stock = step(generator, rows, model), step(model, rows, model)
            assert_like_stock(none_as_zero(ours, model), none_as_zero(stock, model))
            assert ours[-1] is None
            if kind is BranchingEagerly and signs == [1.0, 1.0]:
                assert [x is None for x in ours] == [x is None for x in stock]
        (way,) = generator.stats()["compiled"]
        assert way["level"] == ("xla" if kind is Branching else "eager")

        @tf.function
        def traced():
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(generator(-z))
            return tape.gradient(loss, model.shifts, unconnected_gradients="zero")

        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(-z))
        expected = tape.gradient(loss, model.shifts, unconnected_gradients="zero")
        if strategy != "cpu_batch" or kind is Branching:  # which traces the model itself
            assert_like_stock(traced(), expected)


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes", "threads"])
def test_derivatives_within_a_pooled_method_are_compiled(worker, strategy: str) -> None:
    """Stock's own second derivative is not that of its values: its gates lose it."""
    model = idioms.Physics()
    z = tf.constant(ROWS.astype("float32"))
    step = tf.constant([[0.1, 0.0]])
    up, here, down = (tf.reduce_sum(model(z + n * step), axis=1) for n in (1, 0, -1))
    options = {"processes": {"pool": worker}, "threads": {"workers": 2}, "cpu_batch": {}}[strategy]
    with qpool.parallelize(model, strategy=strategy, methods=["generate"], **options) as generator:
        with tf.GradientTape() as tape:
            u, slope, curvature = generator.generate(z)
            loss = tf.reduce_mean(curvature**2)
        gradient = tape.gradient(loss, model.w)
        (way,) = generator.stats()["compiled"]
        assert way["level"] == "xla"
        np.testing.assert_allclose(u, here, atol=1e-5)
        np.testing.assert_allclose(slope[:, 0], (up - down) / 0.2, atol=5e-3)
        np.testing.assert_allclose(curvature, (up - 2 * here + down) / 0.01, atol=2e-2)
        for n in (0, 2):
            values = []
            for sign in (1, -1):
                shift = tf.one_hot(n, 6) * 0.05 * sign
                model.w.assign_add(shift)
                values.append(tf.reduce_mean(generator.generate(z)[2] ** 2))
                model.w.assign_sub(shift)
            there, back = values
            np.testing.assert_allclose(gradient[n], (there - back) / 0.1, atol=2e-2)


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes", "threads"])
def test_a_program_that_runs_its_own_functions_eagerly_has_ours_compiled(
    worker, monkeypatch, strategy: str
) -> None:
    model = idioms.FixedBatch()
    calls = []
    z = tf.constant(ROWS.astype("float32"))
    stock = step(model, z, model)
    options = {"processes": {"pool": worker}, "threads": {"workers": 2}, "cpu_batch": {}}[strategy]
    run = TracedEngine.run

    def counted(self, *args, **kwargs):
        calls.append(self)
        return run(self, *args, **kwargs)

    tf.config.run_functions_eagerly(True)
    try:
        with qpool.parallelize(model, strategy=strategy, **options) as generator:
            for n in range(3):
                assert_like_stock(step(generator, z, model), stock)
                if n == 1:  # whatever runs it from here on runs no Python of the model's
                    monkeypatch.setattr(TracedEngine, "run", counted)
            assert generator.stats()["compiled"][0]["level"] == "xla"
        assert not calls
        assert tf.config.functions_run_eagerly()
    finally:
        tf.config.run_functions_eagerly(False)


class OfAnyBatch(idioms.Base):
    """Written for engines that take any batch, which Strawberry Fields' do not."""

    def __call__(self, z):
        return idioms.photons(self.state(z[:, 0], z[:, 1]))


class WithALoopToFallBackOn(OfAnyBatch):
    """One circuit for all rows, which the engine was not made for; then one for each."""

    def __call__(self, z):
        try:
            return 2 * super().__call__(z)
        except Exception:
            return tf.stack([idioms.photons(self.state(row[0], row[1])) for row in tf.unstack(z)])


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes"])
def test_a_batch_that_an_engine_has_not_is_refused_where_that_is_caught(
    worker, strategy: str
) -> None:
    options = {"pool": worker} if strategy == "processes" else {"strategy": strategy}
    model, z = WithALoopToFallBackOn(), rows_of(idioms.LoopByIndex)
    stock = step(model, z, model)
    with qpool.parallelize(model, **options) as generator:
        with pytest.warns(errors.CircuitFailedWarning, match="the engine has none"):
            assert_like_stock(step(generator, z, model), stock)
        assert_like_stock(step(generator, z, model), stock)
        (way,) = generator.stats()["compiled"]
        assert (way["level"], way["by_rows"]) == ("xla", True)
    any_batch = OfAnyBatch()
    with qpool.parallelize(any_batch, **options) as generator:
        for _ in range(2):
            assert_like_stock(step(generator, z, any_batch), stock)
        (way,) = generator.stats()["compiled"]
        assert (way["level"], way["by_rows"]) == ("xla", False)


GENERATOR = np.random.default_rng(0)


class DrawingElsewhere(idioms.LoopByIndex):
    """Has sources of random numbers, which no call draws from."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)
        self.seeds = keras.random.SeedGenerator(1)

    def sample_latent(self, rows: int):
        return GENERATOR.normal(size=(rows, 2)) + self.rng.normal(size=2)


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes"])
def test_sources_that_no_call_draws_from_are_of_no_matter(worker, strategy: str) -> None:
    model = DrawingElsewhere()
    z = rows_of(DrawingElsewhere)
    stock = step(model, z, model)
    options = {"pool": worker} if strategy == "processes" else {"strategy": strategy}
    with qpool.parallelize(model, **options) as generator:
        for _ in range(2):
            assert_like_stock(step(generator, z, model), stock)
        (way,) = generator.stats()["compiled"]
    assert (way["level"], way["by_rows"]) == ("xla", True)


class ShiftRule(idioms.LoopByIndex):
    """The gradient of each row written by hand, as a finite difference."""

    def one(self, x, y):
        @tf.custom_gradient
        def shifted(x):
            def run(x):
                return self.state(x, y).mean_photon(0)[0]

            def pull_back(cotangent, variables=()):
                slope = (run(x + 0.1) - run(x - 0.1)) / 0.2
                return cotangent * slope, [tf.zeros_like(variable) for variable in variables]

            return run(x), pull_back

        return shifted(x)

    def __call__(self, z):
        return tf.stack([self.one(z[n, 0], z[n, 1]) for n in range(z.shape[0])])


@pytest.mark.filterwarnings("ignore::qpool.errors.NotCompiledWarning")
def test_gradients_written_by_hand_are_kept_for_any_number_of_rows() -> None:
    model = ShiftRule()
    with qpool.parallelize(model, strategy="threads", workers=2) as generator:
        for rows in (3, 4):
            z = tf.constant(ROWS.astype("float32"))[:rows]
            found = []
            for call in (generator, model):
                with tf.GradientTape() as tape:
                    tape.watch(z)
                    samples = call(z)
                found.append([samples, tape.gradient(samples, z)])
            assert_like_stock(*found)


def test_callers_from_several_threads_take_turns() -> None:
    model = idioms.LoopByIndex()
    expected = {rows: model(tf.ones((rows, 2))) for rows in (2, 3, 4)}
    with (
        qpool.parallelize(model, strategy="cpu_batch") as generator,
        ThreadPoolExecutor(3) as threads,
    ):
        futures = {
            rows: threads.submit(lambda n=rows: [generator(tf.ones((n, 2))) for _ in range(3)])
            for rows in expected
        }
        for rows, future in futures.items():
            for found in future.result():
                np.testing.assert_allclose(found, expected[rows], atol=1e-5)


def test_an_engine_that_compiled_calls_have_run_goes_on_with_no_other_state() -> None:
    model = idioms.LoopByIndex()
    z = rows_of(idioms.LoopByIndex)
    with qpool.parallelize(model, strategy="cpu_batch") as generator:
        for _ in range(2):
            generator(z)
        args = dict.fromkeys(model.names, 0.1) | {"z0": 0.1, "z1": 0.2}
        if model.engine.run_progs:
            with pytest.raises(errors.StatefulCallError, match="was not reset before this call"):
                model.engine.run(model.program, args=args)
            model.engine.reset()
        assert model.engine.run(model.program, args=args).state.ket().shape == (4, 4)


class AsksForItsSize(idioms.LoopByIndex):
    def __call__(self, z):
        return tf.stack([idioms.photons(self.state(*tf.unstack(z[n]))) for n in range(len(z))])


def test_a_batch_of_unknown_size_goes_to_workers_where_the_model_asks_for_it() -> None:
    model = AsksForItsSize()
    z = rows_of(AsksForItsSize)

    def graph_of(generator):
        return tf.function(generator.generate, input_signature=[tf.TensorSpec([None, 2])])

    with (
        qpool.parallelize(model, strategy="cpu_batch") as generator,
        pytest.raises(errors.InputError, match="strategy='processes'"),
    ):
        graph_of(generator)(z)
    with qpool.parallelize(model) as generator:
        call = graph_of(generator)
        for rows in (4, 3):
            assert_like_stock([call(z[:rows])], [model(z[:rows])])


class TwoOutputs(idioms.LoopByIndex):
    """Samples, and what no circuit is asked for: a loss of one of them is not the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = tf.Variable([1.0, 2.0])

    @property
    def trainable_variables(self):
        return [self.w, self.scale]

    def __call__(self, z):
        return {
            "photons": super().__call__(z),
            "scaled": z * self.scale,
            "signs": tf.cast(z > 0, tf.int32),
        }


@pytest.mark.parametrize("strategy", ["cpu_batch", "processes", "threads"])
def test_what_the_loss_does_not_come_to_has_no_gradient(worker, strategy: str) -> None:
    options = {"processes": {"pool": worker}, "threads": {"workers": 2}, "cpu_batch": {}}[strategy]
    model, z = TwoOutputs(), rows_of(TwoOutputs)
    with qpool.parallelize(model, strategy=strategy, **options) as generator:
        for names in (("photons",), ("scaled",), ("photons", "scaled"), ("scaled",)):
            found = []
            for call in (generator, model):
                with tf.GradientTape() as tape:
                    outputs = call(z)
                    loss = sum(tf.reduce_sum(outputs[name] ** 2) for name in names)
                found.append(tape.gradient(loss, model.trainable_variables))
            for ours, stock in zip(*found, strict=True):
                assert (ours is None) == (stock is None)
                if stock is not None:
                    np.testing.assert_allclose(ours, stock, atol=2e-5)
