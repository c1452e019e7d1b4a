"""The worked examples: each in a short setting, as it stands; and what they are judged by."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from qpool import applications
from qpool.errors import ConfigurationError, DataError
from qpool.training import comparison
from qpool.training.comparison import Trained

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "applications"

pytestmark = [
    # What the packages with data say of themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*share cores.*"),
    pytest.mark.filterwarnings("ignore:.*states have less than.*"),
]


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(name: str, out: Path, *options: str, **smaller: int) -> dict[str, Any]:
    """What the script says and writes, run with fewer modes, quanta or slices than it has."""
    module = script(name)
    for constant, value in smaller.items():
        assert 0 < value < getattr(module, constant)
        setattr(module, constant, value)
    command = getattr(module, name)
    asked = ["--seeds", "1", *options, "--out", str(out), "--json"]
    done = CliRunner().invoke(command, asked, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (out / f"{name}.png").stat().st_size > 10_000
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == found
    return found


def test_molecules(tmp_path) -> None:
    found = results("molecules", tmp_path, "--steps", "2", LAYERS=1, CUTOFF=3)
    kinds = [row["kind"] for row in found["molecules"]]
    assert kinds == ["quantum", "classical", "real, held out"]
    quantum, classical, real = found["molecules"]
    assert abs(quantum["parameters"] - classical["parameters"]) < 20
    assert real["distance"] < min(quantum["distance"], classical["distance"])
    assert real["valid"] > 0.9
    assert "real against real" in found["verdict"]


def test_finance(tmp_path) -> None:
    found = results("finance", tmp_path, "--steps", "2", LAYERS=1, CUTOFF=3)
    rows = {row["kind"]: row for row in found["windows of returns"]}
    real, normal = rows["real, held out"], rows["Gaussian"]
    assert real["excess kurtosis"] > 2 > 0.5 > abs(normal["excess kurtosis"])
    assert real["of squares"] > normal["of squares"]
    assert rows["quantum"]["seconds"] > 0


def test_optimisation_gives_the_same_numbers_again(tmp_path) -> None:
    first, second = (
        results("optimisation", tmp_path / name, "--steps", "3", MODES=2, CUTOFF=5)
        for name in ("a", "b")
    )
    for found in (first, second):
        for row in found["fidelity"]:
            assert 0 < row.pop("worst") <= row["median"] <= row["best fidelity"] <= 1.000001
            assert 0 < row["best, held out"] < 1
            assert abs(row["best, held out"] - row["at a higher cutoff"]) < 0.2
            del row["seconds"], row["circuits a second"]
    assert first == second
    assert first["modes of formic acid"] == "2, 4"


def test_landscape(tmp_path) -> None:
    found = results("landscape", tmp_path, "--steps", "6", SLICES=3)
    assert [row["points"] for row in found["time"]] == [36, 8, 36]
    value = float(found["worst distance from stock"].split()[1].strip(","))
    assert value < 1e-4


# -- what judgements are made of ----------------------------------------------------------------


def test_the_acentric_factor_of_what_is_known() -> None:
    """n-hexane and benzene: 0.301 and 0.210 (Poling et al., 5th ed.), reduced boiling points."""
    rows = np.array([[0, 341.9, 507.6, np.log10(30.25)], [0, 353.2, 562.1, np.log10(48.95)]])
    found = script("molecules").derived(rows)
    np.testing.assert_allclose(found[:, 0], [0.6736, 0.6284], atol=1e-3)
    np.testing.assert_allclose(found[:, 1], [0.301, 0.210], atol=0.01)


def test_stylised_facts_of_what_is_known() -> None:
    finance = script("finance")
    draws = np.random.default_rng(0)
    volatility = np.exp(draws.normal(0, 0.7, (20_000, 1)))
    found = finance.facts(volatility * draws.standard_normal((20_000, finance.DAYS)))
    assert found["excess kurtosis"] == pytest.approx(3 * (np.exp(4 * 0.49) - 1), rel=0.5)
    assert abs(found["autocorrelation"]) < 0.03
    assert found["of squares"] > 0.1
    steady = np.tile([1.0, -2.0, -3.0, 4.0, 0, 0, 0, 0], (3, 1))
    assert finance.facts(steady)["drawdown"] == pytest.approx(5.0)


def test_fidelity_is_one_for_equals_only() -> None:
    fidelity = script("optimisation").fidelity
    p = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], np.float32)
    found = fidelity(p, np.array([0.5, 0.5, 0.0], np.float32)).numpy()
    np.testing.assert_allclose(found, [1.0, 0.5], atol=1e-6)
    distribution, _, modes = script("optimisation").real_quanta()
    assert modes == (2, 3, 4)
    real = distribution.reshape(1, -1)
    assert fidelity(real, real[0]).numpy() == pytest.approx(1.0, abs=1e-6)


def test_energy_goes_over_and_back_without_anharmonicity() -> None:
    landscape = script("landscape")
    frequencies, to_local = landscape.real_water()
    t = np.linspace(0, 300, 20)
    beat = landscape.PHASE * (frequencies[0] - frequencies[1])
    points = np.stack([t, np.zeros_like(t)], axis=1)
    landscape.FINE = 50  # the harmonic motion needs no slices
    found = landscape.classical(points, frequencies, to_local)
    np.testing.assert_allclose(found, np.sin(beat * t / 2) ** 2, atol=1e-9)
    np.testing.assert_allclose(
        landscape.exact(points, frequencies, to_local), np.sin(beat * t / 2) ** 2, atol=1e-5
    )


def test_a_classical_generator_of_the_size_that_is_asked_for() -> None:
    for size in (60, 164, 900):
        model = comparison.classical_generator(8, 4, size, 1)
        assert abs(comparison.parameters_of(model) - size) <= 0.2 * size
    again = comparison.classical_generator(8, 4, 900, 1)
    for one, other in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_held_out_rows_are_on_the_scale_of_the_others() -> None:
    rows = np.random.default_rng(0).normal(5.0, 3.0, (90, 2))
    parts = comparison.split("some", rows, ("a", "b"))
    assert (len(parts.train.rows), len(parts.held)) == (60, 30)
    everything = np.vstack([parts.train.rows, parts.held])
    back = parts.train.in_units(everything)
    np.testing.assert_allclose(np.sort(back, axis=0), np.sort(rows, axis=0), rtol=1e-5)
    assert parts.floor() < comparison.held_out_distance(parts.train.rows + 2.0, parts.held)
    with pytest.raises(DataError, match="give more rows"):
        comparison.split("few", rows[:3], ("a", "b"))


def test_one_seed_tells_nothing_of_a_spread() -> None:
    said = applications.verdict([*trained("quantum", 0.1), *trained("classical", 0.3)], 0)
    assert "So few seeds" in said


def trained(kind: str, *distances: float) -> list[Trained]:
    return [Trained(kind, n, 100, 1.0, d, np.zeros((1, 1))) for n, d in enumerate(distances)]


@pytest.mark.parametrize(
    ("quantum", "words"),
    [
        ((0.10, 0.12, 0.11), "closer to the real data than the classical one with every seed"),
        ((0.25, 0.35, 0.3), "nothing that can be told"),
        ((0.41, 0.45, 0.43), "the classical one is closer with every seed"),
    ],
)
def test_the_verdict_is_what_was_measured(quantum, words: str) -> None:
    said = applications.verdict(
        [*trained("quantum", *quantum), *trained("classical", 0.3, 0.4, 0.35)], 0
    )
    assert words in said


def test_bad_input(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match=r"qpool-sf\[applications\]"):
        applications.need("a_package_that_is_not_there.data")
    command = script("landscape").landscape
    with pytest.raises(ConfigurationError, match="seeds must be at least 1"):
        CliRunner().invoke(command, ["--seeds", "0"], catch_exceptions=False)
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "landscape.py"), "--sedes", "2"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert "Did you mean" in done.stderr  # and the rest in the words of this version of click
    assert "--seeds" in done.stderr
