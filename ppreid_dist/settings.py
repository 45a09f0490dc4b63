"""How settings are declared, read from YAML and dotted overrides, checked, and explained by ``--help``.

Each part of the program declares its own :class:`Settings` dataclass beside the class that reads it; the
whole is composed in ``ppreid_dist.experiment``. Reading and typing is OmegaConf's; what is added here is that
every mistake is one line which starts with the full key.
"""

import copy
import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ppreid_dist.errors import ConfigError
from ppreid_dist.files import write_text

S = TypeVar("S", bound="Settings")


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    at_least: float | None = None,
    more_than: float | None = None,
    at_most: float | None = None,
    less_than: float | None = None,
    may_be_empty: bool = False,
) -> Any:
    """A dataclass field with its explanation and its bounds, for use in a :class:`Settings` class.

    A list must have something in it where its default has, unless it ``may_be_empty``. A list, a dictionary or a
    Settings instance as ``default`` is copied for every instance.
    """
    bounds = dict(at_least=at_least, more_than=more_than, at_most=at_most, less_than=less_than)
    filled = isinstance(default, list) and bool(default) and not may_be_empty
    metadata = dict(help=help, choices=choices, filled=filled, **bounds)
    if isinstance(default, (list, dict, Settings)):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(kw_only=True)
class Settings:
    """Base of all settings. Subclasses are ``@dataclass(kw_only=True)`` and may extend ``__post_init__``
    with checks across fields, raising :class:`ConfigError` with a message that starts with the field's name."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            rules, value = f.metadata, getattr(self, f.name)
            if rules.get("filled") and not value:
                raise ConfigError(f"{f.name}: at least one must be given")
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if rules.get("choices") and item not in rules["choices"]:
                    raise ConfigError(f"{f.name}: {item!r} is not one of {', '.join(map(str, rules['choices']))}")
                if isinstance(item, float) and not math.isfinite(item):
                    raise ConfigError(f"{f.name}: {item} is not a finite number")
                if isinstance(item, (int, float)):
                    for rule, broken, word in (
                        ("at_least", lambda v, b: v < b, "at least"),
                        ("more_than", lambda v, b: v <= b, "more than"),
                        ("at_most", lambda v, b: v > b, "at most"),
                        ("less_than", lambda v, b: v >= b, "less than"),
                    ):
                        bound = rules.get(rule)
                        if bound is not None and broken(item, bound):
                            raise ConfigError(f"{f.name}: {item} must be {word} {bound}")


def load_settings(schema: type[S], file: str | Path | None, overrides: Sequence[str] = ()) -> S:
    """Read ``file`` (YAML) over the defaults of ``schema``, then ``key.sub=value`` overrides over both.

    A text is what an override says, also where YAML sees a number in it (``output=2026_01_01``) or a truth value.
    Raises ConfigError (one line, starting with the file or the full key) for an unreadable file, an unknown key,
    a value of the wrong type or out of bounds.
    """
    merged = copy.deepcopy(_defaults(schema))  # type: ignore[arg-type]  # a class is hashable
    if file is not None:
        merged = _merge(merged, _read_yaml(Path(file)), str(file))
    for item in overrides:
        key, equals, text = item.partition("=")
        if not key or not equals:
            hint = "; a file? give it by --config FILE" if os.path.isfile(item) else ""
            raise ConfigError(f"{item}: an override has the form key=value{hint}")
        if "[" in key:
            raise ConfigError(f"{key}: a list is given whole, {key.partition('[')[0]}=[…]")
        if " #" in text and text.lstrip()[:1] not in tuple("'\"[{"):
            raise ConfigError(f"{key}: what follows ' #' would be a comment: quote the value, {key}='\"…\"'")
        try:
            item.encode()
            change = OmegaConf.from_dotlist([item])
        except UnicodeEncodeError:
            raise ConfigError(f"{key}: {text!a} is not UTF-8") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: not YAML: {' '.join(str(error).split())}") from None
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key}: {_reason(error)}") from None
        if _is_text(schema, key) and isinstance(_read(change, key), (int, float)):  # a truth value is an int
            OmegaConf.update(change, key, text.strip())
        merged = _merge(merged, change, key)
    try:
        plain = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_reason(error)}") from None
    return _build(schema, plain, "")


def path_override(key: str, path: Path) -> str:
    """The override that sets ``key`` to a path of any name: YAML sees comments and keys in " #" and ": "."""
    return f"{key}={json.dumps(str(path), ensure_ascii=False)}"


def _is_text(schema: type[Settings], key: str) -> bool:
    """Whether the setting of that full key is a text."""
    hint: Any = schema
    for name in key.split("."):
        inner = _settings_type(hint)
        hint = typing.get_type_hints(inner).get(name) if inner else None
    return hint in (str, str | None)


def _read(change: Any, key: str) -> Any:
    """What the override of ``key`` says, as YAML reads it."""
    value: Any = OmegaConf.to_container(change)
    for name in key.split("."):
        value = value[name]
    return value


@cache
def _defaults(schema: type[Settings]) -> Any:
    """What OmegaConf makes of a schema; six times as slow as a copy of it."""
    return OmegaConf.structured(schema)


def defaults(schema: type[Settings]) -> dict[str, Any]:
    """As :func:`to_dict`, what holds where nothing is said."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(_defaults(schema)))  # type: ignore[arg-type]


