"""How a model's configuration is kept: with the number of its format, checked when it is read."""

from __future__ import annotations

from typing import Any

from workers.errors import ConfigurationError

#: Counts up when a saved configuration comes to mean something else.
FORMAT = 1


class Saved:
    """A mix-in for Keras layers and models: their configuration says its format."""

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "format": FORMAT}  # type: ignore[misc]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        config = dict(config)
        found = config.pop("format", None)
        if found != FORMAT:
            raise ConfigurationError(
                f"this {cls.__name__} was saved in format {found}; this version of qpool reads "
                f"format {FORMAT}. Load it with the version that saved it, and save its weights "
                "(save_weights) to take them over"
            )
        return cls(**config)
