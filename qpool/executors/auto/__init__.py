"""``auto``: begins at once with a good guess, and compares others while the model's own steps run.

executor   ``auto``: which candidates are worth a try, and when
guess      what follows from the circuits that a first call runs
course     whether to go on trying, and with what: a share of the time the model has taken so far
autotuner  measures
choices    what was measured, kept on disk for the next run of the same model, batch and machine
arguments  what calls look like: stand-ins for them
"""
