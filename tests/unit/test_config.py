"""Settings: precedence of sources, messages about unknown keys, durations, and all bounds."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch.config import Settings, api_key, load_settings, parse_duration
from batch.errors import ConfigError, ExitCode


@pytest.fixture
def toml(tmp_path):
    """Return a function that writes a config file and returns its path."""

    def write(text):
        path = tmp_path / "config.toml"
        path.write_text(text, "utf-8")
        return path

    return write


def refusal(flags=None, path=None):
    """Return the error message of an invalid configuration."""
    with pytest.raises(ConfigError) as caught:
        load_settings(path, flags)
    assert caught.value.exit_code is ExitCode.BAD_INPUT
    return str(caught.value)


# --- precedence of sources --------------------------------------------------------------------------------


def test_flags_win_over_environment_over_file_over_defaults(toml, monkeypatch):
    """Precedence applies to each key, not to sections."""
    path = toml("[limits]\nattempts = 7\nrows = 7\nbudget_usd = 7\n")
    monkeypatch.setenv("RESTYLE_LIMITS__ATTEMPTS", "8")
    monkeypatch.setenv("RESTYLE_LIMITS__ROWS", "8")
    limits = load_settings(path, {"limits": {"attempts": 9}}).limits
    assert (limits.attempts, limits.rows, limits.budget_usd, limits.drain) == (9, 8, 7.0, 60.0)


def test_without_any_source_the_defaults_hold():
    """The default target costs nothing."""
    assert load_settings() == Settings.model_construct()
    assert load_settings().target.name == "local"


def test_environment_names_may_be_lower_case_and_lists_are_json(monkeypatch):
    """A sweep can be set by an environment variable with JSON."""
    monkeypatch.setenv("restyle_sweep", json.dumps({"strength": [0.5, 0.75]}))
    assert load_settings().sweep == {"strength": [0.5, 0.75]}


def test_one_axis_can_be_set_from_the_environment(monkeypatch):
    """`RESTYLE_SWEEP__<AXIS>` is accepted, although axes are not fields."""
    monkeypatch.setenv("RESTYLE_SWEEP__SEED", "[1, 2]")
    assert load_settings().sweep == {"seed": [1, 2]}


def test_a_variable_that_is_not_json_is_refused(monkeypatch):
    """The message names the variable and its value, and explains how to set single keys."""
    monkeypatch.setenv("RESTYLE_SWEEP", "{half")
    said = refusal()
    assert "the environment cannot be read: RESTYLE_SWEEP = '{half' is not JSON" in said
    assert "RESTYLE_SWEEP__KEY=VALUE" in said


VARIABLES = [
    ("RESTYLE_LIMITS__MAX_IN_FLIGHT", "0", "limits.max_in_flight = '0': invalid max_in_flight '0': use auto,"),
    ("restyle_limits__rows", "many", "limits.rows = 'many': input should be a valid integer"),
    ("RESTYLE_RUN_SEED", "-1", "run_seed = '-1': input should be greater than or equal to 0"),
    ("RESTYLE_LIMITS", '{"attempts": 0}', "limits.attempts = 0: input should be greater"),
    ("RESTYLE_LIMITS", "3", "limits = 3: expected a section with the keys attempts, budget_usd,"),
    ("RESTYLE_SWEEP__SEED", "1", "sweep.seed = 1: expected a list of values such as [1, 2]"),
]


@pytest.mark.parametrize(("name", "value", "words"), VARIABLES, ids=[f"{row[0]}={row[1]}" for row in VARIABLES])
def test_a_variable_with_a_wrong_value_is_named(monkeypatch, toml, name, value, words):
    """Otherwise the user would look for the error in the config file."""
    monkeypatch.setenv(name, value)
    assert refusal(path=toml("[limits]\ndrain = '5s'")).startswith(f"the environment variable {name}: {words}")


def test_each_problem_is_listed_under_its_source(monkeypatch, toml):
    """The sources are a variable, the file, and a flag that overrides a variable."""
    monkeypatch.setenv("RESTYLE_LIMITS__ATTEMPTS", "0")
    monkeypatch.setenv("RESTYLE_LIMITS__ROWS", "x")
    monkeypatch.setenv("RESTYLE_OUTPUT", '{"download": true}')
    path = toml("[limits]\nbudget_usd = -1\n[output]\nfoo = 1")
    said = refusal({"limits": {"rows": 0}}, path).split("; ")
    too_small = "input should be greater than or equal to"
    assert f"the environment variable RESTYLE_LIMITS__ATTEMPTS: limits.attempts = '0': {too_small} 1" in said
    assert f"the configuration: limits.rows = 0: {too_small} 1" in said
    assert f"{path}: limits.budget_usd = -1: {too_small} 0" in said
    assert "unknown key output.foo" in said


@pytest.mark.parametrize(("given", "character"), [("tab", "\t"), ("\\t", "\t"), ("\t", "\t"), (";", ";"), (" ", " ")])
def test_a_separator_is_one_character_or_the_word_tab(given, character):
    """A tab is hard to write in a shell or a TOML literal."""
    assert load_settings(None, {"manifest": {"separator": given}}).manifest.separator == character


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("limits = 3", ["limits = 3: expected a section with the keys attempts, ", "submits_per_second, updates"]),
        ("manifest = 'm.csv'", ["manifest = 'm.csv': expected a section with the keys encoding, format, id, image,"]),
        (
            "[manifest]\nencoding = 'latin-8'",
            ["manifest.encoding = 'latin-8': unknown text encoding 'latin-8'; use one"],
        ),
        ("[manifest]\nencoding = 'rot13'", ["unknown text encoding 'rot13'"]),
        ("[manifest]\nencoding = 'base64'", ["unknown text encoding 'base64'"]),
        ("[manifest]\nencoding = ''", ["unknown text encoding ''"]),
        ("[manifest]\nseparator = ';;'", ["manifest.separator = ';;': ';;' is not one character; use for example ';'"]),
        ("[manifest]\nseparator = ''", ["'' is not one character"]),
        ("[manifest]\nseparator = '\"'", ["'\"' is not one character"]),
        ("sweep = 3", ["sweep = 3: expected a section with the keys acceleration, ", "seed, strength"]),
        ("[webhook]\nbind = '80'", ["webhook.bind = '80': invalid address '80': use HOST:PORT such as 0.0.0.0:8080"]),
        ("[webhook]\npublic_url = 'box'", ["invalid callback URL 'box': use a URL such as https://box.example/hook"]),
        ("[limits]\nmax_in_flight = 0", ["invalid max_in_flight 0: use auto, auto:LOW-HIGH", ">= 1"]),
        ("[limits]\nmax_in_flight = true", ["invalid max_in_flight True"]),
        ("[limits]\nmax_in_flight = 2.5", ["invalid max_in_flight 2.5"]),
    ],
)
def test_the_message_about_a_wrong_value_names_valid_ones(toml, text, words):
    """The message does not show pydantic's wording: patterns, class names or alternative types."""
    said = refusal(path=toml(text))
    for word in words:
        assert word in said
    for foreign in ("instance of", "pattern", "valid string", ";  ", "constrained"):
        assert foreign not in said


