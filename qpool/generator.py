"""``parallelize``: a model whose call runs in the pool.

The pooled object *is* the model for everything but the pooled methods: an instance of a subclass
of the model's class that shares the model's ``__dict__``. So isinstance, attributes (read and
written), Keras's tracking and checkpoint keys are the model's own, and no list of things to
forward can be incomplete. Owns that object, and what may become one.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qpool.bridge.arguments import argument_names
from qpool.executors import Options, executor_class
from qpool.handle import Handle, drop_traces
from qpool.pooled import ParallelGenerator, pooled_class
from workers import sf_compat
from workers.errors import ConfigurationError, ModelError, nearest
from workers.replica import functions

#: Engines that a replica can hold.
_ENGINES = ("traced", "stock")


def parallelize(
    model: Any,
    workers: int | None = None,
    strategy: str = "auto",
    *,
    tile: int | None = None,
    threads: int = 1,
    start_method: str | None = None,
    pin: bool | None = None,
    engine: str = "traced",
    methods: tuple[str, ...] | list[str] | str = (),
    sharded: tuple[str, ...] | list[str] | str = (),
    pool: Any = None,
    timeout: float | None = None,
    seed: int = 0,
    address: str | None = None,
    nodes: int | None = None,
    devices: Sequence[str] | None = None,
) -> Any:
    """Put a pool of processes behind a model's call.

    Args:
        model: callable on z (or with ``.generate(z)``) with ``.trainable_variables``: a plain
            class, a tf.Module, a Keras layer or model; or a function of z, with the variables and
            engines that it finds in its module or around it; or a factory, called without
            arguments here and in every worker, that makes one. What is called with z, or has
            ``methods`` to pool, may do without variables (a simulation that trains nothing).
        workers: processes; default: the physical cores this process may use. With ``"ray"``: of
            each node, at most.
        strategy: ``"processes"``, ``"threads"`` (the same tiles in this process), ``"cpu_batch"``
            (compiled, in this process, the whole batch at once), ``"sequential"`` (the model in
            place), ``"ray"`` (a pool on each node of a Ray cluster), or ``"auto"``: the fastest of
            those on this machine, measured at the first call; where
            ``workers`` or ``pool`` is given, processes.
        tile: rows computed at once, a power of two; default: from the model and the batch.
        threads: threads and cores of each worker.
        start_method: ``"forkserver"`` or ``"spawn"``; default: the best of this system.
        pin: pin each worker to its own cores: True, False, or None: if no other pool of this
            machine is pinned to them.
        engine: ``"traced"``: the model's Strawberry Fields engines are replaced by compiled ones
            and the call is compiled where it can be (``stats()`` says how far it got, and why not
            further; what a compiled call does beside computing, printing for one, it does
            once). ``"stock"``: Strawberry Fields as it is.
        methods: further methods to pool, beside those that the model itself names in an attribute
            ``pooled_methods``. Their first argument is sharded along its leading axis.
        sharded: names of further arguments to shard with the first. All others go to every
            worker as constants.
        pool: a ``qpool.Pool``, or a ``qpool.Cluster`` of Ray's, to share, in place of one
            of the model's own.
        timeout: seconds a worker may go without finishing a tile before it is replaced; None:
            from how long its tiles have taken (see ``qpool.Pool``).
        seed: start of the random draws of a model that draws.
        address: the address of a Ray cluster, as Ray takes it, for ``strategy="ray"``; default:
            what RAY_ADDRESS says, or a cluster of this machine alone.
        nodes: how many of the cluster's nodes to use at most.
        devices: what each worker computes on, in place of ``workers``: ``["cpu:0-13", "gpu:0"]``
            is a worker on each of fourteen cores and one on a GPU. Shards follow measured speed;
            with devices of several kinds the same bits are not promised.

    Returns:
        An object that is the model (same attributes, variables and type) with its call and its
        ``generate`` pooled, and with ``warm_up``, ``loss_and_gradient``, ``per_sample_gradients``,
        ``stats``, ``close``.
        What the model returns for z of shape (batch, ...), it returns, in the same dtype; every
        output has a leading batch axis.

    Raises:
        ModelError, ShippingError, ConfigurationError, StartupError: before any call.
    """
    sf_compat.install()
    strategy = _where(strategy, pool, address, nodes, devices)
    executor_class(strategy)
    if engine not in _ENGINES:
        raise ConfigurationError(f"unknown engine {engine!r}: {nearest(str(engine), _ENGINES)}")
    model, factory = _model_and_factory(model, _names(methods))
    if isinstance(model, ParallelGenerator):
        raise ModelError("the model is pooled already; parallelize the original")
    pooled_methods = _pooled_methods(model, _names(methods))
    _check_sharded(model, pooled_methods, _names(sharded))
    options = Options(
        workers=workers,
        threads=threads,
        tile=tile,
        start_method=start_method,
        pin=pin,
        engine=engine,
        sharded=_names(sharded),
        pool=pool,
        timeout=timeout,
        seed=seed,
        factory=factory,
        address=address,
        nodes=nodes,
        devices=None if devices is None else _names(devices),
    )
    handle = Handle(model, pooled_methods, strategy, options)
    pooled = _share(model, handle)
    handle.executor()
    return pooled


def create_parallel_generator(
    generator_class: Callable[..., Any],
    *args: Any,
    workers: int | None = None,
    strategy: str = "auto",
    **kwargs: Any,
) -> Any:
    """Make a generator and parallelize it.

    Keyword arguments that ``parallelize`` has go there, all others to ``generator_class``;
    those that both have (``seed``) go to both.

        qpool.create_parallel_generator(QuantumSFGenerator, n_modes=2, latent_dim=4, workers=14)

    Raises:
        ConfigurationError, ModelError: as ``parallelize``.
    """
    ours = set(inspect.signature(parallelize).parameters) - {"model"}
    options = {name: kwargs.pop(name) for name in list(kwargs) if name in ours}
    with contextlib.suppress(TypeError, ValueError):
        theirs = inspect.signature(generator_class).parameters
        kwargs |= {name: value for name, value in options.items() if name in theirs}
    sf_compat.install()
    generator = generator_class(*args, **kwargs)
    return parallelize(generator, workers, strategy, **options)


def _where(
    strategy: str,
    pool: Any,
    address: str | None,
    nodes: int | None,
    devices: Sequence[str] | None,
) -> str:
    """The strategy, where options say that only one can be meant."""
    of_cluster = type(pool).__name__ == "Cluster" or not (address is None and nodes is None)
    if pool is not None and (address, nodes) != (None, None):
        raise ConfigurationError("address= and nodes= are a Cluster's own: leave out them or pool=")
    if of_cluster and strategy not in ("auto", "ray"):
        raise ConfigurationError(
            f"address=, nodes= and a Cluster are of Ray, and strategy={strategy!r} has none: "
            "expected 'ray'"
        )
    if devices is not None and strategy not in ("auto", "processes", "ray"):
        raise ConfigurationError(
            f"devices= are of workers, and strategy={strategy!r} has none: expected 'processes' or "
            "'ray'"
        )
    return "ray" if of_cluster else strategy


def _model_and_factory(
    given: Any, methods: tuple[str, ...]
) -> tuple[Any, Callable[[], Any] | None]:
    """The model itself, and the factory it came from if it came from one. A function of a batch is
    a model. What has the methods that were named, or is called with a batch, needs no variables."""
    named = all(hasattr(given, name) for name in methods or ("generate",))
    if isinstance(given, type) or not (named or hasattr(given, "trainable_variables")):
        if not callable(given):
            raise ModelError(
                f"{type(given).__name__} has no trainable_variables, and is not a factory "
                "or a function: expected an object with .trainable_variables that is callable on "
                "z or has .generate(z), or methods=(...) that it has"
            )
        if not functions.takes_arguments(given):
            made = given()
            if functions.is_function(given) and _is_a_result(made):
                return functions.FunctionModel(given), None
            model = functions.as_model(made)
            if not hasattr(model, "trainable_variables"):
                raise ModelError(
                    f"the factory made a {type(model).__name__}, which has no trainable_variables"
                )
            return model, given
        if isinstance(given, type):
            raise ModelError(
                f"{given.__name__} is a class that cannot be called without arguments: pass an "
                f"object of it, or lambda: {given.__name__}(...)"
            )
        if functions.is_function(given):
            return functions.FunctionModel(given), None
    return given, None


def _is_a_result(made: Any) -> bool:
    """Tensors, as a cost function returns that is called without arguments; and no model."""
    import tensorflow as tf

    return all(isinstance(part, tf.Tensor) for part in tf.nest.flatten(made))


def _pooled_methods(model: Any, extra: tuple[str, ...]) -> tuple[str, ...]:
    own = [name for name in ("__call__", "generate") if callable(getattr(model, name, None))]
    extra = (*getattr(model, "pooled_methods", ()), *extra)
    for name in extra:
        if not callable(getattr(model, name, None)):
            raise ConfigurationError(
                f"methods= names {name!r}, which {type(model).__name__} does not have: "
                f"{nearest(name, _public_methods(model))}"
            )
    if not own and not extra:
        known = ", ".join(_public_methods(model)) or "no method"
        raise ModelError(
            f"{type(model).__name__} is not callable and has no .generate(z): expected one of "
            f"them, or methods=(...) to say what to pool. It has {known}"
        )
    return tuple(dict.fromkeys((*own, *extra)))


def _public_methods(model: Any) -> list[str]:
    names = (name for name in dir(model) if not name.startswith("_"))
    return [name for name in names if callable(getattr(model, name, None))]


def _check_sharded(model: Any, methods: tuple[str, ...], sharded: tuple[str, ...]) -> None:
    """Each name must be an argument of a pooled method: else it would go as a constant, unseen."""
    known = {name for method in methods for name in argument_names(model, method)}
    for name in sharded:
        if name not in known:
            raise ConfigurationError(
                f"sharded= names {name!r}, which is no argument of {', '.join(methods)}: "
                f"{nearest(name, tuple(known))}"
            )


def _share(model: Any, handle: Handle) -> Any:
    """An instance of a subclass of the model's class, over the model's own ``__dict__``."""
    cls = type(model)
    slots = [name for base in cls.__mro__ for name in _names(vars(base).get("__slots__", ()))]
    if set(slots) - {"__dict__", "__weakref__"} or not hasattr(model, "__dict__"):
        raise ModelError(
            f"{cls.__name__} keeps attributes in __slots__ {slots}; expected them in a __dict__. "
            "Drop __slots__"
        )
    hidden = [name for name in (*handle.methods, "generate") if name in vars(model)]
    if hidden:
        raise ModelError(
            f"instance attributes {hidden} hide the methods that would be pooled; make them "
            "methods of the class"
        )
    added = ("warm_up", "per_sample_gradients", "loss_and_gradient", "stats", "close")
    clashes = [name for name in added if hasattr(model, name)]
    if clashes:
        warnings.warn(
            f"{cls.__name__} has its own {clashes}, which the pooled object's come in the place "
            "of; rename them",
            UserWarning,
            stacklevel=3,
        )
    pooled: Any = object.__new__(pooled_class(cls, handle.methods))  # type: ignore[arg-type]
    object.__setattr__(pooled, "__dict__", model.__dict__)
    object.__setattr__(pooled, "_qpool", handle)
    drop_traces(model)
    return pooled


def _names(slots: str | Iterable[str]) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)
