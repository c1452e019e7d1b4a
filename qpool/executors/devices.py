"""``devices=["cpu:0-13", "gpu:0"]``: which worker computes on what. Pure.

cpu          a worker for each of this process's cores (or each ``threads`` of them)
cpu:0-3,8    the same, of these cores
gpu:0        a worker whose model lies on that GPU, and which sees no other
virtual:1    a worker on a virtual CPU device of TensorFlow's, to try a mixed pool without a GPU
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qpool.executors import topology
from workers.errors import ConfigurationError, nearest

_KINDS = ("cpu", "gpu", "virtual")


@dataclasses.dataclass(frozen=True)
class Seat:
    """A worker's place: its ``device``, as ``workers.process.device`` takes it, and its cores."""

    device: str
    cores: tuple[int, ...]


def parse(
    devices: Sequence[str], cpus: Sequence[int], threads: int, visible: str | None = None
) -> list[Seat]:
    """A seat for each worker.

    ``cpus`` are those that there are; ``visible`` is CUDA_VISIBLE_DEVICES, through which GPUs are
    numbered. ConfigurationError for what is no device, is not there, or is named twice.
    """
    if isinstance(devices, str) or not devices:
        raise ConfigurationError(
            f"devices must be a list such as ['cpu', 'gpu:0'], not {devices!r}"
        )
    seats: list[Seat] = []
    for device in devices:
        kind, _, which = str(device).partition(":")
        if kind not in _KINDS:
            raise ConfigurationError(f"unknown device {device!r}: {nearest(kind, _KINDS)}")
        try:
            numbers = sorted(topology.parse_cpu_list(which)) if which else []
        except ValueError:
            raise ConfigurationError(
                f"device {device!r} has no numbers after its colon; expected cpu:0-3,8 or gpu:0"
            ) from None
        if kind == "cpu":
            seats += _of_cores(str(device), numbers or list(cpus), cpus, threads)
            continue
        if not numbers:
            raise ConfigurationError(f"device {device!r} wants a number: {kind}:0")
        names = None
        if visible is not None and kind == "gpu":
            names = [name for name in visible.split(",") if name]
        if names is not None and numbers[-1] >= len(names):
            raise ConfigurationError(
                f"device {device!r}: CUDA_VISIBLE_DEVICES={visible} has {len(names)}, from gpu:0"
            )
        seats += [Seat(f"{kind}:{names[n] if names else n}", ()) for n in numbers]
    taken = [core for seat in seats for core in seat.cores]
    names = [seat.device for seat in seats if seat.device != "cpu"]
    twice = {n for n in (*taken, *names) if (*taken, *names).count(n) > 1}
    if twice:
        raise ConfigurationError(
            f"devices names {', '.join(map(str, sorted(twice, key=str)))} twice"
        )
    return seats


def _of_cores(device: str, cores: Sequence[int], cpus: Sequence[int], threads: int) -> list[Seat]:
    away = [core for core in cores if core not in cpus]
    if away:
        raise ConfigurationError(
            f"device {device!r}: this process may not use CPUs {away}; it has {sorted(cpus)}"
        )
    if len(cores) < threads:
        raise ConfigurationError(
            f"device {device!r} has {len(cores)} CPUs, fewer than threads={threads} of one worker"
        )
    return [Seat("cpu", c) for c in topology.assign(len(cores) // threads, tuple(cores), threads)]
