"""Which runners a campaign has: those of this machine, or of a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence

from qpool.training.campaign.runners import LocalRunners, Runners


def make(
    *,
    cores: Sequence[int],
    each: int,
    most: int | None = None,
    threads: int = 1,
    start_method: str | None = None,
    address: str | None = None,
    ray: bool = False,
) -> Runners:
    """Runners on this machine's ``cores``, ``each`` of them a run; with ``ray``, on a cluster's.

    ``threads`` bounds what a run's process takes by itself; a pool of its own has more.
    """
    if not ray:
        return LocalRunners(cores, each, most, threads, start_method)
    from qpool.training.campaign.on_ray import RayRunners  # Ray is imported where it is asked for

    return RayRunners(address, each, most, threads)
