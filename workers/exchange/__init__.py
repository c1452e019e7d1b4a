"""What coordinator and workers exchange: messages, shared memory, faults, and waiting for them.

Owns the forms. Knows nothing of TensorFlow, models or circuits.
"""
