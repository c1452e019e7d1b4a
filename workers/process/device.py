"""The device that a worker computes on: a GPU of its own, or none but the CPU.

Owns what a process does to itself for that: before TensorFlow starts its runtime, and around all
that is computed.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from workers.errors import StartupError


def reveal(device: str) -> None:
    """Have CUDA show that GPU, and none other; must come before it starts."""
    kind, _, number = device.partition(":")
    if kind == "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = number


def scope(device: str) -> AbstractContextManager[Any]:
    """Within this, TensorFlow places variables and operations on the device.

    Must be made before TensorFlow's first operation. Raises StartupError where there is no such
    GPU.
    """
    import tensorflow as tf

    kind, _, number = device.partition(":")
    if kind == "gpu":
        found = tf.config.list_physical_devices("GPU")
        if not found:
            raise StartupError(
                f"device {device!r}: TensorFlow finds no such GPU here. `nvidia-smi` lists those "
                "that there are; tensorflow[and-cuda] brings what it needs to use them"
            )
        tf.config.experimental.set_memory_growth(found[0], True)
        return tf.device("/GPU:0")
    if kind == "virtual":
        some = [tf.config.LogicalDeviceConfiguration()] * (int(number) + 1)
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], some)
        return tf.device(f"/CPU:{number}")
    return nullcontext()
