"""Settings: flags override environment variables, which override TOML, which overrides the defaults defined here.

Environment variables are named `RESTYLE_<SECTION>__<KEY>`, for example `RESTYLE_LIMITS__BUDGET_USD=25`. The API key is
not a setting: it comes only from the environment (`FAL_KEY`) and is never written anywhere. Durations are float
seconds; text such as `"90s"`, `"50m"` and `"2h"` is accepted.
"""

from __future__ import annotations

import codecs
import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from batch.errors import ConfigError
from batch.fal import protocol
from batch.fal.endpoint import APP_ID, ImageToImageInput
from batch.fal.protocol import TAG_PAIRS, TAGS_BYTES, checked_tag
from batch.types import AppId

__all__ = [
    "RUN_NAME_LIMIT",
    "InputSettings",
    "LimitSettings",
    "ManifestSettings",
    "OutputSettings",
    "PriceSettings",
    "Settings",
    "TargetSettings",
    "WebhookSettings",
    "api_key",
    "load_settings",
    "parse_duration",
    "window_bounds",
]

_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(ms|s|m|h|d)?\s*")
_TABS = {"tab": "\t", "\\t": "\t"}
_PASSWORD = re.compile(r"(?<=//)[^\s'\"]*@")
"""The part of a URL that may contain a password."""
_INVALID_MAX_IN_FLIGHT = "invalid max_in_flight {!r}: use auto, auto:LOW-HIGH such as auto:16-512, or an integer >= 1"
_ENVIRONMENT_PREFIX = "RESTYLE_"
_REFUSED = {
    "sync_mode": "its results are data URIs, which are kept for about six minutes and do not appear in the history;"
    " remove it, restyle downloads the images",
    "store_io": "without stored payloads a result is kept for at most one hour, and a submit whose response was lost"
    " cannot be found again; remove it",
}
"""Options that could lose paid results, with the reason."""
RUN_NAME_LIMIT = 128
"""Maximum length of a run's name in the tag `run`."""
_OWN_TAGS = {"run": RUN_NAME_LIMIT, "job": 32}
"""Tags of every submit, with the maximum length of their values."""
_ROW_INPUTS = frozenset(ImageToImageInput.model_fields) - {"image_url", "sync_mode"}


def parse_duration(value: object) -> object:
    """Convert a duration to seconds: `"50m"` becomes 3000.0, other types pass unchanged.

    Raises:
        ValueError: the text is not a duration.
    """
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value)
    if match is None:
        raise ValueError(f"{value!r} is not a duration; use for example 90s, 50m or 2h")
    return float(match[1]) * _UNITS[match[2] or ""]


def window_bounds(value: str) -> tuple[int, int] | None:
    """Parse `limits.max_in_flight`: `"auto:16-512"` gives (16, 512), `"auto"` gives None (the target's default bounds).

    Raises:
        ValueError: the value is neither form, or its bounds are invalid.
    """
    if value == "auto":
        return None
    match = re.fullmatch(r"auto:(\d{1,6})-(\d{1,6})", value, re.ASCII)
    if match is None:
        raise ValueError(_INVALID_MAX_IN_FLIGHT.format(value))
    low, high = int(match[1]), int(match[2])
    if not 1 <= low <= high:
        raise ValueError(f"invalid max_in_flight {value!r}: LOW must be >= 1 and HIGH >= LOW")
    return low, high


def _tags(value: object) -> dict[str, str]:
    """Parse tags from a table `{team = "design"}` or a list `["team=design"]`.

    Raises:
        ValueError: a tag is invalid (the target would drop it) or duplicate, or the tags do not fit into one header.
    """
    match value:
        case dict():
            given = list(value.items())
        case list() if all(isinstance(one, str) and "=" in one for one in value):
            given = [one.split("=", 1) for one in value]
        case _:
            raise ValueError('use a table like {team = "design"} or a list like ["team=design"]')
    tags: dict[str, str] = {}
    for name, text in given:
        if isinstance(text, bool) or not isinstance(text, str | int | float):
            raise ValueError(f"invalid value {text!r} of tag {name!r}: use text or a number")  # noqa: TRY004 - as below
        key, content = checked_tag(str(name), str(text))
        if key in tags:
            raise ValueError(f"duplicate tag {key!r}; remove one")
        tags[key] = content
    sizes = _OWN_TAGS | {key: len(content) for key, content in tags.items()}
    if len(sizes) > TAG_PAIRS:
        raise ValueError(f"{len(sizes)} tags with run and job: the limit is {TAG_PAIRS}")
    if (size := sum(len(key) + length for key, length in sizes.items())) > TAGS_BYTES:
        raise ValueError(f"up to {size} bytes of keys and values with run and job: the limit is {TAGS_BYTES}")
    return tags


