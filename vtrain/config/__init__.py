"""Configuration: a TOML file or shipped recipe plus dotted overrides become frozen dataclasses, or one clear error.

A settings class is a frozen, keyword-only dataclass. Its fields are keys (`key(default, "one line")`), sections
(another such dataclass) or lists of tables (`tuple[Section, ...]`). Files for a class that names `same_in_stages`, the
keys and sections that all stages share, may have [[stage]] tables. `run_command` is the entry of every command.
"""

from vtrain.config.command import REPORT_DELAY, help_text, run_command
from vtrain.config.dumping import dump, dump_stages
from vtrain.config.keys import REQUIRED, ConfigError, Entry, SectionDoc, describe, key, sections, toml_value
from vtrain.config.reading import build, load, load_stages, recipes

__all__ = [
    "REPORT_DELAY",
    "REQUIRED",
    "ConfigError",
    "Entry",
    "SectionDoc",
    "build",
    "describe",
    "dump",
    "dump_stages",
    "help_text",
    "key",
    "load",
    "load_stages",
    "recipes",
    "run_command",
    "sections",
    "toml_value",
]