def test_settings_cannot_be_changed_later():
    """Settings are frozen."""
    settings = load_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.limits.attempts = 4


# --- unknown keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[limits]\nbuget_usd = 3", "limits.buget_usd; did you mean limits.budget_usd?"),
        ("[limit]\nrows = 3", "limit; did you mean limits?"),
        ("budget_usd = 3", "budget_usd; did you mean limits.budget_usd?"),
        ("[input]\nbudget_usd = 3", "input.budget_usd; did you mean limits.budget_usd?"),
        ("[input]\nguidance = 3.5", "input.guidance; did you mean input.guidance_scale?"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(toml, text, named):
    """This includes keys in the wrong section."""
    path = toml(text)
    said = refusal(path=path)
    assert f"unknown key {named}" in said
    assert str(path) in said


def test_an_unknown_key_without_a_similar_one_lists_all(toml):
    """The message lists the known keys."""
    said = refusal(path=toml("xyzzy = 1"))
    assert "known: input, input.acceleration" in said


def test_an_unknown_variable_names_the_nearest_known_one(monkeypatch):
    """A misspelt limit in the environment must not be ignored."""
    monkeypatch.setenv("RESTYLE_LIMITS__DEADLIN", "5m")
    assert "unknown environment variable RESTYLE_LIMITS__DEADLIN; did you mean RESTYLE_LIMITS__DEADLINE?" in refusal()


def test_an_unknown_axis_names_the_nearest_input():
    """Only inputs of the endpoint can be swept, except the image."""
    assert "'strenght' cannot be swept; did you mean 'strength'?" in refusal({"sweep": {"strenght": [0.5]}})
    assert "'image_url' cannot be swept" in refusal({"sweep": {"image_url": ["a"]}})
    assert "the axis 'seed' has no values" in refusal({"sweep": {"seed": []}})


def test_all_problems_are_in_one_message(toml):
    """Users can fix all errors of a file at once."""
    said = refusal(path=toml("[limits]\nattempts = 0\nrows = 0\nfoo = 1\n[target]\nname = 'nowhere'"))
    for part in ("limits.attempts = 0", "limits.rows = 0", "unknown key limits.foo", "invalid target 'nowhere'"):
        assert part in said


# --- targets ----------------------------------------------------------------------------------------------

FAL_HOSTS = ["queue.fal.run", "fal.run", "ws.fal.run", "rest.fal.ai", "rest.alpha.fal.ai", "api.fal.ai", "fal.ai",
             "v3.fal.media", "v3b.fal.media", "fal.media", "falrun.com", "queue.falrun.com", "x.fal.dev",
             "any.thing.fal.ai"]  # fmt: skip
SPELLINGS = [
    "https://{}", "http://{}/", "https://{}:443", "https://{}:8443/fal-ai/flux", "https://{}.", "https://{}..:443",
    "HTTPS://{}", "https://user@{}", "https://user:hush@{}", "https://{}?x=1", "https://{}#x", " https://{}",
    "https://{}\n", "{}", "//{}", "wss://{}", "https:{}", "https:///{}", "https://gpu-box\\@{}", "https://{}@gpu-box",
]  # fmt: skip
DISGUISES = [
    "https://QUEUE.Fal.Run", "https://queue%2efal%2erun", "https://%71ueue.fal.run", "https://queue%252efal.run",
    "https://queue\u3002fal\u3002run", "https://queue\uff61fal.run", "https://\uff51ueue.fal.run",
    "https://queue.f\u00adal.run", "https://queue.fal\u200b.run", "https://queue.fal\ufe0f.run", "https://queue.f\u00aal.run",
    "https://gpu-box%2f@queue.fal.run",
]  # fmt: skip


@pytest.mark.parametrize("host", FAL_HOSTS)
def test_a_host_of_fal_is_refused_as_a_url_target_in_any_spelling(host):
    """Its cost would not appear in plans. The message names the right target and hides passwords."""
    for spelling in SPELLINGS:
        said = refusal({"target": {"name": spelling.format(host)}})
        assert "--target fal" in said, spelling
        assert "hush" not in said


@pytest.mark.parametrize("url", DISGUISES)
def test_a_host_of_fals_in_disguise_is_seen_through(url):
    """A URL is refused if any URL parser or name lookup would resolve it to fal."""
    assert "--target fal" in refusal({"target": {"name": url}})


def test_a_host_of_fals_is_refused_from_every_source(toml, monkeypatch):
    """The sources are the file, the environment by key or section, and the library; the message names them."""
    url = "https://queue.fal.run"
    path = toml(f"[target]\nname = '{url}'")
    assert "--target fal" in (said := refusal(path=path))
    assert str(path) in said
    monkeypatch.setenv("RESTYLE_TARGET__NAME", url)
    assert "--target fal" in (said := refusal())
    assert "RESTYLE_TARGET__NAME" in said
    monkeypatch.delenv("RESTYLE_TARGET__NAME")
    monkeypatch.setenv("RESTYLE_TARGET", json.dumps({"name": url}))
    assert "--target fal" in refusal()
    monkeypatch.delenv("RESTYLE_TARGET")
    with pytest.raises(ValueError, match="--target fal"):
        Settings.model_validate({"target": {"name": url}})


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8787", "http://[::1]:8787", "https://gpu-box/queue.fal.run", "https://fal.run.example.com",
     "https://my-fal.ai", "https://notfal.run", "http://fal:8787", "https://falai.com", "http://fal.ai.local:1/x"],
)  # fmt: skip
def test_other_hosts_are_targets_as_before(url):
    """This includes hosts with similar names."""
    assert load_settings(flags={"target": {"name": url}}).target.name == url


