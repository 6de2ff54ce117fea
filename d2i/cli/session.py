"""The session of a command that works on Ray, and its progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from d2i.io.progress_bar import ProgressBar

if TYPE_CHECKING:
    from d2i.cluster import Session


@contextmanager
def open_session(
    num_workers: int | None = None,
    ray_address: str | None = None,
    fault: str | None = None,
    *,
    num_producers: int | None = None,
) -> Iterator[tuple[Session, ProgressBar]]:
    """Open a session, and a progress bar that tells of its start.

    Args:
        num_workers: As for `Session`.
        ray_address: As for `Session`.
        fault: The fault to inject, as `--fault` takes it.
        num_producers: As for `Session`.

    Raises:
        ConfigError: If there is no such fault.
    """
    from d2i.cluster import Session
    from d2i.fault_injection import parse_fault

    injected = parse_fault(fault)
    with (
        closing(ProgressBar()) as progress,
        Session(
            num_workers,
            ray_address,
            injected,
            num_producers=num_producers,
            on_start=progress.wait,
        ) as session,
    ):
        yield session, progress
