"""Ray: real clusters of several nodes on this machine; the same bits, whatever happens to them."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import socket
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from models import Drawing, Raising
from rich.console import Console

import qpool
from qpool.errors import ConfigurationError, PoolClosedError, ShippingError, StartupError
from qpool.executors.cluster import Cluster, connect
from qpool.models import QuantumSFGenerator
from qpool.training import checkpoints, run
from qpool.training.config import Config
from qpool.training.journal import Journal

ray = pytest.importorskip("ray")

pytestmark = [
    # What Ray says of itself while it starts and ends its processes.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:ray.*"),
]

Z = tf.random.stateless_normal((13, 4), (1, 2))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of four CPUs each, as processes of this machine: four pools find room at a time."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # nodes import what we import
        for name, value in connect._LOCAL.items():  # as in a cluster that qpool starts
            patch.setenv(f"RAY_{name}", str(value).lower())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = Cluster()
            made.add_node(num_cpus=4)
            made.add_node(num_cpus=4)
            ray.init(address=made.address, log_to_driver=False)
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def model() -> QuantumSFGenerator:
    return QuantumSFGenerator(cutoff_dim=3, layers=1, seed=1)


@pytest.fixture(scope="module")
def shared(cluster: Any) -> Iterator[qpool.Cluster]:
    """A worker on each node, for all models: to start one takes seconds."""
    with qpool.Cluster(workers=1) as found:
        _wait_for(lambda: found._membership.look() or found.nodes == 2)
        yield found


@pytest.fixture(scope="module")
def pooled(shared: qpool.Cluster, model: QuantumSFGenerator) -> Iterator[Any]:
    with qpool.parallelize(model, pool=shared, tile=4, engine="stock") as generator:
        yield generator


@pytest.fixture(scope="module")
def expected(model: QuantumSFGenerator, pool: qpool.Pool) -> list[np.ndarray]:
    """A step on the local pool."""
    with qpool.parallelize(model, pool=pool, tile=4, engine="stock") as generator:
        return step(generator)


def step(generator: Any) -> list[np.ndarray]:
    """Samples, and the gradients of z and of all weights."""
    with tf.GradientTape() as tape:
        tape.watch(Z)
        samples = generator(Z)
        loss = tf.reduce_sum(samples**2)
    return [x.numpy() for x in (samples, *tape.gradient(loss, [Z, *generator.trainable_variables]))]


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def cluster_of(generator: Any) -> Any:
    return generator._qpool.executor().pool


def test_the_bits_of_the_local_pool(pooled, expected) -> None:
    assert same(step(pooled), expected)
    found = pooled.stats()["pool"]
    assert len(found["nodes"]) == len(found["workers"]) == 2
    assert all(node["tiles"] > 0 for node in found["nodes"])
    assert all(worker["cpu_seconds"] > 0 for worker in found["workers"])
    if os.name == "posix":  # none is of lower priority than this process
        own = os.getpriority(os.PRIO_PROCESS, 0)
        assert {os.getpriority(os.PRIO_PROCESS, w["pid"]) for w in found["workers"]} == {own}


def test_weights_travel_once_per_change(pooled, model, expected) -> None:
    step(pooled)
    before = pooled.stats()["pool"]["weight_updates"]
    step(pooled)
    assert pooled.stats()["pool"]["weight_updates"] == before
    weights = model.trainable_variables[0]
    weights.assign_add(tf.ones_like(weights))
    changed = pooled(Z).numpy()
    weights.assign_sub(tf.ones_like(weights))
    assert pooled.stats()["pool"]["weight_updates"] == before + 1
    assert np.abs(changed - expected[0]).max() > 1e-3
    np.testing.assert_allclose(pooled(Z), expected[0], atol=1e-5)


def test_draws_follow_the_tile_and_not_the_node(shared) -> None:
    """A node's tiles are numbered within the whole batch."""
    z = tf.zeros((23, 2))
    found = []
    shared.calls = 0  # as of a pool of its own
    for options in ({"pool": shared}, {"workers": 2}):
        with qpool.parallelize(Drawing(), tile=2, **options) as generator:
            found.append([generator(z).numpy() for _ in range(2)])
    assert np.abs(found[0][0] - found[0][1]).max() > 1e-3
    np.testing.assert_array_equal(found[0], found[1])


