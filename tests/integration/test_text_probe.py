"""Text encoders of every class read the newest turn, and spelled special tokens as plain text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from d2i.config import TextConfig
from d2i.encoders.pipeline_text import PipelineText, load_text_parts
from d2i.encoders.prompt_truncation import Keep, PromptTruncation, text_tokenizers
from d2i.encoders.text_probe import probe_text
from d2i.errors import ConfigError
from d2i.models.pipeline_family import pipeline_family
from tests.integration.pipelines import (
    save_tiny_flux,
    save_tiny_sana,
    save_tiny_sd15,
    save_tiny_sdxl,
    save_tiny_z_image,
)

# The special tokens that each encoder's class is published with, and the words of the longest
# dialogs, which are several windows long.
PIPELINES = {
    "sd15": (save_tiny_sd15, {"text_encoder": ("<|endoftext|>", 289)}),
    "sdxl": (
        save_tiny_sdxl,
        {"text_encoder": ("<|endoftext|>", 289), "text_encoder_2": ("<|startoftext|>", 289)},
    ),
    "flux": (
        save_tiny_flux,
        {"text_encoder": ("<|endoftext|>", 2025), "text_encoder_2": ("<extra_id_99>", 2025)},
    ),
    "z-image": (save_tiny_z_image, {"text_encoder": ("<|im_end|>", 977)}),
    "sana": (save_tiny_sana, {"text_encoder": ("<end_of_turn>", 585)}),
}


class PlainReading:
    """Passes lines unchanged to a pipeline that truncates them at their end, as published."""

    keep: Keep = "end"

    def __init__(self, pipeline: Any) -> None:
        self.windows = PromptTruncation(pipeline, {}, "end").windows
        for tokenizer in text_tokenizers(pipeline).values():
            tokenizer.truncation_side = "right"

    def read(self, line: str) -> str:
        return line


@pytest.fixture(scope="module", params=PIPELINES)
def pipeline_and_expected(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, dict[str, tuple[str, int]]]:
    save, expected = PIPELINES[request.param]
    directory = tmp_path_factory.mktemp("base") / "pipeline"
    save(directory)
    return load_text_parts(directory, "cpu"), expected


@pytest.mark.parametrize("keep", ["end", "start"])
def test_text_as_d2i_reads_it_passes(
    pipeline_and_expected: tuple[Any, dict[str, tuple[str, int]]], keep: Keep
) -> None:
    pipeline, _ = pipeline_and_expected
    assert probe_text(pipeline, PromptTruncation(pipeline, {}, keep)) == []


def test_text_as_published_pipelines_read_it_fails(
    pipeline_and_expected: tuple[Any, dict[str, tuple[str, int]]],
) -> None:
    pipeline, expected = pipeline_and_expected
    problems = probe_text(pipeline, PlainReading(pipeline))
    for encoder, (token, num_words) in expected.items():
        assert any(
            problem.startswith(f"{encoder}: got the special token {token} ") for problem in problems
        )
        assert any(
            problem.startswith(f"{encoder}: got the same tokens for two dialogs of {num_words} ")
            for problem in problems
        )
    assert not any("\n" in problem for problem in problems)
    assert not any("of 2 words" in problem for problem in problems)


def test_training_refuses_text_that_spells_special_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_sd15(tmp_path / "pipeline")
    monkeypatch.setattr(PromptTruncation, "read", lambda _, line: line)
    with pytest.raises(ConfigError, match=r"pipeline: text_encoder: got the special") as caught:
        PipelineText(str(tmp_path / "pipeline"), pipeline_family("sd15"), TextConfig(), 2, "cpu")
    assert "\n" not in str(caught.value)
