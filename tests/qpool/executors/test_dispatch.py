"""The step's state machine, over any order of events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qpool.executors.processes.dispatch import (
    MAX_ATTEMPTS,
    Complete,
    Finished,
    GiveUp,
    Joined,
    Lost,
    Raised,
    Send,
    Step,
)


def sends(instructions: list) -> dict[int, tuple[int, ...]]:
    return {i.worker: i.tiles for i in instructions if isinstance(i, Send)}


def test_nothing_to_do_is_done() -> None:
    assert Step(0, [], first_ticket=1).begin() == [Complete()]


def test_tiles_are_spread_evenly_and_completion_is_said_once() -> None:
    step = Step(5, [0, 1], first_ticket=7)
    first = step.begin()
    assert sends(first) == {0: (0, 1, 2), 1: (3, 4)}
    assert [i.ticket for i in first] == [7, 8]
    assert step.on(Finished(1, 8)) == []
    assert step.on(Finished(0, 7)) == [Complete()]
    assert step.done_by == {0: 0, 1: 0, 2: 0, 3: 1, 4: 1}
    assert step.next_ticket == 9


def test_backward_goes_home_and_the_homeless_are_spread() -> None:
    step = Step(4, [0, 1], 1, assignment={0: (0, 1), 5: (2, 3)})
    assert sorted(t for i in step.begin() for t in i.tiles) == [0, 1, 2, 3]


def test_lost_tiles_go_to_the_least_busy_survivor() -> None:
    step = Step(4, [0, 1, 2], 1)
    step.begin()  # 0: (0, 1)  1: (2,)  2: (3,)
    step.on(Finished(2, 3))
    again = step.on(Lost(0, "killed"))
    assert sends(again)[2] == (0,)


def test_tiles_finished_before_a_death_are_done_and_the_next_one_is_suspect() -> None:
    step = Step(3, [0], 1)
    step.begin()
    step.on(Lost(0, "first", finished=1))
    assert step.done_by == {0: 0}
    assert sends(step.on(Joined(0))) == {0: (1, 2)}
    step.on(Lost(0, "second", finished=1))
    assert sends(step.on(Joined(0))) == {0: (2,)}
    assert step.on(Lost(0, "third")) == []
    step.on(Joined(0))
    assert step.on(Lost(0, "fourth")) == [GiveUp(None, (2,), ("second", "third", "fourth"))]


def test_with_no_survivor_tiles_wait_for_the_next_to_join() -> None:
    step = Step(2, [0], 1)
    step.begin()
    assert step.on(Lost(0, "killed")) == []
    assert sends(step.on(Joined(0))) == {0: (0, 1)}


def test_answers_to_messages_not_sent_change_nothing() -> None:
    step = Step(2, [0, 1], 10)
    step.begin()
    assert step.on(Finished(0, 3)) == []
    assert step.on(Finished(1, 10)) == []
    assert step.on(Raised(0, 99, ValueError())) == []
    assert step.done_by == {}


def test_an_error_waits_until_nobody_writes() -> None:
    step = Step(2, [0, 1], 1)
    step.begin()
    error = ValueError("no")
    assert step.on(Raised(0, 1, error)) == []
    assert step.on(Finished(1, 2)) == [GiveUp(error, (), ())]


def test_tiles_that_take_worker_after_worker_are_given_up() -> None:
    step = Step(1, [0], 1)
    step.begin()
    for n in range(MAX_ATTEMPTS - 1):
        assert step.on(Lost(0, f"death {n}")) == []
        assert sends(step.on(Joined(0))) == {0: (0,)}
    (end,) = step.on(Lost(0, "last"))
    assert end == GiveUp(None, (0,), ("death 0", "death 1", "last"))


@given(st.integers(1, 12), st.integers(1, 5), st.data())
def test_any_order_of_events_ends_with_every_tile_done_or_given_up(
    tiles: int, workers: int, data: st.DataObject
) -> None:
    step = Step(tiles, range(workers), 1)
    flying: list[Send] = []
    alive = set(range(workers))
    ended: list = []
    todo = step.begin()
    for _ in range(500):
        for instruction in todo:
            assert not ended, "nothing may follow the end"
            if isinstance(instruction, Send):
                assert instruction.worker in alive
                flying.append(instruction)
            else:
                ended.append(instruction)
        if ended:
            break
        dead = sorted(set(range(workers)) - alive)
        choices = ["finish", "lose"] if flying else []
        choices += ["join"] if dead else []
        assert choices, "the step waits for something that cannot happen"
        choice = data.draw(st.sampled_from(choices))
        if choice == "join":
            worker = data.draw(st.sampled_from(dead))
            alive.add(worker)
            todo = step.on(Joined(worker))
        else:
            message = data.draw(st.sampled_from(flying))
            if choice == "finish":
                flying.remove(message)
                todo = step.on(Finished(message.worker, message.ticket))
            else:
                alive.discard(message.worker)
                flying = [f for f in flying if f.worker != message.worker]
                finished = data.draw(st.integers(0, len(message.tiles) - 1))
                todo = step.on(Lost(message.worker, "lost", finished))
    assert len(ended) == 1
    assert not flying, "the arena is free only when nobody owes an answer"
    if isinstance(ended[0], Complete):
        assert set(step.done_by) == set(range(tiles))
    else:
        assert ended[0].tiles
        assert len(ended[0].causes) >= MAX_ATTEMPTS
