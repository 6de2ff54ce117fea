from __future__ import annotations

import pytest

from d2i.fetch.downloader import is_disallowed


@pytest.mark.parametrize(
    "values",
    [
        ["noai"],
        ["NoIndex, nofollow"],
        ["none"],
        ["d2i: noimageai"],
        ["d2i : noai"],
        ["otherbot: all", "noindex"],
        ["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"],
        ["max-image-preview:large, noai"],
        ["noai, max-image-preview:large"],
        ["max-snippet:-1, max-video-preview: 3, noimageindex"],
        ["d2i: max-snippet:3, noai"],
        ["unavailable_after: Saturday, 25-Jun-30 15:00:00 UTC, noai"],
    ],
)
def test_x_robots_tag_disallows_image(values: list[str]) -> None:
    assert is_disallowed(values)


@pytest.mark.parametrize(
    "values",
    [
        [],
        ["all"],
        ["nofollow"],
        ["max-image-preview:none"],
        ["otherbot: noindex, noai"],
        ["otherbot: max-image-preview:large, noai"],
        ["unavailable_after: 25 Jun 2030"],
    ],
)
def test_x_robots_tag_for_other_bots_or_links_is_ignored(values: list[str]) -> None:
    assert not is_disallowed(values)
