"""Optuna, which an extra brings: the module, quiet, or an error that says how to get it."""

from __future__ import annotations

from typing import Any

from workers.errors import ConfigurationError


def optuna(wanted_by: str, instead: str) -> Any:
    """The library. ``wanted_by`` and ``instead`` are for the ConfigurationError where it is not
    installed: what is Optuna's, and how to do without."""
    try:
        import optuna as module
    except ImportError as error:
        raise ConfigurationError(
            f"{wanted_by}: pip install 'qpool-sf[campaign]', or {instead}"
        ) from error
    module.logging.set_verbosity(module.logging.WARNING)
    return module
