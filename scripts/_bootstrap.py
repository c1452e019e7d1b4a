"""What the scripts share: make ``.venv`` if it is not there, install the project, run in it.

Runs on any supported Python with nothing installed. Owns the virtual environment; a stamp in it
says which project files and which Python it was made from, so a second run skips the install.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
SUPPORTED = ((3, 10), (3, 13))


def python(extra: str = "") -> Path:
    """The environment's interpreter, with the project and its ``extra`` installed."""
    if not SUPPORTED[0] <= sys.version_info[:2] <= SUPPORTED[1]:
        sys.exit(
            f"qpool needs Python 3.10 to 3.13; this is {sys.version.split()[0]} "
            f"({sys.executable}). Run: python3.12 {sys.argv[0]}"
        )
    folder, name = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    interpreter = VENV / folder / name
    stamp = VENV / f"installed-{extra or 'qpool'}"
    wanted = _fingerprint()
    if stamp.exists() and stamp.read_text() == wanted and interpreter.exists():
        return interpreter
    if not interpreter.exists():
        _say(f"making {VENV.name} with Python {sys.version.split()[0]}")
        venv.create(VENV, with_pip=True)
    _say("installing qpool and what it needs (a few minutes the first time)")
    target = f"{ROOT}[{extra}]" if extra else str(ROOT)
    pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "--no-compile", "--editable", target])
    if done.returncode:
        sys.exit("the installation failed; pip's own words are above")
    # What pip does in one process, without packages' tests; some is for other Pythons, and fails.
    others = r"site-packages[/\\].*[/\\]tests?[/\\]"
    compileall = [str(interpreter), "-m", "compileall", "-qq", "-j", "0", "-x", others]
    subprocess.run([*compileall, str(VENV)], stdout=subprocess.DEVNULL)
    stamp.write_text(wanted)
    return interpreter


def run(*command: object) -> None:
    """Run a command in the project's root; exit with its code if it fails."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


def become(*command: object) -> None:
    """Run a command in the caller's folder as the last thing; signals and exit code are its."""
    words = [str(part) for part in command]
    if os.name == "posix":
        os.execv(words[0], words)
    sys.exit(subprocess.run(words).returncode)


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for name in ("setup.cfg", "pyproject.toml"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def _say(message: str) -> None:
    print(f"[qpool] {message}", file=sys.stderr, flush=True)
