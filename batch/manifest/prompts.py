"""Prompts of rows and cells, from a column or from a template such as `a {animal} as a wizard`. Pure.

All templates, in `[manifest]`, `[input]` and `[sweep]`, follow the same rules. A placeholder is the exact name of a
column and is not evaluated. `{{` and `}}` are literal braces.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any, NamedTuple, TypeAlias

import polars as pl

from batch.errors import ConfigError, ManifestError
from batch.manifest.inputs import shorten
from batch.manifest.types import CellError
from batch.types import Problem

__all__ = ["Column", "Prompts", "Template", "kind_of", "no_column", "parse_template", "placeholders", "require_plain"]

Note: TypeAlias = Callable[[int, str, object, CellError], Problem]
"""Records the error of a cell: the row's index in the batch, the column, the value, the error."""

_DEFAULT_COLUMN = "prompt"
_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_EVALUATED = re.compile(r"[.\[!:]")
"""Syntax that `str.format` evaluates: attributes, indexes, conversions, format specs."""
_ESCAPES = "write {{ and }} for literal braces"


class Column(NamedTuple):
    """A column of the manifest."""

    name: str

    def texts(self, frame: pl.DataFrame) -> list[Any]:
        """Return the values, one per row."""
        return frame[self.name].to_list()

    def empty_in(self, frame: pl.DataFrame, index: int) -> str:  # noqa: ARG002 - same signature as Template
        """Return the column whose empty cell leaves a row without a prompt."""
        return self.name


