"""A call's fastest form that gives what the eager one gives, and what is kept of it on disk.

Owns compiling: levels, loops over rows, files. Knows the engine's circuits, and no models.
"""
