"""The settings, their defaults and bounds. Durations are float seconds and may be written `90s`, `50m` or `2h`."""

from __future__ import annotations

import codecs
import difflib
import os
import re
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from batch.fal import protocol
from batch.fal.endpoint import APP_ID, ImageToImageInput
from batch.fal.protocol import TAG_PAIRS, TAGS_BYTES, checked_tag
from batch.types import AppId

__all__ = [
    "ROW_INPUTS",
    "RUN_NAME_LIMIT",
    "InputSettings",
    "LimitSettings",
    "ManifestSettings",
    "OutputSettings",
    "PriceSettings",
    "Settings",
    "TargetSettings",
    "WebhookSettings",
    "parse_duration",
    "refusal_of",
    "window_bounds",
]

_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(ms|s|m|h|d)?\s*")
_TABS = {"tab": "\t", "\\t": "\t"}
_INVALID_MAX_IN_FLIGHT = "invalid max_in_flight {!r}: use auto, auto:LOW-HIGH such as auto:16-512, or an integer >= 1"
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
ROW_INPUTS = frozenset(ImageToImageInput.model_fields) - {"image_url", "sync_mode"}


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


class Settings(BaseModel):
    """The resolved configuration of one command."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
            if refusal := refusal_of(name):
                raise ValueError(refusal)
            if name not in ROW_INPUTS:
                near = difflib.get_close_matches(name, sorted(ROW_INPUTS), 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"{name!r} cannot be swept{hint} (axes: {', '.join(sorted(ROW_INPUTS))})")
            if not values:
                raise ValueError(f"the axis {name!r} has no values")
        return axes


def refusal_of(name: str) -> str | None:
    """Return why a key is refused, in any spelling: `input.sync_mode`, `target.headers.X-Fal-Store-IO`, ..."""
    plain = name.lower().replace("-", "_")
    return next(
        (f"{name} is not supported: {reason}" for word, reason in _REFUSED.items() if plain.endswith(word)), None
    )
