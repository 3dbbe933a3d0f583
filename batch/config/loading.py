"""Loading of settings: flags over environment over TOML over defaults, and one message for everything that is wrong.

Environment names are `RESTYLE_<SECTION>__<KEY>`, for example `RESTYLE_LIMITS__BUDGET_USD=25`. A whole section, the
axes of `sweep` and `target.tags` are written as JSON. The API key is not a setting: it comes from `FAL_KEY` only and is
never stored.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson
from pydantic import SecretStr, ValidationError

from batch.config.settings import ROW_INPUTS, Settings, refusal_of
from batch.errors import ConfigError

__all__ = ["api_key", "load_settings"]

_PREFIX = "RESTYLE_"
_NOT_SETTINGS = {"RESTYLE_DEBUG"}
"""Switches of the command line: see `batch.cli.main`."""
_TABLES = {("sweep",), ("target", "tags")}
"""Places whose keys are free."""
_PASSWORD = re.compile(r"(?<=//)[^\s'\"]*@")
"""The part of a URL that may contain a password."""


def load_settings(path: Path | None = None, flags: dict[str, dict[str, Any]] | None = None) -> Settings:
    """Resolve the configuration; `flags` are nested like the file and take precedence.

    Raises:
        ConfigError: the file is missing or not TOML, a key is unknown (the message names the nearest one), or a value
            is out of bounds. One message lists all problems.
    """
    path = None if path is None else Path(os.path.expanduser(path))  # noqa: PTH111 - no error for an unknown user
    file = {} if path is None else _read_toml(path)
    variables = _read_environment(os.environ)
    environment: dict[str, Any] = {}
    for place, (_, value) in variables.items():
        environment = _merged(environment, _nested(place, value))
    try:
        return Settings.model_validate(_merged(_merged(file, environment), flags or {}))
    except ValidationError as error:
        raise ConfigError(_explain(error, str(path or "the configuration"), flags or {}, variables)) from error


def api_key() -> SecretStr | None:
    """Return the key from `FAL_KEY`, or `FAL_KEY_ID` and `FAL_KEY_SECRET`, like the official clients; None if unset."""
    key = os.environ.get("FAL_KEY", "")
    pair = os.environ.get("FAL_KEY_ID", ""), os.environ.get("FAL_KEY_SECRET", "")
    key = key or (":".join(pair) if all(pair) else "")
    return SecretStr(key.strip()) if key.strip() else None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}; examples are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


_Place = tuple[str, ...]


def _read_environment(environment: Mapping[str, str]) -> dict[_Place, tuple[str, Any]]:
    """Return name and value of each variable by its place in the settings, those of whole sections first.

    Raises:
        ConfigError: a variable is unknown (a misspelt limit must be an error), or should be JSON and is not.
    """
    found: dict[_Place, tuple[str, Any]] = {}
    names = sorted(name for name in environment if name.upper().startswith(_PREFIX))
    for name in sorted(names, key=lambda name: name.count("__")):
        if name.upper() in _NOT_SETTINGS:
            continue
        place = tuple(name.upper().removeprefix(_PREFIX).lower().split("__"))
        if ".".join(place) not in _known_keys() and place[:-1] not in _TABLES:
            known = {_PREFIX + key.upper().replace(".", "__") for key in _known_keys()} | _NOT_SETTINGS
            raise ConfigError(refusal_of(name) or f"unknown environment variable {name}{_nearest(name.upper(), known)}")
        found[place] = name, _value_of(name, place, environment[name])
    return found


def _value_of(name: str, place: _Place, text: str) -> Any:
    """Return the text, or what it says as JSON where a table or a list is expected."""
    is_table = place in _TABLES or (len(place) == 1 and place != ("run_seed",))
    if not is_table and place[:-1] != ("sweep",):
        return text
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if not is_table:
            return text
        raise ConfigError(
            f"the environment cannot be read: {name} = {text!r} is not JSON; use JSON, or set single keys:"
            f" {name}__KEY=VALUE"
        ) from error


def _nested(place: _Place, value: Any) -> dict[str, Any]:
    for key in reversed(place):
        value = {key: value}
    assert isinstance(value, dict), "a place has at least one key"
    return value


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return both, nested values merged; `above` takes precedence."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _explain(
    error: ValidationError, source: str, flags: Mapping[str, Any], variables: Mapping[_Place, tuple[str, Any]]
) -> str:
    """Return one message with all problems, grouped by source: an environment variable, the file, or a flag."""
    lines: dict[str, list[str]] = {}
    for problem in error.errors():
        place = [str(part) for part in problem["loc"]]
        key = ".".join(place)
        given = _holds(flags, place)  # a flag overrides the environment
        variable = None if given else _variable(place, variables)
        if problem["type"] == "extra_forbidden":
            within = problem["input"] if isinstance(problem["input"], dict) else ()
            refused = next(filter(None, map(refusal_of, [key, *within])), None)
            line = refused or f"unknown key {key}{_nearest(key, _known_keys())}"
        else:
            line = f"{key} = {problem['input']!r}: {_said(problem['type'], place, problem['msg'])}"
            line = _PASSWORD.sub("***@", line)
        origin = "the configuration" if given else source
        if variable is not None:
            origin = f"the environment variable {variable}"
        lines.setdefault(origin, []).append(line)
    return "; ".join(f"{origin}: {'; '.join(dict.fromkeys(said))}" for origin, said in lines.items())


def _said(kind: str, place: list[str], message: str) -> str:
    """Return pydantic's message, except for sections, for which it would name our classes."""
    if kind in {"model_type", "dict_type"}:
        keys = sorted(key.partition(".")[2] for key in _known_keys() if key.startswith(f"{place[0]}."))
        return f"expected a section with the keys {', '.join(keys or sorted(ROW_INPUTS))}"
    if kind == "list_type":
        return "expected a list of values such as [1, 2]"
    message = message.removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:]}"


def _holds(values: Any, place: list[str]) -> bool:
    """Return whether nested values contain one at a place."""
    for part in place:
        if not isinstance(values, Mapping):
            return True  # the place is inside a value, such as a list
        if part not in values:
            return False
        values = values[part]
    return True


def _variable(place: list[str], variables: Mapping[_Place, tuple[str, Any]]) -> str | None:
    """Return the environment variable of the value at a place: the key's own, or its section's."""
    for length in (3, 2, 1):
        name, value = variables.get(tuple(place[:length]), (None, None))
        if name is not None and _holds(value, place[length:]):
            return name
    return None


def _known_keys() -> set[str]:
    keys = set(Settings.model_fields)
    for section, field in Settings.model_fields.items():
        keys |= {f"{section}.{key}" for key in getattr(field.annotation, "model_fields", {})}
    return keys


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean x?`, comparing the whole name, then its last part, to find keys in the wrong section."""
    candidates = sorted(known)
    near = difflib.get_close_matches(name, candidates, 1, 0.6)
    if not near:
        last = {candidate.rsplit(".", 1)[-1]: candidate for candidate in candidates}
        near = [last[hit] for hit in difflib.get_close_matches(name.rsplit(".", 1)[-1], sorted(last), 1, 0.6)]
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(candidates)}"
