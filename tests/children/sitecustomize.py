"""What every interpreter that a test starts begins with: less to load, and a collector that looks
seldom.

Each loads TensorFlow, and there are a hundred of them. qpool's own commands and workers do so by
themselves.
"""

import importlib.abc
import sys

from workers import collector

collector.relax()


class _Wrapped(importlib.abc.MetaPathFinder):
    """While Keras loads, what it has wrappers and pictures for is as if it were not installed."""

    def find_spec(self, fullname, path, target=None):
        keras = sys.modules.get("keras")
        loading = keras is not None and not hasattr(keras, "Model")
        if loading and fullname in ("sklearn", "matplotlib", "pandas"):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


sys.meta_path.insert(0, _Wrapped())
