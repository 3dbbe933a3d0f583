"""Settings: flags override environment variables, which override a TOML file, which overrides the defaults."""

from batch.config.loading import api_key, load_settings
from batch.config.settings import (
    RUN_NAME_LIMIT,
    InputSettings,
    LimitSettings,
    ManifestSettings,
    OutputSettings,
    PriceSettings,
    Settings,
    TargetSettings,
    WebhookSettings,
    parse_duration,
    window_bounds,
)

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
