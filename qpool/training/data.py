"""Two-dimensional data: sets that ship inside scikit-learn, known densities, files; and checks.

Owns loading, checking and standardising. Data sets are rows of numbers; nothing is downloaded. The
ring and the four Gaussians are draws of a density, and say so by their names.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workers.errors import DataError, nearest

#: Rows drawn of a density.
_DRAWN = 1000


@dataclass(frozen=True)
class DataSet:
    """Standardised rows, and the way back.

    ``rows`` is (samples, columns), float32, mean 0 and standard deviation 1 in each column; a
    value in the data's own unit is ``row * scale + shift``.
    """

    name: str
    columns: tuple[str, ...]
    rows: np.ndarray
    shift: np.ndarray
    scale: np.ndarray

    @property
    def fingerprint(self) -> str:
        """A checksum of the rows and their units."""
        parts = (self.rows, self.shift, self.scale)
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()

    def in_units(self, rows: np.ndarray) -> np.ndarray:
        """Standardised rows in the data's own units."""
        return np.asarray(rows) * self.scale + self.shift


def _iris() -> tuple[Any, tuple[str, ...]]:
    from sklearn.datasets import load_iris

    return load_iris().data[:, 2:4], ("petal length (cm)", "petal width (cm)")


def _wine() -> tuple[Any, tuple[str, ...]]:
    from sklearn.datasets import load_wine

    data = load_wine()
    columns = [data.feature_names.index(name) for name in ("flavanoids", "color_intensity")]
    return data.data[:, columns], ("flavanoids", "colour intensity")


def _breast_cancer() -> tuple[Any, tuple[str, ...]]:
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    columns = [list(data.feature_names).index(n) for n in ("mean texture", "mean concave points")]
    return data.data[:, columns], ("mean texture", "mean concave points")


def _ring() -> tuple[Any, tuple[str, ...]]:
    """A circle with Gaussian width a tenth of its radius."""
    draws = np.random.default_rng(0)
    angle, radius = draws.uniform(0, 2 * np.pi, _DRAWN), draws.normal(1.0, 0.1, _DRAWN)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1), ("x", "y")


def _four_gaussians() -> tuple[Any, tuple[str, ...]]:
    """Four round Gaussians at the corners of a square, of width a fifth of half its side."""
    draws = np.random.default_rng(0)
    corners = draws.choice([-1.0, 1.0], (_DRAWN, 2))
    return corners + draws.normal(0.0, 0.2, (_DRAWN, 2)), ("x", "y")


_SETS: dict[str, Callable[[], tuple[Any, tuple[str, ...]]]] = {
    "iris": _iris,
    "wine": _wine,
    "breast-cancer": _breast_cancer,
    "ring": _ring,
    "four-gaussians": _four_gaussians,
}


def names() -> tuple[str, ...]:
    """The data sets that ``load`` knows."""
    return tuple(_SETS)


def load(name: str) -> DataSet:
    """A named data set, or a .csv or .npy file of rows, standardised.

    A .csv file may begin with the names of its columns. DataError names the nearest known name.
    """
    path = Path(name)
    if path.suffix in (".csv", ".npy"):
        return standardise(name, *_from_file(path))
    try:
        load_rows = _SETS[name]
    except KeyError:
        raise DataError(f"unknown data set {name!r}: {nearest(name, names())}") from None
    rows, columns = load_rows()
    return standardise(name, rows, columns)


def _from_file(path: Path) -> tuple[Any, tuple[str, ...]]:
    try:
        if path.suffix == ".npy":
            rows, names = np.load(path, allow_pickle=False), []
        else:
            with path.open(newline="") as file:
                lines = [line for line in csv.reader(file) if line]
            names = [] if not lines or _is_number(lines[0][0]) else lines.pop(0)
            rows = np.array([[float(value) for value in line] for line in lines])
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. Expected rows of numbers, as many in each"
        ) from error
    width = rows.shape[1] if rows.ndim == 2 else 0
    return rows, tuple(names) or tuple(f"column {n}" for n in range(width))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def standardise(name: str, rows: Any, columns: tuple[str, ...]) -> DataSet:
    """Check and standardise any rows."""
    values = check(rows)
    shift, scale = values.mean(axis=0), values.std(axis=0)
    constant = [columns[n] for n in np.flatnonzero(scale == 0)]
    if constant:
        raise DataError(f"constant columns {constant}: expected values that vary; drop them")
    return DataSet(name, columns, ((values - shift) / scale).astype(np.float32), shift, scale)


def check(rows: Any, width: int | None = None, batch_size: int = 1) -> np.ndarray:
    """The rows as a float64 array of rank 2, or a DataError that says what is wrong with them."""
    if hasattr(rows, "element_spec"):
        raise DataError(
            "data must be rows of numbers, all of them; came a tf.data.Dataset. For batches of "
            "your own: gan = trainer.prepare(columns); gan.fit(dataset, epochs=...)"
        )
    try:
        values = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"data must be rows of numbers: {error}") from error
    if values.ndim != 2:
        raise DataError(f"data must be (samples, columns); came shape {values.shape}")
    if width is not None and values.shape[1] != width:
        raise DataError(
            f"the generator makes samples of width {width}; the data has {values.shape[1]} columns"
        )
    if len(values) < batch_size:
        raise DataError(
            f"{len(values)} rows are fewer than a batch of {batch_size}; use a smaller batch_size"
        )
    bad = int((~np.isfinite(values)).any(axis=1).sum())
    if bad:
        raise DataError(f"{bad} of {len(values)} rows have a NaN or an infinity; drop or fill them")
    return values
