"""The page of samples: the context, the stored image, and the image that its latents decode to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from d2i.io import storage
from d2i.report.data_split import speaking_turns
from d2i.report.document import Section, render_page
from d2i.report.embedded_images import image_uri
from d2i.report.table import Cell, Row, Table


@dataclass(frozen=True)
class ShownSample:
    """One sample of a data set.

    Args:
        metadata: Its `json` member: key, context, source.
        line: The context as the text encoder reads it.
        tokens: Its token ids, in order.
        kept: The source bytes of its image, if they are kept.
        decoded: PNG bytes of its latent mean, decoded by the autoencoder.
    """

    metadata: dict[str, Any]
    line: str
    tokens: Sequence[int]
    kept: bytes | None
    decoded: bytes


@dataclass(frozen=True)
class ShownCodec:
    """The image codec of a data set, measured on a few of its images.

    Args:
        line: The figures, or why there are none.
        warning: That they are poor; None if they are not.
        grid: PNG bytes of the images above their reconstructions; None if not measured.
    """

    line: str
    warning: str | None
    grid: bytes | None


def write_samples_page(
    url: str,
    data_url: str,
    num_samples: int,
    samples: Sequence[ShownSample],
    codec: ShownCodec | None = None,
) -> None:
    """Write the page as one self-contained HTML file.

    Args:
        url: Path or URL of the file.
        data_url: The data set, as it is named on the page.
        num_samples: Number of samples in the data set.
        samples: The samples to show.
        codec: The figures of the image codec, to show above them.
    """
    sections = [_codec_section(codec)] if codec else []
    sections += [_section(number, sample) for number, sample in enumerate(samples)]
    page = render_page(
        "samples.html",
        f"Samples of {data_url}",
        sections,
        data_url=data_url,
        num_shown=len(samples),
        num_samples=num_samples,
    )
    storage.write_bytes(url, page.encode())


def _codec_section(codec: ShownCodec) -> Section:
    grid = image_uri(codec.grid) if codec.grid else None
    values = {"line": codec.line, "warning": codec.warning, "grid": grid}
    return Section("image-codec", "Image codec", "codec.html", values)


def _section(number: int, sample: ShownSample) -> Section:
    key, source = str(sample.metadata["key"]), sample.metadata["source"]
    facts = {
        "image": ", ".join(source["ref"]),
        "sha256": source["sha256"],
        "source": f"{source['width']} x {source['height']} pixels, {source['size_bytes']} bytes",
        "text encoder input": sample.line,
        "tokens": " ".join(map(str, sample.tokens)),
    }
    values = {
        "key": key,
        "turns": [(*turn, False) for turn in speaking_turns(sample.metadata["context"])],
        "is_kept": sample.kept is not None,
        "kept": image_uri(sample.kept),
        "decoded": image_uri(sample.decoded),
        "facts": Table("", ("",), tuple(Row(n, (Cell(v),)) for n, v in facts.items())),
    }
    return Section(f"sample-{number}", key, "sample.html", values)
