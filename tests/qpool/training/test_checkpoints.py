"""Checkpoints: whole or not there, verified, and never code."""

from __future__ import annotations

import json
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import programs
import pytest

from qpool.training.checkpoints import Checkpoint, Folder, read, write
from workers.errors import CheckpointError


def checkpoint(step: int = 7) -> Checkpoint:
    arrays = {
        "generator/0": np.arange(6, dtype=np.float32).reshape(2, 3),
        "draws/0": np.array([3, 2**40], np.int64),
        "empty": np.zeros((0, 2), np.complex64),
    }
    return Checkpoint(step, 41, 0.25, arrays)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.npz", checkpoint())
    found = read(tmp_path / "a.npz")
    assert (found.step, found.calls, found.best) == (7, 41, 0.25)
    for name, array in checkpoint().arrays.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_torn_file_is_known(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.npz"
    write(path, checkpoint())
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match="damaged"):
        read(path)


def test_a_flipped_bit_in_an_array_is_known(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write(path, checkpoint())
    data = bytearray(path.read_bytes())
    data[data.find(np.float32(5).tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        read(path)


def test_a_foreign_and_a_newer_one_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "foreign.npz", weights=np.ones(3))
    with pytest.raises(CheckpointError, match="not a checkpoint of qpool"):
        read(tmp_path / "foreign.npz")
    text = np.frombuffer(json.dumps({"format": 99}).encode(), np.uint8)
    np.savez(tmp_path / "newer.npz", manifest=text)
    with pytest.raises(CheckpointError, match="format 99"):
        read(tmp_path / "newer.npz")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        read(tmp_path / "missing.npz")


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


def test_reading_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.npz"
    write(path, checkpoint())
    pickled = np.array([Evil()], dtype=object)
    with zipfile.ZipFile(path, "a") as archive, archive.open("more.npy", "w") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|O", "fortran_order": False, "shape": (1,)}
        )
        file.write(pickle.dumps(pickled))
    assert "more" not in read(path).arrays
    with zipfile.ZipFile(path, "w") as archive, archive.open("manifest.npy", "w") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|O", "fortran_order": False, "shape": (1,)}
        )
        file.write(pickle.dumps(pickled))
    with pytest.raises(CheckpointError, match="damaged"):
        read(path)


def test_a_folder_keeps_the_last_few_and_the_best(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "checkpoints", keep=2)
    with pytest.raises(CheckpointError, match="no checkpoints"):
        folder.newest()
    for step in (1, 2, 3, 4):
        folder.write(checkpoint(step), best=step == 2)
    assert list(folder.steps()) == [4, 3]
    assert read(folder.best).step == 2
    assert folder.newest()[0].step == 4
    folder.steps()[4].write_bytes(b"torn")
    found, damaged = folder.newest()
    assert found.step == 3
    assert "damaged" in str(damaged[0])
    folder.steps()[3].write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="damaged"):
        folder.newest()


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on a file's size there")
def test_a_full_disk_leaves_the_last_one_intact(tmp_path: Path) -> None:
    """The system refuses the write for real: a file may not grow past a limit."""
    code = f"""
        import resource, signal
        import numpy as np
        from pathlib import Path
        from qpool.training.checkpoints import Checkpoint, Folder
        from workers.errors import CheckpointError

        folder = Folder(Path({str(tmp_path)!r}))
        folder.write(Checkpoint(1, 0, 1.0, {{"w": np.ones(10)}}))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        try:
            folder.write(Checkpoint(2, 0, 1.0, {{"w": np.ones(10000)}}))
        except CheckpointError as error:
            print(error)
        print(folder.newest()[0].step, sorted(p.name for p in folder.path.iterdir()))
    """
    done = programs.run(code)
    assert "could not be written" in done.stdout
    assert "1 ['step-00000001.npz']" in done.stdout
