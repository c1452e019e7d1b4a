"""``processes``: a persistent pool of worker processes, and a model's place in it.

bridge (TensorFlow) -> remote.py (one model, arrays) -> arena_pool.py (arrays in shared memory)
                                                           `-- pool.py (workers)
                                                                 |-- dispatch.py    what next
                                                                 |-- perform.py     do it
                                                                 `-- supervisor.py  start, kill

A pool needs no TensorFlow in this process: made before it is imported, its own loads meanwhile.
"""
