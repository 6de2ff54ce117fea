"""Catalog of the published weights files: the source, licence and content of each.

A file is recognized by its keys and shapes, not by its name. Must not import torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from d2i.backbones import presets_of

_UVIT_SOURCE = "github.com/baofff/U-ViT, README, 'Pretrained Models'"
_UVIT_LICENCE = "MIT (that of its repository; not checked for the weights)"
_UVIT_DATA = "MS-COCO 2014, 82,783 training images with their captions, at 256 px"
_UNIDIFFUSER_LICENCE = "AGPL-3.0 (that of its repository; not checked for the weights)"
_WEB_DATA = "images and texts of the web (filtered LAION-5B, according to its paper), at 512 px"
_STABLE_DIFFUSION = "CreativeML Open RAIL-M if it is Stable Diffusion v1's, as we assume"


@dataclass(frozen=True)
class PublishedFile:
    """One published file.

    Args:
        name: Its name at its source.
        holds: Its content, in words.
        source: The place where its authors publish it.
        licence: Its licence as far as d2i knows; not legal advice.
        data: Its training data, as far as d2i knows.
        num_keys: Its number of tensors.
        shapes_sha256: `shapes_hash` of its tensors. Of the caption decoder, only the text prefix
            counts, which is all that text-to-image needs.
        backbone: The preset that loads it, or None.
    """

    name: str
    holds: str
    source: str
    licence: str
    data: str
    num_keys: int
    shapes_sha256: str
    backbone: str | None = None


def shapes_hash(shapes: Mapping[str, Sequence[int]]) -> str:
    """Return the sha256 of the lines `KEY D0xD1x…`, sorted by key, each ended by a newline."""
    lines = [f"{key} {'x'.join(map(str, shape))}\n" for key, shape in sorted(shapes.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def find_published(shapes: Mapping[str, Sequence[int]]) -> list[PublishedFile]:
    """Return the published files that have exactly these keys and shapes; several may."""
    found = shapes_hash(shapes)
    return [file for file in PUBLISHED if file.shapes_sha256 == found]


def weights_to_fetch(backbone: str) -> str:
    """Return the name of a backbone's published file, and its source, or the pipeline it is in."""
    if pipeline := presets_of(backbone).pipeline:
        return f"the directory of a {pipeline}, or its repository in the hub's local cache"
    file = next(file for file in PUBLISHED if file.backbone == backbone)
    return f"{file.name} ({file.source})"


def _unidiffuser(
    version: int, num_keys: int, shapes_sha256: str, *, diffusers: bool = False
) -> PublishedFile:
    more = "" if version == 0 else ", then images and texts of its authors"
    return PublishedFile(
        name="unet/diffusion_pytorch_model" if diffusers else f"uvit_v{version}.pth",
        holds=f"UniDiffuser v{version}" + (", in diffusers' layout" if diffusers else ""),
        source=f"model hub, thu-ml/unidiffuser-v{version}",
        licence=_UNIDIFFUSER_LICENCE,
        data=_WEB_DATA + more,
        num_keys=num_keys,
        shapes_sha256=shapes_sha256,
        backbone=f"unidiffuser-v{version}",
    )


def _autoencoder(name: str, holds: str) -> PublishedFile:
    return PublishedFile(
        name=name,
        holds=holds,
        source=f"{_UVIT_SOURCE.split(',')[0]}, README, 'Autoencoder'",
        licence=_STABLE_DIFFUSION,
        data="LAION if it is Stable Diffusion v1's, as we assume",
        num_keys=248,
        shapes_sha256="2635cb9e3247f5ebcfeb369aba9c686646ee65ab2f88588d27567204e54e2918",
    )


PUBLISHED = (
    PublishedFile(
        name="mscoco_uvit_small.pth",
        holds="U-ViT-S, text to image",
        source=_UVIT_SOURCE,
        licence=_UVIT_LICENCE,
        data=_UVIT_DATA,
        num_keys=166,
        shapes_sha256="d02948c72e10141f9a4df55904e0110acb61856132b00e4a8eae6514c1cae07e",
        backbone="uvit-s",
    ),
    PublishedFile(
        name="mscoco_uvit_small_deep.pth",
        holds="U-ViT-S-Deep, text to image",
        source=_UVIT_SOURCE,
        licence=_UVIT_LICENCE,
        data=_UVIT_DATA,
        num_keys=214,
        shapes_sha256="f23d5a90d40a5359eff551537fc46d45419676ed057b93c1cef8c9aec9116de0",
        backbone="uvit-s-deep",
    ),
    _unidiffuser(0, 416, "0165271d116e0d978b29196a26ee20bbc2bee868c4307edfbb08bddf1bf74246"),
    _unidiffuser(1, 418, "a1bb99e70a08b644fa1e55af4d7218b92fa427b1d737259cbdbf5e703afb8edc"),
    _unidiffuser(
        0, 480, "b9518e16ab348615a11e11591db90b37e2b046396a3f9710f14aa50fc05bf3d3", diffusers=True
    ),
    _unidiffuser(
        1, 482, "e5c342e16b0be2bfd78ffe01daa1a771daf986a959c69a2d63d3919945890724", diffusers=True
    ),
    _autoencoder(
        "autoencoder_kl.pth", "the LDM autoencoder of U-ViT on MS-COCO, and of UniDiffuser"
    ),
    _autoencoder("autoencoder_kl_ema.pth", "the same, averaged; used only by U-ViT-H on ImageNet"),
    PublishedFile(
        name="caption_decoder.pth",
        holds="UniDiffuser's caption decoder; d2i reads only its text prefix, Linear(768, 64)",
        source="model hub, thu-ml/unidiffuser-v1",
        licence=_UNIDIFFUSER_LICENCE,
        data=_WEB_DATA,
        num_keys=2,
        shapes_sha256="20e40beb537b0b49e9142bff15fa0d9c1a8dfb66e28f11afc11b5eaf42341559",
    ),
)
