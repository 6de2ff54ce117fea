"""Published pipelines: text window, side of the dialog that is kept, precision, LoRA adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from d2i.dialog import Turn
from d2i.encoders import load_encoders
from d2i.encoders.prompt_truncation import cut_line
from d2i.errors import ClusterError, ConfigError, D2IError
from d2i.eval.prompts import Prompt
from d2i.eval.system import SystemContext
from d2i.eval.systems import build_system, parse_system
from d2i.eval.systems.diffusers_pipeline import PipelineSystem
from d2i.recipes import change_recipe, load_recipe
from tests.integration.pipelines import (
    save_tiny_flux,
    save_tiny_pipeline,
    save_tiny_unclip,
    save_tiny_unconditional,
    save_tiny_z_image,
)
from tests.processes import run_d2i, run_process

SMALL = {"num_inference_steps": 2, "height": 64, "width": 64}
UNCLIP = {f"{part}_num_inference_steps": 2 for part in ("prior", "decoder", "super_res")}
CLIP_WINDOW = {"tokens": 77, "dialog_tokens": 75}
READS = [
    (save_tiny_pipeline, "diffusers", SMALL, {"text_encoder": CLIP_WINDOW}),
    (save_tiny_unclip, "unclip", UNCLIP, {"text_encoder": CLIP_WINDOW}),
    (
        save_tiny_flux,
        "diffusers",
        SMALL,
        {"text_encoder": CLIP_WINDOW, "text_encoder_2": {"tokens": 512, "dialog_tokens": 511}},
    ),
    (
        save_tiny_flux,
        "diffusers",
        SMALL | {"max_sequence_length": 300},
        {"text_encoder": CLIP_WINDOW, "text_encoder_2": {"tokens": 300, "dialog_tokens": 299}},
    ),
    # The chat template takes 19 of the 512 tokens.
    (
        save_tiny_z_image,
        "diffusers",
        SMALL | {"guidance_scale": 3},
        {"text_encoder": {"tokens": 512, "dialog_tokens": 493}},
    ),
]


def build_pipeline(
    directory: Path,
    kind: str,
    arguments: dict[str, Any],
    *settings: str,
    adapter: Path | None = None,
) -> PipelineSystem:
    recipe = change_recipe(
        load_recipe("demo"),
        [
            *(f"sample.pipeline={json.dumps(arguments)}", "sample.compute_batch_size=4"),
            *settings,
        ],
    )
    spec = parse_system(f"{kind}:{directory}", None, recipe, str(adapter) if adapter else None)
    encoders = load_encoders(recipe.encoders, "cpu")
    system = build_system(SystemContext(spec, recipe, encoders, (), "cpu"))
    assert isinstance(system, PipelineSystem)
    return system


def generate_images(system: PipelineSystem, *lines: str) -> list[NDArray[np.uint8]]:
    """Generate an image for each line, from the same noise."""
    generations = system.generate([Prompt("key", (Turn(None, line),), line) for line in lines])
    found = [generation.pixels for generation in generations]
    assert all(pixels is not None for pixels in found)
    return [pixels for pixels in found if pixels is not None]


@pytest.mark.parametrize("keep", ["end", "start"])
@pytest.mark.parametrize(
    ("save", "kind", "arguments", "windows"),
    READS,
    ids=["stable-diffusion", "unclip", "flux", "flux-300", "z-image"],
)
def test_pipeline_reads_full_text_encoder_window(
    tmp_path: Path,
    save: Callable[[Path], None],
    kind: str,
    arguments: dict[str, Any],
    windows: dict[str, Any],
    keep: str,
) -> None:
    """Text within the longest window changes the image, up to its edge; text beyond does not."""
    save(tmp_path / "pipeline")
    system = build_pipeline(tmp_path / "pipeline", kind, arguments, f"text.keep={keep}")
    assert system.described["text_tokens"] == windows
    longest = max(window["dialog_tokens"] for window in windows.values())
    # Each letter is a token; where bytes are tokens, each space is one more.
    read = (longest + 1) // 2 if save is save_tiny_z_image else longest
    words = ["a"] * (read + 30)

    def changed(first: int, last: int) -> str:
        """Return the line with words first to last replaced, counted from the side that is kept."""
        places = range(first, last) if keep == "start" else range(-last, -first)
        other = list(words)
        for place in places:
            other[place] = "z"
        return " ".join(other)

    plain, beyond, edge, near = generate_images(
        system, " ".join(words), changed(read, read + 30), changed(read - 60, read), changed(0, 60)
    )
    assert (plain == beyond).all()
    assert (plain != edge).any()
    assert (plain != near).any()


def test_special_token_in_message_stays_text(tmp_path: Path) -> None:
    """A message cannot end the prompt; the same holds for d2i's own tokenizer."""
    save_tiny_z_image(tmp_path / "pipeline")
    system = build_pipeline(tmp_path / "pipeline", "diffusers", SMALL)
    ended, longer = generate_images(system, "a <|im_end|> b", "a <|im_end|> c")
    assert (ended != longer).any()
    assert "<|im_end|>" not in system._reading.read("a <|IM_END|> and <|im_end|> b").lower()


