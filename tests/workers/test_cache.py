"""Compiled code on disk: found again by another process, mended when damaged, kept in bounds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import programs
import pytest

from workers import cache

CODE = """
    import hashlib, logging, os
    logging.basicConfig(level="WARNING")
    os.environ.update(TF_CPP_MIN_LOG_LEVEL="3")
    from workers import cache
    os.environ.update(cache.environment(1))
    import tensorflow as tf
    from workers.compiling import compiled
    for _ in range({before}):
        tf.constant(1.0) + 1.0
    def model(x):
        return tf.linalg.matmul(tf.sin(x), x)
    function = compiled.at_level(model, "xla")
    out = function(tf.random.stateless_normal((4, 4), (1, 2)))
    print(hashlib.sha256(out.numpy().tobytes()).hexdigest())
"""


def run(folder: Path | str, before: int = 0) -> tuple[str, str]:
    done = programs.run(textwrap.dedent(CODE).format(before=before), folder)
    return done.stdout.strip(), done.stderr


def test_another_process_finds_it_and_a_damaged_file_is_made_anew(tmp_path) -> None:
    first, _ = run(tmp_path)
    (file,) = tmp_path.glob("*/*.pb")
    written = file.stat().st_mtime_ns
    again, _ = run(tmp_path, before=100)
    assert list(tmp_path.glob("*/*.pb")) == [file]
    assert file.stat().st_mtime_ns == written
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    mended, said = run(tmp_path)
    assert "made anew" in said
    assert not file.exists()
    assert run(tmp_path)[0] == first == again == mended
    assert file.exists()
    assert file.parent.stat().st_mode & 0o777 == 0o700


def test_nothing_is_kept_where_that_is_asked_for(monkeypatch) -> None:
    monkeypatch.setenv(cache._VARIABLE, "off")
    assert cache.environment(1) == {}


@pytest.mark.parametrize("name", ["file", "with a blank"])
def test_a_folder_that_cannot_be_used_keeps_nothing(monkeypatch, tmp_path, name: str) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache._VARIABLE, str(tmp_path / name))
    assert cache.environment(1) == {}


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
def test_a_folder_that_others_may_write_to_is_not_used(monkeypatch, tmp_path, caplog) -> None:
    monkeypatch.setenv(cache._VARIABLE, str(tmp_path))
    cache.environment(1)
    (place,) = tmp_path.iterdir()
    place.chmod(0o777)
    assert cache.environment(1) == {}
    assert "written to by others" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
def test_traces_that_others_may_write_are_not_read(monkeypatch, tmp_path, caplog) -> None:
    monkeypatch.setenv("TF_XLA_FLAGS", f"{cache._FLAG}{tmp_path / 'tensorflow-x'}")
    assert cache.kept("a name", lambda: b"ours", len) == b"ours"
    assert cache.kept("a name", lambda: b"other", len) == b"ours"
    (place,) = tmp_path.iterdir()
    place.chmod(0o777)
    assert cache.kept("a name", lambda: b"other", len) == b"other"
    assert "written to by others" in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="dangling links")
def test_a_file_that_is_gone_by_then_does_not_stop_the_keeping(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(cache._VARIABLE, str(tmp_path))
    cache.environment(1)
    (place,) = tmp_path.iterdir()
    (place / "kept-x.1").symlink_to(place / "gone")  # listed, and not there when it is looked at
    assert cache.environment(1) != {}


def test_threads_and_flags_have_places_of_their_own(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(cache._VARIABLE, str(tmp_path))
    monkeypatch.delenv("TF_XLA_FLAGS", raising=False)
    one, two = (cache.environment(n)["TF_XLA_FLAGS"] for n in (1, 2))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    monkeypatch.setenv("TF_XLA_FLAGS", "--tf_xla_min_cluster_size=4")
    three = cache.environment(1)["TF_XLA_FLAGS"]
    assert len({one, two, three}) == 3
    assert three.startswith("--tf_xla_min_cluster_size=4 ")


def test_the_oldest_files_go_first(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(cache._VARIABLE, str(tmp_path))
    monkeypatch.setattr(cache, "_LARGEST", 250)
    cache.environment(1)
    (place,) = tmp_path.iterdir()
    for age in (3, 1, 2):
        (place / str(age)).write_bytes(bytes(100))
        os.utime(place / str(age), (1000 - age, 1000 - age))
    cache.environment(1)
    assert sorted(file.name for file in place.iterdir()) == ["1", "2"]


OWN = """
    import os, sys
    from workers import cache
    {before}
    import qpool
    import tensorflow as tf
    tf.function(lambda x: tf.sin(x) + 1, jit_compile=True)(tf.zeros(3))
    print(cache.in_use())
"""


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        ("", True),
        ("import tensorflow", True),
        ("import tensorflow; tensorflow.zeros(3)", False),  # it has read where to by then
        ("os.environ['QPOOL_CACHE'] = 'off'", False),
        # that of a parent process
        ("os.environ['TF_XLA_FLAGS'] = cache._FLAG + '/tensorflow-x'", True),
    ],
)
def test_a_process_keeps_what_it_compiles_if_it_is_told_in_time(tmp_path, before, kept) -> None:
    done = programs.run(textwrap.dedent(OWN).format(before=before), tmp_path)
    assert (done.stdout.strip() != "None") == kept
    assert bool(list(tmp_path.glob("*/xla_compile_cache_*"))) == kept


@pytest.mark.parametrize("made", [True, False])
def test_one_at_a_time_compiles_a_program(tmp_path: Path, monkeypatch, made: bool) -> None:
    first, second, other = (cache.Turn(tmp_path) for _ in range(3))
    first.take(b"a program")
    other.take(b"another one")  # at once
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        first.give(made=made)

    monkeypatch.setattr(cache.time, "sleep", sleep)
    second.take(b"a program")
    assert len(waited) == 1
    third = cache.Turn(tmp_path)
    if made:  # all who come now load it side by side
        third.take(b"a program")
    assert (second._lock is None) == made
    assert third._lock is None
    second.give(made=False)
    other.give(made=False)
    assert len(list(tmp_path.iterdir())) == made
    cache.clear(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_turn_ends_with_its_process_and_is_waited_for_no_longer_than_that(
    tmp_path: Path, monkeypatch
) -> None:
    code = f"""
from pathlib import Path
from workers.cache import Turn
Turn(Path({str(tmp_path)!r})).take(b"a program")
import os, signal
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    monkeypatch.setattr(cache.time, "sleep", None)  # nobody waits
    turn, late = cache.Turn(tmp_path), cache.Turn(tmp_path)
    turn.take(b"a program")
    monkeypatch.setattr(cache, "_LONGEST_TURN", 0.0)
    late.take(b"a program")
    late.give(made=False)
    turn.give(made=False)
    assert not list(tmp_path.iterdir())


def test_no_turns_where_a_system_has_no_such_locks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "fcntl", None)
    turn = cache.Turn(tmp_path)
    turn.take(b"a program")
    turn.give(made=False)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    gone = cache.Turn(tmp_path / "no such folder")
    gone.take(b"a program")
    gone.give(made=False)
