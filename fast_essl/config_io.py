"""Configurations as TOML files and command-line overrides, to and from the dataclasses of `config`.

A wrong key, type or range is a `ConfigError` of one line that names the file (or the command line), the key, the
value and, for a name, the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from fast_essl.config import Config, ConfigError
from fast_essl.nearest import nearest

COMMAND_LINE = "command line"
MAX_NUM_BYTES = 2**20
"""Of a TOML file."""
MAX_DEPTH = 16
"""Of nested values, and of files that extend one another."""
Settings = TypeVar("Settings")
"""A dataclass of the form of `Config`: fields, and sections that are such dataclasses."""


def find_config(name: Path, other_words: Iterable[str] = ()) -> Path:
    """The file at `name` or, for a bare name such as `e_simclr_cifar10`, the recipe that comes with fast_essl.

    Errors: `ConfigError` naming the recipe, or that of the other words that could stand there, which is nearest to a
    bare name that is none.
    """
    if name.exists() or name.suffix or name.name != str(name):
        return name
    package = Path(__file__).resolve().parent
    folders = (package / "configs", package.parent / "configs")  # installed, and in a checkout
    recipes = {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}
    if name.name not in recipes:
        found = nearest(name.name, [*recipes, *other_words])
        raise ConfigError(f"{name}: neither a file nor a recipe of fast_essl; the nearest is {found}")
    return recipes[name.name]


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a TOML file and apply command-line overrides to it.

    Args: `overrides`, for example `["--train.max-steps", "20", "--views.view1.scale", "0.1", "1"]`.
    Errors: `ConfigError`; `OSError` when the file cannot be read.
    """
    return load_settings(Config, path, overrides)


def load_settings(kind: type[Settings], path: Path, overrides: list[str] | None = None) -> Settings:
    """As `load_config`, for settings of any kind."""
    table = read_table(path)
    overridden = apply_overrides(table, overrides or [], kind)
    return build_settings(kind, table, source=str(path), sources=dict.fromkeys(overridden, COMMAND_LINE))


def read_table(path: Path) -> dict[str, Any]:
    """The nested values of a TOML file, laid over those of the files that its `extends` names, the last one on top.

    `extends` is a name or a list of names, each of a file beside it or of a recipe that comes with fast_essl.

    Errors: `ConfigError`; `OSError` when a file cannot be read.
    """
    return _read_table(path, ())


