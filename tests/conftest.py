"""Environment of every test: no network, no telemetry, this environment's programs on PATH."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hypothesis import settings

# Subprocesses (the deepspeed launcher, Ray's workers) inherit these. albumentations, which
# img2dataset imports, checks for updates over the network unless this is disabled. torch's idle
# threads spin by default; where tests share the cores, that takes longer than the work itself.
os.environ.update(
    HF_HUB_OFFLINE="1",
    NO_ALBUMENTATIONS_UPDATE="1",
    OMP_WAIT_POLICY="PASSIVE",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_USAGE_STATS_ENABLED="0",
    TOKENIZERS_PARALLELISM="false",
    WANDB_MODE="disabled",
)
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

# Every run uses the same examples, so a failure is reproducible. Examples have no deadline, because
# a shared machine may pause; the test as a whole has a timeout.
settings.register_profile("d2i", deadline=None, derandomize=True)
settings.load_profile("d2i")
