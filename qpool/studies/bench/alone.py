"""Measurements in processes of their own, each on one core."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from workers.process import affinity

#: What a program that obeys says when it has done its work.
_DONE = "done\n"


def alone_on_a_core(module: str, *arguments: Any) -> Any:
    """What ``module``, run as a program of its own on one core, answers to ``arguments``."""
    done = subprocess.run(
        _command(module, _cores(1)[0], arguments),
        env=os.environ | affinity.environment(1),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def with_a_cache(folder: str, module: str, *arguments: Any) -> Any:
    """What ``module``, run as a program of its own that keeps in ``folder`` what it compiles,
    answers to ``arguments``."""
    environment = {**os.environ, "QPOOL_CACHE": folder}
    environment.pop("TF_XLA_FLAGS", None)  # this process's own place
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[2:]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def side_by_side(count: int, module: str, *arguments: Any) -> Iterator[Callable[[], None]]:
    """So many programs, each on a core; a call has all of them do their work once (``obey``)."""
    with contextlib.ExitStack() as stack:
        programs = [
            stack.enter_context(
                subprocess.Popen(
                    _command(module, core, arguments),
                    env=os.environ | affinity.environment(1),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )
            for core in _cores(count)
        ]

        def work() -> None:
            for program in programs:
                assert program.stdin is not None
                program.stdin.write("go\n")
                program.stdin.flush()
            for program in programs:
                assert program.stdout is not None
                if program.stdout.readline() != _DONE:
                    raise RuntimeError(f"a program of {module} ended in the middle of its work")

        yield work  # at the end their input is closed, by which they end


def obey(work: Callable[[], Any]) -> None:
    """In such a program: do the work whenever asked, until nobody can ask any more."""
    for _ in sys.stdin:
        work()
        sys.stdout.write(_DONE)
        sys.stdout.flush()


def _cores(count: int) -> list[int]:
    """A core for each of so many programs, the last one first; they share where there are fewer."""
    cores = affinity.current_cores() or (0,)
    return [cores[-1 - n % len(cores)] for n in range(count)]


def _command(module: str, core: int, arguments: tuple[Any, ...]) -> list[str]:
    return [sys.executable, "-m", module, str(core), json.dumps(arguments)]


def answer(measure: Callable[..., Any]) -> None:
    """In such a program: measure on the core that it was given, and print what was found."""
    core, arguments = int(sys.argv[1]), json.loads(sys.argv[2])
    affinity.pin((core,))
    affinity.keep_memory()
    affinity.bound_tensorflow(1)
    print(json.dumps(measure(*arguments)))
