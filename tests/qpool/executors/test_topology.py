"""Cores: read, ordered, handed out."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpool.executors import topology


def test_physical_cores_come_before_their_siblings() -> None:
    siblings = {n: frozenset({n % 4, n % 4 + 4}) for n in range(8)}
    assert topology.physical_first(list(range(8)), siblings) == ((0, 1, 2, 3, 4, 5, 6, 7), 4)
    neighbours = {n: frozenset({n - n % 2, n - n % 2 + 1}) for n in range(4)}
    assert topology.physical_first([0, 1, 2, 3], neighbours) == ((0, 2, 1, 3), 2)


@given(st.integers(1, 20), st.integers(1, 64), st.integers(1, 4))
def test_no_core_is_given_twice(workers: int, cpus: int, threads: int) -> None:
    given_out = topology.assign(workers, tuple(range(cpus)), threads)
    assert len(given_out) == workers
    flat = [cpu for cores in given_out for cpu in cores]
    assert len(flat) == len(set(flat))
    assert all(len(c) == threads for c in given_out) or not flat


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3,8\n", {0, 1, 2, 3, 8}), ("5", {5}), ("", set()), ("0,2-3", {0, 2, 3})]
)
def test_kernel_cpu_lists(text: str, cpus: set[int]) -> None:
    assert topology.parse_cpu_list(text) == cpus


def test_a_quota_bounds_the_workers() -> None:
    assert topology.Budget((0, 1, 2, 3), 4, 2.5).workers == 2
    assert topology.Budget((0, 1), 2, 0.5).workers == 1
    assert topology.Budget((0, 1), 2, None).workers == 2


def test_this_machine() -> None:
    budget = topology.budget()
    if hasattr(os, "sched_getaffinity"):
        assert set(budget.cpus) == os.sched_getaffinity(0)
    assert 1 <= budget.workers <= len(budget.cpus)


def test_without_affinity_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert topology.budget().cpus


def test_cores_of_a_node_stay_together(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of two cores with two threads each, numbered across, as servers often are."""
    for node, cpus in ((0, "0,2,4,6"), (1, "1,3,5,7")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus + "\n")
    monkeypatch.setattr(topology, "_NODES", tmp_path)
    monkeypatch.setattr(topology, "_siblings", lambda cpu: frozenset({cpu % 4, cpu % 4 + 4}))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    budget = topology.budget()
    assert budget.nodes == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert (budget.cpus, budget.physical) == ((0, 2, 1, 3, 4, 6, 5, 7), 4)
    assert topology.assign(2, budget.cpus, 2) == [(0, 2), (1, 3)]
