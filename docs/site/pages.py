"""The pages of the site: the repository's Markdown, each file under its own path."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every page of the navigation, and the files that it links to, but no code."""
    pages = [ROOT / name for name in _names(config.nav) if files.get_file_from_path(name) is None]
    linked = {found for page in pages for found in _linked(page)}
    for path in sorted({*pages, *linked}):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def _names(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else []
    return [name for part in parts for name in _names(part)]


def _linked(page: Path) -> set[Path]:
    targets = ((page.parent / name).resolve() for name in _LINK.findall(page.read_text("utf-8")))
    return {path for path in targets if path.is_file() and path.suffix not in (".md", ".py")}


def on_page_markdown(markdown: str, **_: object) -> str:
    """Turn links to code and directories, which are no pages, into plain text."""

    def plain(match: re.Match[str]) -> str:
        text, target = match.groups()
        is_page = target.startswith(("http", "#")) or Path(target.partition("#")[0]).suffix
        return match[0] if is_page and not target.endswith(".py") else text

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", plain, markdown)
