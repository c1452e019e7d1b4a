"""Pin a process to its cores and bound its threads.

Owns what one process does to itself. Which cores a worker gets is decided by the coordinator.
Threads are bounded twice: by environment variables that must be set before the libraries load,
and by TensorFlow's own configuration after it loaded and before it first computes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any

#: Read once, when a library is loaded. TensorFlow's threads ignore affinity, so they are bounded.
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)


def environment(threads: int) -> dict[str, str]:
    """Variables for a process that has not loaded TensorFlow yet.

    oneDNN picks kernels by shape and thread count; without it, the same tile gives the same bits.
    GPUs are hidden: many workers on one GPU is a choice to be made, not one to fall into.
    """
    bounded = dict.fromkeys(_THREAD_VARIABLES, str(threads))
    return bounded | {
        "TF_ENABLE_ONEDNN_OPTS": "0",
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3"),
        "CUDA_VISIBLE_DEVICES": "-1",
        "PYTHONHASHSEED": "0",  # a set has the same order in every worker
    }


def bound_tensorflow(threads: int) -> None:
    """Bound TensorFlow's two thread pools; must come before its first operation."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


def pin(cores: tuple[int, ...]) -> tuple[int, ...]:
    """Pin this process (every thread of it) and return the cores it is on now.

    Empty ``cores``, or a system without affinity calls, pins nothing.
    """
    if cores and hasattr(os, "sched_setaffinity"):
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores)
    return current_cores()


@contextlib.contextmanager
def anywhere(cores: tuple[int, ...]) -> Iterator[None]:
    """This thread, and those it starts, may run on ``cores`` for a while: compiling takes as many
    threads as its first one may use."""
    if not (cores and hasattr(os, "sched_setaffinity")):
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cores)
        yield
    finally:
        os.sched_setaffinity(0, before)


def keep_memory() -> None:
    """Have glibc's allocator keep what is freed, rather than give it back to the system.

    A tile's arrays are of the same sizes each time. Given back and asked for anew, each of their
    pages is a fault and is cleared again, which cost more than the arithmetic.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(parameter, value)


#: glibc's numbers (malloc.h): how many blocks may be mapped apart, and when to give memory back.
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1


def yield_to_coordinator() -> None:
    """Schedule this process as a batch job, where the system knows that (Linux).

    A woken batch job does not preempt what runs on its core. Else the first worker that gets its
    shard, if it shares the coordinator's core, would run before the second one gets its own.
    """
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def current_cores() -> tuple[int, ...]:
    """The cores this process may run on; empty where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return ()


def thread_counts() -> dict[str, Any]:
    """What the libraries say of their own thread counts, after loading."""
    import tensorflow as tf

    return {
        "tensorflow_intra_op": tf.config.threading.get_intra_op_parallelism_threads(),
        "tensorflow_inter_op": tf.config.threading.get_inter_op_parallelism_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }
