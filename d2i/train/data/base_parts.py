"""Check that shards were prepared with the other parts of the pipeline that is fine-tuned."""

from __future__ import annotations

from pathlib import Path

from d2i.backbones import presets_of
from d2i.config import Recipe
from d2i.encoders import ClipText, Vae, load_clip_text
from d2i.encoders.data_fingerprint import encoder_sha256
from d2i.errors import CheckpointError
from d2i.models.pipeline_dir import PipelineDirectory
from d2i.shards import ShardReader
from d2i.tokenize import WINDOW_LENGTH, encode, window


def check_base_parts(recipe: Recipe, reader: ShardReader) -> None:
    """Check that the latents in shards are those of the base model's own VAE and text encoder.

    Weights are compared by their sha256, so it does not matter where they came from. Text latents
    of a whole CLIP model count as those of its text tower, which is what pipelines ship: then the
    recipe's `encoders.clip_text` is loaded to compare the two. Shards that d2i preprocess did not
    make name no encoder, and are accepted unchecked; so is stored text that is not used.

    Raises:
        CheckpointError: If they are not; it names the part and both hashes.
    """
    presets, weights = presets_of(recipe.backbone.name), recipe.backbone.weights
    if presets.pipeline is None or weights is None:
        return
    path = PipelineDirectory(weights, presets).path
    fingerprint = reader.manifest.fingerprint
    vae_sha256 = Vae(str(path / "vae"), "kl").hash
    expected = encoder_sha256(fingerprint, "vae")
    if expected not in (None, vae_sha256):
        raise _other(weights, "vae", "encoders.vae", vae_sha256, expected, reader)
    if recipe.text.encode == "on_the_fly":
        return
    _check_tokenizer(weights, path)
    own = ClipText(str(path / "text_encoder"))
    expected = encoder_sha256(fingerprint, "clip_text")
    if expected in (None, own.hash):
        return
    prepared = load_clip_text(recipe.encoders)
    if prepared.hash != expected or prepared.tower_hash != own.tower_hash or prepared.prefix:
        raise _other(weights, "text_encoder", "encoders.clip_text", own.hash, expected, reader)


def _check_tokenizer(weights: str, path: Path) -> None:
    """Check that the base model pads and counts tokens as shards do, as CLIP ViT-L/14."""
    from transformers import CLIPTokenizer

    line = "a red ball"
    tokenizer = CLIPTokenizer.from_pretrained(path / "tokenizer")
    found = tokenizer(line, padding="max_length", max_length=WINDOW_LENGTH).input_ids
    if found != window(encode(line)).tolist():
        raise CheckpointError(
            f"backbone.weights {weights}: its tokenizer reads {line!r} as other ids than CLIP "
            "ViT-L/14's, which shards store; use --set text.encode=on_the_fly"
        )


def _other(
    weights: str, part: str, setting: str, found: str, expected: str | None, reader: ShardReader
) -> CheckpointError:
    return CheckpointError(
        f"backbone.weights {weights}: its {part} has sha256 {found[:16]}…; expected "
        f"{str(expected)[:16]}…, which prepared {reader.url}; use the base model with those "
        f"weights, or prepare the data again with --set {setting}={weights}/{part}"
    )
