"""Warnings said once."""

from __future__ import annotations

import logging

import pytest

from workers.logs import Once


@pytest.mark.parametrize(
    ("silent", "passed"), [(False, ["cast", "other", "lost", "lost"]), (True, ["lost", "lost"])]
)
def test_a_warning_is_said_once_and_an_error_each_time(silent: bool, passed: list[str]) -> None:
    logger, said = logging.Logger("test"), []
    logger.addFilter(Once(silent=silent))
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    for _ in range(2):
        logger.warning("cast")
        logger.info("ca%s", "st")
        logger.warning("other")
        logger.error("lost")
    assert sorted(said) == sorted(passed)
