"""A worker as a process: its start, its loop, its cores, memory and devices.

Owns the process. Knows all other packages of ``workers``; none of them knows this one.
"""