@pytest.mark.parametrize(
    ("line", "room", "end", "start"),
    [
        ("one two", 9, "one two", "one two"),
        ("one two three", 9, "two three", "one two"),
        ("one two three", 5, "three", "one"),
        ("onetwothree", 5, "three", "onetw"),
        ("one", 0, "", ""),
        ("", 0, "", ""),
    ],
)
def test_cut_line_cuts_at_word_boundaries(line: str, room: int, end: str, start: str) -> None:
    assert cut_line(line, lambda text: len(text) <= room, "end").strip() == end
    assert cut_line(line, lambda text: len(text) <= room, "start").strip() == start


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.half)])
def test_pipeline_generates_in_requested_precision(
    tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    save_tiny_flux(tmp_path / "pipeline")
    whole = build_pipeline(tmp_path / "pipeline", "diffusers", SMALL)
    short = build_pipeline(
        tmp_path / "pipeline", "diffusers", SMALL, f"sample.precision={precision}"
    )
    assert short._pipeline.transformer.dtype == short._pipeline.text_encoder_2.dtype == dtype
    (exact,), (rounded,) = (
        generate_images(whole, "a red ball"),
        generate_images(short, "a red ball"),
    )
    difference = np.abs(exact.astype(float) - rounded.astype(float))
    assert 0 < difference.mean() < 3


def save_lora(pipeline: Path, out: Path, *, rank: int = 4, width: int | None = None) -> None:
    """Write a random LoRA for a tiny pipeline's attention, with diffusers' names."""
    torch.manual_seed(1)
    weights = load_file(next((pipeline / "unet").glob("*.safetensors")))
    matrices = {}
    for name, weight in weights.items():
        if ".to_q.weight" in name or ".to_v.weight" in name:
            stem, (rows, columns) = f"unet.{name.removesuffix('.weight')}", weight.shape
            matrices[f"{stem}.lora_A.weight"] = torch.randn(rank, width or columns)
            matrices[f"{stem}.lora_B.weight"] = torch.randn(rows, rank)
    assert matrices
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(matrices, out)


def eval_words(data: Path, out: Path, system: str, *extra: object) -> list[Any]:
    return [
        *("eval", "--system", system, "--data", data, "--out", out, "--save-images", "none"),
        *("--set", f"sample.pipeline={json.dumps(SMALL)}"),
        *("--set", "sample.compute_batch_size=23", *extra),
    ]


def test_lora_adapter_changes_scores_and_is_on_metric_card(tmp_path: Path, chat_data: Path) -> None:
    base, lora = tmp_path / "base", tmp_path / "chatty" / "pytorch_lora_weights.safetensors"
    save_tiny_pipeline(base)
    save_lora(base, lora)
    system = f"diffusers:{base}"
    plain = run_d2i(*eval_words(chat_data, tmp_path / "plain", system, "--json"))
    words = ("--adapter", lora.parent, "--set", "sample.precision=bf16", "--json")
    tuned = run_d2i(*eval_words(chat_data, tmp_path / "tuned", system, *words))
    digest = sha256(lora.read_bytes()).hexdigest()
    card = tuned["card"]
    assert card["adapter"] == {"name": "chatty", "sha256": digest}
    assert card["label"] == f"base + chatty ({digest[:8]})"
    assert (card["precision"], card["text"]["keep"]) == ("bf16", "end")
    assert card["text_tokens"] == {"text_encoder": CLIP_WINDOW}
    assert (plain["card"]["adapter"], plain["card"]["precision"]) == (None, "fp32")
    assert abs(tuned["scores"]["fid"] - plain["scores"]["fid"]) > 1e-3
    # Another adapter is another system.
    save_lora(base, lora, rank=2)
    done = run_process(*eval_words(chat_data, tmp_path / "tuned", system, *words))
    assert done.returncode == 2
    assert "before its files changed; expected the same" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("missing", "does not exist; expected the safetensors file of a LoRA"),
        ("text", "not a complete safetensors file"),
        ("network", "not a LoRA: got 1 tensors, such as unet.weight"),
        ("other layers", "matrices fit StableDiffusionPipeline"),
        ("other widths", "StableDiffusionPipeline cannot read it: .*size mismatch"),
    ],
)
def test_incompatible_adapter_is_one_line_error(tmp_path: Path, made: str, message: str) -> None:
    base, lora = tmp_path / "base", tmp_path / "lora.safetensors"
    save_tiny_pipeline(base)
    if made == "text":
        lora.write_text("no tensors")
    elif made == "network":
        save_file({"unet.weight": torch.zeros(2, 2)}, lora)
    elif made == "other widths":
        save_lora(base, lora, width=48)
    elif made == "other layers":
        save_lora(base, lora)
        known = load_file(lora)
        save_file({k.replace("to_q", "to_other"): v for k, v in known.items()}, lora)
    with pytest.raises(D2IError, match=message) as caught:
        build_pipeline(base, "diffusers", SMALL, adapter=lora)
    assert "\n" not in str(caught.value)


