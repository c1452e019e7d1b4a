"""Pools that tests share: starting one costs seconds."""

from __future__ import annotations

import importlib
import os
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
# Before qpool is imported, which says where this process keeps what it compiles.
if "QPOOL_TESTS_CACHE" in os.environ:  # this run's alone: what it compiles, it compiles once
    os.environ["QPOOL_CACHE"] = os.environ["QPOOL_TESTS_CACHE"]
else:
    _COMPILED = tempfile.TemporaryDirectory(prefix="qpool-tests-")
    os.environ["QPOOL_CACHE"] = _COMPILED.name
if "QPOOL_TESTS_QUICK" in os.environ:
    os.environ["XLA_FLAGS"] = os.environ["QPOOL_TESTS_QUICK"]

# Interpreters that tests start begin with what is there, and with this checkout.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [
        str(Path(__file__).parent / "children"),
        str(Path(__file__).parents[1]),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
)

import pytest
from hypothesis import HealthCheck, settings

import qpool
from qpool.executors.processes import claims
from workers import collector

# The first example of a test may come while other tests load a core: its seconds say nothing.
settings.register_profile("side by side", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("side by side")

# The background jobs of a shell ignore Ctrl-C, and so do their children: some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

collector.relax()  # the suite is many processes that load TensorFlow, and end
claims.PREFIX = f"qpool-tests/{os.getpid()}"  # what else runs on this machine is not our concern

with warnings.catch_warnings():
    # What libraries say of libraries while they load is not ours to fail on; what they say
    # later, when our code calls them, is.
    warnings.simplefilter("ignore")
    for library in ("tensorflow", "keras", "strawberryfields", "sklearn.datasets", "matplotlib"):
        importlib.import_module(library)


@pytest.fixture(scope="session")
def pool_of() -> Iterator[Callable[[int], qpool.Pool]]:
    """``pool_of(n)``: the session's pool of n workers."""
    pools: dict[int, Any] = {}

    def find(workers: int) -> Any:
        if workers not in pools:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*share cores.*")
                pools[workers] = qpool.Pool(workers=workers)
        return pools[workers]

    yield find
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def pool(pool_of: Callable[[int], qpool.Pool]) -> qpool.Pool:
    """The session's pool of two workers."""
    return pool_of(2)


@pytest.fixture(scope="session")
def worker(pool_of: Callable[[int], qpool.Pool]) -> qpool.Pool:
    """The session's pool of one worker: for how models are compiled and what they give, where it is
    no matter how many compute it. Each of more would look at the model and trace it too."""
    return pool_of(1)
