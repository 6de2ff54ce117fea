"""Objects that the driver and all workers share, wherever they run."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from d2i.cluster.actors import get
from d2i.fault_injection import Fault

ObjectT = TypeVar("ObjectT")


class SharedActor(Generic[ObjectT]):
    """One object that the driver and every worker call, wherever they run.

    It lives as long as the session whose `shared` made it; picklable.
    """

    def __init__(self, target: Any, *, is_remote: bool) -> None:
        self._target = target
        self._is_remote = is_remote
        self._lock = threading.Lock()

    def call(self, method: str, *args: object, **kwargs: object) -> Any:
        """Call a method of the object, one call at a time, and return what it returns."""
        if self._is_remote:
            return get(self._target.call.remote(method, *args, **kwargs))
        with self._lock:
            return getattr(self._target, method)(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the lock."""
        return functools.partial(SharedActor, self._target, is_remote=self._is_remote), ()


def create_remote(value: ObjectT) -> SharedActor[ObjectT]:
    """Create a shared object on the running Ray cluster.

    It is on the driver's node, so that its state is not lost with another node.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # An actor that requests nothing goes to a random node first, which may not know the driver's
    # yet: so it requests a byte. If only its process dies, a new one starts from `value` and goes
    # on.
    here = ray.get_runtime_context().get_node_id()
    beside: Any = NodeAffinitySchedulingStrategy(here, soft=True)
    holder = ray.remote(
        num_cpus=0, memory=1, max_restarts=-1, max_task_retries=-1, scheduling_strategy=beside
    )(_SharedObject)
    return SharedActor(holder.remote(value), is_remote=True)


class _SharedObject:
    """Ray actor that holds a shared object."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def call(self, method: str, *args: object, **kwargs: object) -> Any:
        return getattr(self._value, method)(*args, **kwargs)


@dataclass(frozen=True)
class JobFault:
    """One injected fault, whose passes all workers of a session count together; picklable."""

    fault: Fault
    passes: SharedActor[Fault]

    def trigger_at(self, point: str) -> None:
        """Trigger the fault in this process, if this is its point and its pass."""
        if point == self.fault.point and self.passes.call("is_due", point):
            self.fault.act()
