"""The train command."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from d2i.cli.help import RANKS
from d2i.cli.options import (
    CacheDirOption,
    CacheGbOption,
    CheckDataOption,
    FaultOption,
    JsonOption,
    RecipeOption,
    SetOption,
)
from d2i.cli.output import INTERRUPTED, print_result
from d2i.errors import ClusterError, ConfigError


def train(
    recipe: RecipeOption,
    data: Annotated[str, typer.Option(help="Directory made by d2i preprocess.")],
    run: Annotated[
        str, typer.Option(help="Run directory; the same command resumes, more steps train longer.")
    ],
    settings: SetOption = None,
    num_accelerators: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of ranks; by default one per GPU, or one on the CPU.",
            rich_help_panel=RANKS,
        ),
    ] = None,
    zero: Annotated[
        Path | None,
        typer.Option(
            help="DeepSpeed's zero_optimization settings: train/zero-2.json.",
            rich_help_panel=RANKS,
        ),
    ] = None,
    cache_dir: CacheDirOption = None,
    cache_gb: CacheGbOption = None,
    *,
    check_data: CheckDataOption = True,
    preflight: Annotated[
        bool,
        typer.Option(
            "--preflight", help="Reckon and measure memory, and speed, here; train nothing."
        ),
    ] = False,
    as_json: JsonOption = False,
    fault: FaultOption = None,
) -> None:
    """Fine-tune a text-to-image network on conversations.

    Prints the deepspeed command of train/launch.py, and runs it. The paper's recipes start from
    published weights: give --set backbone.weights=PATH of a file that d2i weights list names, or
    backbone.weights=scratch for random weights.

    Examples:

        d2i train --recipe demo --data d2i-demo/data --run runs/demo --num-accelerators 2

        d2i train --recipe demo --data d2i-demo/data --run runs/demo --num-accelerators 2
        --set train.num_steps=600

        d2i train --recipe demo --data d2i-demo/data --run runs/demo --preflight --json

        d2i train --recipe uvit-s-photochat --data data --run runs/a
        --set backbone.weights=mscoco_uvit_small.pth

        d2i train --recipe uvit-s-mmdialog --data s3://bucket/data --run runs/b
        --set backbone.weights=mscoco_uvit_small.pth --set train.order=blocked
        --cache-dir /nvme/d2i --cache-gb 200
    """
    from d2i.backbones import chat_problem
    from d2i.errors import ConfigError
    from d2i.fault_injection import parse_fault
    from d2i.io import storage
    from d2i.io.parse import read_json
    from d2i.recipe_file import is_recipe_file
    from d2i.recipes import resolve_recipe
    from d2i.run_dir import STOPPED_NAME, check_initial_weights
    from d2i.train.launcher import deepspeed_command, run_command

    # Checked here, so that a typo fails before the ranks start.
    resolved = resolve_recipe(recipe, settings or [])
    resolved.train.accumulation(num_accelerators or 1)
    if problem := chat_problem(resolved):
        raise ConfigError(problem)
    if not preflight:
        check_initial_weights(resolved, run)
    parse_fault(fault)
    _check_data(data)
    # The printed command then also works in another working directory.
    named = storage.absolute(recipe) if is_recipe_file(recipe) else recipe
    arguments = ["--recipe", named, "--data", data, "--run", run]
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
    # A launcher that is stopped together with its ranks exits with an error code.
    if code and not storage.exists(storage.join(run, STOPPED_NAME)):
        raise typer.Exit(2 if code == 2 else 1)
    if preflight:
        found = read_json(storage.join(run, "preflight.json"))
        print_result(found, _preflight_lines(found), as_json=as_json)
        return
    _print_run(run, resolved.train.num_steps, as_json=as_json)
    if is_interrupted and storage.exists(storage.join(run, STOPPED_NAME)):
        # So that a shell does not run the commands that follow.
        raise typer.Exit(INTERRUPTED)


def _preflight_lines(found: Mapping[str, Any]) -> Iterator[str]:
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from (f"{name}.{line}" for line in _preflight_lines(value))
        else:
            yield f"{name}: {value}"


def _check_data(data: str) -> None:
    from d2i.io import storage
    from d2i.shards import data_set_url

    if not storage.exists(storage.join(data_set_url(data, "train"), "manifest.json")):
        raise ConfigError(
            f"--data {data}: no manifest.json there or in train/; expected a directory made by "
            "d2i preprocess; run that command again to finish it, or check the path"
        )


def _print_run(run: str, num_steps: int, *, as_json: bool) -> None:
    """Print how a training ended whose launcher exited with 0.

    Raises:
        ClusterError: If it neither finished nor stopped: a killed launcher exits with 0, too.
    """
    from d2i.io import storage
    from d2i.run_dir import STOPPED_NAME, last_step, read_metrics

    result = {"run": run, "finished": last_step(run) == num_steps}
    if storage.exists(storage.join(run, STOPPED_NAME)):
        line = f"stopped on request; resume with the same command: {run}"
        print_result(result | {"finished": False}, [line], as_json=as_json)
        return
    if not result["finished"]:
        raise ClusterError(
            f"{run}: the launcher ended before the training did; expected it to wait for its "
            "ranks; see the output above for what ended it, and resume with the same command"
        )
    last = read_metrics(run)[-1]
    line = f"{last.step} steps, loss {last.loss:.4f}, {last.images_per_s:.0f} images/s: {run}"
    print_result(result | dataclasses.asdict(last), [line], as_json=as_json)
