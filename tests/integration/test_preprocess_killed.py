"""Jobs killed at fault points and restarted give the same bytes and scores.

`make test` kills at a sample of the points, `make soak` at every one.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest

from d2i.config import BackboneConfig
from d2i.models import build_backbone, save_weights
from d2i.models.model_dir import write_config
from tests.integration.commands import preprocess
from tests.processes import run_d2i, run_process
from tests.shared import SHARED, needs_shared

pytestmark = needs_shared
SOURCE = SHARED / "data" / "mmdialog"
POINTS = (
    *("fetch.picture", "fetch.shard", "encode.images", "ledger.written"),
    *("shard.written", "shard.tar", "shard.index", "shard.commit"),
    *("manifest.checksum", "manifest.written"),
)
# Of each kind one point: before a shard is written, while it is, and after the last one.
SAMPLE = tuple(random.Random(1).choice(kind) for kind in (POINTS[:4], POINTS[4:8], POINTS[8:]))


def files_of(out: Path) -> dict[str, bytes]:
    """Return the files of the data set, without the plan and the ledger, which holds times."""
    return {path.name: path.read_bytes() for path in (out / "test").iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "data"
    preprocess("mmdialog", SOURCE, out, "--split", "test", *settings)
    return out


@pytest.mark.parametrize(
    "points",
    [
        pytest.param(SAMPLE, id="sample"),
        pytest.param(POINTS, id="every point", marks=pytest.mark.soak),
    ],
)
def test_resubmitted_preprocess_resumes_after_sigkill(
    tmp_path: Path, data: Path, settings: list[str], points: tuple[str, ...]
) -> None:
    """Killed at one fault point after the other; each attempt resumes the one before."""
    out = tmp_path / "data"
    for point in points:
        killed = run_process(
            *("preprocess", "--corpus", "mmdialog", "--source", SOURCE, "--out", out),
            *("--recipe", "demo", "--workers", "0", "--split", "test", *settings),
            *("--fault", f"{point}:kill:1"),
        )
        assert killed.returncode == -signal.SIGKILL, (point, killed.stderr)
    again = preprocess("mmdialog", SOURCE, out, "--split", "test", *settings)
    assert again["test"]["num_written"] == 5
    assert files_of(out) == files_of(data)


# `make test` kills the evaluation of the demo's network, in `test_evaluation.py`.
@pytest.mark.soak
def test_restarted_evaluation_keeps_finished_tasks_after_sigkill(
    tmp_path: Path, data: Path
) -> None:
    sizes = BackboneConfig(
        name="uvit-s",
        latent_scale=1.0,
        latent_size=8,
        patch_size=2,
        dim=32,
        depth=3,
        num_heads=2,
        text_dim=32,
        num_text_tokens=77,
    )
    network = tmp_path / "network"
    save_weights(build_backbone(sizes.name, **sizes.overrides()), network / "model.safetensors")
    write_config(network, sizes)

    def command(out: str) -> list[Any]:
        return [
            *("eval", "--system", "uvit-s", "--weights", network, "--data", data),
            *("--out", tmp_path / out, "--save-images", "all", "--json"),
            *("--set", "sample.compute_batch_size=2"),
        ]

    killed = run_process(*command("killed"), "--fault", "eval.task_written:kill:2")
    assert killed.returncode == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("killed/tasks/*.npz")}
    assert len(finished) == 2
    assert run_d2i(*command("killed"))["scores"] == run_d2i(*command("whole"))["scores"]
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