class Template(NamedTuple):
    """A parsed template."""

    text: str
    """The template as written."""
    parts: tuple[str | Column, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the placeholders, each once."""
        return tuple(dict.fromkeys(part.name for part in self.parts if isinstance(part, Column)))

    @property
    def literal(self) -> str | None:
        """The text if it is the same for every row, else None."""
        return None if self.columns else "".join(part for part in self.parts if isinstance(part, str))

    def texts(self, frame: pl.DataFrame) -> list[Any]:
        """Return the filled template, one text per row; None where a part is missing."""
        if (literal := self.literal) is not None:
            return [literal] * len(frame)
        # Not `pl.concat_str`: it takes a second per 5,000 parts.
        columns = {name: frame[name].cast(pl.String).to_list() for name in self.columns}
        parts = [repeat(part) if isinstance(part, str) else columns[part.name] for part in self.parts]
        return [_concatenated(row) for row in zip(*parts, strict=False)]

    def empty_in(self, frame: pl.DataFrame, index: int) -> str:
        """Return the first column whose missing part leaves a row without a prompt."""
        return next(name for name in self.columns if frame[name][index] is None)


def parse_template(text: str, key: str, columns: Sequence[str]) -> Template:
    """Parse a template in time linear in its length.

    Args:
        text: the template.
        key: the setting that holds it, for messages.
        columns: valid placeholder names. Other plain names are kept, for the caller to refuse.

    Raises:
        ConfigError: a brace is unmatched; a placeholder is empty or contains format syntax.
    """
    known = frozenset(columns)
    parts: list[str | Column] = []
    literal: list[str] = []
    end = 0
    for token in _TOKEN.finditer(text):
        literal.append(text[end : token.start()])
        end, name = token.end(), token[1]
        if token[0] in {"{{", "}}"}:
            literal.append(token[0][0])
        elif name is None:
            raise _unbalanced(text, key, token.start())
        else:
            if name not in known:
                _check_name(text, key, name, columns)
            parts += [*_joined(literal), Column(name)]
            literal = []
    literal.append(text[end:])
    return Template(text, (*parts, *_joined(literal)))


def placeholders(text: str) -> set[str]:
    """Return the names in a template's braces, even if the template is malformed."""
    return {token[1] for token in _TOKEN.finditer(text) if token[1]}


def _concatenated(parts: Sequence[str | None]) -> str | None:
    """Return the text of a row; None if a part is missing."""
    return None if None in parts else "".join(parts)  # type: ignore[arg-type]  # None was excluded


def _joined(literal: list[str]) -> list[str]:
    text = "".join(literal)
    return [text] if text else []


def _unbalanced(text: str, key: str, at: int) -> ConfigError:
    fault = "is not closed" if text[at] == "{" else "is unmatched"
    place = f"{text[at]!r} at character {at + 1} {fault}"
    return ConfigError(f"{key} = {shorten(text)!r} is not a template: {place}; {_ESCAPES}")


def _check_name(text: str, key: str, name: str, columns: Sequence[str]) -> None:
    """Refuse an empty placeholder and `str.format` syntax."""
    said = f"{key} = {shorten(text)!r}: the placeholder {shorten(f'{{{name}}}')!r} must be a column name in braces"
    if not name:
        raise ConfigError(f"{said}; {_ESCAPES}")
    if _EVALUATED.search(name):
        plain = _EVALUATED.split(name, maxsplit=1)[0]
        hint = f"; did you mean {plain!r}?" if plain in columns else _near(name, columns) or ";"
        raise ConfigError(f"{said}; formats, attributes and indexes are not evaluated{hint} {_ESCAPES}")


class Prompts:
    """The sources of the prompts of one manifest."""

    def __init__(self, schema: pl.Schema, *, setting: str, default: str | None, swept: Sequence[str] | None) -> None:
        """Parse the templates.

        Args:
            schema: the manifest's columns.
            setting: `manifest.prompt`, a column name or a template.
            default: `input.prompt`, for rows and cells without another prompt.
            swept: the prompt of each cell as written; None if prompts are not swept.

        Raises:
            ConfigError: a template is malformed, or one of `[input]` or `[sweep]` names an unknown column.
            ManifestError: `manifest.prompt` names an unknown column, or one without text or numbers.
        """
        self._default = None if default is None else _template(schema, default, "input.prompt")
        self._swept = None if swept is None else [_template(schema, text, "sweep.prompt") for text in swept]
        self._source = None if self._swept is not None else _source(schema, setting, default)
        sources = (self._source, self._default, *(self._swept or ()))
        self.longest = max((len(one.text) for one in sources if isinstance(one, Template)), default=0)
        """Length of the longest template in characters."""

    @property
    def columns(self) -> frozenset[str]:
        """The columns that prompts take text from."""
        sources = (self._source, self._default, *(self._swept or ()))
        names = (one.columns if isinstance(one, Template) else (one.name,) for one in sources if one is not None)
        return frozenset(name for some in names for name in some)

    @property
    def for_all(self) -> str | None:
        """The prompt of every row if it is the same for all, else None."""
        return None if self._source is not None or self._default is None else self._default.literal

    def of_rows(self, frame: pl.DataFrame, note: Note) -> list[Any] | None:
        """Return the prompt of each row, unchecked; None if all rows share one, or prompts are swept.

        A row without a prompt is passed to `note` and gets an empty prompt.
        """
        if self._swept is not None or self.for_all is not None:
            return None
        first = self._source or self._default
        assert first is not None, "a source or a default exists"
        texts = self._filled(frame, first)
        for index in (index for index, text in enumerate(texts) if text is None):
            note(index, *self._gap(frame, index, first))
            texts[index] = ""
        return texts

    def of_cells(self, frame: pl.DataFrame, note: Note) -> list[list[str | Problem]] | None:
        """Return each cell's prompts or problems, one per row; None if prompts are not swept."""
        if self._swept is None:
            return None
        known: dict[tuple[int, str], Problem] = {}
        filled: dict[str, list[str | Problem]] = {}
        for template in self._swept:
            if template.text in filled:
                continue
            texts = filled[template.text] = self._filled(frame, template)
            for index in (index for index, text in enumerate(texts) if text is None):
                gap = self._gap(frame, index, template)
                place = (index, gap[0])
                known[place] = known.get(place) or note(index, *gap)
                texts[index] = known[place]
        return [filled[template.text] for template in self._swept]

    def _filled(self, frame: pl.DataFrame, source: Column | Template) -> list[Any]:
        """Return one text per row: from the source, else from `input.prompt`, else None."""
        texts = source.texts(frame)
        if self._default is None or None not in texts:
            return texts
        others = self._default.texts(frame)
        return [other if text is None else text for text, other in zip(texts, others, strict=True)]

    def _gap(self, frame: pl.DataFrame, index: int, source: Column | Template) -> tuple[str, None, CellError]:
        """Return the empty column that leaves a row without a prompt, its value and the error."""
        needs = "" if isinstance(source, Column) else f", and the prompt {shorten(source.text)!r} needs it"
        advice = ", or set input.prompt for all rows"
        if self._default is not None and self._default is not source:
            advice = f"; a part of input.prompt = {shorten(self._default.text)!r} is empty too"
        elif self._default is not None:
            advice = ", or remove the placeholder"
        return source.empty_in(frame, index), None, CellError("missing", f"the cell is empty{needs}; fill it{advice}")


def _source(schema: pl.Schema, setting: str, default: str | None) -> Column | Template | None:
    """Return the source of the rows' own prompts; None if only `input.prompt` gives one."""
    if setting in schema:
        return Column(setting)
    template = parse_template(setting, "manifest.prompt", schema.names())
    if template.columns:
        return _checked(schema, template, "manifest.prompt")
    # The default column name may be absent from the manifest; an explicitly configured one may not.
    if setting == _DEFAULT_COLUMN and default is not None:
        return None
    missing = no_column(schema, setting, "manifest.prompt")
    raise ManifestError(f"{missing}; input.prompt sets one prompt for all rows")


def _template(schema: pl.Schema, text: str, key: str) -> Template:
    """Parse a template of the configuration, with or without placeholders.

    Raises:
        ConfigError: the template is malformed or names an unknown column.
    """
    template = parse_template(text, key, schema.names())
    try:
        return _checked(schema, template, key)
    except ManifestError as error:
        raise ConfigError(f"{key} = {shorten(text)!r}: {error}; {_ESCAPES}") from error


def _checked(schema: pl.Schema, template: Template, key: str) -> Template:
    for name in template.columns:
        require_plain(schema, name, key)
    return template


# --- columns that settings name ---------------------------------------------------------------------------


def require_plain(schema: pl.Schema, name: str, key: str) -> None:
    """Check that a column holds text or numbers.

    Raises:
        ManifestError: it does not, or is missing.
    """
    kind = kind_of(schema, name, key)
    if kind.is_nested() or kind == pl.Binary:
        raise ManifestError(f"the column {name!r} holds {kind}; {key} needs one with text or numbers")


def kind_of(schema: pl.Schema, name: str, key: str) -> pl.DataType:
    """Return the type of a column that the setting `key` names.

    Raises:
        ManifestError: the column is missing; the message names the nearest one.
    """
    if name not in schema:
        raise ManifestError(no_column(schema, name, key))
    return schema[name]


def no_column(schema: pl.Schema, name: str, key: str) -> str:
    """Return the message for a missing column, with the nearest one and all others."""
    hint = _near(name, schema.names()) or "."
    return f"the manifest has no column {shorten(name)!r} ({key}){hint} Its columns are: {', '.join(schema.names())}"


def _near(name: str, columns: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, columns, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
