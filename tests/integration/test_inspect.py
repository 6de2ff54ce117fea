"""`d2i inspect --html`: one file that shows a shard's samples and loads nothing else."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2i.cli.inspect import inspect
from d2i.cluster import Session
from d2i.errors import CheckpointError
from d2i.preprocess.job import PreprocessRequest
from d2i.preprocess.job import preprocess as run_job
from d2i.recipes import resolve_recipe
from tests.integration.chats import encode_image
from tests.shared import SHARED, needs_shared

pytestmark = needs_shared


def test_inspect_html_shows_image_and_decoded_latents(
    tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    photo = Image.open(sorted((SHARED / "data" / "photos").rglob("*.jpg"))[0]).convert("RGB")
    photo = photo.resize((64, 64))
    source = tmp_path / "chats"
    source.mkdir()
    (source / "a.png").write_bytes(encode_image(photo, "PNG"))
    line = {"id": "a", "turns": [{"text": "<b>look</b> at this", "images": ["a.png"]}]}
    for split in ("train", "test"):
        (source / f"{split}.jsonl").write_text(json.dumps(line))
    recipe = resolve_recipe("demo", settings[1::2])
    out = tmp_path / "data"
    run_job(PreprocessRequest("jsonl", str(source), str(out), recipe), Session(0), lambda _: None)
    page = tmp_path / "page.html"
    inspect(str(out / "test"), html=str(page), num=3)
    html = page.read_text()
    assert "&lt;b&gt;look&lt;/b&gt; at this" in html and "<b>look" not in html
    assert "49406 " in html and "default-src 'none'" in html
    kept, decoded = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(found))).convert("RGB"), np.float32)
        for found in re.findall(r"base64,([A-Za-z0-9+/=]+)", html)[1:]
    )
    assert np.abs(kept - np.asarray(photo)).max() == 0
    assert np.abs(kept - decoded).mean() < 16, "the tiny autoencoder is a rough one"

    inspect(str(out / "train"), html=str(page))
    assert "not stored in this shard" in page.read_text()
    assert str(page) in capsys.readouterr().out

    kept_recipe = json.loads((out / "recipe.json").read_text())
    kept_recipe["encoders"] |= {"vae": "demo:vae", "vae_kind": "kl"}
    (out / "recipe.json").write_text(json.dumps(kept_recipe))
    (out / "recipe.json.sha256").unlink()
    with pytest.raises(CheckpointError, match=r"encoders\.vae: got weights with .* which prepared"):
        inspect(str(out / "test"), html=str(page))
