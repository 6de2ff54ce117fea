"""The licence of a base model is that which its own README.md names, or none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from d2i.io.front_matter import front_matter
from d2i.models.licence import Licence, read_licence

REPOSITORY = "owner/name"
OF_REPOSITORY = f"https://huggingface.co/{REPOSITORY}/blob/main/LICENSE.md"


@pytest.mark.parametrize(
    ("values", "licence"),
    [
        ({"license": "creativeml-openrail-m"}, Licence("creativeml-openrail-m")),
        ({"license": "openrail++"}, Licence("openrail++")),
        ({"license": "Apache-2.0"}, Licence("apache-2.0")),
        # A name and a link are those of a licence that the hub does not list.
        ({"license": "mit", "license_name": "MIT"}, Licence("mit")),
        (
            {"license": "other", "license_name": "my-1.0", "license_link": "https://a.example/b"},
            Licence("other", "my-1.0", "https://a.example/b"),
        ),
        ({"license_name": "my-1.0"}, Licence("other", "my-1.0")),
        ({"license": "My Own Licence, 1.0"}, Licence("other", "my-own-licence-1.0")),
        ({"license": ["mit", "apache-2.0"]}, Licence("other", "mit-and-apache-2.0")),
        (
            {"license": "other", "license_link": "LICENSE.md"},
            Licence("other", link=OF_REPOSITORY),
        ),
        ({"license": "mit", "license_link": "javascript:alert(1)"}, Licence("mit")),
        ({"license": "mit", "license_link": "../../LICENSE"}, Licence("mit")),
        ({"license": {"a": "mit"}}, None),
        ({"license": "x" * 1000}, None),
        ({"license": " \n "}, None),
        ({"tags": ["a"]}, None),
    ],
)
def test_licence_is_read_from_front_matter(
    tmp_path: Path, values: dict[str, object], licence: Licence | None
) -> None:
    (tmp_path / "README.md").write_text(front_matter(values) + "# A model\n")
    assert read_licence(tmp_path, REPOSITORY) == licence


@pytest.mark.parametrize(
    "content", [b"", b"# A model\n", b"---\nlicense: [\n---\n", b"\xff\xfe", b"---\nlicense: mit\n"]
)
def test_readme_that_names_no_licence_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "README.md").write_bytes(content)
    assert read_licence(tmp_path) is None


def test_missing_or_irregular_readme_is_none(tmp_path: Path) -> None:
    assert read_licence(tmp_path) is None
    os.mkfifo(tmp_path / "README.md")
    assert read_licence(tmp_path) is None


def test_link_into_directory_is_left_out(tmp_path: Path) -> None:
    values = {"license": "other", "license_link": "LICENSE.md"}
    (tmp_path / "README.md").write_text(front_matter(values))
    assert read_licence(tmp_path) == Licence("other")


def test_long_readme_is_read_at_its_head(tmp_path: Path) -> None:
    text = front_matter({"license": "mit"}) + "é" * 100_000
    (tmp_path / "README.md").write_text(text)
    assert read_licence(tmp_path) == Licence("mit")
