"""``sequential``: the model in place, as if there were no qpool."""

from __future__ import annotations

from typing import Any

from qpool.executors.base import Executor


class SequentialExecutor(Executor):
    """Calls the model itself, in this process. With ``engine="stock"`` qpool's own models run on
    Strawberry Fields as it is; others do so anyway."""

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function = self.model if method == "__call__" else getattr(self.model, method)
        with self._counted(args):
            if self.options.engine != "stock":
                return function(*args, **kwargs)
            from workers.engine.scope import traced_engines

            with traced_engines(False):
                return function(*args, **kwargs)

    def stats(self) -> dict[str, Any]:
        return {"strategy": "sequential", **self._rate()}

    def per_sample_gradients(self, z: Any, cotangent: Any) -> list[Any]:
        from qpool.bridge.losses import of_each_sample

        return of_each_sample(self.model, self.call, z, cotangent)
