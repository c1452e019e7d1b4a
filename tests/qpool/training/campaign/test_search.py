"""Settings drawn from ranges."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from scipy import stats

from qpool.errors import ConfigurationError
from qpool.training import Campaign
from qpool.training.campaign import search

pytest.importorskip("optuna")

RANGES = {
    "generator_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "penalty": {"low": 0.0, "high": 2.0},
    "layers": {"low": 1, "high": 4},
    "encoding": ["coherent_state", "angle_encoding"],
}


def test_draws_fill_their_ranges() -> None:
    found = search.draw(RANGES, 400)
    logs = [math.log10(cell["generator_rate"]) for cell in found]
    assert stats.kstest(logs, stats.uniform(-4, 2).cdf).pvalue > 0.01
    assert stats.kstest([c["penalty"] for c in found], stats.uniform(0, 2).cdf).pvalue > 0.01
    assert {cell["layers"] for cell in found} == {1, 2, 3, 4}
    assert {type(cell["layers"]) for cell in found} == {int}
    assert {cell["encoding"] for cell in found} == {*RANGES["encoding"]}
    assert all(len(str(cell["generator_rate"])) <= 9 for cell in found)


def test_more_trials_are_the_same_and_more() -> None:
    assert search.draw(RANGES, 30)[:12] == search.draw(RANGES, 12)


def test_trials_differ() -> None:
    found = search.draw({"layers": {"low": 1, "high": 3}}, 3)
    assert sorted(cell["layers"] for cell in found) == [1, 2, 3]
    with pytest.raises(ConfigurationError, match="trials=4, and the search has 3 different"):
        search.draw({"layers": {"low": 1, "high": 3}}, 4)


def test_rounding_stays_within_the_range() -> None:
    narrow = {"low": 0.123456, "high": 0.123457}
    (found,) = search.draw({"penalty": narrow}, 1)
    assert narrow["low"] <= found["penalty"] <= narrow["high"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (3, r"search.rate is 3: expected \{low"),
        ("iris", r"search.rate is 'iris': expected \{low"),
        ([], r"search.rate is \[\]: expected \{low"),
        ({"low": 1}, r"expected \{low"),
        ({"low": 1, "high": True}, r"expected \{low"),
        ({"low": 1, "high": 2, "logg": True}, "unknown 'logg' in search.rate.*log"),
        ({"low": 2, "high": 1}, "expected low < high; came 2, 1"),
        ({"low": 0.0, "high": 1.0, "log": True}, "above 0, as log is asked for; came 0.0, 1.0"),
    ],
)
def test_what_is_no_range_is_refused(given, words) -> None:
    with pytest.raises(ConfigurationError, match=words):
        search.draw({"rate": given}, 2)


def test_a_campaign_of_a_file_has_its_trials(tmp_path: Path) -> None:
    path = tmp_path / "campaign.toml"
    lines = ["steps = 9", "[grid]", "seed = [1, 2]", "[search]", "[search.generator_rate]"]
    lines += ["low = 1e-3", "high = 1e-2", "[campaign]", "trials = 3"]
    path.write_text("\n".join(lines))
    found = Campaign.read(path, out=tmp_path / "out").cells
    assert len(found) == 6
    assert len({cell.settings["generator_rate"] for cell in found}) == 3
    assert len({cell.group for cell in found}) == 3
    path.write_text("\n".join(lines[:-2]))
    with pytest.raises(ConfigurationError, match="expected both or none"):
        Campaign.read(path, out=tmp_path / "out")
    path.write_text("\n".join([*lines[:3], "[search]", "steps = [9, 10]", *lines[-2:]]))
    with pytest.raises(ConfigurationError, match="trials=3, and the search has 2"):
        Campaign.read(path, out=tmp_path / "out")
    path.write_text(
        "\n".join(["[search]", "generator_rat = [0.1, 0.2]", "[campaign]", "trials = 1"])
    )
    with pytest.raises(ConfigurationError, match="generator_rate"):
        Campaign.read(path, out=tmp_path / "out")


def test_a_user_without_optuna_is_told(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigurationError, match=r"qpool-sf\[campaign\]"):
        search.draw(RANGES, 1)
    with pytest.raises(ConfigurationError, match="at least 1, not 0"):
        search.draw(RANGES, 0)
