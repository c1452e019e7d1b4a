"""A model as one process holds it: how it is shipped, probed, called and pulled back.

Owns the model's side of a worker, which the strategies in the trainer's process use too. Knows the
engine and compiling, and of the exchange the messages' forms; no processes.
"""