def _merge(settings: Any, change: Any, source: str) -> Any:
    try:
        return OmegaConf.unsafe_merge(settings, change)  # the other one copies everything for every override
    except TypeError:
        raise ConfigError(f"{source}: a list is given whole, as KEY=[…]") from None
    except OmegaConfBaseException as error:
        # Inside a tuple OmegaConf knows neither the key nor the value.
        reason = _reason(error) if error.full_key else "a value in it has the wrong type"
        raise ConfigError(f"{error.full_key or source}: {reason} (in {source})") from None


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0]


def _read_yaml(file: Path) -> Any:
    try:
        content = OmegaConf.load(file)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: can't be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{file}: {key}{_reason(error)}") from None
    if not OmegaConf.is_dict(content):
        raise ConfigError(f"{file}: the top level must be keys and values")
    return content


def _settings_type(annotation: Any) -> type[Settings] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Settings) else None


def _build(schema: type[S], values: Any, prefix: str) -> S:
    hints = typing.get_type_hints(schema)
    arguments = {}
    for f in dataclasses.fields(schema):
        hint, value, key = hints[f.name], values[f.name], f"{prefix}{f.name}"
        if nested := _settings_type(hint):
            value = _build(nested, value, f"{key}.")
        elif typing.get_origin(hint) is list and (nested := _settings_type(typing.get_args(hint)[0])):
            value = [_build(nested, item, f"{key}[{i}].") for i, item in enumerate(value)]
        elif typing.get_origin(hint) is tuple and value is not None:
            value = tuple(value)
        arguments[f.name] = value
    try:
        return schema(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None


def to_dict(settings: Settings) -> dict[str, Any]:
    """The settings as plain nested dictionaries and lists, ready for YAML or JSON."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(settings)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def save_settings(settings: Settings, file: Path) -> None:
    """Write the resolved settings as YAML, atomically."""
    write_text(file, yaml.safe_dump(to_dict(settings), sort_keys=False))


def describe(schema: type[Settings], prefix: str = "", given: Settings | None = None) -> Iterator[tuple[str, str, str]]:
    """Yield ``(full key, default, explanation)`` for every setting, in order of declaration; the defaults are those of
    ``given``, where whoever holds such settings gives them others than the schema's own."""
    hints = typing.get_type_hints(schema)
    for f in dataclasses.fields(schema):
        key, hint = f"{prefix}{f.name}", hints[f.name]
        # Not of an instance unless there is one: a schema may have keys that must be given.
        value: Any = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if given is not None:
            value = getattr(given, f.name)
        if nested := _settings_type(hint):
            yield from describe(nested, f"{key}.", value if isinstance(value, Settings) else None)
            continue
        text = f.metadata.get("help", "")
        if choices := f.metadata.get("choices"):
            text = f"{text} [{' | '.join(map(str, choices))}]"
        if typing.get_origin(hint) is list and (nested := _settings_type(typing.get_args(hint)[0])):
            yield key, f"{len(value)} of them", text
            yield from describe(nested, f"{key}[i].", value[0] if len(value) == 1 else None)
            continue
        if isinstance(hint, types.UnionType) and value is None:
            default = "null"
        else:
            default = yaml.safe_dump(_plain(value), default_flow_style=True).splitlines()[0]
        yield key, default, text


def help_text(schema: type[Settings]) -> str:
    """Every key with its default and its explanation, a line each."""
    return "\n".join(f"  {key}={default}\n        {text}" for key, default, text in describe(schema))
