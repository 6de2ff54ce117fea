"""The sample command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from d2i.cli.options import (
    JsonOption,
    SetOption,
)
from d2i.cli.output import print_result
from d2i.errors import ConfigError

# One batch size for any number of images, so that an image is the same alone or in a grid.
_SMALL_BATCH = 4


def sample(
    run: Annotated[str, typer.Option(help="A finished run.")],
    dialog: Annotated[
        str, typer.Option(help="A file with a turn per line, or a JSON chat; - for stdin.")
    ],
    out: Annotated[str, typer.Option(help="The PNG to write, a path or a URL.")] = "picture.png",
    seed: Annotated[
        list[int] | None, typer.Option(min=0, help="One image per seed; several make a grid.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Generate the image of d2i eval for this instance key.")
    ] = None,
    settings: SetOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Generate the image that answers one conversation.

    The PNG records how it was generated. The network runs at a batch size of 4; with --key at that
    of d2i eval, to match it bit for bit.

    Examples:

        echo 'i saw a big red ball on the beach at night' | d2i sample --run d2i-demo/run --dialog -

        echo '[{"role": "user", "content": "a red ball at night"}]' | d2i sample
        --run d2i-demo/run --dialog - --seed 7 --seed 8 --out answers.png

        echo 'a red ball at night' | d2i sample --run d2i-demo/run --dialog -
        --set sample.weights=trained --set sample.sampler=diffusers:DPMSolverMultistepScheduler

        d2i sample --run runs/a --dialog chat.json
    """
    from d2i.eval.loaded_model import load
    from d2i.eval.single_dialog import generate_image, read_dialog, read_roles

    if not out.lower().endswith(".png"):
        raise ConfigError(f"--out {out}: expected a name that ends in .png; change it")
    given = _read_text(dialog)
    turns = read_dialog(given)
    # With a key, the image matches d2i eval's bit for bit, which takes its batch size.
    size = None if key else _SMALL_BATCH
    model = load(f"run:{run}", settings=settings or [], compute_batch_size=size)
    seeds = seed or [model.recipe.sample.seed]
    text = generate_image(model, turns, seeds, out, key=key, roles=read_roles(given))
    result = {"image": out, "text": text, "seeds": seeds}
    print_result(result, [out], as_json=as_json)


def _read_text(dialog: str) -> str:
    try:
        data = _read_stdin() if dialog == "-" else Path(dialog).expanduser().read_bytes()
        # Some editors begin a file with a byte order mark.
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(
            f"--dialog {dialog}: {err}; expected a text or JSON file in UTF-8, or - for stdin"
        ) from err


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise OSError("stdin is closed")
    return sys.stdin.buffer.read()
