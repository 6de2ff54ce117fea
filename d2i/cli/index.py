"""The index command: tars that d2i did not write."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Annotated

import typer

from d2i.cli.options import JsonOption
from d2i.cli.output import print_result
from d2i.io.progress_bar import Counts, ProgressBar


def index(
    directory: Annotated[
        str, typer.Argument(help="A directory or URL of WebDataset tars that d2i did not write.")
    ],
    *,
    as_json: JsonOption = False,
) -> None:
    """Index WebDataset tars that d2i did not write.

    With the index, d2i verify checks them, and Python reads any sample of them. It is written to
    DIRECTORY/d2i-index, and no tar is changed. Run it again after the tars change.

    Examples:

        d2i index laion

        d2i index s3://bucket/laion --json
    """
    from d2i.shards import index_tars

    started = time.monotonic()
    with closing(ProgressBar()) as progress:
        done = index_tars(
            directory,
            on_progress=lambda done, total: progress.show(
                Counts(f"{done}/{total} tars", done, total, "tars", started)
            ),
        )
    tars = done.tars
    arrays = {name: [info.dtype, *info.shape] for name, info in tars.arrays.items()}
    lines = [
        f"{tars.num_samples} samples in {len(tars.shards)} tars, {tars.size_bytes} bytes",
        f"members: {', '.join(tars.suffixes) or 'none'}; arrays: {arrays or 'none'}",
    ]
    if done.num_other_files:
        lines += [
            f"{done.num_other_files} files belong to no sample: no suffix, or hidden",
            "wids counts those with a dot in their path as samples: then its numbers differ",
        ]
    lines.append(f"next: d2i verify {directory}")
    result = {
        "num_samples": tars.num_samples,
        "num_shards": len(tars.shards),
        "size_bytes": tars.size_bytes,
        "members": list(tars.suffixes),
        "arrays": arrays,
        "num_other_files": done.num_other_files,
    }
    print_result(result, lines, as_json=as_json)
