"""Commands over networks: train, sample."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from d2i.cli.console import (
    INTERRUPTED,
    CacheDirOption,
    CacheGbOption,
    CheckDataOption,
    FaultOption,
    JsonOption,
    RecipeOption,
    SetOption,
    print_result,
    register,
)
from d2i.errors import ClusterError, ConfigError

# The same however many pictures are asked for, so that one is the same alone or in a grid.
_SMALL_BATCHES = ["sample.compute_batch_size=4", "encoders.compute_batch_size=4"]


def add_commands(app: typer.Typer) -> None:
    """Give the commands of this module to the app."""
    for command in (train, sample):
        register(app, command)


def train(
    recipe: RecipeOption,
    data: Annotated[str, typer.Option(help="Folder made by d2i preprocess.")],
    run: Annotated[
        str, typer.Option(help="Run directory; the same command resumes, more steps train longer.")
    ],
    settings: SetOption = None,
    num_accelerators: Annotated[
        int | None, typer.Option(min=1, help="Ranks; else every GPU, or one CPU rank.")
    ] = None,
    zero: Annotated[
        Path | None, typer.Option(help="DeepSpeed's zero_optimization settings: train/zero-2.json.")
    ] = None,
    cache_dir: CacheDirOption = None,
    cache_gb: CacheGbOption = None,
    *,
    check_data: CheckDataOption = True,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="Measure this machine for it; train nothing.")
    ] = False,
    as_json: JsonOption = False,
    fault: FaultOption = None,
) -> None:
    """Fine-tune a backbone: print the deepspeed line of train/launch.py, and run it.

    The paper's recipes start from published weights: --set backbone.weights=PATH, of a file that
    d2i weights list names, or =scratch for random ones.

    Examples:

        d2i train --recipe demo --data data --run runs/demo --num-accelerators 2

        d2i train --recipe uvit-s-photochat --data data --run runs/a
        --set backbone.weights=mscoco_uvit_small.pth

        d2i train --recipe demo --data data --run runs/demo --set train.num_steps=600

        d2i train --recipe uvit-s-mmdialog --data data --run runs/b --preflight --json

        d2i train --recipe uvit-s-mmdialog --data s3://bucket/data --run runs/b
        --set backbone.weights=mscoco_uvit_small.pth --set train.order=blocked
        --cache-dir /nvme/d2i --cache-gb 200
    """
    from d2i import storage
    from d2i.fault_injection import parse_fault
    from d2i.parse import read_json
    from d2i.recipes import resolve_recipe
    from d2i.run_dir import STOPPED_NAME, check_initial_weights
    from d2i.train.launcher import deepspeed_command, run_command

    # Checked here, so that a typing error costs no start of the ranks.
    resolved = resolve_recipe(recipe, settings or [])
    resolved.train.accumulation(num_accelerators or 1)
    if not preflight:
        check_initial_weights(resolved, run)
    parse_fault(fault)
    _check_data(data)
    arguments = ["--recipe", recipe, "--data", data, "--run", run]
    arguments += [part for setting in settings or [] for part in ("--set", setting)]
    arguments += ["--zero", str(zero)] if zero else []
    arguments += ["--cache-dir", str(cache_dir)] if cache_dir else []
    arguments += ["--cache-gb", str(cache_gb)] if cache_gb is not None else []
    arguments += [] if check_data else ["--no-check-data"]
    arguments += ["--fault", fault] if fault else []
    arguments += ["--preflight"] if preflight else []
    command = deepspeed_command(arguments, num_accelerators)
    typer.echo(" ".join(command), err=True)
    storage.remove(storage.join(run, STOPPED_NAME))
    code, is_interrupted = run_command(command)
    # A launcher that is told to end, as its ranks are, says that it failed.
    if code and not storage.exists(storage.join(run, STOPPED_NAME)):
        raise typer.Exit(2 if code == 2 else 1)
    if preflight:
        found = read_json(storage.join(run, "preflight.json"))
        print_result(found, [f"{name}: {v}" for name, v in found.items()], as_json=as_json)
        return
    _print_run(run, resolved.train.num_steps, as_json=as_json)
    if is_interrupted and storage.exists(storage.join(run, STOPPED_NAME)):
        # So that a shell does not go on with what was to come after.
        raise typer.Exit(INTERRUPTED)


def sample(
    run: Annotated[str, typer.Option(help="A finished run.")],
    dialog: Annotated[
        str, typer.Option(help="A file of lines or JSON, any chat form; - for stdin.")
    ],
    out: Annotated[str, typer.Option(help="The PNG to write, a path or a URL.")] = "picture.png",
    seed: Annotated[
        list[int] | None, typer.Option(min=0, help="One picture a seed; several make a grid.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Draw what d2i eval draws for the instance of this key.")
    ] = None,
    settings: SetOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Draw the picture that answers one conversation; the PNG says how it was drawn.

    The network runs at 4 pictures at a time; with --key at d2i eval's batch, for its very bits.

    Examples:

        echo 'i saw a big red ball on the beach at night' | d2i sample --run runs/demo --dialog -

        d2i sample --run runs/demo --dialog chat.json --seed 7 --seed 8 --out answers.png

        d2i sample --run runs/demo --dialog chat.txt --set sample.weights=trained

        d2i sample --run runs/demo --dialog chat.txt
        --set sample.sampler=diffusers:DPMSolverMultistepScheduler
    """
    from d2i.eval.guidance import choose_settings
    from d2i.eval.single_dialog import Request, generate_image, read_dialog
    from d2i.recipes import change_recipe
    from d2i.run_dir import read_recipe

    if not out.lower().endswith(".png"):
        raise ConfigError(f"--out {out}: expected a name that ends in .png; change it")
    turns = read_dialog(_read_text(dialog))
    choice = choose_settings(f"run:{run}", settings or [])
    # An instance's key asks for what d2i eval draws, at its batch, to the bit.
    batches = [] if key else _SMALL_BATCHES
    recipe = change_recipe(read_recipe(run), [*batches, *choice.settings])
    seeds = seed or [recipe.sample.seed]
    text = generate_image(Request(run, recipe, turns, seeds, key), out)
    result = {"image": out, "text": text, "seeds": seeds}
    print_result(result, [out], as_json=as_json)


