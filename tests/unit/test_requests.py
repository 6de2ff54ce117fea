"""Requests of the stages are small, and each field is read by the stage that takes it.

The fields of a dataclass that a request holds are the request's too; a recipe is one field.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import d2i

MAX_FIELDS = 12
ROOT = Path(d2i.__file__).parent
# Where the work runs is the session's.
OF_SESSION = {"num_workers", "ray_address", "fault", "num_producers"}


def is_dataclass(value: Any) -> bool:
    return isinstance(value, type) and dataclasses.is_dataclass(value)


def find_dataclasses() -> Iterator[type[Any]]:
    """Yield every dataclass of d2i."""
    for module in pkgutil.walk_packages(d2i.__path__, "d2i."):
        for value in vars(importlib.import_module(module.name)).values():
            if is_dataclass(value) and value.__module__ == module.name:
                yield value


DATACLASSES = {kind.__name__: kind for kind in find_dataclasses()}
REQUESTS = {name: kind for name, kind in DATACLASSES.items() if name.endswith("Request")}


def held_dataclasses(annotation: Any) -> Iterator[type[Any]]:
    """Yield the dataclasses in an annotation such as `Proxy | None`."""
    if is_dataclass(annotation):
        yield annotation
    for argument in get_args(annotation):
        yield from held_dataclasses(argument)


def num_fields(kind: type[Any]) -> int:
    """Count the fields, with those of held dataclasses in place of the fields that hold them."""
    # Some are imported for annotations alone.
    names = DATACLASSES | vars(sys.modules[kind.__module__])
    annotations = get_type_hints(kind, names)
    num = 0
    for field in dataclasses.fields(kind):
        held = [value for value in held_dataclasses(annotations[field.name]) if value is not kind]
        num += sum(map(num_fields, held)) if held else 1
    return num


def attributes_read(room: str) -> set[str]:
    """Return the attributes that the modules of a room read."""
    path = ROOT / room
    files = path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]
    trees = (ast.parse(file.read_text()) for file in files)
    return {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def test_every_stage_has_a_request() -> None:
    stages = {"Cluster", "Demo", "Eval", "Plan", "Preprocess", "Repair", "Select", "Train"}
    assert {f"{stage}Request" for stage in stages} <= REQUESTS.keys()


@pytest.mark.parametrize("name", sorted(REQUESTS))
def test_request_has_few_fields_and_none_of_the_session(name: str) -> None:
    fields = {field.name for field in dataclasses.fields(REQUESTS[name])}
    assert num_fields(REQUESTS[name]) <= MAX_FIELDS
    assert not fields & OF_SESSION


@pytest.mark.parametrize("name", sorted(REQUESTS))
def test_every_field_of_request_is_read_by_its_stage(name: str) -> None:
    kind = REQUESTS[name]
    room = kind.__module__.split(".")[1]
    unread = {field.name for field in dataclasses.fields(kind)} - attributes_read(room)
    assert unread == set()


def test_number_of_workers_is_known_in_cluster_and_commands_only() -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if "num_workers" in path.read_text()
        and path.relative_to(ROOT).parts[0] not in {"cluster", "cli"}
    ]
    assert found == []
