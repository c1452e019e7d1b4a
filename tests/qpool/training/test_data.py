"""Real data, checked before any worker starts."""

from __future__ import annotations

import numpy as np
import pytest

from qpool.training import data
from workers.errors import DataError


@pytest.mark.parametrize("name", data.names())
def test_sets_are_standardised_and_can_be_taken_back(name: str) -> None:
    found = data.load(name)
    assert found.rows.dtype == np.float32
    assert found.rows.shape[1] == len(found.columns) == 2
    np.testing.assert_allclose(found.rows.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(found.rows.std(axis=0), 1, atol=1e-5)
    if name not in ("ring", "four-gaussians"):
        assert found.in_units(found.rows).min() >= -1e-5  # all of these are lengths and the like


def test_iris_is_the_real_one() -> None:
    found = data.load("iris")
    np.testing.assert_allclose(found.in_units(found.rows)[0], [1.4, 0.2], rtol=1e-5)
    assert len(found.rows) == 150


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([["a", "b"]], "rows of numbers"),
        ([1.0, 2.0], r"\(samples, columns\)"),
        ([[1.0, np.nan], [1.0, 2.0]], "1 of 2 rows"),
        ([[1.0, np.inf]], "infinity"),
        ([[1.0, 2.0, 3.0]], "width 2"),
    ],
)
def test_bad_rows(rows, words: str) -> None:
    with pytest.raises(DataError, match=words):
        data.check(rows, width=2)


def test_too_few_rows_and_constant_columns() -> None:
    with pytest.raises(DataError, match="smaller batch_size"):
        data.check(np.ones((3, 2)), batch_size=4)
    with pytest.raises(DataError, match=r"constant columns \['b'\]"):
        data.standardise("x", [[1.0, 2.0], [3.0, 2.0]], ("a", "b"))
    with pytest.raises(DataError, match="did you mean 'iris'"):
        data.load("irs")


def test_rows_from_files(tmp_path) -> None:
    rows = np.random.default_rng(0).normal(size=(9, 2))
    np.save(tmp_path / "a.npy", rows)
    text = "\n".join(f"{a!r},{b!r}" for a, b in rows.tolist())
    (tmp_path / "plain.csv").write_text(text)
    (tmp_path / "named.csv").write_text("left,right\n" + text + "\n")
    for name, columns in (
        ("a.npy", ("column 0", "column 1")),
        ("plain.csv", ("column 0", "column 1")),
        ("named.csv", ("left", "right")),
    ):
        found = data.load(str(tmp_path / name))
        assert found.columns == columns
        np.testing.assert_allclose(found.in_units(found.rows), rows, atol=1e-5)
    (tmp_path / "ragged.csv").write_text("1,2\n3\n")
    for name in ("ragged.csv", "missing.csv", "missing.npy"):
        with pytest.raises(DataError, match="cannot be read"):
            data.load(str(tmp_path / name))
