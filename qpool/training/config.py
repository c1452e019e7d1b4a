"""What a run depends on: from defaults, a TOML file and the command line, checked by name."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.errors import ConfigurationError, nearest

#: How learning rates go over a run.
SCHEDULES = ("constant", "cosine")

#: What generator and critic play for (see ``gan.QuantumGAN``).
LOSSES = ("wasserstein", "non-saturating")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run depends on. ``*_every`` and ``steps`` are numbers of steps."""

    data: str = "breast-cancer"
    steps: int = 250
    batch_size: int = 32
    modes: int = 2
    layers: int = 2
    cutoff: int = 12
    encoding: str = "coherent_state"
    readout: str = "positions"
    generator_rate: float = 0.01
    critic_rate: float = 0.01
    schedule: str = "cosine"
    critic_steps: int = 5
    critic_units: int = 32
    critic_layers: int = 2
    loss: str = "wasserstein"
    penalty: float = 1.0
    norm_penalty: float = 20.0
    ema_momentum: float | None = None
    clip_norm: float | None = None
    workers: int | None = None
    threads: int = 1
    strategy: str = "processes"
    tile: int | None = None
    start_method: str | None = None
    address: str | None = None
    checkpoint_every: int = 50
    evaluate_every: int = 50
    keep: int = 3
    seed: int = 1

    @staticmethod
    def of(values: Mapping[str, Any]) -> Config:
        """From values by name; ConfigurationError for an unknown one names the nearest."""
        fields = {field.name: field for field in dataclasses.fields(Config)}
        for name, value in values.items():
            if name not in fields:
                raise ConfigurationError(
                    f"unknown setting {name!r}: {nearest(name, tuple(fields))}"
                )
            kinds = str(fields[name].type).split(" | ")
            if not any(_is(value, kind) for kind in kinds):
                raise ConfigurationError(
                    f"{name} must be {' or '.join(kinds)}; came {value!r} ({type(value).__name__})"
                )
        return Config(**values)

    @staticmethod
    def read(path: Path) -> dict[str, Any]:
        """The settings in a TOML file, by name, checked."""
        values = read_toml(path, "settings", "TOML, a line for each: steps = 1000")
        Config.of(values)
        return values

    def check(self) -> None:
        """What can be refused before anything heavy is loaded or written."""
        from qpool.executors import strategies
        from qpool.models import encodings

        positive = (
            "steps",
            "batch_size",
            "modes",
            "layers",
            "critic_steps",
            "critic_units",
            "critic_layers",
            "threads",
            "checkpoint_every",
            "evaluate_every",
            "keep",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {getattr(self, name)}")
        names = (("strategy", strategies()), ("schedule", SCHEDULES), ("loss", LOSSES))
        for name, known in names:
            value = getattr(self, name)
            if value not in known:
                raise ConfigurationError(f"unknown {name} {value!r}: {nearest(value, known)}")
        for name in ("generator_rate", "critic_rate", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigurationError(f"{name} must be more than 0, not {value}")
        for name in ("penalty", "norm_penalty"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigurationError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.ema_momentum is not None and not 0 < self.ema_momentum < 1:
            raise ConfigurationError(
                f"ema_momentum must be between 0 and 1, not {self.ema_momentum}"
            )
        if self.cutoff < 2:
            raise ConfigurationError(f"cutoff must be at least 2, not {self.cutoff}")
        if not 0 <= self.seed < 2**32:
            raise ConfigurationError(f"seed must be from 0 to 2**32 - 1, not {self.seed}")
        if self.workers is not None and self.workers < 1:
            raise ConfigurationError(
                f"workers must be a whole number of at least 1, not {self.workers}"
            )
        if self.tile is not None and (self.tile < 1 or self.tile & (self.tile - 1)):
            raise ConfigurationError(f"tile must be a power of two, not {self.tile}")
        if self.address is not None and self.strategy != "ray":
            raise ConfigurationError(
                f"address is of a Ray cluster, and strategy={self.strategy!r} has none: expected "
                "strategy ray"
            )
        encodings.find(self.encoding)


def read_toml(path: Path, what: str, expected: str) -> dict[str, Any]:
    """What is in a TOML file; ConfigurationError says what of ``what`` cannot be read."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return dict(tomllib.loads(path.read_text()))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(
            f"the {what} in {path} cannot be read: {error}. Expected {expected}"
        ) from error


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return False
    kinds: dict[str, Any] = {"int": int, "float": (int, float), "str": str, "None": type(None)}
    return isinstance(value, kinds[kind])
