"""``CircuitLayer``: any Strawberry Fields program with free parameters, as a Keras layer.

Owns which parameters are fed and which are trained. Running a program is ``programs``', what is
read out ``models.readouts``'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from qpool import programs
from qpool.models import readouts
from qpool.models.readouts import Readout
from qpool.models.saved import Saved
from workers import sf_compat
from workers.errors import ConfigurationError, InputError, nearest


@keras.saving.register_keras_serializable("qpool")
class CircuitLayer(Saved, keras.Layer):
    """A program as a layer: rows of inputs -> what is read of the state.

    (batch, len(inputs)), real -> (batch, ...), as the read-out says. In float32 the state is
    complex64, with ``dtype="float64"`` complex128.

    Args:
        program: an ``sf.Program`` with free parameters (``program.params(...)``) and without
            measurements: what would be measured is read out instead.
        inputs: names of the parameters that the layer's input feeds, one for each column.
        trainable_parameters: names of those that are trained; default: all others.
        readout: a name (``positions``, ``quadratures``, ``photons``, ``homodyne``, ``density``,
            ``ket``) or a ``qpool.models.Readout``.
        cutoff_dim: Fock states kept per mode.
        initial: starting values by name; those of other parameters come from ``initializer``.
        initializer: a Keras initializer; default: normal, with standard deviation 0.1.
        seed: of the default initializer, and of a read-out that draws.

    Raises:
        ConfigurationError: no free parameters, a name that the program does not have, one that is
            input and trainable, one that is neither, a measurement, an unknown read-out.
    """

    def __init__(
        self,
        program: Any,
        inputs: Sequence[str],
        trainable_parameters: Sequence[str] | None = None,
        readout: str | Readout = "quadratures",
        cutoff_dim: int = 8,
        initial: Mapping[str, float] | None = None,
        initializer: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        sf_compat.install()
        self.program = programs.from_text(program) if isinstance(program, str) else program
        self.inputs, self.trainable_parameters = _roles(self.program, inputs, trainable_parameters)
        unknown = sorted(set(initial or {}) - set(self.trainable_parameters))
        if unknown:
            raise ConfigurationError(
                f"initial= names {unknown[0]!r}, which is not trained: "
                f"{nearest(unknown[0], self.trainable_parameters)}"
            )
        if cutoff_dim < 2:
            raise ConfigurationError(f"cutoff_dim must be at least 2, not {cutoff_dim}")
        self.cutoff_dim = cutoff_dim
        self.initial = dict(initial or {})
        self.seed = seed
        modes = self.program.num_subsystems
        self._read = readouts.find(readout)
        self._features = self._read.shape(modes, cutoff_dim)
        self.readout = readout if isinstance(readout, str) else self._read
        self.initializer = keras.initializers.get(
            initializer or keras.initializers.RandomNormal(stddev=0.1, seed=seed)
        )
        self._chance = readouts.Chance(self._read.draws(modes), seed)
        self.parameters = None
        if self.trainable_parameters:
            self.parameters = self.add_weight(
                shape=(len(self.trainable_parameters),), initializer=self._start, name="parameters"
            )
        self.built = True

    def _start(self, shape: Any, dtype: Any = None) -> Any:
        drawn = tf.unstack(tf.convert_to_tensor(self.initializer(shape, dtype)))
        names = self.trainable_parameters
        return tf.stack(
            [
                tf.constant(self.initial[name], dtype) if name in self.initial else value
                for name, value in zip(names, drawn, strict=True)
            ]
        )

    def state(self, rows: Any) -> Any:
        """Strawberry Fields' state for (batch, len(inputs)) rows, with a batch axis."""
        rows = tf.cast(tf.convert_to_tensor(rows), self.compute_dtype)
        if rows.shape.rank != 2 or rows.shape[-1] != len(self.inputs):
            raise InputError(
                f"expected rows of shape (batch, {len(self.inputs)}), a column for each of "
                f"{list(self.inputs)}; came {tuple(rows.shape)}"
            )
        arguments = dict(zip(self.inputs, tf.unstack(rows, axis=1), strict=True))
        if self.parameters is not None:
            values = tf.unstack(tf.convert_to_tensor(self.parameters))
            arguments |= dict(zip(self.trainable_parameters, values, strict=True))
        dtype = tf.complex128 if self.compute_dtype == "float64" else tf.complex64
        return programs.state(self.program, arguments, self.cutoff_dim, dtype)

    def call(self, rows: Any) -> Any:
        return self._read(self.state(rows), self._chance.draw(tf.shape(rows)[0]))

    def compute_output_spec(self, rows: Any) -> keras.KerasTensor:
        """See ``keras.Layer``."""
        real = "float64" if self.compute_dtype == "float64" else "float32"
        dtype = {"float32": "complex64", "float64": "complex128"}[real]
        complex_valued = isinstance(self._read, readouts.Ket)
        return keras.KerasTensor(
            (rows.shape[0], *self._features), dtype if complex_valued else real
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "program": programs.as_text(self.program),
            "inputs": list(self.inputs),
            "trainable_parameters": list(self.trainable_parameters),
            "readout": readouts.as_config(self.readout),
            "cutoff_dim": self.cutoff_dim,
            "initial": self.initial,
            "initializer": keras.initializers.serialize(self.initializer),
            "seed": self.seed,
        }


def _roles(
    program: Any, inputs: Sequence[str], trainable: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the parameters that are fed and of those that are trained, checked."""
    free = tuple(program.free_params)
    if not free:
        raise ConfigurationError(
            "the program has no free parameters: nothing could be fed or trained. Make some with "
            "program.params('name') and use them in its gates"
        )
    found = programs.measured(program)
    if found:
        raise ConfigurationError(
            f"the program measures ({found[0]}), which has no gradient; leave that out, and read "
            "the state out: readout='homodyne', say"
        )
    fed = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    if not fed:
        raise ConfigurationError(
            "a layer needs inputs: name the parameters that its input feeds, one for each column"
        )
    rest = tuple(name for name in free if name not in fed)
    trained = rest if trainable is None else tuple(trainable)
    for role, names in (("inputs", fed), ("trainable_parameters", trained)):
        for name in names:
            if name not in free:
                raise ConfigurationError(
                    f"{role}= names {name!r}, which is no free parameter of the program: "
                    f"{nearest(name, free)}"
                )
        if len(set(names)) < len(names):
            raise ConfigurationError(f"{role}= names a parameter twice: {list(names)}")
    both = sorted(set(fed) & set(trained))
    if both:
        raise ConfigurationError(
            f"{both} named as input and as trainable: a parameter is fed or trained, not both"
        )
    left = [name for name in rest if name not in trained]
    if left:
        raise ConfigurationError(
            f"{left} are free parameters of the program, but neither inputs nor trainable: name "
            "them in one of the two, or give the gate a number"
        )
    return fed, trained
