"""The page of samples: the context, the stored image, and the image that its latents decode to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from d2i.io import storage
from d2i.report.data_split import speaking_turns
from d2i.report.document import render_document, render_header
from d2i.report.html import Section, card, counted, image_tag, table, text


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


def write_samples_page(
    url: str, data_url: str, num_samples: int, samples: Sequence[ShownSample]
) -> None:
    """Write the page as one self-contained HTML file.

    Args:
        url: Path or URL of the file.
        data_url: The data set, as it is named on the page.
        num_samples: Number of samples in the data set.
        samples: The samples to show.
    """
    shown = card("Shown", [("samples", counted(len(samples), "sample"))], "in shard order")
    header = render_header(
        "prepared data",
        text(data_url),
        f"{counted(num_samples, 'sample')}: each context beside its source image and the image "
        "decoded from the stored latents.",
        shown,
    )
    sections = [_section(number, sample) for number, sample in enumerate(samples)]
    page = render_document(
        f"Samples of {data_url}", header, sections, "No image on this page is generated."
    )
    storage.write_bytes(url, page.encode())


def _section(number: int, sample: ShownSample) -> Section:
    key = str(sample.metadata["key"])
    kept = _figure("Source image", image_tag(sample.kept, f"source image of {key}"))
    if sample.kept is None:
        kept = _figure("Source image", "<p>not stored in this shard</p>")
    decoded = _figure("Decoded latents", image_tag(sample.decoded, f"decoded latents of {key}"))
    body = (
        f'<article class="conversation">{_chat(sample.metadata["context"])}'
        f'<div class="images">{kept}{decoded}</div></article>{_facts(sample)}'
    )
    return Section(f"sample-{number}", key, body)


def _chat(turns: Sequence[dict[str, Any]]) -> str:
    items = "".join(
        f'<li dir="auto" class="{"ours" if speaker % 2 else "theirs"}">{text(words)}</li>'
        for speaker, words in speaking_turns(turns)
    )
    return f'<ol class="chat" tabindex="0" aria-label="Conversation">{items}</ol>'


def _figure(name: str, body: str) -> str:
    return f"<figure><figcaption>{text(name)}</figcaption>{body}</figure>"


def _facts(sample: ShownSample) -> str:
    source = sample.metadata["source"]
    rows = {
        "image": ", ".join(source["ref"]),
        "sha256": source["sha256"],
        "source": f"{source['width']} x {source['height']} pixels, {source['size_bytes']} bytes",
        "text encoder input": sample.line,
        "tokens": " ".join(map(str, sample.tokens)),
    }
    return table(("", "value"), [(text(name), [text(value)]) for name, value in rows.items()])
