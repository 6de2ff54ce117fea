"""The evaluation worker: generates and measures the images of one task at a time."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from d2i.cluster import JobFault, device_of_worker
from d2i.config import Recipe
from d2i.dialog import key_order_hash
from d2i.encoders import Encoders, load_encoders
from d2i.encoders.bundle import versions
from d2i.encoders.data_fingerprint import check_encoder_hashes
from d2i.errors import ConfigError, DataError
from d2i.eval.features.feature_computer import FeatureComputer, generation_rows
from d2i.eval.prompts import ContextMode, PromptReader
from d2i.eval.system import Generation, SystemContext, SystemSpec
from d2i.eval.systems import build_system
from d2i.eval.tasks import EvalTask, images_path, images_url, write_task
from d2i.images.decode import png_bytes
from d2i.io import storage
from d2i.io.checksums import sha256_of
from d2i.io.config_lock import lock_or_diff
from d2i.shards import ShardReader

SaveImages = Literal["all", "sample", "none"]
# `--save-images sample` saves about one image in this many, chosen by key hash.
_SAMPLE_SHARE = 64


@dataclass(frozen=True)
class TaskResult:
    """Number of images that a task generated, and its failures by reason."""

    num_generated: int
    failures: Counter[str]


@dataclass(frozen=True)
class EvalWorkerBuilder:
    """Builds the worker in the process where it runs; picklable."""

    recipe: Recipe
    system: SystemSpec
    data_url: str
    out_url: str
    context: ContextMode
    save_images: SaveImages
    fault: JobFault | None = None
    open_shards: Callable[[str], ShardReader] = ShardReader

    def __call__(self) -> EvalWorker:
        """Load the system, the encoders and the feature extractor.

        Raises:
            CheckpointError: If one cannot be loaded, or the data set was made by other encoders.
        """
        device = device_of_worker()
        worker = EvalWorker(self, load_encoders(self.recipe.encoders, device), device)
        worker.lock_metric_card()
        return worker


class EvalWorker:
    """Generates images and measures them; images stay in memory from sampler to metric."""

    def __init__(self, builder: EvalWorkerBuilder, encoders: Encoders, device: str) -> None:
        self._builder, self._encoders, self._device = builder, encoders, device
        self._reader = builder.open_shards(builder.data_url)
        hashes = encoders.hashes()
        if builder.recipe.text.encode == "on_the_fly":
            # Then the stored text, and what encoded it, are not used.
            hashes.pop("clip_text", None)
        check_encoder_hashes(hashes, self._reader.manifest, self._reader.url)
        self._prompts = PromptReader(self._reader, builder.recipe.text, builder.context)
        self._measurer = FeatureComputer(builder.recipe, encoders, self._reader, device)
        self._system = build_system(
            SystemContext(
                builder.system,
                builder.recipe,
                encoders,
                self._reader.keys,
                device,
                builder.open_shards,
            )
        )

    def run(self, task: EvalTask) -> TaskResult:
        """Run one task: store its features, save images as configured, return the counts."""
        keys = [self._reader.keys[i] for i in task.indices]
        generations = self._system.generate([self._prompts.read(i) for i in task.indices])
        if len(generations) != len(keys):
            raise DataError(
                f"{self._builder.system.name} returned {len(generations)} generations for "
                f"{len(keys)} prompts; expected one per prompt: an image, or the reason why there "
                "is none"
            )
        self._trigger_at("eval.task_drawn")
        images = {
            key: self._measurer.fit(generation.pixels)
            for key, generation in zip(keys, generations, strict=True)
            if generation.pixels is not None
        }
        saved = self._save_images(task, images)
        self._trigger_at("eval.pictures_written")
        arrays = self._measure(task, keys, generations, images)
        write_task(self._builder.out_url, task, arrays, saved)
        self._trigger_at("eval.task_written")
        reasons = Counter(
            generation.reason for generation in generations if generation.pixels is None
        )
        return TaskResult(len(images), reasons)

    def lock_metric_card(self) -> None:
        """Write the worker's part of the metric card, or check that it matches an existing one.

        Raises:
            ConfigError: If earlier images were generated with other weights, versions or devices.
        """
        mine = {
            "weights": dict(self._system.described) | self._encoders.hashes(),
            **self._measurer.describe(),
            "versions": versions(),
            "device": self._device,
            "real": self._measurer.describe_real(self._device),
        }
        if differences := lock_or_diff(describe_url(self._builder.out_url), mine):
            raise ConfigError(
                f"{self._builder.out_url} has images generated with other weights, versions or "
                f"devices: got {'; '.join(differences[:3])}; choose another --out"
            )

    def _trigger_at(self, point: str) -> None:
        if self._builder.fault:
            self._builder.fault.trigger_at(point)

    def _measure(
        self,
        task: EvalTask,
        keys: Sequence[str],
        generations: Sequence[Generation],
        images: dict[str, NDArray[np.uint8]],
    ) -> dict[str, NDArray[Any]]:
        features = self._measurer.measure_generated(np.stack([*images.values()])) if images else {}
        lines = [self._prompts.read_dialog(index) for index in task.indices]
        return {
            "keys": np.array(keys),
            **generation_rows(generations),
            **self._measurer.measure_real(task.indices),
            **self._measurer.measure_text(lines),
            **features,
        }

    def _save_images(self, task: EvalTask, images: dict[str, NDArray[np.uint8]]) -> dict[str, str]:
        """Save the images that `save_images` selects; return the sha256 of their tar, by path."""
        chosen = [
            (key, png_bytes(pixels, {"key": key, "system": self._builder.system.name}))
            for key, pixels in images.items()
            if _is_saved(key, self._builder.save_images)
        ]
        if not chosen:
            return {}
        data = _tar_bytes(chosen)
        storage.write_bytes(images_url(self._builder.out_url, task), data)
        return {images_path(task): sha256_of(data)}


def describe_url(out_url: str) -> str:
    """Return the URL of the workers' part of the metric card."""
    return storage.join(out_url, "tasks", "card.json")


def _is_saved(key: str, save_images: SaveImages) -> bool:
    if save_images == "sample":
        return key_order_hash(key, 0) % _SAMPLE_SHARE == 0
    return save_images == "all"


def _tar_bytes(files: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, data in files:
            info = tarfile.TarInfo(f"{key}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
