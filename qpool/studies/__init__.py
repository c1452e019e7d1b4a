"""Benchmarks, sweeps and soaks: every figure is taken in the run that reports it, with what it is
compared to.

Knows all of qpool; nothing of qpool but its command line knows this.
"""
