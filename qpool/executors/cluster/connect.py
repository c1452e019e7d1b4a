"""Ray itself: connecting, the nodes there are, and errors that say what to do.

Owns the connection; one process has one, shared by all that compute over it. Ray is imported when a
cluster is first asked for.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from qpool.executors import topology
from workers.errors import ConfigurationError, StartupError

#: Seconds in which a cluster's address has to take a connection. Ray would try for minutes.
_ANSWER = 5.0

#: Of a cluster that is ours alone. Ray would start a process for each CPU, which no actor takes;
#: let other programs go before (niceness 15: beside five busy ones, an actor takes minutes to
#: start); and start a process anew that has not begun within a minute.
_LOCAL = {
    "prestart_worker_first_driver": False,
    "worker_niceness": 0,
    "worker_register_timeout_seconds": 300,
}


@dataclass(frozen=True)
class Place:
    """A node of the cluster: Ray's name for it, its address, and the CPUs it has for Ray."""

    name: str
    address: str
    cpus: int


def ray() -> Any:
    """Ray's module; ConfigurationError where it is not installed."""
    # Said by Ray for a future version; it concerns GPUs, which nothing here asks Ray for.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray as module
    except ImportError as error:
        raise ConfigurationError(
            f"strategy='ray' needs Ray, which cannot be imported ({error}): "
            "pip install 'qpool-sf[ray]'"
        ) from error
    return module


#: How many use the connection that was made here, and to where; 0 where it is the user's own.
_users = 0
_made = ""


def connect(address: str | None, cpus: int | None = None) -> None:
    """Connect this process to the cluster at ``address``; ``disconnect`` for each time.

    None: the cluster this process is connected to already, or that RAY_ADDRESS names, or else one
    that is started on this machine (with so many ``cpus``) and ends with this process.
    """
    global _users, _made
    module = ray()
    if module.is_initialized():
        here = module.get_runtime_context().gcs_address
        if address not in (None, "auto", here, _made) and _resolved(address) != _resolved(here):
            raise ConfigurationError(
                f"this process is connected to the Ray cluster at {here}, not {address}: call "
                "ray.shutdown() first, or leave address= out"
            )
        _users += bool(_users)
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_answers(address)
    own: dict[str, Any] = {}
    if address == "local":
        cpus = max(cpus or 1, len(topology.budget().cpus))
        own = {"num_cpus": cpus, "include_dashboard": False, "_system_config": _LOCAL}
    try:
        module.init(address=address, log_to_driver=False, logging_level="WARNING", **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise StartupError(f"no Ray cluster at address={address!r}: {error}") from error
    _users, _made = 1, address


def disconnect() -> None:
    """The last one to leave closes a connection that was made here."""
    global _users
    if _users:
        _users -= 1
        if not _users:
            ray().shutdown()


def _resolved(address: str) -> Any:
    """Host and port as numbers, however the host is written."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        return socket.gethostbyname(host), port
    except OSError:
        return address


def _check_answers(address: str) -> None:
    """StartupError if nothing takes a connection there."""
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigurationError(
            f"address={address!r} is no address of a Ray cluster: expected host:port, as "
            "`ray start --head` prints it, ray://host:port, or auto"
        )
    try:
        socket.create_connection((host, int(port)), _ANSWER).close()
        if not address.startswith("ray://"):  # whatever listens there may not be Ray
            check = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address"]
            subprocess.run([*check, address], capture_output=True, timeout=2 * _ANSWER, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise StartupError(
            f"no Ray cluster answers at {address} ({error}): start one there with `ray start "
            "--head`, or give the address that it printed"
        ) from error


def places() -> dict[str, Place]:
    """The nodes that are alive and have CPUs, by name, in an order that stays."""
    found = [
        Place(node["NodeID"], node["NodeManagerAddress"], int(node["Resources"].get("CPU", 0)))
        for node in ray().nodes()
        if node["Alive"]
    ]
    return {place.name: place for place in sorted(found, key=lambda p: p.name) if place.cpus}


def free() -> dict[str, float]:
    """CPUs that nobody has taken, as of a moment ago, by node; without nodes of which Ray does not
    say."""
    try:
        from ray._private.state import available_resources_per_node

        available = available_resources_per_node()
    except (ImportError, ray().exceptions.RayError):  # a client (ray://) is not told
        return {}
    return {name: resources.get("CPU", 0.0) for name, resources in available.items()}


def versions() -> dict[str, str]:
    """What has to be the same on all nodes for the same bits. Imports nothing heavy."""
    packages = ("tensorflow", "strawberryfields", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["qpool-sf"] = importlib.metadata.version("qpool-sf")
    return {"python": platform.python_version(), **found}
