"""The licence of a model, as the README.md of its directory names it. Must not import torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2i.io import storage
from d2i.io.front_matter import read_front_matter

HUB = "https://huggingface.co"
_MAX_BYTES = 1 << 16
_MAX_CHARS = 200
# The form of the hub's identifiers, such as openrail++.
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_FILE = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Licence:
    """A licence, in the fields of the hub's model cards.

    Args:
        identifier: The hub's, such as `creativeml-openrail-m`; `other` for one it does not list.
        name: Its name, for `other`.
        link: The URL of its text, if that is known.
    """

    identifier: str
    name: str | None = None
    link: str | None = None

    @property
    def words(self) -> str:
        """Its identifier or name, and the URL of its text."""
        return (self.name or self.identifier) + (f" ({self.link})" if self.link else "")

    def metadata(self) -> dict[str, str]:
        """Return its fields in a card's front matter."""
        fields = {"license": self.identifier, "license_name": self.name, "license_link": self.link}
        return {field: value for field, value in fields.items() if value}


def read_licence(directory: Path, repository: str | None = None) -> Licence | None:
    """Read the licence from the front matter of a directory's README.md.

    Args:
        directory: That of a model.
        repository: The repository on the hub that it was downloaded from, to which a link in it
            then leads.

    Returns:
        None if there is no README.md that can be read and names a licence.
    """
    try:
        head = storage.read_head(str(directory / "README.md"), _MAX_BYTES)
        values = read_front_matter(head.decode("utf-8-sig", "replace"))
    except (OSError, ValueError):
        return None
    given, name = _line(values.get("license")), _line(values.get("license_name"))
    if given is None and name is None:
        return None
    link = _absolute(_line(values.get("license_link")), repository)
    identifier = (given or "other").lower()
    if not _IDENTIFIER.fullmatch(identifier):
        # In words, where the hub expects an identifier.
        identifier, name = "other", name or given
    if identifier != "other":
        return Licence(identifier, link=link)
    return Licence(identifier, _slug(name) if name else None, link)


def _line(value: Any) -> str | None:
    """Return one line of text, or that of several licences; None for anything else."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = " and ".join(value)
    if not isinstance(value, str) or len(value) > _MAX_CHARS:
        return None
    return " ".join(value.split()) or None


def _slug(name: str) -> str:
    """Return a name in the form that the hub expects, such as `my-license-1.0`."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "other"


def _absolute(link: str | None, repository: str | None) -> str | None:
    """Return a link that leads somewhere from another repository, too."""
    if link and re.fullmatch(r"https?://[!-~]+", link):
        return link
    if link and repository and _FILE.fullmatch(link):
        return f"{HUB}/{repository}/blob/main/{link}"
    return None
