"""Faults strike where and when they are told to, once."""

from __future__ import annotations

import pytest

from workers.exchange.faults import Fault, Faults, InjectedFault


def test_a_fault_strikes_once_after_as_many_passes_as_told() -> None:
    faults = Faults((Fault("forward", "raise", after=2), Fault("forward", "memory", after=3)))
    faults.reach("backward")
    faults.reach("forward")
    faults.reach("forward")
    with pytest.raises(InjectedFault):
        faults.reach("forward")
    with pytest.raises(MemoryError):
        faults.reach("forward")
    faults.reach("forward")


def test_faults_can_be_added() -> None:
    faults = Faults()
    faults.reach("loop")
    faults.add((Fault("loop", "raise"),))
    with pytest.raises(InjectedFault):
        faults.reach("loop")
