"""``processes``: a persistent pool of worker processes, and a model's place in it.

gradient.py (TensorFlow) -> remote.py (one model, arrays) -> pool.py (workers)
                                                               |-- dispatch.py    what next
                                                               `-- supervisor.py  start, kill

A pool needs no TensorFlow in this process: made before it is imported, its own loads meanwhile.
"""
