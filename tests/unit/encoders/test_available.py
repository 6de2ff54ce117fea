"""A missing encoder is an error before any image is fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from d2i.cluster import Session
from d2i.config import EncodersConfig
from d2i.encoders.available import check_present
from d2i.errors import CheckpointError
from d2i.preprocess.job import PreprocessRequest, preprocess
from d2i.recipes import resolve_recipe
from tests.servers import Handler, WebServer, running

SHIPPED = {"vae": "demo:vae", "clip_image": "demo:clip_image", "clip_text": "demo:clip_text"}


def test_missing_encoder_raises_before_any_request(tmp_path: Path) -> None:
    def answer(handler: Handler) -> None:
        handler.send(200, b"no picture")

    with running(WebServer("127.0.0.1", {"/a.png": answer})) as web:
        url = f"http://127.0.0.1:{web.port}/a.png"
        line = {"id": "a", "turns": [{"text": "look", "images": [url]}]}
        (tmp_path / "test.jsonl").write_text(json.dumps(line))
        recipe = resolve_recipe("demo", [f"encoders.vae={tmp_path}/absent"])
        out = str(tmp_path / "out")
        request = PreprocessRequest("jsonl", str(tmp_path), out, recipe)
        with pytest.raises(CheckpointError, match=r"encoders\.vae is .*absent: no such file"):
            preprocess(request, Session(0), lambda _: None)
        assert not web.asked


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "/nowhere/x") for name in ("vae", "clip_image", "clip_text", "text_prefix")),
        ("vae", "./x"),
        ("clip_image", "x.pth"),
        ("clip_text", "nowhere/x"),
    ],
)
def test_check_present_checks_each_encoder(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    encoders = EncodersConfig.model_validate(SHIPPED | {name: value})
    with pytest.raises(CheckpointError, match=rf"give --set encoders\.{name}=PATH"):
        check_present(encoders)


def test_check_present_accepts_existing_encoders(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    check_present(EncodersConfig.model_validate(SHIPPED))
    check_present(EncodersConfig.model_validate(SHIPPED | {"vae": str(tmp_path / "vae")}))
    # A node of a cluster may have files that this machine lacks.
    check_present(EncodersConfig.model_validate(SHIPPED | {"vae": "/nodes/vae"}), is_here=False)