def test_errors_of_the_model_are_those_of_the_pool(shared) -> None:
    with qpool.parallelize(Raising(), pool=shared) as generator:
        for _ in range(2):
            with pytest.raises(qpool.errors.RemoteError, match="ArithmeticError") as caught:
                generator(tf.constant([[1.0], [-1.0]] * 4))
            assert isinstance(caught.value.__cause__, ArithmeticError)
    with pytest.raises(PoolClosedError):
        generator(Z)


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_actors_and_nodes_that_die_in_mid_step_change_nothing(cluster, pooled, expected) -> None:
    """A node comes and goes, and an actor is killed while its answer is awaited."""
    members = cluster_of(pooled)._membership.members
    kill = itertools.count()
    original = cluster_of(pooled)._membership.answer

    def answer(reference: Any) -> Any:
        if next(kill) == 0:
            victim = members[-1]
            os.kill(ray.get(victim.actor.hello.remote())["pid"], signal.SIGKILL)
        return original(reference)

    cluster_of(pooled)._membership.answer = answer
    assert same(step(pooled), expected)
    cluster_of(pooled)._membership.answer = original
    # The first step may have had its answers already; the next call finds out.
    assert same(step(pooled), expected)
    assert pooled.stats()["pool"]["lost_nodes"] == 1

    third = cluster.add_node(num_cpus=4)
    until(
        lambda: cluster_of(pooled).nodes == 3, pooled, expected
    )  # and the killed one's node has another
    cluster.remove_node(third, allow_graceful=False)
    until(lambda: pooled.stats()["pool"]["lost_nodes"] == 2, pooled, expected)
    assert same(step(pooled), expected)

    for member in list(members):  # all at once: the step waits for others to come
        ray.kill(member.actor)
    assert same(step(pooled), expected)


def test_what_was_interrupted_leaves_no_old_weights(cluster, model, pooled, expected) -> None:
    until(lambda: cluster_of(pooled).nodes == 2, pooled, expected)  # one may be on its way still
    weights = model.trainable_variables[0]
    weights.assign_add(tf.ones_like(weights))
    pool, original = cluster_of(pooled), cluster_of(pooled)._news
    asked = itertools.count()

    def news(member: Any, plan: int) -> Any:
        found = original(member, plan)
        if next(asked) == 1:  # noted as told, and not sent
            raise KeyboardInterrupt
        return found

    pool._news = news
    with pytest.raises(KeyboardInterrupt):
        pooled(Z)
    pool._news = original
    changed = pooled(Z).numpy()
    with qpool.parallelize(model, strategy="sequential", engine="stock") as stock:
        np.testing.assert_allclose(changed, stock(Z), atol=1e-5)
    weights.assign_sub(tf.ones_like(weights))


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_a_node_that_gives_no_sign_of_life_is_given_up(pooled, expected, monkeypatch) -> None:
    from qpool.executors.cluster import membership as module

    monkeypatch.setattr(module, "_SILENCE", 1.0)
    lost = pooled.stats()["pool"]["lost_nodes"]
    until(lambda: cluster_of(pooled).nodes == 2, pooled, expected)
    frozen = cluster_of(pooled)._membership.members[0]
    os.kill(ray.get(frozen.actor.hello.remote())["pid"], signal.SIGSTOP)
    found = step(pooled)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    assert pooled.stats()["pool"]["lost_nodes"] == lost + 1


def test_two_models_on_one_cluster(cluster, shared, model) -> None:
    """And a cluster's address as people write it."""
    address = cluster.address.replace(socket.gethostbyname(socket.gethostname()), "localhost")
    with (
        qpool.parallelize(model, pool=shared) as first,
        qpool.parallelize(Raising(), pool=shared) as second,
    ):
        assert first.stats()["strategy"] == second.stats()["strategy"] == "ray"
        assert first(Z).shape == (13, 2)
        np.testing.assert_array_equal(second(tf.ones((5, 1))), 2.0 * np.ones((5, 1)))
    assert not shared.closed  # it is not the generators' to close
    with pytest.raises(ConfigurationError, match="expected 'ray'"):
        qpool.parallelize(model, pool=shared, strategy="processes")
    connect.connect(address)
    connect.disconnect()
    assert ray.is_initialized()  # it was ours before


def until(true: Callable[[], bool], pooled: Any, expected: list[np.ndarray]) -> None:
    """Go on with steps until it is true, each with the same bits."""

    def found() -> bool:
        assert same(step(pooled), expected)
        return true()

    _wait_for(found)


CONFIG = Config(
    data="iris",
    steps=9,
    batch_size=16,
    layers=1,
    cutoff=3,
    critic_steps=1,
    workers=1,
    tile=4,
    checkpoint_every=2,
    evaluate_every=9,
)
QUIET = Console(quiet=True)


