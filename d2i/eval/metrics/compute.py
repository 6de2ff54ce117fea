"""Scores of generated images from their features: FID, KID, Inception Score and CLIP-I.

The only module that imports torch_fidelity, for its FID, Inception Score and Inception network.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_isc import (
    KEY_METRIC_ISC_MEAN,
    KEY_METRIC_ISC_STD,
    isc_features_to_metric,
)

from d2i.errors import DataError
from d2i.eval.metrics.kid import choose_subsets, mmd_of_subsets
from d2i.io.checksums import file_sha256

Floats = npt.NDArray[np.float64]

# The file's name carries the first eight digits of its sha256, as torch hub's names do.
_INCEPTION_SHA256_PREFIX = "6726825d"
_INCEPTION = f"weights-inception-2015-12-05-{_INCEPTION_SHA256_PREFIX}.pth"
# Covariances and unbiased estimates divide by n - 1.
_MIN_IMAGES = 2


def compute_scores(
    real_features: Any,
    features: Any,
    logits: Any | None,
    real_embeddings: Any,
    embeddings: Any,
    *,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    is_splits: int = 10,
    seed: int = 2020,
) -> dict[str, float | int | None]:
    """Score generated images as torch-fidelity does, in float64.

    Accepts arrays and tensors of any floating dtype. Float64 throughout makes the scores agree
    between devices; torch-fidelity's own float32 differs by about 1e-6 of the FID, 2e-7 of the KID.

    Args:
        real_features: (N, D) features of the reference images, for FID and KID.
        features: (M, D) features of the generated images.
        logits: (M, C) class logits of the generated images, before softmax, or None for an
            extractor that has no classes.
        real_embeddings: (M, E) CLIP embeddings of the reference images.
        embeddings: (M, E) CLIP embeddings of the generated images; row i pairs with row i above.
        kid_subsets: number of random subsets that KID is the mean over.
        kid_subset_size: images in a subset; fewer where there are fewer images.
        is_splits: splits that the Inception Score is the mean over; fewer where there are fewer
            images.
        seed: of KID's subsets and of the Inception Score's permutation.

    Returns:
        `fid`, `kid`, `kid_std`, `is`, `is_std`, `clip_i`, and the sizes actually used,
        `kid_subset_size` and `is_splits`. The deviations are population standard deviations over
        subsets and splits; `kid_std` is None where each subset is the whole set. `is`, `is_std` and
        `is_splits` are None without logits.

    Raises:
        DataError: If the shapes do not match, a value is not finite, or there are too few rows to
            score.
    """
    real, fake = _matrix("real_features", real_features), _matrix("features", features)
    return {
        "fid": compute_fid(real, fake),
        **_kid(real.numpy(), fake.numpy(), kid_subsets, kid_subset_size, seed),
        **_inception_score(logits, len(fake), is_splits, seed),
        "clip_i": _clip_i(
            _matrix("real_embeddings", real_embeddings), _matrix("embeddings", embeddings)
        ),
    }


def compute_fid(real_features: Any, features: Any) -> float:
    """Return the Fréchet distance of two Gaussians (Heusel et al. 2017, section 3), in float64.

    Args:
        real_features: (N, D) features of the reference images.
        features: (M, D) features of the generated images, by the same extractor.

    Raises:
        DataError: As `compute_scores`.
    """
    real, fake = _matrix("real_features", real_features), _matrix("features", features)
    _expect_same_width("features", real, fake)
    statistics = (fid_features_to_statistics(real), fid_features_to_statistics(fake))
    try:
        found = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    except np.linalg.LinAlgError as error:
        raise DataError(
            f"fid: {error}; the covariance of the features overflows; check their range"
        ) from error
    return _finite("fid", found)


def _kid(
    real: Floats, fake: Floats, num_subsets: int, subset_size: int, seed: int
) -> dict[str, float | int | None]:
    """Return the mean KID over random subsets (Binkowski et al. 2018, section 4)."""
    size = min(subset_size, len(real), len(fake))
    counts = choose_subsets(len(real), len(fake), num_subsets, size, seed)
    of_subsets = mmd_of_subsets(real, fake, *counts)
    # Subsets that contain every image are identical: they have no spread.
    is_whole = size == len(real) == len(fake)
    return {
        "kid": _finite("kid", float(of_subsets.mean())),
        "kid_std": None if is_whole else _finite("kid_std", float(of_subsets.std())),
        "kid_subset_size": size,
    }


def _inception_score(
    logits: Any | None, num_images: int, most_splits: int, seed: int
) -> dict[str, float | int | None]:
    """Return the Inception Score (Salimans et al. 2016, section 4) over random splits."""
    if logits is None:
        return {"is": None, "is_std": None, "is_splits": None}
    rows = _matrix("logits", logits)
    if len(rows) != num_images:
        raise DataError(
            f"logits: got {len(rows)} rows, expected {num_images}, one per generated image; "
            "compute the logits of every generated image"
        )
    num_splits = min(most_splits, len(rows))
    found = isc_features_to_metric(rows, splits=num_splits, shuffle=True, rng_seed=seed)
    return {
        "is": _finite("is", found[KEY_METRIC_ISC_MEAN]),
        "is_std": _finite("is_std", found[KEY_METRIC_ISC_STD]),
        "is_splits": num_splits,
    }


def _clip_i(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Return CLIP-I as Taited/clip-score defines it: 100 times the mean cosine of the pairs."""
    _expect_same_width("embeddings", real, fake)
    if len(real) != len(fake):
        raise DataError(
            f"embeddings: got {len(fake)} rows for {len(real)} reference images, expected pairs"
        )
    norms = real.norm(dim=1) * fake.norm(dim=1)
    if bool((norms == 0).any()):
        raise DataError(
            f"embeddings: row {int((norms == 0).nonzero()[0])} is all zero and has no direction; "
            "check the CLIP weights"
        )
    return _finite("clip_i", float(100 * ((real * fake).sum(dim=1) / norms).mean()))


