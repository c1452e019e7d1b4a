"""What the probe asks of a call, with a profiler of the user's around it."""

from __future__ import annotations

import cProfile
import sys

from workers.replica import probe


def some(n: int) -> int:
    return sum(len(str(i)) for i in range(n))


def test_calls_are_counted_and_the_callers_profiler_goes_on() -> None:
    plain = probe.interpreter_calls(lambda: some(5))
    seen = []

    def mine(_frame, event, _argument) -> None:
        seen.append(event)

    sys.setprofile(mine)
    try:
        assert probe.interpreter_calls(lambda: some(5)) == plain
        assert sys.getprofile() is mine
    finally:
        sys.setprofile(None)
    profile = cProfile.Profile()
    profile.enable()
    try:
        assert probe.interpreter_calls(lambda: some(5)) == plain
        some(7)
    finally:
        profile.disable()
    counted = [entry for entry in profile.getstats() if entry.code is some.__code__]
    assert counted
    assert seen
    assert plain == (plain[0], 5)
    assert plain[0] > 10
