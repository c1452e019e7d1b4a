"""Child processes: how one is started, heard, killed and collected; what it runs is its program's.

Pools start their workers here, campaigns their runs. Needs no TensorFlow.
"""