def _check_data(data: str) -> None:
    from d2i import storage

    candidates = (data, storage.join(data, "train"))
    if not any(storage.exists(storage.join(url, "manifest.json")) for url in candidates):
        raise ConfigError(
            f"--data {data}: no manifest.json there nor in train/; expected a folder made by "
            "d2i preprocess; repeat its command to finish it, or check the path"
        )


def _print_run(run: str, num_steps: int, *, as_json: bool) -> None:
    """Say how a training ended whose launcher ended well.

    Raises:
        ClusterError: If it neither finished nor stopped: a launcher that is killed ends with 0.
    """
    from d2i import storage
    from d2i.run_dir import STOPPED_NAME, last_step, read_metrics

    result = {"run": run, "finished": last_step(run) == num_steps}
    if storage.exists(storage.join(run, STOPPED_NAME)):
        line = f"stopped as asked: resume with the same command: {run}"
        print_result(result | {"finished": False}, [line], as_json=as_json)
        return
    if not result["finished"]:
        raise ClusterError(
            f"{run}: the launcher ended before the training did; expected it to wait for its "
            "ranks; see above who ended it, and resume with the same command"
        )
    last = read_metrics(run)[-1]
    line = f"{last.step} steps, loss {last.loss:.4f}, {last.images_per_s:.0f} images/s: {run}"
    print_result(result | dataclasses.asdict(last), [line], as_json=as_json)


def _read_text(dialog: str) -> str:
    try:
        data = _read_stdin() if dialog == "-" else Path(dialog).expanduser().read_bytes()
        # Some editors begin a file with a mark that is none of its text.
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(
            f"--dialog {dialog}: {err}; expected a text or JSON file in UTF-8, or - for stdin"
        ) from err


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise OSError("stdin is closed")
    return sys.stdin.buffer.read()
