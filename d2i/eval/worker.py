"""The evaluation worker: draws and measures one group of test instances at a time."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from d2i import storage
from d2i.cluster import device_of_worker
from d2i.config import Recipe
from d2i.dialog import key_order_hash
from d2i.encoders import Encoders, load_encoders
from d2i.encoders.bundle import versions
from d2i.errors import ConfigError, DataError
from d2i.eval.extractors import build_extractor
from d2i.eval.sampler import Sampler
from d2i.eval.systems import SystemSpec
from d2i.fault import Fault
from d2i.pictures import crop_to_square, decode_picture, png_bytes
from d2i.settle import settle
from d2i.shards import ShardReader

SaveImages = Literal["all", "sample", "none"]
# Of `--save-images sample`, about one picture in this many, chosen by key hash.
_SAMPLE_SHARE = 64


@dataclass(frozen=True)
class EvalTask:
    """A group of instances, by their index in the data set."""

    number: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class EvalWorkerBuilder:
    """Builds the worker where it runs; picklable."""

    recipe: Recipe
    system: SystemSpec
    data_url: str
    out_url: str
    save_images: SaveImages
    fault: Fault | None = None

    def __call__(self) -> EvalWorker:
        """Load the network, the encoders and the feature extractor."""
        device = device_of_worker()
        worker = EvalWorker(self, load_encoders(self.recipe.encoders, device), device)
        worker.settle()
        return worker


class EvalWorker:
    """Draws pictures and measures them; pictures stay in memory from sampler to metric."""

    def __init__(self, builder: EvalWorkerBuilder, encoders: Encoders, device: str) -> None:
        self._builder = builder
        self._encoders = encoders
        self._reader = ShardReader(builder.data_url)
        self._extractor = build_extractor(builder.recipe, encoders, device)
        self._sampler = Sampler(
            builder.system.backbone,
            encoders.vae,
            builder.recipe.sample,
            self._reader.empty_text,
            device,
        )
        self._device = device

    def run(self, task: EvalTask) -> int:
        """Do one group, keep its features (and pictures as asked); return how many it has."""
        keys = [self._reader.keys[i] for i in task.indices]
        text = self._reader.read(task.indices, members=("text",))["text"]
        drawn = self._sampler.draw(keys, text)
        true = np.stack([self._true_picture(i) for i in task.indices])
        self._save_pictures(task, keys, drawn)
        storage.write_bytes(
            task_url(self._builder.out_url, task.number),
            npz_bytes(self._measure(drawn, true) | {"keys": np.array(keys)}),
        )
        if self._builder.fault:
            self._builder.fault.reach("eval.task_written")
        return len(keys)

    def settle(self) -> None:
        """Write what only a worker knows of the metric card, or check that it is the same.

        Raises:
            ConfigError: If earlier pictures were drawn by other weights, versions or devices.
        """
        mine = {
            "weights": {"backbone": self._sampler.hash} | self._encoders.hashes(),
            "extractor": self._extractor.name,
            "versions": versions(),
            "device": self._device,
        }
        if differences := settle(describe_url(self._builder.out_url), mine):
            raise ConfigError(
                f"{self._builder.out_url} holds pictures drawn otherwise: got "
                f"{'; '.join(differences[:3])}; choose another --out"
            )

    def _true_picture(self, index: int) -> NDArray[np.uint8]:
        data = self._reader.read_image(index)
        if data is None:
            raise DataError(
                f"{self._reader.keys[index]} has no picture in the shards; expected its source "
                "bytes; prepare the data with --set preprocess.keep_images=always"
            )
        picture = decode_picture(data, self._builder.recipe.image)
        return np.asarray(crop_to_square(picture.image, self._builder.recipe.image.resolution))

    def _measure(
        self, drawn: NDArray[np.uint8], true: NDArray[np.uint8]
    ) -> dict[str, NDArray[Any]]:
        size = self._encoders.compute_batch_size
        of_drawn, of_true = self._extractor.extract(drawn), self._extractor.extract(true)
        measured = {
            "features": of_drawn.features,
            "real_features": of_true.features,
            "embeddings": self._encoders.clip_image.encode(drawn, size),
            "real_embeddings": self._encoders.clip_image.encode(true, size),
        }
        return measured if of_drawn.logits is None else measured | {"logits": of_drawn.logits}

    def _save_pictures(self, task: EvalTask, keys: Sequence[str], drawn: NDArray[np.uint8]) -> None:
        chosen = [
            (key, png_bytes(pixels, {"key": key, "system": self._builder.system.name}))
            for key, pixels in zip(keys, drawn, strict=True)
            if _is_saved(key, self._builder.save_images)
        ]
        if chosen:
            url = storage.join(self._builder.out_url, "images", f"{task.number:06d}.tar")
            storage.write_bytes(url, _tar_bytes(chosen))


def task_url(out_url: str, number: int) -> str:
    """Return where the features of one finished group lie."""
    return storage.join(out_url, "tasks", f"{number:06d}.npz")


def has_finished_tasks(out_url: str) -> bool:
    """Say whether any group of this evaluation was finished."""
    names = storage.list_names(storage.join(out_url, "tasks"))
    return any(name.endswith(".npz") for name in names)


def describe_url(out_url: str) -> str:
    """Return where the workers keep their part of the metric card."""
    return storage.join(out_url, "tasks", "card.json")


def npz_bytes(arrays: dict[str, NDArray[Any]]) -> bytes:
    """Encode named arrays as one npz."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


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
