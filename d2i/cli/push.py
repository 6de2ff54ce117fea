"""The push command: a finished run's results to the hub."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from d2i.cli.options import JsonOption
from d2i.cli.output import print_result


def push(
    run: Annotated[str, typer.Argument(help="A finished run that fine-tuned a pipeline.")],
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub.")
    ],
    *,
    upload: Annotated[
        bool, typer.Option("--upload", help="Upload; otherwise only show what would be.")
    ] = False,
    private: Annotated[
        bool, typer.Option("--private/--public", help="Who can read a new repository.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Upload a finished run to the Hugging Face hub.

    Without --upload, it only shows what would be uploaded. The trained weights, the model card and
    the recipe are uploaded in one commit, where diffusers looks for them; no checkpoint, no data
    and no path of this machine is. Read the terms before others can read the repository.

    The token is that of huggingface_hub: HF_TOKEN, or hf auth login.

    Examples:

        d2i push runs/sd15 me/dialog-lora

        d2i push runs/sd15 me/dialog-lora --upload
    """
    from d2i.push.repository_files import collect_files
    from d2i.push.upload import repository_url
    from d2i.push.upload import upload as upload_files

    url = repository_url(repository)
    contents = collect_files(run, repository)
    result: dict[str, Any] = {
        "repository": repository,
        "url": url,
        "private": private,
        "files": [
            {"path": file.path, "size_bytes": file.size_bytes, "sha256": file.sha256}
            for file in contents.files
        ],
        "licence": contents.licence,
        "terms": list(contents.terms),
        "notes": list(contents.notes),
        "uploaded": False,
        "removed": [],
        "commit": None,
    }
    lines = list(_lines(result))
    if not upload:
        lines.append("nothing was uploaded; to upload this, add --upload")
        print_result(result, lines, as_json=as_json)
        return
    if not as_json:
        # Before anything leaves this machine.
        print_result(result, [*lines, "uploading …"], as_json=False)
    done = upload_files(contents, repository, private=private)
    result |= {"uploaded": done.is_new, "removed": list(done.removed), "commit": done.commit}
    print_result(result, _uploaded_lines(result), as_json=as_json)


def _lines(result: dict[str, Any]) -> Iterator[str]:
    files = result["files"]
    size = sum(file["size_bytes"] for file in files)
    kind = "private" if result["private"] else "public"
    yield f"{result['url']} ({kind}): {len(files)} files, {size:,} bytes"
    for file in files:
        yield f"  {file['path']}: {file['size_bytes']:,} bytes, sha256 {file['sha256']}"
    yield f"licence: {result['licence']}"
    yield from (f"  {line}" for line in result["terms"])
    yield from (f"note: {line}" for line in result["notes"])


def _uploaded_lines(result: dict[str, Any]) -> Iterator[str]:
    yield from (f"removed: {path}, of an earlier push" for path in result["removed"])
    state = "uploaded" if result["uploaded"] else "nothing was uploaded, as nothing has changed"
    yield f"{state}: {result['url']}/commit/{result['commit']}"
