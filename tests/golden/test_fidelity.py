"""FID, KID and IS equal torch-fidelity's own on real photographs, by its own network.

Its published weights cannot be had here: random ones in its own file form prove that the same
pixels reach the same network and the same functions; the numbers of `test_metrics` prove those.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity import feature_extractor_inceptionv3 as inception

from d2i.config import MetricsConfig
from d2i.errors import DataError
from d2i.eval.features.extractors import InceptionExtractor
from d2i.eval.metrics.compute import InceptionFeatures, compute_scores
from d2i.images.decode import crop_to_square
from tests.golden.test_metrics import FID, IS, KID
from tests.shared import SHARED, needs_shared

NUM_IMAGES = 8


class Unfilled(inception.FeatureExtractorInceptionV3):
    """The network before its weights are loaded."""

    def load_state_dict(self, *_: object) -> None:  # type: ignore[override]
        """Keep what it was built with."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        network = Unfilled("random", ["2048"])
    for name, tensor in network.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(tensor)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_crops(photographs: list[Path], directory: Path) -> np.ndarray:
    directory.mkdir()
    crops = []
    for number, path in enumerate(photographs):
        with Image.open(path) as photograph:
            crop = crop_to_square(photograph.convert("RGB"), 96)
        crop.save(directory / f"{number:03d}.png")
        crops.append(np.asarray(crop))
    return np.stack(crops)


@needs_shared
def test_fid_kid_is_match_torch_fidelity_on_photographs(tmp_path: Path, weights: Path) -> None:
    photographs = sorted((SHARED / "data" / "photos").rglob("*.jpg"))
    true = write_crops(photographs[::40][:NUM_IMAGES], tmp_path / "true")
    drawn = write_crops(photographs[7::40][:NUM_IMAGES], tmp_path / "drawn")
    common = {
        "feature_extractor_weights_path": str(weights),
        "cuda": False,
        "batch_size": NUM_IMAGES,
        "save_cpu_ram": True,
        "cache": False,
        "verbose": False,
    }
    directories = {"input1": str(tmp_path / "true"), "input2": str(tmp_path / "drawn")}
    expected = torch_fidelity.calculate_metrics(
        **directories, **common, fid=True, kid=True, kid_subsets=10, kid_subset_size=6
    )
    # The Inception Score is that of the first directory.
    expected |= torch_fidelity.calculate_metrics(
        input1=directories["input2"], **common, isc=True, isc_splits=4
    )
    config = MetricsConfig(extractor_weights=str(weights), extractor_sha256=sha256(weights)[:8])
    # Batches that the images do not fill, another size than the peer's.
    extractor = InceptionExtractor(config, 3, "cpu")
    of_true, of_drawn = extractor.extract(true), extractor.extract(drawn)
    pairs = np.eye(NUM_IMAGES, dtype=np.float32)
    scores = compute_scores(
        of_true.features,
        of_drawn.features,
        of_drawn.logits,
        pairs,
        pairs,
        kid_subsets=10,
        kid_subset_size=6,
        is_splits=4,
    )
    assert scores["fid"] == pytest.approx(expected["frechet_inception_distance"], **FID)
    assert scores["kid"] == pytest.approx(expected["kernel_inception_distance_mean"], **KID)
    assert scores["is"] == pytest.approx(expected["inception_score_mean"], **IS)
    assert np.array_equal(extractor.extract(drawn[[5]]).features, of_drawn.features[[5]])


def test_wrong_inception_weights_are_rejected(weights: Path) -> None:
    with pytest.raises(DataError, match=r"has sha256 [0-9a-f]{8}, expected 6726825d; download it"):
        InceptionFeatures(str(weights), None, "cpu")


def test_missing_inception_weights_error_names_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist; .*'d2i doctor' prints their URL"):
        InceptionFeatures(str(tmp_path / "none.pth"), None, "cpu")


def test_weights_that_run_code_are_rejected(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "hostile.pth"
    path.write_bytes(pickle.dumps(Runs()))
    with pytest.raises(DataError, match="has more than arrays"):
        InceptionFeatures(str(path), sha256(path), "cpu")
    assert not (tmp_path / "ran").exists()
