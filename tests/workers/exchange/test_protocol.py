"""Messages survive the channel."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.errors import InputError
from workers.exchange import protocol
from workers.exchange.protocol import Compute, Computed, Kind

whole = st.integers(0, 2**62)
computes = st.builds(
    Compute, whole, whole, whole, whole, whole, st.lists(whole).map(tuple), st.sampled_from(Kind)
)
seconds = st.floats(0, allow_infinity=False)
computeds = st.builds(Computed, whole, whole, st.lists(seconds).map(tuple), seconds, whole, whole)


@given(computes | computeds)
def test_the_messages_of_every_step(message: Compute | Computed) -> None:
    found = protocol.decode(protocol.encode(message))
    assert type(found) is type(message)
    assert found == message
    if isinstance(found, Compute):
        assert isinstance(found.kind, Kind)


@pytest.mark.parametrize(
    "message", [protocol.Stop(), protocol.Confirm(3, None), protocol.Forget((1, 2))]
)
def test_other_messages(message: object) -> None:
    assert protocol.decode(protocol.encode(message)) == message


def test_an_error_in_a_message() -> None:
    failed = protocol.decode(protocol.encode(protocol.Failed(1, 2, InputError("three rows"))))
    assert isinstance(failed.error, InputError)
    assert str(failed.error) == "three rows"


@given(computes | computeds)
def test_a_message_of_every_step_is_told_from_a_pickle(message: object) -> None:
    assert not protocol.encode(message).startswith(pickle.PROTO)
