"""What every interpreter that a test starts begins with: a collector that looks seldom.

Each loads TensorFlow, and there are a hundred of them. qpool's own commands and workers do so by
themselves.
"""

from workers import collector

collector.relax()