def _decodes_text(encoding: str) -> bool:
    try:
        return isinstance(codecs.lookup(encoding).incrementaldecoder().decode(b"", True), str)
    except (LookupError, ValueError, TypeError):  # a NUL in the name, or not an incremental text decoder
        return False


Duration = Annotated[float, BeforeValidator(parse_duration), Field(gt=0, allow_inf_nan=False)]
StartTimeout = Annotated[float, BeforeValidator(parse_duration), Field(gt=1, allow_inf_nan=False)]
Lifetime = Annotated[float, BeforeValidator(parse_duration), Field(ge=3600, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ManifestSettings(_Section):
    """Columns and format of the manifest."""

    image: str = "image_url"
    """Column with the source image."""
    prompt: str = "prompt"
    """Column name, or a template over columns such as `a {animal} as a wizard`."""
    id: str | None = None
    """Column that identifies a row for its derived seed; None: image and prompt identify it."""
    format: Literal["csv", "tsv", "jsonl", "json", "parquet", "arrow", "images"] | None = None
    """None: detected from the name; CSV for standard input."""
    separator: str | None = None
    """Column separator of a CSV: one character, or `tab`. None: detected from the header."""
    encoding: str | None = None
    """Encoding of CSV and JSONL: a Python text encoding. None: UTF-8, or that of the byte order mark."""
    on_bad_row: Literal["fail", "skip"] = "fail"

    @field_validator("separator")
    @classmethod
    def _one_character(cls, value: str | None) -> str | None:
        character = _TABS.get(value, value) if value is not None else None
        if character is None or (len(character) == 1 and character not in '"\r\n\0'):
            return character
        raise ValueError(f"{value!r} is not one character; use for example ';', '|' or 'tab'")

    @field_validator("encoding")
    @classmethod
    def _text_encoding(cls, value: str | None) -> str | None:
        if value is None or _decodes_text(value):
            return value
        raise ValueError(
            f"unknown text encoding {value!r}; use one of Python's, for example 'cp1252', 'latin-1' or 'utf-16'"
        )


class InputSettings(_Section):
    """Endpoint inputs for every row; a manifest column of the same name wins. Unset: the endpoint's default."""

    prompt: str | None = None
    strength: Annotated[float | None, Field(ge=0.01, le=1, allow_inf_nan=False)] = None
    num_inference_steps: Annotated[int | None, Field(ge=10, le=50)] = None
    guidance_scale: Annotated[float | None, Field(ge=1, le=20, allow_inf_nan=False)] = None
    seed: Annotated[int | None, Field(ge=0)] = None
    num_images: Annotated[int | None, Field(ge=1, le=4)] = None
    enable_safety_checker: bool | None = None
    output_format: Literal["jpeg", "png"] | None = None
    acceleration: Literal["none", "regular", "high"] | None = None


class TargetSettings(_Section):
    """The target that executes the jobs."""

    name: str = "local"
    """`local` (embedded, free), `fal`, or the URL of a server with the same protocol."""
    app: AppId = APP_ID
    engine: Literal["preview", "echo"] = "preview"
    """Engine of the embedded endpoint."""
    service_time: Annotated[float, BeforeValidator(parse_duration), Field(ge=0)] = 0.0
    """Simulated time per job of the embedded `echo` engine."""
    slots: Annotated[int | None, Field(ge=1)] = None
    """Concurrent requests of the embedded endpoint; None: one per core, 32 for `echo`."""
    faults: str | None = None
    """A faults file for the embedded endpoint, to rehearse failures."""
    idempotency: Literal["auto", "replay", "reject", "none"] = "auto"
    """The target's behaviour on a repeated `Idempotency-Key`, see `batch.run.verdicts.Idempotency`. `auto`: the
    embedded endpoint replays, fal ignores keys, other servers report it at /health."""
    priority: Literal["normal", "low"] = "normal"
    """`low` requests wait behind all requests of normal priority."""
    keep_files: Lifetime | None = None
    """Lifetime of result files at the target; None: its default."""
    tags: Annotated[dict[str, str], BeforeValidator(_tags)] = {}
    """Labels for usage reports. Each submit also has `run`, the run directory's name, and `job`, the job's key, unless
    they are set here; an empty value omits a tag."""

    @field_validator("idempotency")
    @classmethod
    def _possible(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("name") == "fal" and value in {"replay", "reject"}:
            raise ValueError("fal ignores Idempotency-Key, so a repeated submit would be paid for twice; use auto")
        return value

    @field_validator("faults")
    @classmethod
    def _expand_home(cls, value: str | None) -> str | None:
        return None if value is None else os.path.expanduser(value)  # noqa: PTH111 - no error for an unknown user

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value in {"local", "fal"}:
            return value
        if protocol.names_fal(value):
            raise ValueError(
                "this is one of fal's own hosts; use --target fal (target.name = 'fal'), which knows the price and asks"
                " before it spends money"
            )
        if not re.match(r"https?://[^/]", value):
            raise ValueError(f"invalid target {value!r}: use local, fal, or a URL such as http://gpu-box:8787")
        if protocol.origin_of(value) == ("", "", 0):
            raise ValueError(
                "not an unambiguous URL: remove user name, spaces and backslashes, as in http://gpu-box:8787"
                " (the key comes from FAL_KEY)"
            )
        return value.rstrip("/")


class LimitSettings(_Section):
    """Concurrency, rate, time and cost limits."""

    max_in_flight: int | str = "auto"
    """An integer, `auto`, or `auto:LOW-HIGH`; see `window_bounds`."""
    submits_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """None: 20 for fal, unlimited elsewhere."""
    polls_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Rate limit of status reads over all jobs. None: 200 for fal, unlimited elsewhere."""
    updates: Literal["poll", "stream", "webhook"] = "poll"
    """How the run notices that a job has ended: status reads, or streams or webhooks with reads as a fallback."""
    budget_usd: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    deadline: Duration | None = None
    drain: Duration = 60.0
    """How long a stopping run collects jobs in flight."""
    collect_for: Annotated[float, BeforeValidator(parse_duration), Field(ge=0, allow_inf_nan=False)] = 7 * 86400.0
    """For this long after the end of a paid request whose result could not be read, the result is fetched again for
    free; later, `--retry-failed` submits a new attempt."""
    max_failures: str | None = None
    """Stop after more failures than this: `50` jobs, or `10%` of ended jobs (applied from 20 ended jobs)."""
    attempts: Annotated[int, Field(ge=1, le=20)] = 3
    """Maximum attempts for a job whose failure the service calls retryable."""
    rows: Annotated[int | None, Field(ge=1)] = None
    """Use only the first rows of the manifest; None: all."""
    start_timeout: StartTimeout | None = None
    """Sent with each submit: a request that does not start within this time after acceptance fails at no cost."""
    on_unknown: str = "hold"
    """Handling of a submit with unknown outcome: `hold`, or for example `resubmit-after=30m`."""
    max_image_megapixels: Annotated[float, Field(gt=0)] = 100.0
    """A larger local image is a bad row: the target would refuse it after the upload."""
    max_download_bytes: Annotated[int, Field(gt=0)] = 64 * 2**20

    @field_validator("max_in_flight", mode="before")
    @classmethod
    def _window(cls, value: object) -> object:
        number = int(value) if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value, re.ASCII) else value
        if isinstance(number, int) and not isinstance(number, bool) and number >= 1:
            return number
        if not isinstance(value, str):
            raise ValueError(_INVALID_MAX_IN_FLIGHT.format(value))  # noqa: TRY004 - pydantic reports only ValueErrors
        window_bounds(value)
        return value

    @field_validator("max_failures", mode="before")
    @classmethod
    def _failures(cls, value: object) -> object:
        text = str(value) if isinstance(value, int) else value
        if text is not None and not re.fullmatch(r"\d+%?", str(text)):
            raise ValueError(f"invalid max_failures {value!r}: use a number of jobs or a percentage such as 10%")
        return text

    @field_validator("on_unknown")
    @classmethod
    def _unknown(cls, value: str, info: ValidationInfo) -> str:
        if value != "hold":
            kind, _, span = value.partition("=")
            if kind != "resubmit-after":
                raise ValueError(f"invalid on_unknown {value!r}: use hold or resubmit-after=DURATION")
            after, timeout = parse_duration(span), info.data.get("start_timeout")
            if timeout is not None and isinstance(after, float) and after < timeout:
                raise ValueError(
                    f"it is shorter than limits.start_timeout = {timeout:g}s, during which the first submit may still"
                    f" start and be billed; use resubmit-after={timeout:g}s or longer"
                )
        return value


class WebhookSettings(_Section):
    """The receiver of callbacks with `limits.updates = "webhook"`."""

    bind: str = "127.0.0.1:0"
    """Address and port to listen on; port 0: any free port."""
    public_url: str | None = None
    """URL at which the target reaches the receiver. None: the bound address, for a target on this machine."""

    @field_validator("bind")
    @classmethod
    def _address(cls, value: str) -> str:
        if re.fullmatch(r"(\[[0-9A-Fa-f:]+\]|[^\s:/\[\]]+):\d{1,5}", value, re.ASCII):
            return value
        raise ValueError(f"invalid address {value!r}: use HOST:PORT such as 0.0.0.0:8080 or [::1]:8080")

    @field_validator("public_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is None or re.fullmatch(r"https?://[^/\s?#]+[^\s?#]*", value):
            return value
        raise ValueError(f"invalid callback URL {value!r}: use a URL such as https://box.example/hook, without ? and #")


class OutputSettings(_Section):
    """Settings of the output."""

    download: bool = True


class PriceSettings(_Section):
    """The target's price; unset: the built-in, dated price for fal, free for any other target."""

    usd_per_megapixel: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    as_of: date | None = None


class Settings(BaseSettings):
    """The resolved configuration of one command."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=_ENVIRONMENT_PREFIX, env_nested_delimiter="__"
    )

    manifest: ManifestSettings = ManifestSettings()
    input: InputSettings = InputSettings()
    sweep: dict[str, list[Any]] = Field(default_factory=dict)
    target: TargetSettings = TargetSettings()
    limits: LimitSettings = LimitSettings()
    webhook: WebhookSettings = WebhookSettings()
    output: OutputSettings = OutputSettings()
    price: PriceSettings = PriceSettings()
    run_seed: Annotated[int, Field(ge=0)] = 0
    """Input of all derived seeds: another run seed gives other images."""

    @field_validator("sweep")
    @classmethod
    def _axes(cls, axes: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for name, values in axes.items():
            if refusal := _refusal(name):
                raise ValueError(refusal)
            if name not in _ROW_INPUTS:
                near = difflib.get_close_matches(name, sorted(_ROW_INPUTS), 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{name!r} cannot be swept{hint} (axes: {', '.join(sorted(_ROW_INPUTS))})")
            if not values:
                raise ValueError(f"the axis {name!r} has no values")
        return axes


def load_settings(path: Path | None = None, flags: dict[str, dict[str, Any]] | None = None) -> Settings:
    """Resolve the configuration; `flags` are nested like the file and take precedence.

    Raises:
        ConfigError: the file is missing or not TOML, a key is unknown (the message names the nearest one), or a value
            is out of bounds. One message lists all problems.
    """
    path = None if path is None else Path(os.path.expanduser(path))  # noqa: PTH111 - no error for an unknown user
    if path is not None:
        _check_toml(path)
    _check_environment(os.environ)

    class Loaded(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic-settings passes all by name
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            if path is None:
                return init_settings, env_settings
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, path)

    try:
        loaded = Loaded(**(flags or {}))  # type: ignore[arg-type]
    except ValidationError as error:
        source = str(path) if path is not None else "the configuration"
        raise ConfigError(_explain(error, source, flags or {}, os.environ)) from error
    except SettingsError as error:
        raise ConfigError(_explain_environment(error, os.environ)) from error
    return Settings.model_construct(**{name: getattr(loaded, name) for name in Settings.model_fields})


def api_key() -> SecretStr | None:
    """Return the key from `FAL_KEY`, or `FAL_KEY_ID` and `FAL_KEY_SECRET`, like the official clients; None if unset."""
    key = os.environ.get("FAL_KEY", "")
    pair = os.environ.get("FAL_KEY_ID", ""), os.environ.get("FAL_KEY_SECRET", "")
    key = key or (":".join(pair) if all(pair) else "")
    return SecretStr(key.strip()) if key.strip() else None


def _check_toml(path: Path) -> None:
    try:
        tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}; examples are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def _check_environment(environment: Mapping[str, str]) -> None:
    """Refuse unknown `RESTYLE_*` variables: pydantic-settings ignores them, but a misspelt limit must be an error."""
    known = {
        f"{_ENVIRONMENT_PREFIX}{section}__{key}".upper()
        for section, field in Settings.model_fields.items()
        for key in getattr(field.annotation, "model_fields", {})
    } | {f"{_ENVIRONMENT_PREFIX}{name}".upper() for name in Settings.model_fields}
    known |= {"RESTYLE_DEBUG"}  # a switch of the command line, not a setting: see `batch.cli.commands`
    for name in environment:
        upper = name.upper()
        is_table = upper.startswith((f"{_ENVIRONMENT_PREFIX}SWEEP__", f"{_ENVIRONMENT_PREFIX}TARGET__TAGS__"))
        if upper.startswith(_ENVIRONMENT_PREFIX) and upper not in known and not is_table:
            raise ConfigError(_refusal(name) or f"unknown environment variable {name}{_nearest(upper, known)}")


def _explain(error: ValidationError, source: str, flags: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    """Return one message with all problems, grouped by source: an environment variable, the file, or a flag."""
    lines: dict[str, list[str]] = {}
    for problem in error.errors():
        place = [str(part) for part in problem["loc"]]
        key = ".".join(place)
        given = _holds(flags, place)  # a flag overrides the environment
        variable = None if given else _variable(place, environment)
        if problem["type"] == "extra_forbidden":
            within = problem["input"] if isinstance(problem["input"], dict) else ()
            refused = next(filter(None, map(_refusal, [key, *within])), None)
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
        return f"expected a section with the keys {', '.join(keys or sorted(_ROW_INPUTS))}"
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


def _variable(place: list[str], environment: Mapping[str, str]) -> str | None:
    """Return the environment variable of the value at a place: the key's own, or its section's, which holds JSON."""
    names = {name.upper(): name for name in environment}
    own = names.get((_ENVIRONMENT_PREFIX + "__".join(place[:2])).upper())
    section = names.get((_ENVIRONMENT_PREFIX + place[0]).upper())
    if own is not None or section is None:
        return own
    try:
        return section if _holds(json.loads(environment[section]), place[1:]) else None
    except ValueError:
        return section


def _explain_environment(error: SettingsError, environment: Mapping[str, str]) -> str:
    """Return the message for a variable that is neither plain text nor JSON."""
    named = re.search(r'field "(\w+)"', str(error))
    variable = None if named is None else _variable([named[1]], environment) or _tables_of(named[1], environment)
    if variable is None:
        return f"the environment cannot be read: {error}; RESTYLE_* values must be plain text or JSON"
    said = f"{variable} = {environment[variable]!r} is not JSON"
    return f"the environment cannot be read: {said}; use JSON, or set single keys: {variable}__KEY=VALUE"


def _tables_of(section: str, environment: Mapping[str, str]) -> str | None:
    """Return the environment variable of a table inside a section; the only such key is `target.tags`."""
    return next((name for name in environment if name.upper() == f"{_ENVIRONMENT_PREFIX}{section}__TAGS".upper()), None)


def _refusal(name: str) -> str | None:
    """Return why a key is refused, in any spelling: `input.sync_mode`, `target.headers.X-Fal-Store-IO`, ..."""
    plain = name.lower().replace("-", "_")
    return next(
        (f"{name} is not supported: {reason}" for word, reason in _REFUSED.items() if plain.endswith(word)), None
    )


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
