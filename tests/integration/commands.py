"""Command lines that several tests run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.processes import run_d2i


def preprocess(corpus: str, source: Path, out: Path, *extra: str) -> dict[str, dict[str, Any]]:
    result = run_d2i(
        *("preprocess", "--corpus", corpus, "--source", source, "--out", out),
        *("--recipe", "demo", "--workers", "0", "--json", *extra),
    )
    return {split["split"]: split for split in result["splits"]}
