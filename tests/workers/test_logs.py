"""Warnings said once."""

from __future__ import annotations

import logging
import os

import programs
import pytest

from workers.logs import Once, hushed


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
        logger.warning("calls to named_lastingly.<locals>.pooled triggered tf.function retracing")
        logger.error("lost")
    assert sorted(said) == sorted(passed)


def test_what_is_written_while_hushed_is_seen_if_it_fails(capfd) -> None:
    with hushed():
        os.write(2, b"oneDNN is on")
    os.write(2, b"after")

    def load() -> None:
        with hushed():
            os.write(2, b"no such library")
            raise ImportError

    with pytest.raises(ImportError):
        load()
    assert capfd.readouterr().err == "afterno such library"


def test_tensorflow_loads_without_a_word() -> None:
    code = (
        "import sys, workers.logs; workers.logs.hush_tensorflow(); import tensorflow as tf; "
        "tf.constant(0.0); print(tf.__spec__.name, file=sys.stderr)"
    )
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("TF_", "CUDA_"))}
    done = programs.run(code, environment=environment)
    assert done.stderr.splitlines()[-1:] == ["tensorflow"]
    assert "oneDNN" not in done.stderr
    assert "cuInit" not in done.stderr
