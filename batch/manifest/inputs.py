"""Endpoint inputs as columns: defaults, types and bounds, checked for many values at once. Pure.

All bounds and defaults come from the fields of `ImageToImageInput`; none is repeated here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from batch.fal.endpoint import ImageToImageInput
from batch.manifest.types import CellError
from batch.types import Json, JsonObject

__all__ = ["DEFAULTS", "INPUTS", "PROMPT_LIMIT", "allowed", "check_column", "check_value", "shorten", "surrogate_fault"]

PROMPT_LIMIT = 1_000_000
"""Maximum length of a prompt in characters; the model reads 512 tokens of it."""
_FIELDS = ImageToImageInput.model_fields
INPUTS: frozenset[str] = frozenset(_FIELDS)
"""Names of all inputs of the endpoint."""
DEFAULTS: JsonObject = {name: field.default for name, field in _FIELDS.items() if not field.is_required()}
"""Every input with a default, including `seed: None`."""


def _column_adapter(field: FieldInfo) -> TypeAdapter[list[Any]]:
    item: Any = field.annotation
    for constraint in field.metadata:
        item = Annotated[item, constraint]
    return TypeAdapter(list[item])


_COLUMNS = {name: _column_adapter(field) for name, field in _FIELDS.items()}


def check_column(
    name: str, values: Sequence[object], column: str | None = None
) -> tuple[list[Any], dict[int, CellError]]:
    """Validate many values of the input `name` by the endpoint's rules.

    Args:
        name: an input of the endpoint.
        values: the values to check.
        column: the column's name in messages; default: `name`.

    Returns:
        The values in the endpoint's types (None if invalid), and the errors by index. The `type` of an error is
        pydantic's word (`less_than_equal`, `int_parsing`, ...).
    """
    adapter = _COLUMNS[name]
    try:
        checked = adapter.validate_python(list(values))
        return (checked, {}) if name != "prompt" else _without_unusable(checked, column or name)
    except ValidationError as error:
        types: dict[int, str] = {}
        for problem in error.errors(include_url=False, include_context=False, include_input=False):
            types.setdefault(int(problem["loc"][0]), problem["type"])
    good = iter(adapter.validate_python([value for index, value in enumerate(values) if index not in types]))
    checked = [None if index in types else next(good) for index in range(len(values))]
    faults = {
        index: CellError(word, f"{column or name} is {shorten(values[index])!r}; it must be {allowed(name)}")
        for index, word in types.items()
    }
    if name == "prompt":
        checked, unusable = _without_unusable(checked, column or name)
        faults |= unusable
    return checked, faults


def _without_unusable(prompts: list[Any], column: str) -> tuple[list[Any], dict[int, CellError]]:
    """Reject prompts that the endpoint's schema allows but no service takes: with a NUL, or megabytes long."""
    if max(map(len, filter(None, prompts)), default=0) <= PROMPT_LIMIT and "\0" not in "".join(filter(None, prompts)):
        return prompts, {}  # the usual case, without a check of each of a million prompts
    faults: dict[int, CellError] = {}
    for index, text in enumerate(prompts):
        if text and ("\0" in text or len(text) > PROMPT_LIMIT):
            faults[index] = _unusable(text, column)
    return [None if index in faults else text for index, text in enumerate(prompts)], faults


def _unusable(text: str, column: str) -> CellError:
    if "\0" in text:
        return CellError("string_nul", f"{column} is {shorten(text)!r}; remove the NUL character")
    length = f"{column} has {len(text):,} characters ({shorten(text, 20)!r})"
    return CellError("string_too_long", f"{length}; the limit is {PROMPT_LIMIT:,}; shorten it")


def check_value(name: str, value: object) -> Json | CellError:
    """Return one value of the input `name` in the endpoint's type, or the error."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return surrogate_fault(name, str(value))
    checked, faults = check_column(name, [value])
    return faults[0] if faults else checked[0]


def surrogate_fault(name: str, text: str) -> CellError:
    """Return the error for text with an unpaired surrogate."""
    what = "it contains an unpaired surrogate (invalid Unicode)"
    return CellError("string_unicode", f"{name} is {shorten(text)!r}; {what}")


def allowed(name: str) -> str:
    """Return the allowed values of an input in words, such as `a number from 0.01 to 1`."""
    field = _FIELDS[name]
    kind: Any = field.annotation
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    kinds = [part for part in get_args(kind) or (kind,) if part is not type(None)]
    noun = {float: "a number", int: "an integer", bool: "true or false", str: "text"}[kinds[0]]
    if _bound(field, "min_length"):
        noun = f"non-empty {noun}"
    low, high = _bound(field, "ge"), _bound(field, "le")
    return noun if low is None or high is None else f"{noun} from {low} to {high}"


def _bound(field: FieldInfo, word: str) -> object:
    return next((getattr(limit, word) for limit in field.metadata if hasattr(limit, word)), None)


def shorten(value: object, limit: int = 80) -> str:
    """Return a value as text for a message, with at most `limit` characters."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, dict):
        return shorten(value.get("path") or value.get("bytes") or "", limit)
    text = "" if value is None else str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
