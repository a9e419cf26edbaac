"""The configuration machinery on a toy command, and the real settings of every command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtrain import config
from vtrain.config import REQUIRED, ConfigError, key
from vtrain.settings import COMMANDS
from vtrain.vocab import Vocabulary

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One leg of the toy."""

    length: float = key(REQUIRED, "in metres", above=0)
    label: str = key("", "what it is called")


@dataclass(frozen=True, kw_only=True)
class Body:
    """What the legs carry."""

    color: Literal["red", "green"] = key("red", "its color")
    size: int = key(3, "its size", min=1, max=9)
    spots: tuple[float, ...] = key((), "where its spots are", min=0)
    span: tuple[int, int] = key((1, 2), "from, to")
    tags: tuple[str, ...] = key(("a",), "its tags", choices=("a", "b"))
    hairy: bool | None = key(None, "none = undecided")
    alive: bool = key(True, "whether it lives")

    def __post_init__(self) -> None:
        if self.span[0] > self.span[1]:
            raise ConfigError(f"span is {self.span}; expected from <= to")


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A toy."""

    name: str = key(REQUIRED, "its name")
    body: Body
    legs: tuple[Leg, ...] = key((), "its legs")


def toy(tmp_path: Path, text: str, *overrides: str) -> Toy:
    path = tmp_path / "toy.toml"
    path.write_text(text)
    return config.load(Toy, path, overrides)


GOOD = 'name = "t"\n[body]\nspan = [2, 5]\n[[legs]]\nlength = 2\n[[legs]]\nlength = 1.5\nlabel = "left"\n'


def test_a_file_becomes_typed_values(tmp_path):
    found = toy(tmp_path, GOOD)
    assert found == Toy(name="t", body=Body(span=(2, 5)), legs=(Leg(length=2.0), Leg(length=1.5, label="left")))
    assert type(found.legs[0].length) is float
    with pytest.raises(AttributeError):
        found.body.size = 4


def test_overrides_win_over_the_file_and_make_tables(tmp_path):
    found = toy(
        tmp_path,
        GOOD,
        "name=5",  # a string needs no quotes
        "body.color=green",
        'body.tags=["b","a"]',
        "body.hairy=true",
        "body.spots=[1, 2.5]",
        "legs.0.length=9",
        "legs.2.length=1e-3",
        'legs.2.label="x = y"',
    )
    assert (found.name, found.body.color, found.body.tags, found.body.hairy) == ("5", "green", ("b", "a"), True)
    assert found.body.spots == (1.0, 2.5)
    assert [leg.length for leg in found.legs] == [9.0, 1.5, 1e-3]
    assert found.legs[2].label == "x = y"
    assert toy(tmp_path, GOOD + "", "body.hairy=true", "body.hairy=none").body.hairy is None
    assert config.load(Toy, None, ["name=a=b"]).name == "a=b"


def test_an_override_may_mend_a_value_of_the_file(tmp_path):
    assert toy(tmp_path, 'name = "t"\nbody.size = 99\n', "body.size=2").body.size == 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("body.sise = 3", "unknown key body.sise; did you mean body.size?"),
        ("size = 3", "unknown key size; did you mean body.size?"),
        ("qqq = 3", "unknown key qqq; expected one of name, body, legs"),
        ("body.size = 3.0", "body.size is 3.0; expected int >= 1 and <= 9"),
        ("body.size = true", "body.size is true; expected int >= 1 and <= 9"),
        ("body.size = 10", "body.size is 10; expected int >= 1 and <= 9"),
        ("body.size = 0", "body.size is 0; expected int >= 1 and <= 9"),
        (f"body.size = {10**400}", "expected int >= 1 and <= 9"),
        ("body.alive = 1", "body.alive is 1; expected true | false"),
        ("body.hairy = 'yes'", 'body.hairy is "yes"; expected true | false'),
        ("body.color = 'gren'", 'body.color is "gren"; expected "red" | "green" (did you mean green?)'),
        ("body.color = 1", 'body.color is 1; expected "red" | "green"'),
        ("body.color = 2024-01-01", "body.color is 2024-01-01; expected"),
        ("body.spots = 1.0", "body.spots is 1.0; expected list of float >= 0"),
        ("body.spots = [1, -1]", "body.spots.1 is -1.0; expected float >= 0"),
        ("body.spots = [nan]", "body.spots.0 is nan; expected float >= 0"),
        ("body.spots = [inf]", "body.spots.0 is inf; expected float >= 0"),
        (f"body.spots = [{10**400}]", "expected float >= 0"),
        ("body.spots = ['a']", 'body.spots.0 is "a"; expected float >= 0'),
        ("body.span = [1]", "body.span is [1]; expected list of 2 int"),
        ("body.span = [3, 1]", "body: span is (3, 1); expected from <= to"),
        ("body.tags = ['c']", 'body.tags.0 is "c"; expected "a" | "b"'),
        ("body = 3", "body is 3; expected a table of keys"),
        ("legs = [1]", "legs.0 is 1; expected a table of keys"),
        ("legs = {length = 1}", "expected list of tables"),
        ("legs = [{}]", "legs.0.length is missing; expected float > 0: in metres"),
        ("legs = [{length = true}]", "legs.0.length is true; expected float > 0"),
        ("legs = [{length = 0}]", "legs.0.length is 0.0; expected float > 0"),
        ("legs = [{length = 1, lenght = 2}]", "unknown key legs.0.lenght; did you mean legs.0.length?"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(tmp_path, line, expected):
    with pytest.raises(ConfigError) as error:
        toy(tmp_path, f"name = 't'\n{line}\n")
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/toy.toml: ")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("body.sise=3", "unknown key body.sise; did you mean body.size?"),
        ("legs.0.lenght=3", "unknown key legs.0.lenght; did you mean legs.0.length?"),
        ("body.size=big", 'body.size is "big"; expected int >= 1 and <= 9'),
        ("body.size=1\n[x]", "expected int >= 1 and <= 9"),
        ("body.alive=True", 'body.alive is "True"; expected true | false'),
        ("body.color=gren", "did you mean green?"),
        ("body.tags=[a]", 'expected list of "a" | "b", quoted: \'body.tags=[...]\''),
        ("body.span=[1, 2, 3]", "expected list of 2 int"),
        ("body=3", "body is a section; set one of its keys: body.key=value"),
        ("legs.length=3", "legs is a list; write legs.0.length"),
        ("legs.3.length=3", "legs has 2 entries"),
        ("body.size.x=3", "body.size is int >= 1 and <= 9; it has no keys inside"),
        ("name=", 'name is ""; expected non-empty str'),
        ("body.size", "expected section.key=value"),
        ("=3", "expected section.key=value"),
    ],
)
def test_what_is_wrong_in_an_override_is_one_line(tmp_path, override, expected):
    with pytest.raises(ConfigError) as error:
        toy(tmp_path, GOOD, override)
    message = str(error.value)
    assert message.startswith(f"override {override}: ")
    assert expected in message
    assert message.count("\n") == override.count("\n")


def test_an_override_into_a_broken_file_blames_the_file_value(tmp_path):
    for line in ("body = 3", "body = []"):
        with pytest.raises(ConfigError, match=r"body is (3|\[\]); expected a table of keys"):
            toy(tmp_path, line, "body.size=2")


def test_all_problems_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        toy(tmp_path, "body.size = 0\nbody.colour = 'red'\n")
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert any("did you mean body.color?" in line for line in lines)
    assert any("name is missing; expected non-empty str: its name" in line for line in lines)


def test_a_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "marked.toml").write_text(GOOD.replace("\n", "\r\n"), encoding="utf-8-sig")
    assert config.load(Toy, tmp_path / "marked.toml") == toy(tmp_path, GOOD)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"toy\.toml: not valid TOML: .*line 2"):
        toy(tmp_path, "a = 1\nb = = 2\n")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"\n')
    with pytest.raises(ConfigError, match=r"latin\.toml: not valid TOML"):
        config.load(Toy, tmp_path / "latin.toml")
    with pytest.raises(ConfigError, match=r"^quickstart/a: no such file or recipe \(did you mean quickstart/ar\?\)"):
        config.load(Toy, "quickstart/a")
    with pytest.raises(ConfigError, match=r"shipped recipes: .*quickstart/vq"):
        config.load(Toy, "quickstart/ar.toml")


texts = st.text(max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
lengths = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
legs = st.builds(Leg, length=lengths, label=texts)
bodies = st.builds(
    Body,
    color=st.sampled_from(["red", "green"]),
    size=st.integers(1, 9),
    spots=st.lists(st.floats(min_value=0, allow_infinity=False), max_size=3).map(tuple),
    span=st.tuples(st.integers(max_value=0), st.integers(min_value=0)),
    tags=st.lists(st.sampled_from("ab"), max_size=3).map(tuple),
    hairy=st.none() | st.booleans(),
    alive=st.booleans(),
)


@given(st.builds(Toy, name=st.text(min_size=1, max_size=8), body=bodies, legs=st.lists(legs, max_size=3).map(tuple)))
def test_dump_is_toml_that_loads_to_the_same(settings):
    assert config.build(Toy, tomllib.loads(config.dump(settings))) == settings


def test_dump_through_a_file(tmp_path):
    settings = toy(tmp_path, GOOD, 'name=\x7f \\ " \t \U0001f600 é')
    assert toy(tmp_path, config.dump(settings)) == settings


def shell(main, *argv: str, cls: type = Toy) -> int:
    """The exit code of a command that is called with `argv`."""
    try:
        config.run_command(cls, main, argv)
    except SystemExit as end:
        return end.code
    return 0


def test_run_command_hands_over_settings_and_dry_run(tmp_path):
    calls = []
    (tmp_path / "toy.toml").write_text(GOOD)

    def main(settings, dry_run):
        calls.append((settings, dry_run))

    cfg = str(tmp_path / "toy.toml")
    assert shell(main, "--cfg", cfg, "body.size=4") == 0
    assert shell(main, "name=x", f"--cfg={cfg}", "--dry-run") == 0
    assert calls[0] == (toy(tmp_path, GOOD, "body.size=4"), False)
    assert calls[1] == (toy(tmp_path, GOOD, "name=x"), True)


@dataclass(frozen=True, kw_only=True)
class Staged(Toy):
    """A toy that grows in stages."""

    same_in_stages = ("name", "body.color", "legs")


STAGES = """
name = "t"
[body]
size = 1
spots = [1, 2]
[[legs]]
length = 2
[[stage]]
[[stage]]
body.size = 5
body.spots = [3]
[[stage]]
[stage.body]
hairy = true
span = [0, 9]
"""


def staged(tmp_path: Path, text: str, *overrides: str) -> list[Staged]:
    path = tmp_path / "staged.toml"
    path.write_text(text)
    return config.load_stages(Staged, path, overrides)


def test_a_stage_has_the_files_keys_and_its_own(tmp_path):
    first, second, third = (stage.body for stage in staged(tmp_path, STAGES))
    assert (first.size, first.spots, first.hairy, first.span) == (1, (1.0, 2.0), None, (1, 2))
    assert (second.size, second.spots, second.hairy) == (5, (3.0,), None)
    assert (third.size, third.spots, third.hairy, third.span) == (1, (1.0, 2.0), True, (0, 9))
    assert staged(tmp_path, GOOD) == [config.load(Staged, tmp_path / "staged.toml")]
    staged(tmp_path, STAGES)
    with pytest.raises(ConfigError, match=r"staged.toml: has 3 \[\[stage\]\] tables; expected one set of keys"):
        config.load(Staged, tmp_path / "staged.toml")


def test_overrides_hold_for_all_stages_or_for_one(tmp_path):
    overrides = ("stage.2.body.size=7", "body.size=6", "legs.0.label=x", "stage.3.body.hairy=none")
    found = staged(tmp_path, STAGES, *overrides)
    assert [stage.body.size for stage in found] == [6, 7, 6]
    assert {stage.legs[0].label for stage in found} == {"x"}
    assert {stage.body.hairy for stage in found} == {None}


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (STAGES, ["stage.4.body.size=1"], "override stage.4.body.size=1: the file has 3 [[stage]] tables"),
        (GOOD, ["stage.1.body.size=1"], "override stage.1.body.size=1: the file has 0 [[stage]] tables"),
        (STAGES, ["stage.0.body.size=1"], "override stage.0.body.size=1: expected stage.N.section.key=value, N from 1"),
        (STAGES, ["stage.body.size=1"], "override stage.body.size=1: expected stage.N.section.key=value"),
        (STAGES, ["stage.2.body.sizes=1"], "stage.2.body.sizes=1: unknown key body.sizes; did you mean body.size?"),
        (STAGES + "size = 10", [], "staged.toml: stage 3: body.size is 10; expected int >= 1 and <= 9"),
        (STAGES + "sice = 1", [], "staged.toml: stage 3: unknown key body.sice; did you mean body.size?"),
        (STAGES, ["stage.2.body.span=[3, 1]"], "staged.toml: stage 2: body: span is (3, 1)"),
        (STAGES + 'color = "green"', [], 'stage 3: body.color is "green"; expected "red" as in stage 1'),
        (STAGES, ["stage.2.name=u"], 'staged.toml: stage 2: name is "u"; expected "t" as in stage 1'),
        (STAGES, ["stage.2.legs.0.length=3"], "stage 2: legs is "),
        ('stage = 3\nname = "t"', [], "staged.toml: stage is 3; expected [[stage]] tables"),
        ('stage = [1]\nname = "t"', [], "staged.toml: stage is [1]; expected [[stage]] tables"),
    ],
)
def test_mistakes_in_stages_name_the_stage(tmp_path, text, overrides, expected):
    with pytest.raises(ConfigError) as error:
        staged(tmp_path, text, *overrides)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_command_without_stages_refuses_them(tmp_path):
    with pytest.raises(ConfigError, match=r"toy.toml: \[\[stage\]\]: this command has no stages"):
        toy(tmp_path, STAGES)
    with pytest.raises(ConfigError, match=r"override stage.1.name=x: unknown key stage"):
        toy(tmp_path, GOOD, "stage.1.name=x")


def test_all_stages_dump_to_what_loads_to_the_same(tmp_path):
    stages = staged(tmp_path, STAGES, "stage.1.body.hairy=false", "stage.3.body.spots=[]")
    assert staged(tmp_path, config.dump_stages(stages)) == stages
    assert config.dump_stages(stages[:1]) == config.dump(stages[0])
    assert "size" not in config.dump_stages([stages[0], stages[0]]).partition("[[stage]]")[2]


def test_main_takes_the_settings_of_each_stage(tmp_path, capsys):
    calls = []

    def main(*stages, dry_run):
        calls.append([stage.body.size for stage in stages])

    (tmp_path / "staged.toml").write_text(STAGES)
    config.run_command(Staged, main, ["--cfg", str(tmp_path / "staged.toml"), "stage.3.body.size=2"])
    assert calls == [[1, 5, 2]]
    config.run_command(Staged, main, ["--help"])
    assert "[[stage]] tables" in capsys.readouterr().out
    config.run_command(Toy, main, ["--help"])
    assert "[[stage]]" not in capsys.readouterr().out


def test_further_options_are_handed_over_where_they_are_given(capsys):
    calls, options = [], {"part": "which part is done"}

    def main(settings, dry_run, part="all"):
        calls.append((settings.name, part))

    for argv in (["name=x"], ["--part", "2", "name=x"], ["name=x", "--part=a=b"]):
        config.run_command(Toy, main, argv, options=options)
    assert calls == [("x", "all"), ("x", "2"), ("x", "a=b")]
    for argv, expected in (
        (["name=x", "--part"], "--part: expected one value"),
        (["--part=1", "--part=2"], "--part: expected one value"),
        (["-part=1"], "unknown option -part=1; expected --cfg, --part, --dry-run, --help or key=value"),
    ):
        with pytest.raises(SystemExit):
            config.run_command(Toy, main, argv, options=options)
        assert expected in capsys.readouterr().err
    config.run_command(Toy, main, ["--help"], options=options)
    assert "\n  --part PART       which part is done\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--body.size=3"], "unknown option --body.size=3; expected --cfg, --dry-run, --help or key=value; "
         "a key is set without dashes: body.size=3"),
        (["--dryrun"], "unknown option --dryrun"),
        (["--cfg"], "--cfg: expected one file or recipe name"),
        (["--cfg", "a", "--cfg", "b"], "--cfg: expected one file or recipe name"),
        (["name=x", "body.sise=3"], "did you mean body.size?"),
    ],
)  # fmt: skip
def test_mistakes_in_the_shell(capsys, argv, expected):
    assert shell(lambda settings, dry_run: None, *argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert expected in err
    assert err.count("\n") == 1


def raise_user_error(settings, dry_run):
    Vocabulary.of(text=0)


def raise_missing_file(settings, dry_run):
    Path("no such file").read_bytes()


def slip(settings, dry_run):
    Vocabulary.from_json([["text", 1, 2]])  # a ValueError of Python's, in our code


def test_user_errors_exit_with_2_and_slips_keep_their_traceback(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert shell(raise_user_error, "name=x") == 2
    assert shell(raise_missing_file, "name=x") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: vocabulary range 'text'")
    assert "no such file" in lines[1]
    with pytest.raises(ValueError, match="too many values to unpack"):
        shell(slip, "name=x")
    with pytest.raises(ValueError, match="zero-size"):
        shell(lambda settings, dry_run: np.zeros(0).max(), "name=x")
    monkeypatch.setenv("VTRAIN_TRACEBACK", "1")
    with pytest.raises(ValueError, match="vocabulary range"):
        shell(raise_user_error, "name=x")


def test_ctrl_c_exits_with_130():
    def main(settings, dry_run):
        raise KeyboardInterrupt

    assert shell(main, "name=x") == 130


def test_ranks_tell_a_wrong_setting_once_but_never_swallow_an_error(capsys, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "0")
    assert shell(slip, "nam=x") == 2
    assert waits == []
    monkeypatch.setenv("RANK", "3")
    assert shell(slip, "name=") == 2
    assert waits == [config.REPORT_DELAY]  # torchrun ends this rank meanwhile: rank 0 has told the same
    assert shell(raise_user_error, "name=x") == 2
    assert waits == [config.REPORT_DELAY]
    assert "error: rank 3: vocabulary range" in capsys.readouterr().err


TOY_COMMAND = '''
"""Words of the toy command."""
from test_config import Toy
from vtrain.config import run_command

def main(settings, dry_run):
    if settings.name == "refuse":
        raise ValueError(f"{settings.name}: cannot be done")
    print(settings.body.size, dry_run)

if __name__ == "__main__":
    run_command(Toy, main)
'''


def test_a_command_in_a_process(tmp_path):
    (tmp_path / "command.py").write_text(TOY_COMMAND)
    paths = [str(ROOT), str(ROOT / "tests")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*argv):
        done = subprocess.run(
            [sys.executable, "command.py", *argv], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    assert run("name=x", "body.size=7", "--dry-run") == (0, "7 True\n", "")
    typo = "error: override body.sizes=7: unknown key body.sizes; did you mean body.size?\n"
    assert run("name=x", "body.sizes=7") == (2, "", typo)
    assert run("name=refuse") == (2, "", "error: refuse: cannot be done\n")
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: python command.py [--cfg NAME|FILE]")
    assert "Words of the toy command." in out


@pytest.mark.parametrize("cls", [Toy, *COMMANDS.values()])
def test_help_shows_every_key_with_type_default_and_words(cls):
    text = config.help_text(cls, slip)
    entries = [entry for section in config.sections(cls) for entry in section.keys]
    assert len({entry.path for entry in entries}) == len(entries) >= 3
    for entry in entries:
        assert f"  {entry.path} ({entry.type}, " in text
        assert f"\n      {entry.doc}\n" in text
    assert "quickstart/ar" in text


def test_sections_lists_tables_and_lists_of_tables():
    found = {section.header: [k.path for k in section.keys] for section in config.sections(Toy)}
    assert found[""] == ["name", "legs"]
    assert found["[body]"][:2] == ["body.color", "body.size"]
    assert found["[[legs]]"] == ["legs.N.length", "legs.N.label"]


def settings_classes(cls: type) -> set[type]:
    """A settings class and all sections inside it."""
    inner = {cls}
    for kind in get_type_hints(cls).values():
        for part in (kind, *get_args(kind)):
            if is_dataclass(part):
                inner |= settings_classes(part)
    return inner


ENTRIES = [
    (command, entry)
    for command, cls in COMMANDS.items()
    for section in config.sections(cls)
    for entry in section.keys
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_typo_in_any_key_of_any_command_names_the_key(command):
    for _, entry in (pair for pair in ENTRIES if pair[0] == command):
        path = entry.path.replace(".N.", ".0.")
        section, _, name = path.rpartition(".")
        typo = f"{section}.{name[0]}{name}" if section else f"{name[0]}{name}"
        with pytest.raises(ConfigError, match=rf"unknown key {typo}; did you mean {path}\?"):
            config.load(COMMANDS[command], None, [f"{typo}=1"])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_defaults_of_all_keys_are_legal_and_documented(command):
    for _, entry in (pair for pair in ENTRIES if pair[0] == command):
        assert entry.doc
        assert "\n" not in entry.doc
        if entry.default in ("required", "none"):
            continue
        with pytest.raises(ConfigError) as error:  # nothing but required keys is missing
            config.load(COMMANDS[command], None, [f"{entry.path.replace('.N.', '.0.')}={entry.default}"])
        assert not str(error.value).startswith("override"), entry.path


def test_settings_classes_are_frozen_and_their_optional_keys_default_to_none():
    for cls in {inner for command in COMMANDS.values() for inner in settings_classes(command)}:
        assert cls.__dataclass_params__.frozen
        assert not cls.__doc__.startswith(f"{cls.__name__}("), f"{cls.__name__} has no words of its own"
        kinds = get_type_hints(cls)
        for f in fields(cls):  # TOML has no none: dump leaves the key out, so its default must be none
            if get_origin(kinds[f.name]) is not tuple and NoneType in get_args(kinds[f.name]):
                assert f.default is None


def required(cls: type) -> list[str]:
    """Overrides that give every required key of a command some value."""
    entries = [e for s in config.sections(cls) for e in s.keys]
    missing = [e.path.replace(".N.", ".0.") for e in entries if e.default == "required" and "tables" not in e.type]
    missing = [p for p in missing if not p.startswith("eval.sources.")]
    return [f"{path}=1" for path in missing] + {
        "pretrain": ["model.preset=digits"],
        "sample": ['prompts.texts=["a"]'],
    }.get(next(name for name, c in COMMANDS.items() if c is cls), [])


@pytest.mark.parametrize("command", COMMANDS)
def test_real_settings_dump_and_load(command):
    settings = config.load(COMMANDS[command], None, required(COMMANDS[command]))
    assert config.build(COMMANDS[command], tomllib.loads(config.dump(settings))) == settings


def test_a_required_list_must_not_be_empty():
    with pytest.raises(ConfigError, match=r"data.sources is \[\]; expected non-empty list of tables"):
        config.load(COMMANDS["pretrain"], None, ["data.sources=[]"])


@pytest.mark.parametrize(
    ("command", "overrides", "expected"),
    [
        ("pretrain", ["model.init=folder"], "model: set one of preset and init; both are set"),
        ("pretrain", ["model.preset="], "model: set one of preset and init"),
        ("pretrain", ["model.preset=", "model.init=f", "model.layers=3"], "model: layers: a model from init keeps"),
        ("pretrain", ["train.tokens_per_step=5000"], "expected a multiple of data.pack_tokens = 4096"),
        ("pretrain", ["optim.warmup=2"], "optim.warmup is 2; expected at most train.steps = 1"),
        ("pretrain", ["eval.every=1"], "eval: every is 1 and sources is empty"),
        ("pretrain", ["sample.every=1"], "sample: every is 1 and prompts is empty"),
        ("autoencoder", ["eval.every=1"], "eval: every is 1; expected records or images"),
        ("autoencoder", ["loss.l2=0"], "loss: l1 and l2 are both 0"),
        ("pretrain", ["data.sources.0.path=a/x", "data.sources.1.path=b/x"], "data: sources: 2 are called x"),
        ("pretrain", ["eval.sources.0.path=a/x", "eval.sources.1.path=b/", "eval.sources.1.name=x"], "2 are called x"),
        ("sample", ["prompts.file=x"], "prompts: set one of file and texts; both are set"),
    ],
)
def test_keys_that_contradict_each_other(command, overrides, expected):
    with pytest.raises(ConfigError) as error:
        config.load(COMMANDS[command], None, [*required(COMMANDS[command]), *overrides])
    assert str(error.value).startswith("settings: ")
    assert expected in str(error.value)


def test_the_reference_page_is_what_the_settings_say():
    script = ROOT / "scripts" / "config_reference.py"
    done = subprocess.run([sys.executable, script, "--check"], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