def test_a_run_goes_from_here_to_a_cluster_and_back(cluster, tmp_path, monkeypatch) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    run.train(CONFIG, whole, QUIET)
    original = Journal.on_train_batch_end

    def stop(self, batch, logs=None):
        if (self.step + 1) % 3 == 0 and self.step < 8:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, batch, logs)

    monkeypatch.setattr(Journal, "on_train_batch_end", stop)
    assert run.train(CONFIG, out, QUIET)["steps"] == 3
    assert run.resume(out, address=cluster.address, workers=1, console=QUIET)["steps"] == 6
    assert run.resume(out, workers=1, console=QUIET)["steps"] == 9
    for name in ("metrics.csv", "evaluations.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    found, expected = (
        checkpoints.read(checkpoints.Folder(d / "checkpoints").steps()[9]) for d in (out, whole)
    )
    assert all(np.array_equal(found.arrays[n], a) for n, a in expected.arrays.items())
    with pytest.raises(ConfigurationError, match="would not give its bits"):
        run.resume(out, strategy="cpu_batch")


def test_a_cluster_without_room(cluster, model, monkeypatch) -> None:
    from qpool.executors.cluster import membership as module

    monkeypatch.setattr(module, "_ROOM", 1.0)
    monkeypatch.setattr(module, "_AGAIN", 0.0)
    taken = ray.remote(num_cpus=3)(dict)
    words = "CPUs it is asked for are not free"
    held = Holding([taken.remote() for _ in range(2)])
    with held, pytest.raises(StartupError, match=words):
        Cluster(workers=2)
    monkeypatch.setattr(
        module, "_ROOM", 25.0
    )  # for an actor to start; the other one has to give up
    with Holding([taken.remote()]):
        found = Cluster(workers=2)
        assert found.nodes == 1
    with found:
        _wait_for(lambda: found._membership.look() or found.nodes == 2)  # room has become free


def _wait_for(true: Callable[[], bool]) -> None:
    """Ask, and leave the core to those who are waited for."""
    deadline, nothing = time.monotonic() + 300, threading.Event()
    while not true():
        assert time.monotonic() < deadline
        nothing.wait(0.1)


class Holding:
    """Actors, ended at the end."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors

    def __enter__(self) -> None:
        ray.get([actor.__ray_ready__.remote() for actor in self._actors])

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)


@pytest.mark.parametrize("free", [0.0, 4.0, None])  # of each node; None: Ray does not say
def test_a_node_is_busy_or_has_no_room(cluster, monkeypatch, free) -> None:
    """One that has the CPUs is waited for as long as workers are: it may be busy."""
    from qpool.executors.cluster import membership as module

    monkeypatch.setattr(module, "_ROOM", 0.0)
    said = {} if free is None else dict.fromkeys(connect.places(), free)
    monkeypatch.setattr(module.connect, "free", lambda: said)
    if free:
        with Cluster(workers=1, nodes=1) as found:
            assert found.nodes == 1
        monkeypatch.setattr(module, "_START", 0.0)
    words = "has not started an actor within 0 s" if free else "CPUs it is asked for are not free"
    with pytest.raises(StartupError, match=words):
        Cluster(workers=1, nodes=1)


def test_a_model_that_nodes_cannot_import(shared, pooled, expected, monkeypatch) -> None:
    module = types.ModuleType("only_here")

    class Model(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = tf.Variable(1.0)

        def __call__(self, z: Any) -> Any:
            return self.w * z

    Model.__module__, Model.__qualname__ = "only_here", "Model"
    module.Model = Model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "only_here", module)
    with pytest.raises(ShippingError, match="cannot import 'only_here'"):
        qpool.parallelize(Model(), pool=shared)
    assert same(step(pooled), expected)


def test_versions_that_differ(cluster, monkeypatch) -> None:
    real = connect.versions()
    monkeypatch.setattr(connect, "versions", lambda: {**real, "numpy": "9.9"})
    with pytest.raises(StartupError, match=r"numpy .* \(here 9.9\)"):
        Cluster(workers=1, nodes=1)


def test_addresses_that_are_none(cluster, model) -> None:
    with pytest.raises(ConfigurationError, match="is connected to the Ray cluster"):
        Cluster("127.0.0.1:1")
    with pytest.raises(ConfigurationError, match="expected 'ray'"):
        qpool.parallelize(model, strategy="threads", address=cluster.address)
    with pytest.raises(ConfigurationError, match="nodes must be at least 1"):
        Cluster(nodes=0)
    with pytest.raises(ConfigurationError, match="expected strategy ray"):
        dataclasses.replace(CONFIG, address="here:1").check()


def test_an_address_that_does_not_answer(monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(StartupError, match="no Ray cluster answers"):
        connect._check_answers(f"127.0.0.1:{port}")
    monkeypatch.setattr(connect, "_ANSWER", 0.5)
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(StartupError, match="no Ray cluster answers"),
    ):
        connect._check_answers(f"127.0.0.1:{other.getsockname()[1]}")
    with pytest.raises(ConfigurationError, match="expected host:port"):
        connect._check_answers("nonsense")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigurationError, match=r"qpool-sf\[ray\]"):
        connect.connect(None)
