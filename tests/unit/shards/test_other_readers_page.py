"""The examples of docs/other-readers.md run, on tars of webdataset and on data of d2i."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from tests.processes import run_d2i

ROOT = Path(__file__).resolve().parents[3]
NEEDS_ENERGON = "# energon: "


def examples() -> list[str]:
    page = (ROOT / "docs" / "other-readers.md").read_text()
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the working directory of the page: tars of others, and data that d2i prepared."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WIDS_CACHE", str(tmp_path / "cache"))
    shutil.copytree(ROOT / "tests" / "made_before" / "data", tmp_path / "data")
    (tmp_path / "laion").mkdir()
    with wds.TarWriter(str(tmp_path / "laion" / "0.tar")) as writer:
        for number in range(3):
            emb = np.full(512, number, np.float32)
            sample = {"jpg": b"\xff\xd8", "txt": f"caption {number}", "emb.npy": emb}
            writer.write({"__key__": f"k{number}", **sample})
    run_d2i("index", tmp_path / "laion")
    return tmp_path


def test_examples_of_the_page_run(places: Path) -> None:
    found: dict[str, Any] = {}
    blocks = examples()
    for block in blocks:
        code = compile(block, "docs/other-readers.md", "exec")
        if not block.startswith(NEEDS_ENERGON):
            exec(code, found)
    assert sum(block.startswith(NEEDS_ENERGON) for block in blocks) == 1
    assert found["keys"] == ["k2", "k0", "k1"]
    assert found["batch"]["emb"].shape == (3, 512)
    assert found["batch"]["emb"][:, 0].tolist() == [2.0, 0.0, 1.0]
    assert sorted(found["members"]) == ["emb.npy", "jpg", "txt"]
    assert found["caption"] == found["caption_again"] == "caption 2"
    assert found["turns"][0]["text"].startswith("look at")
    assert found["tokens"].shape == (77,)
    assert found["sample"]["tokens.npy"].dtype == np.uint16
    assert not list((places / "data").rglob("*.idx"))
