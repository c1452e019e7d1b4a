"""Quantum models made of Strawberry Fields programs, as Keras models.

Importing it is what Keras needs to load one that was saved (``keras.models.load_model``).
"""

from qpool.models.discriminator import QuantumSFDiscriminator
from qpool.models.encodings import Encoding, register_encoding
from qpool.models.generator import QuantumSFGenerator
from qpool.models.readouts import Density, Homodyne, Readout

__all__ = [
    "Density",
    "Encoding",
    "Homodyne",
    "QuantumSFDiscriminator",
    "QuantumSFGenerator",
    "Readout",
    "register_encoding",
]
