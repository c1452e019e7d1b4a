"""The collector is let be while we trace and load, and is afterwards as it was."""

from __future__ import annotations

import gc
import os
import weakref

import programs
import pytest

from workers import collector


def test_it_waits_and_goes_on() -> None:
    assert gc.isenabled()
    with collector.waiting():
        assert not gc.isenabled()
        with collector.waiting():
            pass
        assert not gc.isenabled()  # one within another is the same
    assert gc.isenabled()
    with pytest.raises(FileNotFoundError), collector.waiting():
        os.stat("/no such file")
    assert gc.isenabled()


def test_one_that_its_user_turned_off_stays_off() -> None:
    gc.disable()
    try:
        with collector.waiting():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_was_loaded_is_frozen_and_thresholds_are_put_back() -> None:
    code = """
import gc
from workers import collector
gc.set_threshold(700, 10, 10)
with collector.loading():
    seldom, kept = gc.get_threshold()[0], [[n] for n in range(1000)]
print(seldom > 700, gc.get_threshold(), gc.get_freeze_count() > 1000)
collector.relax()
print(gc.get_threshold()[0] > 700)
"""
    done = programs.run(code)
    assert done.stdout == "True (700, 10, 10) True\nTrue\n"


class Cyclic:
    def __init__(self) -> None:
        self.itself = self


def test_of_every_few_models_that_are_gone_nothing_is_left() -> None:
    gone, enabled = collector.Gone(), gc.isenabled()
    gc.disable()
    try:
        models = [weakref.ref(Cyclic()) for _ in range(2)]
        gone.one_more()
        gone.one_more()
        assert all(model() is not None for model in models)
        gone.one_more()
        assert not any(model() is not None for model in models)
    finally:
        if enabled:
            gc.enable()
