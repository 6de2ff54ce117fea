"""Backward compatibility: names promised on disk, in settings, in random draws and in the API.

`names.json`, `words.txt`, `numbers.json` and `on_disk.json` beside this file are the golden lists.
A change that intentionally breaks or extends a promise regenerates them by the command below, and
records that in the CHANGELOG:

    python -m tests.contracts

Names of classes and functions are free to change, except those of `API`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import operator
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer.main
from pydantic import BaseModel
from safetensors import safe_open

from d2i.cli.app import app
from d2i.config import Recipe
from d2i.fault_injection import Point

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
API = (
    "d2i:Dataset",
    "d2i:Model.generate",
    "d2i:Model.read",
    "d2i:Read",
    "d2i:load",
    "d2i:webdataset",
    "d2i.cluster:Session",
    "d2i.cluster:Session.capacity",
    "d2i.cluster:Session.map",
    "d2i.cluster:Session.pipeline",
    "d2i.cluster:Session.shared",
    "d2i.corpora:read_instances",
    "d2i.dialog:Instance",
    "d2i.dialog:Turn",
    "d2i.dialog:linearize",
    "d2i.diffusion:Schedule",
    "d2i.diffusion:ancestral",
    "d2i.diffusion:dpm_solver",
    "d2i.eval.metrics:compute_scores",
    "d2i.eval.system:CallOptions",
    "d2i.eval.system:Generation",
    "d2i.eval.system:SeededSystem.generate_seeded",
    "d2i.eval.system:System.generate",
    "d2i.eval.system:SystemContext",
    "d2i.models:build_backbone",
    "d2i.models:load_weights",
    "d2i.shards:ShardReader",
    "d2i.shards:verify",
    "d2i.tokenize:encode",
    "d2i.tokenize:window",
)
WRITTEN = (
    "d2i.cluster.estimate:Forecast",
    "d2i.cluster.estimate:Rate",
    "d2i.demo.run:DemoRequest",
    "d2i.doctor.check:Check",
    "d2i.eval.metrics.category_scores:CategoryScores",
    "d2i.corpus_analysis.captioning:DescribeSummary",
    "d2i.preprocess.plan.planner:Plan",
    "d2i.preprocess.repair:RepairSummary",
    "d2i.preprocess.plan.supplements:Supplement",
    "d2i.run_dir:BestChoice",
    "d2i.weights_catalog:PublishedFile",
)
"""Classes whose fields are keys of a file or of a command's JSON."""

_WORD = re.compile(r"[\w.\-/:{}]*[a-z][\w.\-/:{}]*")
_VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")


def names() -> dict[str, Any]:
    """Return the promised names that can be collected without running a command."""
    return {
        "api": {name: signature(name) for name in API},
        "fields": {name: field_names(name) for name in WRITTEN},
        "settings": sorted(setting_names(Recipe)),
        "options": command_options(),
        "fault points": sorted(get_args(Point)),
        "environment": environment_names(),
    }


def field_names(name: str) -> list[str]:
    module, _, attribute = name.partition(":")
    kind = getattr(importlib.import_module(module), attribute)
    return [field.name for field in dataclasses.fields(kind)]


def signature(name: str) -> list[str]:
    """Return the parameter names of a function or of a class's constructor."""
    module, _, attribute = name.partition(":")
    found = operator.attrgetter(attribute)(importlib.import_module(module))
    parameters = inspect.signature(found).parameters
    return [f"{'*' * (p.kind is p.KEYWORD_ONLY)}{p.name}" for p in parameters.values()]


def setting_names(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        parts = [
            part
            for part in (field.annotation, *get_args(field.annotation))
            if isinstance(part, type) and issubclass(part, BaseModel)
        ]
        if not parts:
            yield f"{prefix}{name}={json.dumps(field.default, default=str)}"
        for part in parts:
            yield from setting_names(part, f"{prefix}{name}.")


def command_options() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        found[" ".join(words)] = sorted(
            o for p in command.params for o in p.opts + p.secondary_opts
        )
        for name, child in getattr(command, "commands", {}).items():
            walk(child, (*words, name))

    walk(typer.main.get_command(app), ("d2i",))
    return found


def syntax_trees() -> list[ast.Module]:
    return [ast.parse(path.read_text()) for path in sorted((ROOT / "d2i").rglob("*.py"))]


def environment_names() -> list[str]:
    """Return the strings in the code that look like environment variables."""
    found = {text for tree in syntax_trees() for _, text in texts(tree)}
    return sorted(text for text in found if _VARIABLE.fullmatch(text))


def words() -> list[str]:
    """Return all machine-readable strings in the code: keys, file names, columns, reasons, kinds.

    Docstrings, annotations, names of type variables and `__all__` are excluded.
    """
    found = set()
    for tree in syntax_trees():
        skipped = {id(part) for node in ast.walk(tree) for part in names_of_code(node)}
        found |= {text for node, text in texts(tree) if id(node) not in skipped}
    return sorted(text for text in found if _WORD.fullmatch(text))


def texts(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node, node.value


def names_of_code(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the strings below `node` that name a part of the code itself."""
    if isinstance(node, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id in {"__all__", "__slots__"}
        for target in node.targets
    ):
        yield from ast.walk(node.value)
    if isinstance(node, ast.Expr):
        yield node.value  # a docstring
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"TypeVar", "ParamSpec"}:
        yield from ast.walk(node)
    for field in ("annotation", "returns"):
        part = getattr(node, field, None)
        if part is not None and "Literal" not in ast.dump(part):
            yield from ast.walk(part)


def described(directory: Path) -> dict[str, Any]:
    """Describe a directory that d2i has written: names of files, keys and columns.

    Numbers and hashes in file names are replaced by a placeholder.
    """
    found: dict[str, Any] = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = re.sub(r"[0-9a-f]{16}|\d+", "N", str(path.relative_to(directory)))
        found.setdefault(name, fields_of(path))
    return found


def on_disk(directory: Path, printed: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the commands of `tests/made_before/make.py` write, and the keys they print."""
    return {
        "files": described(directory),
        "printed": {name: sorted(set(key_paths(value))) for name, value in printed.items()},
    }


def fields_of(path: Path) -> Any:
    if path.suffix == ".json":
        return sorted(set(key_paths(json.loads(path.read_text()))))
    if path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        return sorted({key for line in lines for key in key_paths(json.loads(line))})
    if path.suffix == ".parquet":
        return [f"{field.name}: {field.type}" for field in pq.read_schema(path)]
    if path.suffix == ".arrow":
        schema = pa.ipc.open_file(path).schema
        return [f"{field.name}: {field.type}" for field in schema]
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return sorted(f"{name}: {arrays[name].dtype}" for name in arrays.files)
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return sorted(file.metadata() or {})
    return None


def key_paths(value: Any, path: str = "") -> Iterator[str]:
    """Return the keys of nested objects, joined by dots, with numbers and hashes replaced."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            plain = re.sub(r"[0-9a-f]{16,}|\d+|/.*/", "N", key)
            yield f"{path}{plain}"
            yield from key_paths(inner, f"{path}{plain}.")
    elif isinstance(value, list):
        for inner in value:
            yield from key_paths(inner, f"{path}[].")
