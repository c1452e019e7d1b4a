"""A run's settings: from a file, checked by name and kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from qpool.training.config import Config
from workers.errors import ConfigurationError


def test_settings_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('steps = 12\ndata = "iris"\npenalty = 2\nclip_norm = 0.5\n')
    found = Config.of(Config.read(path))
    assert (found.steps, found.data, found.penalty, found.clip_norm) == (12, "iris", 2, 0.5)
    assert found.batch_size == Config().batch_size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepps = 3", "did you mean 'steps'"),
        ('steps = "3"', "steps must be int"),
        ("steps = true", "steps must be int"),
        ("steps = 1.5", "steps must be int"),
        ("clip_norm = 'a'", "clip_norm must be float or None"),
        ("steps", "Expected TOML"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=words):
        Config.read(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Config.read(tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"strategy": "procesess"}, "did you mean 'processes'"),
        ({"ema_momentum": 1.0}, "between 0 and 1"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_bad_values(settings: dict, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Config.of(settings).check()
