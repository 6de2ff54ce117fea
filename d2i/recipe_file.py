"""Recipes as files: written as TOML that explains every setting, read from TOML or JSON.

TOML has no null: there the text "null" is null, for a setting that may be null. Must not import
torch.
"""

from __future__ import annotations

import json
import textwrap
import tomllib
from pathlib import PurePath
from typing import Any, get_args

from pydantic.fields import FieldInfo

from d2i.config import Config, Recipe, load_config
from d2i.errors import ConfigError
from d2i.io import checksums, storage
from d2i.io.terminal import plain

_NULL = "null"
_WIDTH = 96
_HEADER = (
    "A recipe of d2i, with every setting: pass this file as --recipe FILE.toml. Settings after a # "
    "without a space are unset, and shown with their default or with what the backbone needs; "
    'delete the # to set one. "null" is `None`.'
)
_ESCAPES = {'"': r"\"", "\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"}


def is_recipe_file(name: str) -> bool:
    """Return whether a recipe is named by its file, of TOML or JSON."""
    return PurePath(name).suffix in (".toml", ".json")


def read_recipe_file(url: str) -> Recipe:
    """Read a recipe from a TOML or JSON file, such as a `recipe.json` beside prepared data.

    Args:
        url: The file, a path or URL; its name ends in `.toml` or `.json`.

    Raises:
        ConfigError: One line that names the file, and the setting that is wrong or missing.
    """
    try:
        data = _read(url)
    except OSError as err:
        raise ConfigError(
            f"recipe {url}: {err.strerror or err}; expected a file such as 'd2i recipes show NAME' "
            "prints; check the path"
        ) from err
    values = _parse(data, url)
    if isinstance(values.get("recipe"), dict):
        raise ConfigError(
            f"recipe {url}: got the config.json of a run; expected a recipe alone; save the part "
            "below 'recipe' as a file of its own"
        )
    return load_config(Recipe, values, source=f"recipe {url}")


def to_toml(recipe: Recipe) -> str:
    """Return a recipe as TOML, each setting below its explanation.

    A setting that counts as unset is a comment, so that reading leaves it unset: it may follow from
    another one, such as the backbone.

    Raises:
        ConfigError: If a text is "null" where that would be read as null.
    """
    return "\n".join([*_comment(_HEADER), *_table(recipe, ())]) + "\n"


def _read(url: str) -> bytes:
    """Read a file that d2i stored with a checksum, or one that somebody wrote."""
    beside = checksums.checksum_url(url)
    if not storage.exists(beside):
        return storage.read_bytes(url)
    next_step = f"if you edited it, delete {beside} to accept the edit"
    return checksums.read_bytes(url, next_step=next_step, error=ConfigError)


def _parse(data: bytes, url: str) -> dict[str, Any]:
    is_toml = PurePath(url).suffix == ".toml"
    try:
        text = data.decode("utf-8-sig")
        values = tomllib.loads(text) if is_toml else json.loads(text)
    except (ValueError, RecursionError) as err:
        raise ConfigError(
            f"recipe {url}: {err}; expected {'TOML' if is_toml else 'JSON'}, such as "
            "'d2i recipes show NAME' prints; correct that line"
        ) from err
    if not isinstance(values, dict):
        raise ConfigError(
            f"recipe {url}: got a JSON {type(values).__name__}; expected an object of settings; "
            "see 'd2i recipes show NAME --json'"
        )
    return _with_nulls(Recipe, values) if is_toml else values


def _with_nulls(kind: type[Config], values: dict[str, Any]) -> dict[str, Any]:
    """Replace the text "null" by None, in settings that may be None."""
    read = dict(values)
    for name, field in kind.model_fields.items():
        value, group = values.get(name), field.annotation
        if isinstance(value, dict) and isinstance(group, type) and issubclass(group, Config):
            read[name] = _with_nulls(group, value)
        elif value == _NULL and _may_be_null(field):
            read[name] = None
    return read


def _may_be_null(field: FieldInfo) -> bool:
    return type(None) in get_args(field.annotation)


def _table(config: Config, path: tuple[str, ...]) -> list[str]:
    """Return the lines of a table, then those of the tables in it."""
    lines: list[str] = []
    if path:
        title = (type(config).__doc__ or "").partition("\n")[0]
        lines += ["", *_comment(title), f"[{'.'.join(path)}]"]
    groups = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Config):
            groups.append((name, value))
            continue
        place = ".".join((*path, name))
        if value == _NULL and _may_be_null(field):
            raise ConfigError(
                f"{place} is the text 'null', which a TOML file cannot hold, as it is read as null "
                "there; expected another text; use --json"
            )
        explanation = _comment(field.description or "")
        entry = f"{name} = {_value(value)}".split("\n")
        mark = "" if name in config.model_fields_set else "#"
        lines += ["", *explanation] if explanation or not path else []
        lines += [mark + line for line in entry]
    for name, group in groups:
        lines += _table(group, (*path, name))
    return lines


def _comment(text: str) -> list[str]:
    lines = textwrap.wrap(text, _WIDTH - 2, break_long_words=False, break_on_hyphens=False)
    return [f"# {line}" for line in lines]


def _value(value: Any) -> str:
    """Return a setting's value as TOML; a list that is too long for a line has a line for each."""
    if value is None:
        return _text(_NULL)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{_text(key)} = {_value(part)}" for key, part in value.items()) + "}"
        )
    if isinstance(value, (list, tuple)):
        parts = [_value(part) for part in value]
        line = f"[{', '.join(parts)}]"
        return line if len(line) <= _WIDTH else "\n".join(["[", *(f"  {p}," for p in parts), "]"])
    return repr(value)


def _text(text: str) -> str:
    """Return a TOML string; characters that act on a terminal are escaped."""
    return '"' + "".join(_ESCAPES.get(c) or _printable(c) for c in text) + '"'


def _printable(character: str) -> str:
    if plain(character) == character:
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