@pytest.mark.parametrize(
    "url", ["http://me:hush@gpu-box", "http://gpu box", "http://gpu-box\\x", "http://gpu-box:99999"]
)
def test_an_ambiguous_url_is_refused_as_a_target(url):
    """URL parsers disagree about its host, and run.json would store a password."""
    said = refusal({"target": {"name": url}})
    assert "not an unambiguous URL" in said
    assert "hush" not in said


# --- files ------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_used_is_named(tmp_path, toml):
    """A missing file, invalid TOML, a folder and binary data each have a message."""
    assert "there is no config file" in refusal(path=tmp_path / "none.toml")
    assert "is not TOML" in refusal(path=toml("[limits"))
    assert "cannot be read" in refusal(path=tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"# \xff")
    assert "cannot be read" in refusal(path=tmp_path / "latin.toml")


# --- durations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90.0), ("50m", 3000.0), ("2h", 7200.0), ("1d", 86400.0), ("250ms", 0.25), ("1.5h", 5400.0),
     (" 3 s ", 3.0), ("12", 12.0), (".5s", 0.5), (7, 7), (2.5, 2.5)],
)  # fmt: skip
def test_a_duration_is_float_seconds(text, seconds):
    """Numbers are seconds; text may have a unit."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "5 weeks", "-5s", "1h30m", "s", "5.m.", "1e3s"])
def test_an_invalid_duration_is_refused_with_an_example(text):
    """The message has valid examples."""
    with pytest.raises(ValueError, match="is not a duration; use for example 90s"):
        parse_duration(text)


@given(st.floats(0.001, 1e6).map(lambda value: round(value, 3)), st.sampled_from(["ms", "s", "m", "h", "d"]))
def test_a_duration_is_its_number_times_its_unit(number, unit):
    """This holds for any number and unit."""
    factor = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}[unit]
    assert math.isclose(parse_duration(f"{number:.3f}{unit}"), number * factor, rel_tol=1e-9)


def test_a_setting_that_is_a_duration_is_read_as_one():
    """Text becomes seconds."""
    assert load_settings(None, {"limits": {"deadline": "50m"}}).limits.deadline == 3000.0


# --- bounds -----------------------------------------------------------------------------------------------

IN_BOUNDS = [
    ("input.strength", [0.01, 1], [0, 0.009, 1.01, math.nan, "much"]),
    ("input.num_inference_steps", [10, 50], [9, 51, 20.5]),
    ("input.guidance_scale", [1, 20], [0.99, 20.01, math.inf]),
    ("input.seed", [0, 2**53 + 1], [-1, 1.5]),
    ("input.num_images", [1, 4], [0, 5]),
    ("input.output_format", ["jpeg", "png"], ["webp"]),
    ("input.acceleration", ["none", "regular", "high"], ["warp"]),
    ("input.enable_safety_checker", [True, False], ["perhaps"]),
    ("manifest.on_bad_row", ["fail", "skip"], ["drop"]),
    ("manifest.format", ["csv", "tsv", "jsonl", "json", "parquet", "arrow", "images"], ["xlsx", "CSV", ""]),
    ("manifest.separator", [",", ";", "|", "\t", "tab"], ["", ";;", '"', "\n", "\0", 5]),
    (
        "manifest.encoding",
        ["utf-8", "latin-1", "cp1252", "UTF-16", "utf_16_le", "utf-32", "big5", "shift_jis", "iso2022_jp", "cp037"],
        ["", "latin-8", "hex", "base64", "zlib", "rot13", "undefined", "a\0b", "é", 8],
    ),
    ("target.name", ["local", "fal", "http://box:8787", "https://box"], ["lokal", "ftp://box", "http://", "box:80"]),
    ("target.engine", ["preview", "echo"], ["oil"]),
    ("target.service_time", [0, "2s"], [-1, "soon"]),
    ("target.slots", [1, 512], [0]),
    ("target.idempotency", ["auto", "replay", "reject", "none"], ["maybe", True]),
    ("target.priority", ["low", "normal"], ["high", ""]),
    ("target.keep_files", ["7d", 3600, "1h"], ["59m", 3599, math.inf, "forever"]),
    (
        "target.tags",
        [
            {},
            {"team": "design", "n": 3},
            ["team=design", "note=a=b c"],
            {"Team": " x "},
            {"run": "", "job": ""},
            {f"k{number}": "v" for number in range(8)},
            {"a": "v" * 256, "k" * 64: ""},
        ],
        [
            "team=design",
            ["team"],
            [3],
            {"": "x"},
            {"a b": "x"},
            {"k" * 65: "x"},
            {"fal.x": "y"},
            {"a": "v" * 257},
            {"a": "x,y"},
            {"a": "é"},
            {"a": "x\ny"},
            {"a": True},
            {"a": ["x"]},
            {"a": None},
            {"a": "1", "A": "2"},
            {f"k{number}": "v" for number in range(9)},
            {f"k{number}": "v" * 250 for number in range(4)},
        ],
    ),
    (
        "limits.max_in_flight",
        ["auto", 1, "32", "auto:1-1", "auto:16-512"],
        [0, "0", "many", "auto:0-5", "auto:9-8", "auto:4"],
    ),
    ("limits.polls_per_second", [0.1, 1000], [0, -1, math.inf]),
    ("limits.updates", ["poll", "stream", "webhook"], ["push"]),
    ("webhook.bind", ["127.0.0.1:0", "[::1]:8080", "box:1"], ["8080", "http://box:1", "::1:80", "box:many"]),
    ("webhook.public_url", ["https://box/hook", "http://box:1"], ["box", "ftp://box", "https://box/?a=b", "https://"]),
    ("limits.submits_per_second", [0.1, 1000], [0, -1, math.inf]),
    ("limits.budget_usd", [0, 25.5], [-0.01, math.inf, math.nan]),
    ("limits.deadline", ["1s", 5], [0, "0s", math.inf, math.nan, "soon"]),
    ("limits.drain", ["1s", 5], [0, "-1s"]),
    ("limits.collect_for", ["7d", 0], [-1, "-1s"]),
    ("limits.max_failures", ["50", "10%", 50], ["half", "-1", "10.5%"]),
    ("limits.attempts", [1, 20], [0, 21]),
    ("limits.rows", [1], [0]),
    ("limits.start_timeout", ["10m", 1.5, "90s"], ["1s", 0, "-5s", math.inf, math.nan, "soon"]),
    ("limits.on_unknown", ["hold", "resubmit-after=30m"], ["resubmit", "resubmit-after=soon", "resubmit-after="]),
    ("limits.max_image_megapixels", [0.1], [0]),
    ("limits.max_download_bytes", [1], [0]),
    ("output.download", [True, False], ["perhaps"]),
    ("price.usd_per_megapixel", [0, 0.03], [-0.01, math.inf]),
    ("price.as_of", ["2026-11-01"], ["yesterday"]),
    ("run_seed", [0, 2**31], [-1]),
]


def nested(key, value):
    section, _, name = key.partition(".")
    return {section: {name: value}} if name else {section: value}


@pytest.mark.parametrize(("key", "good", "bad"), IN_BOUNDS, ids=[key for key, _, _ in IN_BOUNDS])
def test_each_key_takes_its_bounds_and_nothing_beyond(key, good, bad):
    """Both bounds are inclusive; the message about a value outside names the key."""
    for value in good:
        load_settings(None, nested(key, value))
    for value in bad:
        assert key in refusal(nested(key, value)), value


def test_every_bounded_key_is_tested():
    """A new key with bounds needs a line in the table above; free text has no bounds."""
    free = {"manifest.image", "manifest.prompt", "manifest.id", "input.prompt", "target.app", "target.faults", "sweep"}
    keys = set()
    for section, field in Settings.model_fields.items():
        names = getattr(field.annotation, "model_fields", None)
        keys |= {section} if names is None else {f"{section}.{name}" for name in names}
    assert keys - free == {key for key, _, _ in IN_BOUNDS}


def test_resolved_settings_can_be_loaded_again():
    """`run.json` stores them for `restyle export` and other commands, including unset values, durations and tags."""
    for flags in ({}, {"limits": {"start_timeout": "10m"}, "target": {"keep_files": "7d", "tags": ["a=b"]}}):
        settings = load_settings(None, flags)
        assert Settings.model_validate(settings.model_dump(mode="json")) == settings


def test_tags_are_normalized_as_at_the_target(monkeypatch):
    """Lower-case keys, no surrounding spaces, numbers as text; also from the environment, as JSON or key by key."""
    tagged = {"target": {"tags": {" Team ": " design ", "batch": 7}}}
    assert load_settings(None, tagged).target.tags == {"team": "design", "batch": "7"}
    assert load_settings(None, {"target": {"tags": ["env=prod", "note=a=b"]}}).target.tags == {
        "env": "prod",
        "note": "a=b",
    }
    monkeypatch.setenv("RESTYLE_TARGET__TAGS__TEAM", "design")
    assert load_settings().target.tags == {"team": "design"}
    monkeypatch.delenv("RESTYLE_TARGET__TAGS__TEAM")
    monkeypatch.setenv("RESTYLE_TARGET__TAGS", '["a=b"]')
    assert load_settings().target.tags == {"a": "b"}
    monkeypatch.setenv("RESTYLE_TARGET__TAGS", "a=b")
    assert "RESTYLE_TARGET__TAGS = 'a=b' is not JSON" in refusal()


def test_a_tag_that_the_target_would_drop_is_named(toml):
    """The message has the key, the value and the rule."""
    said = refusal(path=toml('[target]\ntags = {"Te am" = "x"}'))
    assert "target.tags = {'Te am': 'x'}: invalid tag key 'Te am': use 1 to 64 characters of a-z, 0-9" in said
    said = refusal(path=toml('[target]\ntags = {team = "a,b"}'))
    assert "invalid value 'a,b' of tag 'team': use up to 256 printable ASCII characters, without commas" in said
    said = refusal(path=toml('[target]\ntags = "team"'))
    assert """target.tags = 'team': use a table like {team = "design"} or a list like ["team=design"]""" in said


def test_resubmit_after_is_not_shorter_than_the_start_timeout():
    """Otherwise the first submit could still start. The message names both keys and both values."""
    limits = {"start_timeout": "10m", "on_unknown": "resubmit-after=5m"}
    said = refusal({"limits": limits})
    assert "limits.on_unknown = 'resubmit-after=5m': it is shorter than limits.start_timeout = 600s" in said
    assert "use resubmit-after=600s or longer" in said
    load_settings(None, {"limits": limits | {"on_unknown": "resubmit-after=10m"}})
    load_settings(None, {"limits": limits | {"on_unknown": "hold"}})


@pytest.mark.parametrize("word", ["replay", "reject"])
def test_fal_is_not_trusted_with_repeats(word):
    """The service ignores idempotency keys, so a repeat would be paid for twice."""
    said = refusal({"target": {"name": "fal", "idempotency": word}})
    assert f"target.idempotency = '{word}': fal ignores Idempotency-Key" in said
    load_settings(None, {"target": {"name": "fal", "idempotency": "none"}})
    load_settings(None, {"target": {"name": "https://box", "idempotency": word}})


def test_a_target_url_loses_its_last_slash():
    """Joined URLs then have a single slash."""
    assert load_settings(None, {"target": {"name": "http://box:8787/"}}).target.name == "http://box:8787"


# --- the key ----------------------------------------------------------------------------------------------


def test_the_api_key_comes_from_the_environment_and_is_never_shown(monkeypatch):
    """`FAL_KEY`, else the pair of id and secret; None if absent or blank."""
    assert api_key() is None
    monkeypatch.setenv("FAL_KEY_ID", "id")
    assert api_key() is None
    monkeypatch.setenv("FAL_KEY_SECRET", "secret")
    pair = api_key()
    assert pair is not None
    assert pair.get_secret_value() == "id:secret"
    monkeypatch.setenv("FAL_KEY", " a:b ")
    key = api_key()
    assert key is not None
    assert key.get_secret_value() == "a:b"
    assert "a:b" not in f"{key!r} {key}"
    monkeypatch.setenv("FAL_KEY", " ")
    monkeypatch.delenv("FAL_KEY_ID")
    assert api_key() is None


def test_the_api_key_is_not_a_setting(toml):
    """It cannot be stored in a config file by mistake."""
    assert "unknown key" in refusal(path=toml("[target]\nkey = 'a:b'"))


def test_the_switch_for_traces_is_a_known_variable(monkeypatch):
    """Messages about unexpected errors mention it."""
    monkeypatch.setenv("RESTYLE_DEBUG", "1")
    load_settings()
