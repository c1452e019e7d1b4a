"""Ending runs early that are hopeless, by asynchronous successive halving: Optuna's.

Owns the translation alone: a run is a trial, an evaluation a report. Off unless asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qpool.training.campaign import library
from workers.errors import ConfigurationError


class Halving:
    """Keeps one run in ``factor`` of those that come to the same rung.

    Rungs are at ``first`` steps, ``factor`` times as many, and so on (Li et al., "A system for
    massively parallel hyperparameter tuning", 2020; ``optuna.pruners.SuccessiveHalvingPruner``).
    ``objective`` is the figure of an evaluation that is to be small.

    Raises:
        ConfigurationError: Optuna is not installed, or a number makes no sense.
    """

    def __init__(self, first: int, factor: int = 3, objective: str = "energy_distance") -> None:
        if first < 1 or factor < 2:
            raise ConfigurationError(
                f"halving needs first >= 1 and factor >= 2; came first={first}, factor={factor}"
            )
        optuna = library.optuna("halving is Optuna's", "leave it out")
        self._states = optuna.trial.TrialState
        self._objective = objective
        self._study = optuna.create_study(
            sampler=optuna.samplers.RandomSampler(seed=0),
            pruner=optuna.pruners.SuccessiveHalvingPruner(
                min_resource=first, reduction_factor=factor
            ),
        )
        self._trials: dict[str, Any] = {}

    def hopeless(self, name: str, step: int, evaluated: Mapping[str, float]) -> bool:
        """Tell an evaluation of a run; whether the run should end here."""
        if self._objective not in evaluated:
            raise ConfigurationError(
                f"halving looks at {self._objective!r}, and the run {name} reports "
                f"{sorted(evaluated)}; name one of these as objective"
            )
        value = evaluated[self._objective]
        if name not in self._trials:
            self._trials[name] = self._study.ask()
        trial = self._trials[name]
        if step < 1:
            return False
        trial.report(value if math.isfinite(value) else math.inf, step)
        return bool(trial.should_prune())

    def ended(self, name: str, *, pruned: bool) -> None:
        """A run is over, by itself or because it was hopeless."""
        trial = self._trials.pop(name, None)
        if trial is not None:
            state = self._states.PRUNED if pruned else self._states.FAIL
            last = self._study.trials[trial.number].last_step
            if not pruned and last is not None:
                value = self._study.trials[trial.number].intermediate_values[last]
                self._study.tell(trial, value)
            else:
                self._study.tell(trial, state=state)