def _read_table(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if any(os.path.realpath(path) == os.path.realpath(other) for other in above):
        raise ConfigError(f"{path}: extends itself, by way of {above[-1]}")
    if len(above) == MAX_DEPTH:
        raise ConfigError(
            f"{path}: {above[0]} extends more than {MAX_DEPTH} files, each by way of the one before"
        )
    own = read_toml(path)
    extends = own.pop("extends", [])
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not all(isinstance(name, str) and _is_text(name) for name in names):
        raise ConfigError(
            f"{path}: extends = {_shown(extends)}: must be the name of a recipe or a file, or a list of them"
        )
    table: dict[str, Any] = {}
    for name in names:
        beside = path.parent / f"{name.removesuffix('.toml')}.toml"
        base = beside if beside.exists() else find_config(Path(name))
        table = lay_over(table, _read_table(base, (*above, path)))
    return lay_over(table, own)


def read_toml(path: Path) -> dict[str, Any]:
    """The nested values of one TOML file.

    Errors: `ConfigError` for what is not TOML, not a regular file (it might block), too large or nested too deeply;
    `OSError`.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        # Opening a fifo would wait for a writer.
        raise ConfigError(f"{path}: is not a regular file")
    with path.open("rb") as file:
        content = file.read(MAX_NUM_BYTES + 1)
    if len(content) > MAX_NUM_BYTES:
        raise ConfigError(f"{path}: has more than {MAX_NUM_BYTES:,} bytes; it is not a configuration")
    try:
        table = tomllib.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    except ValueError as error:  # of the syntax, of UTF-8, or of a number with more than 4,300 digits
        raise ConfigError(f"{path}: not a TOML file: {error}") from None
    if not _is_flat(table):
        raise ConfigError(f"{path}: nested more than {MAX_DEPTH} deep")
    return table


def _is_flat(table: dict[str, Any]) -> bool:
    """Whether what is nested is no deeper than `MAX_DEPTH`."""
    level: list[Any] = [table]
    for _ in range(MAX_DEPTH):
        inner = [list(item.values()) if isinstance(item, dict) else item for item in level]
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not level:
            return True
    return False


def lay_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested values, those of `above` where both have one."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = lay_over(below[key], value) if both else value
    return merged


def config_from_table(table: dict[str, Any], *, source: str, sources: dict[str, str] | None = None) -> Config:
    """Build a Config from nested plain values.

    Args: `source` names the origin in errors; `sources` the origin of single dotted keys where it differs.
    Errors: `ConfigError`.
    """
    return build_settings(Config, table, source=source, sources=sources)


def build_settings(
    kind: type[Settings], table: dict[str, Any], *, source: str, sources: dict[str, str] | None = None
) -> Settings:
    """As `config_from_table`, for settings of any kind."""
    settings: Settings = _build(kind, table, "", source, sources or {}, kind)
    return settings


def config_to_table(config: Any) -> dict[str, Any]:
    """The inverse of `config_from_table`: nested dicts of str, int, float, bool and lists of them."""
    return {key: _plain(value) for key, value in dataclasses.asdict(config).items()}


def config_to_toml(config: Any) -> str:
    """The resolved configuration as TOML text; reading it back gives an equal Config."""
    lines: list[str] = []

    def emit(table: dict[str, Any], prefix: str) -> None:
        values = {key: value for key, value in table.items() if not isinstance(value, dict)}
        if values:
            lines.extend(["", f"[{prefix}]"] if prefix else [])
            lines.extend(f"{key} = {_toml_value(value)}" for key, value in values.items())
        for key, value in table.items():
            if isinstance(value, dict):
                emit(value, f"{prefix}.{key}" if prefix else key)

    emit(config_to_table(config), "")
    return "\n".join(lines).lstrip("\n") + "\n"


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested table as one dict by dotted key, as `train.max_steps`."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _field_types(section: type, prefix: str = "") -> dict[str, Any]:
    """The type of every field below a dataclass, by dotted key."""
    found: dict[str, Any] = {}
    for name, hint in _hints(section).items():
        if dataclasses.is_dataclass(hint):
            found.update(_field_types(typing.cast(type, hint), f"{prefix}{name}."))
        else:
            found[prefix + name] = hint
    return found


def _hints(section: type) -> dict[str, Any]:
    hints = typing.get_type_hints(section)
    return {item.name: hints[item.name] for item in dataclasses.fields(section)}


def _build(
    section: type, table: dict[str, Any], prefix: str, source: str, sources: dict[str, str], kind: type
) -> Any:
    """A section of settings of a kind; `prefix` leads to it."""
    hints = _hints(section)
    values: dict[str, Any] = {}
    for name, value in table.items():
        key = prefix + name
        origin = sources.get(key, source)
        if name not in hints:
            where, found = _unknown(key, value, kind)
            raise ConfigError(f"{origin}: unknown key {where}; the nearest valid name is {found}")
        if not dataclasses.is_dataclass(hints[name]):
            values[name] = _convert(value, hints[name], f"{origin}: {key}")
        elif isinstance(value, dict):
            values[name] = _build(typing.cast(type, hints[name]), value, key + ".", source, sources, kind)
        else:
            raise ConfigError(f"{origin}: {key} = {_shown(value)}: must be a section, [{key}]")
    for item in dataclasses.fields(section):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if item.name in values or not required:
            continue
        if dataclasses.is_dataclass(hints[item.name]):
            values[item.name] = _build(
                typing.cast(type, hints[item.name]), {}, f"{prefix}{item.name}.", source, sources, kind
            )
        else:
            raise ConfigError(f"{source}: {prefix}{item.name} is missing and has no default")
    try:
        return section(**values)
    except ValueError as error:  # a range: the message begins with the field's name
        key = prefix + str(error).split(" = ", 1)[0]
        raise ConfigError(f"{sources.get(key, source)}: {prefix}{_short(str(error), 300)}") from None


def _unknown(key: str, value: Any, kind: type) -> tuple[str, str]:
    """How to show an unknown key (a section by its name alone), and the valid name nearest to it."""
    types_by_key = _field_types(kind)
    if isinstance(value, dict):
        sections = sorted({name.rpartition(".")[0] for name in types_by_key} - {""})
        return f"[{key}]", f"[{nearest(key, sections)}]"
    return f"{key} = {_shown(value)}", nearest(key, list(types_by_key))


def _shown(value: Any) -> str:
    """A value for a message: as Python writes it, shortened."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4,300 digits
        return "a number of thousands of digits"
    return _short(text, 100)


def _short(text: str, length: int) -> str:
    """A text without its middle where it is longer than `length`."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]} … {text[-half:]}"


def _is_text(text: str) -> bool:
    """Whether the system takes it as a name, and a file as text: no NUL, and no byte that is not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Check a TOML value against a field's type; whole numbers serve as floats, nothing else is converted."""
    origin = typing.get_origin(hint)
    wrong = f"{where} = {_shown(value)}: must be"
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            found = nearest(_shown(value), list(choices))
            listed = ", ".join(repr(choice) for choice in choices)
            raise ConfigError(f"{wrong} one of {listed}; the nearest is {found!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{wrong} a list of numbers")
        parts = _parts(hint, len(value))
        if len(value) != len(parts):
            raise ConfigError(f"{wrong} {len(parts)} numbers")
        return tuple(_convert(item, part, where) for item, part in zip(value, parts, strict=True))
    if hint in (Path, str) and isinstance(value, str):
        if not _is_text(value):
            raise ConfigError(f"{wrong} UTF-8 text without a NUL character")
        if hint is Path and not value:
            raise ConfigError(f"{wrong} the path of a file")
        return hint(value)
    if isinstance(value, int) and abs(value) >= 2**64:
        raise ConfigError(f"{wrong} below 2**64; no field takes more")
    if hint in (int, float) and type(value) in (int, hint):
        if math.isnan(value):
            raise ConfigError(f"{wrong} a number")
        return hint(value)
    if hint is bool and isinstance(value, bool):
        return value
    kinds = {
        Path: "a path in quotes",
        str: "a text in quotes",
        float: "a number",
        int: "a whole number",
        bool: "true or false",
    }
    raise ConfigError(f"{wrong} {kinds[hint]}")


def apply_overrides(table: dict[str, Any], tokens: list[str], kind: type = Config) -> list[str]:
    """Write `--section.field VALUE…` (or `=VALUE`) into a nested table; returns the dotted keys written."""
    types_by_key = _field_types(kind)
    written: list[str] = []
    position = 0
    while position < len(tokens):
        option, equals, joined = tokens[position].partition("=")
        position += 1
        if not option.startswith("--"):
            raise ConfigError(f"{COMMAND_LINE}: {option!r} follows no option; write --section.field VALUE")
        key = option[2:].replace("-", "_")
        values = [joined] if equals else []
        while not equals and position < len(tokens) and not tokens[position].startswith("--"):
            values.append(tokens[position])
            position += 1
        if key not in types_by_key:
            raise unknown_option(" ".join([option, *values]), options_of(kind))
        *sections, name = key.split(".")
        inner = table
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                break  # the file holds a value where a section belongs; building the config says so
        else:
            inner[name] = _parse_tokens(values, types_by_key[key], f"{COMMAND_LINE}: {option}")
            written.append(key)
    return written


def options_of(kind: type) -> list[str]:
    """`--section.field` of every field of settings of a kind."""
    return [f"--{key.replace('_', '-')}" for key in _field_types(kind)]


def unknown_option(words: str, options: list[str]) -> ConfigError:
    """The error for an option, with its values, that is none of those that there are."""
    found = nearest(words.split(" ", 1)[0], options)
    return ConfigError(f"{COMMAND_LINE}: unknown option {words}; the nearest valid name is {found}")


def _parse_tokens(values: list[str], hint: Any, where: str) -> Any:
    """The value that a TOML file would hold, from the words that follow an option."""
    if typing.get_origin(hint) is tuple:
        parts = _parts(hint, len(values))
        # Words that are too many keep the last type; building the config reports their number.
        types_ = parts + parts[-1:] * (len(values) - len(parts))
        return [_parse_word(word, part) for word, part in zip(values, types_, strict=False)]
    if len(values) != 1:
        raise ConfigError(f"{where}: takes one value, {len(values)} given")
    return _parse_word(values[0], hint)


def _parts(hint: types.GenericAlias, num_values: int) -> list[Any]:
    """The types of a tuple's items: as many as it has, or as there are values where it may be of any length."""
    parts = list(typing.get_args(hint))
    return parts[:1] * num_values if parts[-1] is Ellipsis else parts


def _parse_word(word: str, hint: Any) -> Any:
    """A word as its field's type, or as it is where it is not one: building the config then reports it."""
    if hint is bool:
        return {"true": True, "false": False}.get(word.lower(), word)
    if hint in (int, float):
        try:
            return hint(word)
        except ValueError:
            return word
    return word