def test_adapter_without_peft_names_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_pipeline(tmp_path / "base")
    save_lora(tmp_path / "base", tmp_path / "lora.safetensors")
    monkeypatch.setattr("diffusers.utils.constants.USE_PEFT_BACKEND", False)
    with pytest.raises(ClusterError, match=r"peft is not installed.*pip install 'd2i\[lora\]'"):
        build_pipeline(tmp_path / "base", "diffusers", SMALL, adapter=tmp_path / "lora.safetensors")


def test_adapter_for_unsupported_system_raises() -> None:
    recipe = load_recipe("demo")
    for system, weights in (
        ("images:made", None),
        ("unclip:karlo", None),
        ("uvit-s", "demo:backbone"),
    ):
        with pytest.raises(
            ConfigError, match=r"--adapter lora: .* takes no adapter; expected --system"
        ):
            parse_system(system, weights, recipe, "lora")


@pytest.mark.parametrize(
    ("save", "arguments", "message"),
    [
        (save_tiny_unconditional, {}, "DDPMPipeline takes no prompt; expected a text-to-image"),
        (save_tiny_pipeline, {"steps": 2}, "StableDiffusionPipeline takes no steps; expected"),
        (save_tiny_pipeline, {"height": 63, "width": 64}, "cannot generate .*: .* divisible by 8"),
    ],
)
def test_unusable_pipeline_is_one_line_error(
    tmp_path: Path, save: Callable[[Path], None], arguments: dict[str, Any], message: str
) -> None:
    save(tmp_path / "pipeline")
    with pytest.raises(ConfigError, match=message) as caught:
        build_pipeline(tmp_path / "pipeline", "diffusers", arguments)
    assert "\n" not in str(caught.value)
