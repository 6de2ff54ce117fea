"""Mirror: one host that has, by name, the images that a corpus lists as files.

Sends no requests itself.
"""

from __future__ import annotations

import re
from urllib.parse import quote, urlsplit

from d2i.errors import ConfigError
from d2i.fetch.result import FetchError
from d2i.fetch.ssrf_guard import check_url

_PLACEHOLDER = re.compile(r"\{(path|name|key)\}")


def mirror_url(template: str, path: str) -> str:
    """Return the URL of a file on the mirror.

    Args:
        template: `FetchConfig.mirror`.
        path: The file's name in the corpus.

    Raises:
        FetchError: `bad_url` for a name that leaves its directory (path traversal).
    """
    names = {"path": path, "name": path.rpartition("/")[2]}
    names["key"] = names["name"].rpartition(".")[0] or names["name"]
    # A file called `...jpg` has the key `..`.
    if ".." in [*path.split("/"), names["key"]]:
        raise FetchError("bad_url", f"{path}: got a part '..', expected a path below the mirror")
    return _PLACEHOLDER.sub(lambda found: quote(names[found[1]]), template)


def mirror_host(template: str, allow_hosts: frozenset[str]) -> str | None:
    """Return the one host of a mirror, as `Target.netloc`; None if the host depends on the file.

    Raises:
        ConfigError: If the template gives no URL that may be requested.
    """
    try:
        target = check_url(_PLACEHOLDER.sub("x", template), allow_hosts)
    except FetchError as err:
        raise ConfigError(
            f"fetch.mirror {template}: {err}; expected an http or https URL on its default "
            "port; fix it, or allow its host with --allow-host HOST:PORT"
        ) from err
    return None if _PLACEHOLDER.search(urlsplit(template).netloc) else target.netloc
