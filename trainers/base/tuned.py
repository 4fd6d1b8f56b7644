"""Reads tables of methods' settings for a size of model, such as those in `trainers/configs/methods`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import yaml

from trace_bench import packaged
from trace_bench.cli.options import option_words
from trace_bench.text import one_line
from trainers.base.config import ConfigError


def tuned_words(argv: list[str], method: str) -> list[str]:
    """The settings for a method from the table that the command line or its config names, as words of a command line.

    In front of the other words they win over the config, and the command line wins over them.

    Raises:
        ConfigError: if the table is no table, or the config cannot be read.
    """
    name, config = _value(argv, "--tuned"), _value(argv, "--config")
    content = _read(config) if config else None  # also without need: it refuses duplicate keys, TRL's parser does not
    if name is None and isinstance(content, dict):
        name = content.get("tuned")
    return [word for key, value in tuned_settings(name, method).items() for word in option_words(key, value)]


def tuned_settings(name: Any, method: str) -> dict[str, Any]:
    """The settings for a method in a table: option -> value; without a table (None, "none") there are none.

    Raises:
        ConfigError: if the table is no table.
    """
    if name in (None, "none"):
        return {}
    file = packaged.find("table of settings", str(name), packaged.tuned())
    table = _read(str(file))
    if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
        raise ConfigError(f"{one_line(file)} is not a table of settings: use METHOD: {{OPTION: VALUE}} in YAML.")
    return table.get(method, {})


def _value(argv: list[str], option: str) -> str | None:
    """The last value of an option of a command line."""
    return next((word for word, before in pairwise(reversed(argv)) if before == option), None)


def _read(file: str) -> Any:
    try:
        return packaged.read_yaml(file)
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise ConfigError(f"The configuration cannot be read: {e}") from e
