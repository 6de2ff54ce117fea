"""Checks of a pipeline to train or to evaluate: its licence, and its text as d2i encodes it."""

from __future__ import annotations

from collections.abc import Iterator

from d2i.doctor.check import Check, first_line, run_checks
from d2i.errors import D2IError


def base_checks(name: str) -> Iterator[Check]:
    """Check a pipeline, with the side of a dialog kept that recipes keep by default.

    Args:
        name: The directory of the pipeline, or its repository in the local cache.

    Yields:
        Two `Check`s. Nothing is raised: a pipeline that cannot be loaded is a `fail` row.
    """
    return run_checks(
        [
            (f"licence of {name}", lambda: check_licence(name)),
            (f"text of {name}", lambda: check_text(name)),
        ]
    )


def check_licence(name: str) -> Check:
    """Say the licence of a pipeline; an unknown or a non-commercial one is a warning.

    Args:
        name: The directory of the pipeline, or its repository in the local cache.
    """
    from d2i.backbones import presets_of_pipeline
    from d2i.models.licence import read_licence
    from d2i.models.pipeline_dir import local_directory, read_index

    row = f"licence of {name}"
    try:
        path = local_directory(name, "pipeline that save_pretrained wrote", "--weights DIR")
        presets = presets_of_pipeline(str(read_index(path).get("_class_name")))
    except D2IError as err:
        detail, _, fix = first_line(err).rpartition("; ")
        return Check(row, "fail", detail, fix)
    if licence := read_licence(path):
        if "non-commercial" in licence.words.lower():
            return Check(row, "warn", licence.words, "use it, and what you train, accordingly")
        return Check(row, "ok", f"{licence.words}, which holds for what is trained, too")
    published = presets and presets.published_licence
    hint = f"; the published weights of this family are under {published}" if published else ""
    return Check(
        row, "warn", f"not named by a README.md there{hint}", "look where it was published"
    )


def check_text(name: str) -> Check:
    """Check that text encoders read the newest turn, and spelled special tokens as plain text.

    Args:
        name: The directory of the pipeline, or its repository in the local cache.
    """
    from d2i.config import TextConfig
    from d2i.encoders.pipeline_text import load_text_parts
    from d2i.encoders.prompt_truncation import PromptTruncation
    from d2i.encoders.text_probe import NEXT_STEP, probe_text
    from d2i.models.pipeline_dir import local_directory

    row = f"text of {name}"
    try:
        path = local_directory(name, "pipeline that save_pretrained wrote", "--weights DIR")
        # Token ids are the same in every precision.
        pipeline = load_text_parts(path, "cpu", "bf16")
        reading = PromptTruncation(pipeline, {}, TextConfig().keep)
        problems = probe_text(pipeline, reading)
    except D2IError as err:
        detail, _, fix = first_line(err).rpartition("; ")
        return Check(row, "fail", detail, fix)
    if problems:
        return Check(row, "fail", problems[0], NEXT_STEP)
    windows = [
        f"{encoder}: {window.tokens} tokens, {window.dialog_tokens} of a dialog"
        for encoder, window in reading.windows.items()
    ]
    return Check(row, "ok", "; ".join(windows))
