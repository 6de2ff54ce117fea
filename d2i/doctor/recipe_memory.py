"""Check of a recipe: the memory that its training takes, without data and before it is started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from d2i.doctor.check import Check, first_line, run_checks
from d2i.errors import D2IError


def memory_checks(
    recipe: str, settings: Sequence[str], num_ranks: int, memory_gb: float | None
) -> Iterator[Check]:
    """Check that a training fits the device of each rank.

    Args:
        recipe: The recipe's name, file, or module:function.
        settings: As `--set` takes them.
        num_ranks: Number of ranks.
        memory_gb: Memory of a GPU, in 1e9 bytes; by default that of this machine's device.

    Yields:
        One `Check`. Nothing is raised: a recipe that cannot be read is a `fail` row.
    """
    name = f"memory of {recipe}"
    return run_checks([(name, lambda: _check_memory(name, recipe, settings, num_ranks, memory_gb))])


def _check_memory(
    name: str, recipe: str, settings: Sequence[str], num_ranks: int, memory_gb: float | None
) -> Check:
    import torch

    from d2i.recipes import resolve_recipe
    from d2i.train.memory import MemoryReckoner, device_memory, memory_problem

    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu or memory_gb is not None else "cpu")
    try:
        resolved = resolve_recipe(recipe, settings)
        reckoner = MemoryReckoner(num_ranks, device.type)
        memory = reckoner.reckon(resolved)
        available = device_memory(device, num_ranks) if memory_gb is None else int(memory_gb * 1e9)
        if memory.total <= available:
            return Check(name, "ok", memory.describe())
        found = reckoner.settings_that_fit(resolved, available)
    except D2IError as err:
        detail, _, fix = first_line(err).rpartition("; ")
        return Check(name, "fail", detail, fix)
    detail, _, fix = str(memory_problem(memory, available, found)).rpartition("; ")
    return Check(name, "warn", detail.removeprefix("memory: "), fix)