def _matrix(name: str, values: Any) -> torch.Tensor:
    """Return `values` as a finite float64 (n, d) tensor on the CPU."""
    tensor = values.detach().cpu() if torch.is_tensor(values) else torch.tensor(np.asarray(values))
    if tensor.dim() != 2 or len(tensor) < _MIN_IMAGES:
        raise DataError(
            f"{name}: got shape {tuple(tensor.shape)}, expected (images, width) with at least "
            f"{_MIN_IMAGES} images; score more images"
        )
    tensor = tensor.double()
    bad_rows = (~tensor.isfinite().all(dim=1)).nonzero().flatten()
    if len(bad_rows):
        raise DataError(
            f"{name}: {len(bad_rows)} of {len(tensor)} rows have values that are not finite, "
            f"first row {int(bad_rows[0])}; check that image and the network's weights"
        )
    return tensor


def _expect_same_width(name: str, real: torch.Tensor, fake: torch.Tensor) -> None:
    if real.shape[1] != fake.shape[1]:
        raise DataError(
            f"{name}: got width {fake.shape[1]}, expected {real.shape[1]} as for the reference "
            "images; compute both with the same extractor"
        )


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise DataError(f"{name}: got {value}, expected a finite number; check the features' range")
    return value


class InceptionFeatures:
    """torch-fidelity's Inception v3: 2048 features and 1008 logits of uint8 images.

    Args:
        weights: Path of `weights-inception-2015-12-05-6726825d.pth`, or None for the copy in
            torch hub's cache.
        sha256: First digits of the file's sha256; None expects the published file's.
        device: Torch device that it runs on.

    Raises:
        DataError: If the file is missing, has another sha256, or contains more than arrays
            (checked first, because torch-fidelity unpickles it).
    """

    def __init__(self, weights: str | None, sha256: str | None, device: str) -> None:
        path = Path(weights) if weights else Path(torch.hub.get_dir(), "checkpoints", _INCEPTION)
        digits = sha256 or _INCEPTION_SHA256_PREFIX
        _check_inception(path, digits)
        self.name = f"inception-v3-compat {digits[:8]}"
        self._device = device
        self._network = FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=str(path),
        ).to(device)

    def extract(
        self, pixels: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return features (N, 2048) and logits (N, 1008) of uint8 images (N, H, W, 3)."""
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self._device)
        with torch.no_grad():
            features, logits = self._network(images)
        return features.float().cpu().numpy(), logits.float().cpu().numpy()


def _check_inception(path: Path, digits: str) -> None:
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; expected torch-fidelity's Inception weights ('d2i doctor' "
            "prints their URL); put the file there, pass --set metrics.extractor_weights=PATH, or "
            "--set metrics.extractor=clip"
        )
    digest = file_sha256(str(path))
    if not digest.startswith(digits):
        raise DataError(f"{path} has sha256 {digest[:8]}, expected {digits}; download it again")
    try:
        torch.load(path, weights_only=True)
    except pickle.UnpicklingError as err:
        raise DataError(
            f"{path} has more than arrays; expected a state dict; download the published file"
        ) from err
