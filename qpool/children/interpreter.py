"""A fresh interpreter as a child process, with nothing of this one's but what it is handed.

Owns the command line and what differs between systems: which descriptors go along, and that
Ctrl-C in the terminal reaches the coordinator alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_WINDOWS = sys.platform == "win32"

#: The folder that holds the ``workers`` package, for interpreters that start from nothing.
_ROOT = str(Path(__file__).resolve().parents[2])


def start(
    entry: str, arguments: Sequence[Any], handles: Sequence[int], environment: Mapping[str, str]
) -> subprocess.Popen:
    """Run ``entry``, "module:function", with these arguments and with ``handles`` open."""
    module, function = entry.split(":")
    code = (
        f"import sys, json; sys.path.insert(0, {_ROOT!r}); "
        f"from {module} import {function}; {function}(*json.loads(sys.argv[1]))"
    )
    options: dict[str, Any] = {"env": dict(environment), "stdin": subprocess.DEVNULL}
    if _WINDOWS:
        startup = subprocess.STARTUPINFO()  # type: ignore[attr-defined]
        startup.lpAttributeList = {"handle_list": list(handles)}
        for handle in handles:
            os.set_handle_inheritable(handle, True)  # type: ignore[attr-defined]
        options |= {
            "startupinfo": startup,
            "creationflags": subprocess.CREATE_NEW_PROCESS_GROUP,  # type: ignore[attr-defined]
        }
    else:
        options |= {"pass_fds": tuple(handles), "start_new_session": True}
    return subprocess.Popen([sys.executable, "-c", code, json.dumps(arguments)], **options)
