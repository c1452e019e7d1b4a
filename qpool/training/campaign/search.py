"""Settings beyond a grid: drawn at random from ranges, by Optuna.

Owns the translation alone. All is drawn before anything starts, so a campaign that is gone on with
has the runs that it had; more trials are the same ones, and more. With ``halving`` this is the
random search of "A system for massively parallel hyperparameter tuning" (Li et al., 2020).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qpool.training.campaign import library
from workers.errors import ConfigurationError, nearest

#: How often a draw may be one that was had already, for each that is asked for.
_PATIENCE = 100

_EXPECTED = "expected {low = 1e-4, high = 1e-2, log = true}, or a list of values"


def draw(ranges: Mapping[str, Any], trials: int) -> list[dict[str, Any]]:
    """``trials`` different settings, each drawn from its range.

    A range is ``{"low": a, "high": b}``, ends included, uniform, or with ``"log": True`` uniform in
    the logarithm; of whole numbers where both ends are; or a list of values, all as likely. Numbers
    are rounded to four digits, so that a run's name says what it is.

    Raises:
        ConfigurationError: Optuna is not installed, a range is none, or it has fewer values.
    """
    if trials < 1:
        raise ConfigurationError(f"trials must be at least 1, not {trials}")
    optuna = library.optuna("search draws by Optuna", "list the values in a grid")
    space = {name: _distribution(optuna, name, given) for name, given in ranges.items()}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found: dict[str, dict[str, Any]] = {}
    for _ in range(_PATIENCE * trials):
        drawn = {n: _rounded(v, ranges[n]) for n, v in study.ask(space).params.items()}
        found.setdefault(json.dumps(drawn), drawn)
        if len(found) == trials:
            return list(found.values())
    raise ConfigurationError(
        f"trials={trials}, and the search has {len(found)} different settings; a grid runs them all"
    )


def _distribution(optuna: Any, name: str, given: Any) -> Any:
    if isinstance(given, Sequence) and not isinstance(given, str) and given:
        return optuna.distributions.CategoricalDistribution(list(given))
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"search.{name} is {given!r}: {_EXPECTED}")
    for key in given:
        if key not in ("low", "high", "log"):
            raise ConfigurationError(
                f"unknown {key!r} in search.{name}: {nearest(key, ('low', 'high', 'log'))}"
            )
    ends, log = (given.get("low"), given.get("high")), given.get("log", False)
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in ends):
        raise ConfigurationError(f"search.{name} is {dict(given)}: {_EXPECTED}")
    low, high = ends
    if not low < high or (log and low <= 0):  # type: ignore[operator]
        above = " and above 0, as log is asked for" if log else ""
        raise ConfigurationError(f"search.{name}: expected low < high{above}; came {low}, {high}")
    whole = all(isinstance(x, int) for x in ends)
    kind = "IntDistribution" if whole else "FloatDistribution"
    return getattr(optuna.distributions, kind)(low, high, log=log)


def _rounded(value: Any, given: Any) -> Any:
    if not isinstance(value, float) or not isinstance(given, Mapping):
        return value
    return min(max(float(f"{value:.4g}"), float(given["low"])), float(given["high"]))
