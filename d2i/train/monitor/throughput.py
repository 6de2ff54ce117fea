"""Training speed: images/s, share of time waiting for data, MFU, time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from d2i.config import BackboneConfig
from d2i.models.model_dir import build_untrained
from d2i.models.registry import family_of_backbone
from d2i.run_dir import MetricsLine

# Dense bf16 and fp16 peaks of NVIDIA's data sheets, FLOP/s, by a part of the device's name.
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "A10": 125e12,
    "V100": 125e12,
}


class Throughput:
    """Measures speed and time waiting for data since the last metrics line.

    Args:
        step: The step that the run starts or resumes from.
        elapsed_s: Seconds of training before it.
    """

    def __init__(self, step: int, elapsed_s: float) -> None:
        self._started = time.monotonic() - elapsed_s
        self._line_started = time.monotonic()
        self._line_step = step
        self._waited_s = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, including those before an interruption."""
        return time.monotonic() - self._started

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        started = time.monotonic()
        yield
        self._waited_s += time.monotonic() - started

    def next_line(self, step: int) -> tuple[float, float]:
        """Return the speed since the last line, and begin the next line.

        Returns:
            Steps/s, and the share of time spent waiting for data, 0 to 1.
        """
        now = time.monotonic()
        seconds = max(now - self._line_started, 1e-9)
        rate, waited = (step - self._line_step) / seconds, self._waited_s / seconds
        self._line_started, self._line_step, self._waited_s = now, step, 0.0
        return rate, waited


def count_flops(config: BackboneConfig) -> int:
    """Return the FLOP of one image, forward and backward: three times those of the forward pass.

    A multiply-add counts as two; recomputation is not counted (docs/models.md, Work).
    """
    with torch.device("meta"):
        network: Any = build_untrained(config).requires_grad_(False)
    return 3 * family_of_backbone(config.name).flops(network)


def peak_images_per_s(
    config: BackboneConfig, precision: str, device: torch.device, num_devices: int
) -> float | None:
    """Return the images/s that devices would train on at their peak; None if that is unknown."""
    peak = peak_flops(device, precision)
    return None if peak is None else num_devices * peak / count_flops(config)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return a device's peak FLOP/s in a precision; None if unknown."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def progress_line(line: MetricsLine, num_steps: int, global_batch_size: int) -> str:
    """Return the progress line that the first rank prints."""
    left_s = (num_steps - line.step) * global_batch_size / max(line.images_per_s, 1e-9)
    mfu = "n/a" if line.mfu is None else f"{line.mfu:.0%}"
    return (
        f"step {line.step}/{num_steps}  loss {line.loss:.4f}  {line.images_per_s:.0f} images/s  "
        f"data wait {line.data_wait or 0:.1%}  MFU {mfu}  {_duration(left_s)} left"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
