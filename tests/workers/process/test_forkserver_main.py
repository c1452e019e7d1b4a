"""What a forkserver loads, and what it leaves out."""

from __future__ import annotations

import programs

CODE = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
from workers import collector
from workers.process import forkserver_main
with collector.loading():
    forkserver_main._preload(["workers.process.main"], ["sklearn", "matplotlib", "pandas"])
left_out = [name for name in ("sklearn", "matplotlib", "pandas") if name in sys.modules]
import gc
frozen = gc.get_freeze_count()
import tensorflow as tf, sklearn.datasets, pandas  # a model's own module may need them
layers = [tf.keras.Input((2,)), tf.keras.layers.Dense(1)]
print(left_out, frozen > 100_000, tf.keras.Sequential(layers)(tf.zeros((3, 2))).shape)
"""


def test_what_no_model_is_made_of_is_left_out_and_can_be_imported_later() -> None:
    done = programs.run(CODE)
    assert done.stdout == "[] True (3, 1)\n"
