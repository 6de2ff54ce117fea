"""The command about a Ray cluster: check."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from d2i.cli.completion import complete_recipe
from d2i.cli.options import JsonOption, SetOption
from d2i.cli.output import print_result, row_line
from d2i.cli.session import open_session
from d2i.io.terminal import plain

if TYPE_CHECKING:
    from d2i.config import Recipe


def check(
    ray_address: Annotated[str, typer.Option(help="A running Ray cluster, HOST:PORT or auto.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A recipe, by name or file, whose weights every node must have.",
            autocompletion=complete_recipe,
        ),
    ] = None,
    settings: SetOption = None,
    storage: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A directory that every node must read and write."),
    ] = None,
    num_nodes: Annotated[int | None, typer.Option(min=1, help="Wait for this many nodes.")] = None,
    wait_s: Annotated[float, typer.Option(min=0, help="Maximum wait, in seconds.")] = 300.0,
    *,
    as_json: JsonOption = False,
) -> None:
    """Check every node of a Ray cluster before a long job.

    Compares versions with the driver's, and checks accelerators, weights, storage, disk, object
    store and clock. Exits with 1 if a check fails.

    Examples:

        d2i cluster check --ray-address auto

        d2i cluster check --ray-address 10.0.0.5:6379 --num-nodes 4 --recipe uvit-s-mmdialog
        --storage s3://bucket/data
    """
    from d2i.doctor.cluster import ClusterRequest, check_cluster

    request = ClusterRequest(num_nodes, wait_s, _recipe(recipe, settings), tuple(storage or ()))
    found = []
    with open_session(ray_address=ray_address) as (session, progress):
        for report in check_cluster(request, session):
            progress.close()
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
            f"--set {settings[0]}: got no recipe to change; expected --recipe with it; add --recipe"
        )
    return None if name is None else resolve_recipe(name, settings or [])
