"""Table 3: four runs, each trained and evaluated on a linearization of its own.

python eval/table3.py data/photochat studies/table3 --run runs/space --run runs/special \
  --run runs/letters --run runs/hash

`--help` shows the commands that make them. With --test-time-only each given run is evaluated on
all four linearizations, regardless of its training: another experiment than the paper's, and
labelled so.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from d2i.cluster import Session
from d2i.config import Recipe
from d2i.dialog import TEMPLATES
from d2i.errors import ConfigError, D2IError
from d2i.eval.generation_settings import choose_settings
from d2i.eval.job import EvalProgress, evaluate
from d2i.eval.request import EvalRequest
from d2i.eval.systems import parse_system
from d2i.io.config_lock import diff
from d2i.recipes import change_recipe, read_stored_recipe
from d2i.report import write_report
from d2i.run_dir import read_recipe
from d2i.shards import data_set_url


def show(progress: EvalProgress) -> None:
    """Print the progress of an evaluation."""
    print(progress.line(), file=sys.stderr)


def commands(strategy: str, data: str, recipe: str, out: str, prepared: str = "hash") -> list[str]:
    """Return the commands that make the run of a linearization, and evaluate it as this does.

    All train on the same data: other linearizations than `prepared` are encoded while training.
    """
    encode = "stored" if strategy == prepared else "on_the_fly"
    return [
        f"d2i train --recipe {recipe} --data {data} --run runs/{strategy} "
        f"--set text.strategy={strategy} --set text.encode={encode} "
        "--set backbone.weights=WEIGHTS",
        f"d2i eval --system run:runs/{strategy} --data {data} --out {out}/{strategy}",
    ]


def one_each(runs: Sequence[str], recipe: Recipe, data: str, out: Path) -> dict[str, str]:
    """Find the one run that was trained on each linearization.

    Raises:
        ConfigError: If a linearization has no run, or two.
    """
    trained: dict[str, str] = {}
    for run in runs:
        strategy = read_recipe(run).text.strategy
        if strategy in trained:
            raise ConfigError(
                f"{trained[strategy]} and {run} were both trained on {strategy}; expected one run "
                "per linearization; add --test-time-only to evaluate one run on all of them"
            )
        trained[strategy] = run
    missing = [strategy for strategy in TEMPLATES if strategy not in trained]
    for strategy in missing:
        made_by = commands(strategy, data, recipe.name, str(out), recipe.text.strategy)
        print(f"to make the run of {strategy}:", *made_by, sep="\n  ", file=sys.stderr)
    if missing or len(trained) > len(TEMPLATES):
        raise ConfigError(
            f"got runs trained on {', '.join(trained)}; expected one on each of "
            f"{', '.join(TEMPLATES)}; make the missing runs, or add --test-time-only to "
            "evaluate a run on texts that it was not trained on"
        )
    _compare({strategy: trained[strategy] for strategy in TEMPLATES})
    return trained


def _compare(trained: dict[str, str]) -> None:
    """Warn if the runs differ in more than their text, since that changes the scores too."""
    recipes = {run: read_recipe(run).model_dump(mode="json") for run in trained.values()}
    for recipe in recipes.values():
        for name in ("strategy", "encode"):
            del recipe["text"][name]
    (first, expected), *others = recipes.items()
    for run, found in others:
        if named := diff(found, expected):
            print(f"warning: {run} differs from {first}: {'; '.join(named[:3])}", file=sys.stderr)


def ask(run: str, strategy: str, data: str, settings: Sequence[str]) -> EvalRequest:
    """Return the request of a run on a linearization, with its other text settings as trained."""
    system = f"run:{run}"
    choice = choose_settings(system, [f"text.strategy={strategy}", *settings])
    recipe = change_recipe(read_stored_recipe(data), choice.settings)
    return EvalRequest(
        recipe=recipe,
        system=parse_system(system, None, recipe),
        data_url=data_set_url(data, "test"),
        out_url="",
        guidance_chosen_by=choice.guidance_by,
    )


def main(
    data: Annotated[str, typer.Argument(help="Directory made by d2i preprocess.")],
    out: Annotated[
        Path, typer.Argument(help="Directory of the study; the same command resumes it.")
    ],
    run: Annotated[list[str], typer.Option(help="A finished run, one per linearization.")],
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE, for all runs.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="0: no Ray; default: fits the machine.")
    ] = None,
    ray_address: Annotated[str | None, typer.Option(help="A running Ray cluster.")] = None,
    *,
    test_time_only: Annotated[
        bool,
        typer.Option(
            "--test-time-only", help="Evaluate each run on all four; not as in the paper."
        ),
    ] = False,
) -> None:
    """Evaluate each run on the text it was trained on, then write table3.html, .md and .csv."""
    if test_time_only:
        names = [re.sub(r"[^A-Za-z0-9-]+", "-", r).strip("-") for r in run]
        pairs = [(r, s, f"{n}-{s}") for r, n in zip(run, names, strict=True) for s in TEMPLATES]
    else:
        trained = one_each(run, read_stored_recipe(data), data, out)
        pairs = [(trained[strategy], strategy, strategy) for strategy in TEMPLATES]
    with Session(workers, ray_address) as session:
        for one, strategy, name in pairs:
            request = replace(ask(one, strategy, data, setting or []), out_url=str(out / name))
            print(one, strategy, evaluate(request, session, show)["scores"])
    title = "Linearizations" + (", changed at test time only" if test_time_only else "")
    for suffix in ("html", "md", "csv"):
        write_report([out / name for *_, name in pairs], out / f"table3.{suffix}", title=title)


def _help() -> str:
    made_by = ("data/photochat", "unidiffuser-v1-photochat", "studies/table3")
    parts = ["\n".join(commands(strategy, *made_by)) for strategy in TEMPLATES]
    # \b keeps the line breaks of a paragraph.
    shown = "".join(f"\n\n\b\n{part}" for part in parts)
    return f"{main.__doc__}\n\nTo make and evaluate the four runs:{shown}"


if __name__ == "__main__":
    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    app.command(help=_help())(main)
    try:
        app()
    except D2IError as err:
        print(f"table3: {err}", file=sys.stderr)
        sys.exit(2)
