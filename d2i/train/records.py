"""What the first rank keeps of a run while it goes on: lines, TensorBoard, a chart, pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from d2i.runs import MetricsLine, ValidationLine, append_line, keep_lines_until
from d2i.train.chart import draw_chart

_EVENTS_NAME = "tensorboard"


class Records:
    """The records of one run, as files in its folder.

    Args:
        run_dir: The run directory.
        step: The step that the run goes on from; later lines of a cut off attempt are dropped.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        # Imported here: of all ranks only the first one needs it, and it takes a second.
        from torch.utils.tensorboard import SummaryWriter

        self._run_dir = run_dir
        keep_lines_until(run_dir, step)
        self._events = SummaryWriter(str(run_dir / _EVENTS_NAME), purge_step=step + 1)

    def metrics(self, line: MetricsLine) -> None:
        """Keep the line of some steps."""
        append_line(self._run_dir, line)
        for name in ("loss", "lr", "images_per_s", "data_wait", "mfu"):
            value = getattr(line, name)
            if value is not None:
                self._events.add_scalar(f"train/{name}", value, line.step)

    def validation(self, line: ValidationLine) -> None:
        """Keep a validation loss, and draw the chart anew."""
        append_line(self._run_dir, line)
        self._events.add_scalar("valid/loss", line.loss, line.step)
        for band, loss in line.bands.items():
            self._events.add_scalar(f"valid/n_{band}", loss, line.step)
        bands = "  ".join(f"n {band}: {loss:.4f}" for band, loss in line.bands.items())
        say(f"step {line.step}  validation loss {line.loss:.4f}  ({bands})")
        self.draw()

    def draw(self) -> None:
        """Draw `loss.png` out of what is kept, and hand TensorBoard what it has not seen."""
        draw_chart(self._run_dir)
        self._events.flush()

    def close(self) -> None:
        """Draw for the last time."""
        self.draw()
        self._events.close()


def record_keys(run_dir: Path, rank: int, step: int, keys: Sequence[str]) -> None:
    """Append the keys of a rank's micro batch to `keys/rank-N.jsonl`."""
    path = run_dir / "keys" / f"rank-{rank}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"step": step, "keys": list(keys)}) + "\n")


def say(line: str) -> None:
    """Print a line of the first rank to stderr, where progress goes."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
