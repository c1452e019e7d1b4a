"""Measurements: every figure is taken in the run that reports it, with what it is compared to."""
