"""What a program measures of itself while it runs: processes, machine, gradients, batches.

Figures that are taken for their own sake, and how, are in ``qpool.studies``.
"""
