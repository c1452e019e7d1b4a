"""Which gates become one matrix."""

from __future__ import annotations

from workers.engine.plan import Circuit, Gate, plan


def steps(*gates: Gate, axes: int = 2, prepared: bool = False, batched=()):
    count = 1 + max((p for gate in gates for p in gate.parameters), default=0)
    flags = tuple(n in batched for n in range(count))
    return plan(Circuit(axes, 4, "complex64", gates, flags, prepared))


D0, S0 = Gate("displacement", (0,), (0, 1)), Gate("squeezing", (0,), (2, 3))
R0, K1 = Gate("rotation", (0,), (1,)), Gate("kerr", (1,), (2,))
BS = Gate("beamsplitter", (0, 1), (4, 5))


def test_neighbours_on_one_mode_become_one_matrix() -> None:
    (step,) = steps(D0, R0, S0)
    assert [name for name, _ in step.cores] == ["displacement", "squeezing"]
    assert step.vacuum
    assert ("n0", 1, 1.0) in step.angles[1]  # the rotation lies between the two
    assert steps(R0, Gate("displacement", (0,), (0, 2)))[0].parameters == {0, 2}


def test_phases_go_into_the_next_pair_and_not_past_it() -> None:
    (pair, last) = steps(R0, BS, K1, prepared=True)
    assert pair.axes == (0, 1)
    assert ("n0", 1, 1.0) in pair.angles[0]
    assert (last.axes, last.cores) == ((1,), ())


def test_passive_gates_on_the_vacuum_are_left_out() -> None:
    assert steps(BS, R0, K1) == ()
    assert [step.axes for step in steps(BS, D0, BS)] == [(0,), (0, 1)]


def test_a_squeezer_of_two_modes_acts_on_the_vacuum_too() -> None:
    (step,) = steps(Gate("two_mode_squeezing", (0, 1), (0, 1)))
    assert step.keeps == "difference"


def test_a_step_is_batched_if_any_of_its_parameters_is() -> None:
    first, second = steps(D0, BS, batched=(1,))
    assert first.batched
    assert not second.batched


def test_a_phase_of_the_bra_turns_back_in_a_gate_that_is_not_conjugated() -> None:
    turn = Gate("rotation", (1,), (0,), conjugate=True)
    (step,) = steps(turn, Gate("loss", (0, 1), (1,)), prepared=True)
    assert step.angles[0] == (("n1", 0, -1.0),)
