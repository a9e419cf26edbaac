"""The shell side of every command: arguments, --help, and errors as one line."""

from __future__ import annotations

import dis
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vtrain.config.keys import ConfigError, Entry, sections
from vtrain.config.reading import load_stages, recipes

REPORT_DELAY = 3.0  # seconds; torchrun looks at its workers every 0.1 s
_OPTIONS = """options:
  --cfg NAME|FILE   a TOML file, or a shipped recipe: {recipes}
  --dry-run         resolve the settings and the data, print the plan, do nothing
{more}  --help            this text
  key=value         set one key, after the file: optim.lr=1e-4, data.sources.0.weight=2, train.trainable=["head.*"]
"""
_STAGES = """
stages:
  A file may have [[stage]] tables, which are run one after the other. A stage has the keys of the file with those of
  its table in their place: tables are merged ([stage.optim]), lists replaced ([[stage.data.sources]]).
  stage.2.key=value sets a key of the second alone, key=value sets it for all.
"""


def run_command(
    cls: type,
    main: Callable[..., Any],
    argv: Sequence[str] | None = None,
    *,
    options: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """The shell side of a command: settings from `argv` (default: the process's), then `main(settings, dry_run=...)`.

    `main` of a command that has stages takes the settings of each, `main(first, second, ..., dry_run=...)`.
    options: {name: one line for --help} of further `--name VALUE`; those that are given go to `main` as strings.
    A mistake of the user's prints one `error: ...` line per problem and exits with 2: OSError, ConfigError and every
    ValueError that this project's code raises on purpose. Anything else keeps its traceback, and with
    VTRAIN_TRACEBACK=1 these do, too. Ctrl-C exits with 130.
    """
    try:
        arguments = sys.argv[1:] if argv is None else argv
        if {"--help", "-h"} & set(arguments):
            print(help_text(cls, main, options), end="")
            return
        given, dry_run, overrides = _parse_arguments(arguments, ("cfg", *options))
        cfg = given.pop("cfg", None)
        main(*load_stages(cls, cfg, overrides), dry_run=dry_run, **given)
    except (ValueError, OSError) as error:
        if os.environ.get("VTRAIN_TRACEBACK") == "1" or not _is_user_error(error):
            raise
        _report(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _parse_arguments(arguments: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], bool, list[str]]:
    """({name: value} of the options that are given, dry_run, overrides). `--cfg X` and `--cfg=X` are the same."""
    given: dict[str, str] = {}
    dry_run, overrides = False, []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument == "--dry-run":
            dry_run = True
        elif argument.startswith("--") and name in names:
            if name in given or not (equals or rest):
                raise ConfigError(f"--{name}: expected one {'file or recipe name' if name == 'cfg' else 'value'}")
            given[name] = value if equals else rest.pop(0)
        elif argument.startswith("-"):
            known = ", ".join(f"--{option}" for option in (*names, "dry-run", "help"))
            hint = f"; a key is set without dashes: {argument.lstrip('-')}" if equals else ""
            raise ConfigError(f"unknown option {argument}; expected {known} or key=value{hint}")
        else:
            overrides.append(argument)
    return given, dry_run, overrides


def _is_user_error(error: Exception) -> bool:
    """Whether an error tells about the user's input: raised by a `raise` of our own, not by a slip in our code."""
    if isinstance(error, OSError | ConfigError):
        return True
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    ours = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] in ("vtrain", "vkernels", "__main__")
    return ours and trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _report(error: Exception) -> None:
    """Print `error: ...`, under torchrun with the rank.

    A wrong setting is the same on all ranks: rank 0 tells it, and torchrun ends the others while they wait.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0" and isinstance(error, ConfigError):
        time.sleep(REPORT_DELAY)
    for line in str(error).splitlines() or [type(error).__name__]:
        print(f"error: {line}" if rank == "0" else f"error: rank {rank}: {line}", file=sys.stderr, flush=True)


def help_text(cls: type, main: Callable[..., Any], options: Mapping[str, str] = MappingProxyType({})) -> str:
    """What --help prints: usage, the command's own words, options, and every key with type, default and one line."""
    module = sys.modules[main.__module__]
    program = f"torchrun -m {module.__spec__.name}" if module.__spec__ else f"python {Path(module.__file__).name}"
    parts = [
        f"usage: {program} [--cfg NAME|FILE] [--dry-run] [key=value ...]",
        (module.__doc__ or "").strip(),
        (_OPTIONS + (_STAGES if hasattr(cls, "same_in_stages") else "")).format(
            recipes=", ".join(recipes()),
            more="".join(f"  {f'--{name} {name.upper()}':<17} {doc}\n" for name, doc in options.items()),
        ),
    ]
    for section in sections(cls):
        lines = [f"  {k.path} ({k.type}, {_default_words(k)})\n      {k.doc}" for k in section.keys]
        parts.append("\n".join([f"{section.header} {section.doc}".strip(), *lines]))
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _default_words(entry: Entry) -> str:
    return entry.default if entry.default == "required" else f"default {entry.default}"
