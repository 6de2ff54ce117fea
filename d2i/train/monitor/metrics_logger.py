"""Logs of a run, written by the first rank: JSON lines, TensorBoard, W&B and the loss chart."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from d2i.config import Recipe, TrainConfig
from d2i.io import storage
from d2i.io.terminal import plain
from d2i.run_dir import (
    MetricsLine,
    ValidationLine,
    append_line,
    read_metrics,
    read_validation,
    truncate_logs_after,
)
from d2i.train.checkpoint.checkpoint_files import Progress
from d2i.train.monitor.chart import plot_losses
from d2i.train.monitor.wandb_logger import WandbLogger

_EVENTS_NAME = "tensorboard"


class MetricsLogger:
    """Writes the logs of one run, as files in its directory.

    Args:
        run_url: The run directory.
        recipe: The run's recipe; it may enable Weights & Biases.
        step: The last step whose line is kept; later ones, of an interrupted attempt, are dropped.
        validation_step: The same for validation losses; `None` means `step`.

    Raises:
        ConfigError: If Weights & Biases is enabled and cannot be used.
    """

    def __init__(
        self, run_url: str, recipe: Recipe, step: int, validation_step: int | None = None
    ) -> None:
        # Imported here: only the first rank needs it, and the import takes a second.
        from torch.utils.tensorboard import SummaryWriter

        self._run_url = run_url
        truncate_logs_after(run_url, step, validation_step)
        # TensorBoard needs a local directory: the run's, or a temporary one copied to the run.
        self._directory = _local_events(run_url)
        self._events = SummaryWriter(str(self._directory), purge_step=step + 1)
        project = recipe.train.wandb_project
        self._wandb = WandbLogger(project, run_url, recipe) if project else None

    def has_metrics(self, step: int) -> bool:
        """Return whether the metrics line of a step exists."""
        return any(line.step == step for line in read_metrics(self._run_url))

    def has_validation(self, step: int) -> bool:
        """Return whether the validation line of a step exists."""
        return any(line.step == step for line in read_validation(self._run_url))

    def metrics(self, line: MetricsLine) -> None:
        """Log a metrics line."""
        append_line(self._run_url, line)
        names = ("loss", "lr", "images_per_s", "data_wait", "mfu")
        values = {f"train/{name}": getattr(line, name) for name in names}
        self._show({name: v for name, v in values.items() if v is not None}, line.step)

    def validation(self, line: ValidationLine) -> None:
        """Log and print a validation loss, and update the chart."""
        append_line(self._run_url, line)
        in_bands = {f"valid/n_{band}": loss for band, loss in line.bands.items()}
        self._show({"valid/loss": line.loss, **in_bands}, line.step)
        bands = "  ".join(f"n {band}: {loss:.4f}" for band, loss in line.bands.items())
        say(f"step {line.step}  validation loss {line.loss:.4f}  (trained weights; {bands})")
        self.plot_losses()

    def _show(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.add(values, step)

    def plot_losses(self) -> None:
        """Plot `loss.png` from the logs, and flush TensorBoard's events."""
        plot_losses(self._run_url)
        self._events.flush()
        self._publish_events()

    def close(self) -> None:
        """Plot a last time, and close TensorBoard and Weights & Biases."""
        self.plot_losses()
        self._events.close()
        self._publish_events()
        if self._wandb:
            self._wandb.close()

    def _publish_events(self) -> None:
        if storage.local_path(self._run_url) is None:
            for path in self._directory.iterdir():
                url = storage.join(self._run_url, _EVENTS_NAME, path.name)
                storage.write_bytes(url, path.read_bytes())


def _local_events(run_url: str) -> Path:
    local = storage.local_path(run_url)
    return local / _EVENTS_NAME if local else Path(tempfile.mkdtemp(prefix=_EVENTS_NAME))


def kept_lines(progress: Progress, config: TrainConfig) -> tuple[int, int]:
    """Return the last steps whose metrics and validation lines a resumed run keeps.

    A run that resumes past its former end drops the lines that it wrote only because it ended: a
    run planned that long from the start would not have them.
    """
    step = progress.step
    if step == config.num_steps:
        return step, step
    is_due = step % config.num_validation_steps == 0
    return step - len(progress.losses), step if is_due else step - 1


def say(line: str) -> None:
    """Print a line of the first rank to stderr, where progress goes."""
    sys.stderr.write(f"{plain(line)}\n")
    sys.stderr.flush()
