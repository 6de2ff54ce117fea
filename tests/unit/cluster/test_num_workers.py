"""Workers are started only for tasks, and on cores that no other worker occupies."""

from __future__ import annotations

import pytest

from d2i.cluster import pipeline
from d2i.cluster.actors import ActorSize

ON_GPU, ON_CPU = ActorSize(1.0, 1.0), ActorSize(1.0, 0.0)


@pytest.mark.parametrize(
    ("size", "num_tasks", "num_built", "expected"),
    [
        (ON_GPU, 100, 0, (8, 2)),
        # At the end of the job, eight consumers occupy their cores, though four have no task.
        (ON_GPU, 4, 8, (8, 2)),
        (ON_GPU, 1, 8, (8, 1)),
        (ON_GPU, 4, 0, (4, 4)),
        (ON_CPU, 100, 0, (8, 8)),
        (ON_CPU, 4, 8, (8, 4)),
    ],
)
def test_producers_take_the_cores_that_consumers_leave(
    monkeypatch: pytest.MonkeyPatch,
    size: ActorSize,
    num_tasks: int,
    num_built: int,
    expected: tuple[int, int],
) -> None:
    monkeypatch.setattr(pipeline, "num_cluster_cores", lambda: 10)
    assert pipeline._num_workers(8, None, size, num_tasks, num_built=num_built) == expected
