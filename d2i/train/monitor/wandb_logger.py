"""Logging to Weights & Biases, only on request; the only module that imports wandb."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from typing import Any

from d2i.config import Recipe
from d2i.errors import ConfigError
from d2i.io import storage


class WandbLogger:
    """Logs to one Weights & Biases run, the same one when this run resumes.

    Only the recipe, the metrics and the name of the run directory are sent: no code, no console
    output, no name of this machine.

    Args:
        project: The Weights & Biases project.
        run_url: The run directory; a hash of its URL is the run id.
        recipe: The run's recipe.

    Raises:
        ConfigError: If wandb is not installed or not logged in.
    """

    def __init__(self, project: str, run_url: str, recipe: Recipe) -> None:
        url, local = storage.resolve(run_url), storage.local_path(run_url)
        try:
            import wandb
        except ImportError as err:
            raise ConfigError(
                f"train.wandb_project is {project}: {err}; run pip install wandb, or leave the "
                "setting out"
            ) from err
        try:
            self._run: Any = wandb.init(
                project=project,
                id=hashlib.sha256(url.encode()).hexdigest()[:16],
                name=url.rpartition("/")[2],
                resume="allow",
                dir=str(local or tempfile.mkdtemp(prefix="wandb")),
                config=recipe.model_dump(mode="json"),
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    disable_git=True,
                    disable_code=True,
                    x_disable_meta=True,
                    x_disable_machine_info=True,
                    x_disable_stats=True,
                    x_save_requirements=False,
                    host="",
                ),
            )
        except wandb.errors.Error as err:
            raise ConfigError(
                f"train.wandb_project is {project}: {' '.join(str(err).split())} Expected "
                "write access to the project; run wandb login, or set WANDB_MODE=offline"
            ) from err

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Send the values of a step; a step that is already there is not changed."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Send the remaining values and end the run."""
        self._run.finish()
