"""Calls that this process computes as one: no tiles, no workers.

sequential      ``sequential``: the model as it is
cpu_batch       ``cpu_batch``: compiled, the whole batch at once
unpooled        methods of a pooled object that nobody named, compiled when they are called again
compiled_calls  each way of calling a method, with what was compiled: both of these call by it
choosing        what it is compiled to: the best form that gives what the eager call gave
inputs          what of a call's arguments is an input of what is compiled, and what a constant
effects         what a call does beside computing
"""
