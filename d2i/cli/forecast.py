"""Options and printed lines of a dry run's forecast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from d2i.errors import ConfigError

if TYPE_CHECKING:
    from d2i.cluster.estimate import Forecast, RateOverrides

RateOption = Annotated[
    float | None,
    typer.Option(
        "--rate", min=1e-9, help="With --dry-run: instances/s of one worker; default: as measured."
    ),
]
PriceOption = Annotated[
    float | None,
    typer.Option("--price-per-node-hour", min=0, help="With --dry-run: price of a node per hour."),
]

_GIB = 2**30


def assumed_of(rate: float | None, price: float | None, *, dry_run: bool) -> RateOverrides:
    """Read both options.

    Raises:
        ConfigError: If one is given without a dry run.
    """
    from d2i.cluster.estimate import RateOverrides

    given = {"--rate": rate, "--price-per-node-hour": price}
    if not dry_run and (named := [name for name, value in given.items() if value is not None]):
        raise ConfigError(
            f"{named[0]} applies only to a dry run; expected --dry-run with it; add --dry-run"
        )
    return RateOverrides(rate, price)


def forecast_lines(found: Forecast) -> list[str]:
    """Return the printed lines of a forecast."""
    work, offer = found.work, found.offer
    rate = "" if found.items_per_s is None else f"{found.items_per_s:.3g} instances/s per worker, "
    lines = [
        f"remaining: {work.num_items} instances in {work.num_tasks} tasks",
        f"workers: {found.num_workers} (one {offer.unit} each), nodes: {offer.num_nodes}, "
        f"rounds: {found.num_rounds}",
        f"rate: {rate}{found.rate_from}",
    ]
    if found.bytes_in_flight:
        lines.append(_memory_line(found.bytes_in_flight, offer.object_store_bytes))
    if found.time_s is not None:
        cost = "" if found.cost is None else f", cost: {found.cost:.2f}"
        lines.append(f"time: {_duration(found.time_s)} plus start-up{cost}")
    return lines


def _memory_line(in_flight: int, held: int) -> str:
    there = f"; the object stores hold {held / _GIB:.1f} GiB" if held else ""
    return f"memory: at most {in_flight / _GIB:.2f} GiB of images in flight{there}"


def _duration(time_s: float) -> str:
    return f"{time_s:.0f} s" if time_s < 600 else f"{time_s / 3600:.1f} h"
