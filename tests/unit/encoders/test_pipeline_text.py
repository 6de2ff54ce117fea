"""A pipeline's own encoders give the latents that shards store for the same lines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from d2i.config import TextConfig
from d2i.encoders import ClipText
from d2i.encoders.pipeline_text import PipelineText
from d2i.models.pipeline_family import pipeline_family
from d2i.prompt_text import text_tokens
from tests.integration.pipelines import save_tiny_sd15, save_tiny_sdxl

LINES = [
    "# i saw a red ball",
    "# don\u2019t you love it? &amp; \u201cyes\u201d \U0001f600 #  two  spaces",
    "# " + "a long dialog " * 40 + "# the end",
    "",
]


@pytest.mark.parametrize("keep", ["end", "start"])
def test_latents_equal_those_of_stored_tokens(tmp_path: Path, keep: str) -> None:
    save_tiny_sd15(tmp_path / "base")
    config = TextConfig.model_validate({"keep": keep})
    text = PipelineText(str(tmp_path / "base"), pipeline_family("sd15"), config, 3, "cpu")
    tokens = np.stack([text_tokens(line, config) for line in LINES])
    stored = ClipText(str(tmp_path / "base" / "text_encoder")).encode(tokens, 3)
    found = text.encode(LINES)
    assert found.keys() == {"text"}
    np.testing.assert_allclose(found["text"], stored.astype(np.float16), atol=2e-3)
    np.testing.assert_allclose(text.encode_empty()["text"], found["text"][-1], atol=2e-3)


def test_sdxl_reads_two_encoders_and_zeros_for_empty_text(tmp_path: Path) -> None:
    save_tiny_sdxl(tmp_path / "base")
    text = PipelineText(str(tmp_path / "base"), pipeline_family("sdxl"), TextConfig(), 2, "cpu")
    found = text.encode(LINES)
    assert {name: rows.shape for name, rows in found.items()} == {
        "text": (4, 77, 64),
        "pooled": (4, 32),
    }
    # Rows do not depend on their batch.
    alone = text.encode(LINES[2:3])
    np.testing.assert_array_equal(alone["text"][0], found["text"][2])
    assert all(not rows.any() for rows in text.encode_empty().values())
