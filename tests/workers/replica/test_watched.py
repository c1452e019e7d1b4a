"""What calls look at is found, and a change of it is seen."""

from __future__ import annotations

import keras
import scripted
import tensorflow as tf

from workers.replica import places, watched

LIMIT, COUNT = 2.0, 0


class Looks:
    def __init__(self) -> None:
        self.noise, self.calls, self.epoch, self.names = 0.5, 0, 3, ["a"]

    def __call__(self, z):
        global COUNT
        COUNT += 1
        self.calls += 1
        return self.scaled(z) * len(self.names)

    def scaled(self, z):
        return z * self.noise * LIMIT


def test_settings_are_what_calls_look_at_and_do_not_set(monkeypatch) -> None:
    model = Looks()
    looked_at, written = watched.watched(model, ("__call__",))
    found = [place for place in looked_at if isinstance(place, places.Setting)]
    assert {setting.key: setting.value for setting in found} == {
        "calls": 0,  # which a call sets: it is seen whether it does
        "noise": 0.5,
        "LIMIT": 2.0,
        "names": ["a"],
    }
    (calls,) = (setting for setting in found if setting.where in written)
    assert calls.key == "calls"
    assert {place.key for place in looked_at if place not in found} == {
        "__class__",
        "scaled",
        "hbar",
    }
    assert watched.constants(model) == ((__name__, "LIMIT", 2.0),)
    model.noise = 0.5000
    assert all(setting.is_there() for setting in found)
    model.noise = 0.25
    model.names.append("b")
    monkeypatch.setitem(globals(), "LIMIT", 3.0)
    assert [setting.key for setting in found if setting.is_there()] == ["calls"]


class HoldsALibrarys:
    def __init__(self) -> None:
        self.activation = keras.activations.get("tanh")

    def __call__(self, z):
        return self.activation(z)


def test_a_librarys_function_is_one_place_and_what_it_leads_to_is_the_librarys() -> None:
    found = watched.watched(HoldsALibrarys(), ("__call__",))[0]
    assert {place.key for place in found} == {"__class__", "activation", "hbar"}


def test_variables_that_are_bound_anew_are_others() -> None:
    gan = scripted.Gan()
    (scale,) = (place for place in watched.watched(gan, ())[0] if place.key == "scale")
    assert scale.is_there()
    gan.scale = tf.Variable(1.5)
    assert not scale.is_there()
