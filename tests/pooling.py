"""How the pool's own tests pool a model: as it is.

They are about processes, memory and messages. Compiling each of their models, in each worker and
for each shape, would take longer than what they test; ``integration/test_traced.py`` has that.
"""

from __future__ import annotations

import functools

import qpool

parallelize = functools.partial(qpool.parallelize, engine="stock")
