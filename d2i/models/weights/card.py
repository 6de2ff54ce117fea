"""The model card (`README.md`) of converted weights: their origin, training data and licence."""

from __future__ import annotations

from collections.abc import Sequence

from d2i.weights_catalog import PublishedFile

CARD_NAME = "README.md"
_UNKNOWN = (
    "Unknown to d2i: the tensors match no published file. State here what they were trained on, "
    "and what the licences of that data and of the initial weights allow."
)


def model_card(
    words: str, source: str, sha256: str, published: Sequence[PublishedFile], use: str
) -> str:
    """Return the text of a model card.

    Args:
        words: Description of the weights.
        source: Name of the file that they came from.
        sha256: Hash of that file.
        published: Published files with the same keys and shapes (fine-tuned weights share them).
        use: The setting that takes the directory.
    """
    return "\n".join(
        [
            f"# {words}",
            "",
            f"From `{source}`, sha256 `{sha256}`. Use it with `--set {use}=DIR`.",
            "",
            "## Data and licence",
            *_origin(published),
            "",
        ]
    )


def _origin(published: Sequence[PublishedFile]) -> list[str]:
    if not published:
        return [_UNKNOWN]
    lines = [
        "The keys and shapes are those of the files below. Fine-tuned weights match too: then add",
        "the fine-tuning data, and whether it may be redistributed (MMDialog may not).",
        "",
    ]
    for file in published:
        lines += [
            f"- `{file.name}` ({file.holds}): {file.source}.",
            f"  Trained on {file.data}. Licence: {file.licence}; read it at the source.",
        ]
    return lines
