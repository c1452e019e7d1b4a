"""Where a circuit's steps are loops."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.engine.repeats import Run, runs


@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=40))
def test_every_step_is_in_one_run_and_each_turn_is_like_the_first(forms: list[str | None]) -> None:
    found = runs(forms)
    assert [n for run in found for n in range(run.first, run.first + run.size)] == list(
        range(len(forms))
    )
    for run in found:
        steps = forms[run.first : run.first + run.size]
        assert steps == steps[: run.period] * run.count
        if run.size > 1:
            assert run.count > 1
            assert None not in steps


@pytest.mark.parametrize(
    ("forms", "expected"),
    [
        ("", []),
        ("aaa", [Run(0), Run(1), Run(2)]),  # a loop of three saves too little
        ("aaaa", [Run(0, 1, 4)]),
        ("xabcabcabcy", [Run(0), Run(1, 3, 3), Run(10)]),
        ("abababcdcdcd", [Run(0, 2, 3), Run(6, 2, 3)]),
        # half layers of an interferometer and three gates: the shortest period
        ("ppoo" * 6, [Run(0, 4, 6)]),
    ],
)
def test_the_loop_is_the_one_that_saves_most(forms: str, expected: list[Run]) -> None:
    assert runs(forms) == expected


def test_equal_layers_make_one_loop_however_many_they_are() -> None:
    for layers in (2, 6, 24):
        assert runs("pppooo" * 2 * layers) == [Run(0, 6, 2 * layers)]
