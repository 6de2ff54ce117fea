"""The command over a cluster: check."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from d2i.cli.console import JsonOption, SetOption, print_result, register, row_line
from d2i.terminal import plain

if TYPE_CHECKING:
    from d2i.config import Recipe


def add_commands(app: typer.Typer) -> None:
    """Give the command of this module to the app."""
    cluster = typer.Typer(help="What a Ray cluster offers.", no_args_is_help=True)
    register(cluster, check)

    # A group of its own, also with one command in it.
    @cluster.callback()
    def _group() -> None: ...

    app.add_typer(cluster, name="cluster")


def check(
    ray_address: Annotated[str, typer.Option(help="A running Ray cluster, HOST:PORT or auto.")],
    recipe: Annotated[
        str | None, typer.Option(help="Look for the weights that this recipe names.")
    ] = None,
    settings: SetOption = None,
    storage: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A folder that every node must read and write."),
    ] = None,
    num_nodes: Annotated[int | None, typer.Option(min=1, help="Wait for so many nodes.")] = None,
    wait_s: Annotated[float, typer.Option(min=0, help="How long, in seconds.")] = 300.0,
    *,
    as_json: JsonOption = False,
) -> None:
    """Say what each node of a cluster lacks, before a job burns hours there.

    Versions beside the driver's, accelerators, weights, storage, disk, object store, clock. Exit
    code 1 where something would fail.

    Examples:

        d2i cluster check --ray-address auto

        d2i cluster check --ray-address 10.0.0.5:6379 --num-nodes 4 --recipe uvit-s-mmdialog
        --storage s3://bucket/data
    """
    from d2i.doctor.cluster import ClusterRequest, check_cluster

    request = ClusterRequest(
        ray_address, num_nodes, wait_s, _recipe(recipe, settings), tuple(storage or ())
    )
    found = []
    for report in check_cluster(request):
        found.append(asdict(report))
        if not as_json:
            typer.echo(plain(report.name))
            for row in report.checks:
                typer.echo(f"  {row_line(row.status, row.name, row.detail, row.fix)}")
    if as_json:
        print_result({"reports": found}, [], as_json=True)
    if any(row["status"] == "fail" for report in found for row in report["checks"]):
        raise typer.Exit(1)


def _recipe(name: str | None, settings: list[str] | None) -> Recipe | None:
    from d2i.errors import ConfigError
    from d2i.recipes import resolve_recipe

    if name is None and settings:
        raise ConfigError(
            f"--set {settings[0]} changes a recipe; expected --recipe with it; add it"
        )
    return None if name is None else resolve_recipe(name, settings or [])
