"""Stages: what one takes over from the other, where a run goes on, and that a death between them changes nothing."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from crashes import leftovers, run_once, tree
from ranks import run_ranks
from safetensors.torch import load_file
from toys import pretrain_settings, write_dataset

from vtrain import config
from vtrain.models.decoder import Decoder
from vtrain.models.hf import export_hf, read_image_facts
from vtrain.models.presets import preset
from vtrain.pretrain import main
from vtrain.settings import Init, PretrainSettings
from vtrain.text import load_text_tokenizer, train_sentencepiece
from vtrain.train.stage import matched
from vtrain.vocab import Vocabulary

TIMES = ("step_s", "eta_s", "tokens_per_s", "data_wait", "memory_gb")  # differ from run to run
EXACT = ("step", "stage", "loss", "loss/text", "loss/visual", "lr", "grad_norm", "tokens", "padding")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The same kind of pictures at 16 and at 64 codes."""
    folder = tmp_path_factory.mktemp("data")
    image = {"resolution": 64, "downscale": 16}
    small = write_dataset(folder / "small", 60, side=4, image=image)
    return small, write_dataset(folder / "large", 40, side=8, seed=1, image=image | {"resolution": 128})


def stages(out: Path, *datasets: Path, steps=(6, 4), **changes):
    """Settings of one stage per dataset; `changes` are {"section": {key: value, or a tuple with one per stage}}."""
    found = []
    for number, (dataset, count) in enumerate(zip(datasets, steps)):
        tree = {"data": {"sources": [{"path": str(dataset)}], "pack_tokens": 128, "prefetch": 1}}
        tree |= {"train": {"steps": count, "tokens_per_step": 256}}
        tree |= {"optim": {"lr": 1e-2, "schedule": "constant", "warmup": 0}}
        for section, keys in changes.items():
            own = {key: value[number] if isinstance(value, tuple) else value for key, value in keys.items()}
            tree[section] = tree.get(section, {}) | own
        found.append(pretrain_settings(out, dataset, **tree))
    return found


def records(out: Path, kind: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if r["kind"] == kind]


def exact(out: Path, names=EXACT) -> list[dict]:
    return [{k: r.get(k) for k in names} for r in records(out)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_weights(mine: Path, theirs: Path) -> None:
    mine, theirs = weights(mine), weights(theirs)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


@pytest.fixture(scope="module")
def both(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("both") / "out"
    main(*stages(out, *data))
    return out


def test_a_stage_is_a_fresh_run_from_the_weights_of_the_one_before(data, both, tmp_path):
    """16 codes, then 64: the second stage is, bit for bit, a run of its own whose model is the first stage's."""
    assert [r["step"] for r in records(both)] == list(range(1, 11))
    assert [r["stage"] for r in records(both)] == [1] * 6 + [2] * 4
    assert [r["steps"] for r in records(both)] == [6] * 6 + [10] * 4
    alone = tmp_path / "alone"
    (second,) = stages(alone, data[1], steps=(4,))
    tree = tomllib.loads(config.dump(second)) | {"model": {"init": str(both / "stage-1")}}
    main(config.build(PretrainSettings, tree))
    names = ("loss", "loss/text", "loss/visual", "lr", "grad_norm", "padding")
    assert exact(alone, names) == exact(both, names)[6:]
    assert_equal_weights(alone / "final", both / "final")
    total = records(both)[-1]["tokens"]
    assert total == records(both)[5]["tokens"] + records(alone)[-1]["tokens"]
    for folder, step, side in (("stage-1", 6, 64), ("final", 10, 128)):
        assert json.loads((both / folder / "training.json").read_text()) == {"step": step, "trained_steps": step}
        assert read_image_facts(both / folder) == {"resolution": side, "downscale": 16}


@pytest.mark.slow
def test_averages_may_be_what_the_next_stage_takes_over(data, tmp_path):
    staged, alone = tmp_path / "staged", tmp_path / "alone"
    main(*stages(staged, *data, optim={"lr": 1e-2, "ema": (0.5, 0.9)}, init={"weights": ("raw", "ema")}))
    (second,) = stages(alone, data[1], steps=(4,), optim={"lr": 1e-2, "ema": 0.9})
    tree = tomllib.loads(config.dump(second)) | {"model": {"init": str(staged / "stage-1")}}
    main(config.build(PretrainSettings, tree))
    assert [r["loss"] for r in records(staged)][6:] == [r["loss"] for r in records(alone)]
    assert_equal_weights(alone / "final", staged / "final")  # the averages of the second stage begin with it


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kept_moments_and_cursors_make_two_stages_one_run(data, tmp_path, ranks):
    straight, kept, reset = tmp_path / "straight", tmp_path / "kept", tmp_path / "reset"
    run_ranks(ranks, main, *stages(straight, data[0], steps=(10,)))
    run_ranks(ranks, main, *stages(kept, data[0], data[0], init={"optimizer": True}))
    run_ranks(ranks, main, *stages(reset, data[0], data[0], init={"optimizer": False}))
    names = [name for name in EXACT if name != "stage"]
    assert exact(kept, names) == exact(straight, names)
    assert_equal_weights(kept / "final", straight / "final")
    assert exact(reset, names)[:7] == exact(straight, names)[:7]  # the seventh step meets the same weights
    assert exact(reset, names)[7:] != exact(straight, names)[7:]


def test_counts_that_were_apart_stay_so_in_later_stages(data, tmp_path):
    """The third stage keeps the moments of the second, in which the norms were new: the two are one."""
    two, three = tmp_path / "two", tmp_path / "three"
    new = {"optimizer": True, "new": ([], ["norm", "*ffn_norm"], [])}
    main(*stages(two, *[data[0]] * 2, steps=(2, 4), init=new))
    main(*stages(three, *[data[0]] * 3, steps=(2, 2, 2), init=new))
    assert_equal_weights(three / "final", two / "final")
    state = json.loads((three / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert len(state["stage"]["counted_apart"]["adamw"]) == 1


def test_sources_go_on_unless_they_are_told_to_begin_anew(data, tmp_path):
    drawn = {}
    for restart in (False, True):
        out = tmp_path / str(restart)
        main(*stages(out, data[0], data[0], steps=(1, 1), data={"restart": restart}, optim={"lr": 1e-30}))
        drawn[restart] = [r["loss"] for r in records(out)]  # the weights hardly move: the same samples, the same loss
    assert drawn[True][0] == pytest.approx(drawn[True][1], abs=1e-6)
    assert abs(drawn[False][0] - drawn[False][1]) > 1e-4


@pytest.mark.parametrize("alone", [False, True])
def test_what_cannot_follow_is_told_before_anything_is_trained(data, tmp_path, alone):
    """A later stage, begun alone, says the same of the checkpoint that it meets."""
    same_name = write_dataset(tmp_path / "other" / "small", 30, seed=5)
    grown = write_dataset(tmp_path / "grown", 30, side=4, seed=3, vocab=Vocabulary.of(text=30, visual=20))
    out, model = tmp_path / "out", {"preset": "digits", "layers": (2, 3), "hidden": 32, "heads": 2, "kv_heads": 2}
    other_size = (
        r"embed\.visual, which is not in init\.new, has 16 ids, expected 20; head\.visual, .* 16 ids, expected 20$"
    )
    if alone:
        main(*stages(out, *data, steps=(1, 1)), stage="1")
    begins, number = (rf"^{out}/checkpoints/step-00000001: ", "2") if alone else ("^stage 2: ", "")
    for dataset, changes, message in (
        (same_name, {}, r"loader state: .*source\.small\.uuid is .*data\.sources\.N\.name\), or data\.restart=true$"),
        (grown, {}, "the weights of the stage before: " + other_size),
        (data[1], {"model": model}, r"the weights of the stage before: missing layers\.2\.attn_norm, which is not in"),
        (data[1], {"init": {"new": ([], ["heads.*"])}}, r".*init\.new: 'heads\.\*' matches none of \d+ parameters$"),
        (data[1], {"init": {"weights": ("raw", "ema")}}, r".*init.weights is ema; the stage before has no averages"),
    ):
        with pytest.raises(ValueError, match=begins + message):
            main(*stages(out, data[0], dataset, steps=(1, 1), **changes), stage=number)
    with pytest.raises(ValueError, match=("" if alone else begins) + r"train\.trainable: 'heads\.\*' matches none of"):
        main(*stages(out, *data, steps=(1, 1), train={"trainable": (["*"], ["heads.*"])}), stage=number)
    assert out.exists() == alone
    assert not (out / "final").exists()


def test_sources_that_return_after_a_stage_are_those_that_left(data, tmp_path):
    """The third stage meets the cursor of a source that the first or the second one had."""
    same_name = write_dataset(tmp_path / "other" / "small", 30, seed=5)
    for before in (data, reversed(data)):
        with pytest.raises(config.ConfigError, match=r"^stage 3: loader state: .*source\.small\.uuid is"):
            main(*stages(tmp_path / "out", *before, same_name, steps=(1, 1, 1)))
    anew = {"restart": (False, False, True)}
    main(*stages(tmp_path / "out", *data, same_name, steps=(1, 1, 1), data=anew), dry_run=True)


def test_keys_of_later_stages_are_refused_where_there_is_none(data, tmp_path):
    for section, keys, names in (
        ("init", {"optimizer": True}, "init"),
        ("data", {"restart": True}, "data.restart"),
    ):
        with pytest.raises(config.ConfigError, match=rf"^{names}: for later stages; expected \[\[stage\]\] tables"):
            main(*stages(tmp_path / "out", data[0], **{section: keys}))


def test_schedules_warmups_and_the_best_evaluation_are_a_stages_own(data, tmp_path):
    out = tmp_path / "out"
    optim = {"lr": (1e-2, 1e-3), "schedule": "cosine", "warmup": (0, 2)}
    evaluation = {"sources": [{"path": str(data[1])}], "every": 2}
    main(*stages(out, *data, optim=optim, eval=evaluation, checkpoint={"keep": 1}))
    rates = [r["lr"] for r in records(out)]
    cosine = [0.5 + 0.5 * np.cos(np.pi * step / 6) for step in range(6)]
    np.testing.assert_allclose(rates[:6], np.multiply(cosine, 1e-2), rtol=1e-6)
    np.testing.assert_allclose(rates[6:8], [0.5e-3, 1e-3], rtol=1e-6)
    assert 0 < rates[9] < rates[8] <= 1e-3
    assert [r["best"] for r in records(out, "eval") if r["step"] == 8] == [True]
    kept = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert kept[-1] == "step-00000010"
    assert all(name > "step-00000006" for name in kept), "the checkpoints of the first stage make room"


def cfg(folder: Path, *datasets: Path, **changes) -> list[str]:
    """The arguments of a command that runs stages from a file."""
    path = folder / "stages.toml"
    path.write_text(
        config.dump_stages(stages(folder / "unset", *datasets, checkpoint={"every": 2, "keep": 1}, **changes))
    )
    return ["--cfg", str(path)]


def result(out: Path) -> dict:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    return {"metrics": metrics, "files": files, "stage-1": tree(out / "stage-1"), "final": tree(out / "final")}


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> tuple[list[str], dict, Path]:
    """(arguments, result, points passed) of two stages; the second has new norms and keeps the other moments."""
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = cfg(folder, *data, init={"optimizer": True, "new": ([], ["norm", "*ffn_norm"])})
    log = folder / "points"
    ended = run_once(
        "pretrain", [*arguments, f"run.out={folder / 'out'}"], folder / "log", VTRAIN_FAILPOINT_LOG=str(log)
    )
    assert ended.code == 0, ended.output
    return arguments, result(folder / "out"), log


FAULTS = (
    "rename:stage:kill",  # the model of the first stage is whole, but has no name yet
    "write:metrics.jsonl#6:stop",  # asked to stop in the last step of the first stage
    pytest.param("renamed:stage:kill", marks=pytest.mark.slow),  # between the stages
    pytest.param("write:metrics.jsonl#8:kill", marks=pytest.mark.slow),  # in the first steps of the second one
    "renamed:step#4:kill",  # after its first checkpoint, with that of the first stage beside it: some counts are apart
    pytest.param("write:config.json#2:full", marks=pytest.mark.slow),  # at its export
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_death_in_or_between_stages_changes_nothing(undisturbed, tmp_path, fault):
    arguments, expected, log = undisturbed
    point, _, number = fault.rpartition(":")[0].partition("#")
    assert log.read_text().splitlines().count(point) >= int(number or 1)
    out = tmp_path / "out"
    command = [*arguments, f"run.out={out}"]
    ended = run_once("pretrain", command, tmp_path / "first", VTRAIN_FAILPOINT=fault)
    assert ended.code == {"kill": -9, "full": 2, "stop": 0}[fault.rpartition(":")[2]], ended.output
    if fault.endswith("stop"):
        assert (out / "stage-1").is_dir()
        assert len(records(out)) == 6, "no other stage began"
    again = run_once("pretrain", command, tmp_path / "second")
    assert again.code == 0, again.output
    assert result(out) == expected
    assert leftovers(out) == []


@pytest.mark.slow
def test_a_death_at_every_rename_changes_nothing(undisturbed, tmp_path):
    """In the second stage where it is passed in both; the operations between them are those of any run."""
    arguments, expected, log = undisturbed
    passed = [point for point in log.read_text().splitlines() if point.startswith("rename:")]
    for point in sorted(set(passed)):
        out = tmp_path / point.replace(":", "-") / "out"
        command, fault = [*arguments, f"run.out={out}"], f"{point}#{passed.count(point) * 2 // 3 + 1}:kill"
        assert run_once("pretrain", command, tmp_path / "first", VTRAIN_FAILPOINT=fault).code == -9, fault
        again = run_once("pretrain", command, tmp_path / "second")
        assert again.code == 0, f"{fault}: {again.output}"
        assert result(out) == expected, fault
        assert leftovers(out) == [], fault


def test_a_chosen_stage_on_other_ranks(data, both, tmp_path):
    out = tmp_path / "out"
    settings = stages(out, *data)
    with pytest.raises(ValueError, match=r"^stage 2 of 2: stage 1 of 2 is not complete in .*expected its 6 steps and"):
        main(*settings, stage="2")
    run_ranks(2, chosen_stage, settings, "1")
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["checkpoints", "stage-1"]
    run_ranks(3, chosen_stage, settings, "2")
    names = ("loss", "loss/text", "loss/visual", "grad_norm")
    mine, theirs = ([[r[n] for n in names] for r in records(folder)] for folder in (out, both))
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    assert [r["tokens"] for r in records(out)] == [r["tokens"] for r in records(both)]


def chosen_stage(settings, number: str) -> None:
    main(*settings, stage=number)


def test_what_is_done_is_left_alone(data, both, capsys):
    before = tree(both)
    settings = stages(both, *data)
    main(*settings)
    assert "already trained to step 10" in capsys.readouterr().out
    main(*settings, stage="2")
    main(*settings, stage="1")
    assert "stage 1 of 2 is already trained; nothing to do" in capsys.readouterr().out
    assert tree(both) == before
    for number in ("0", "3", "x", "-1"):
        with pytest.raises(config.ConfigError, match=rf"--stage {number}: expected a number from 1 to 2"):
            main(*settings, stage=number)
    with pytest.raises(ValueError, match=r"^stage 2 of 2: checkpoint.resume is never; expected auto, or the path"):
        main(*stages(both, *data, checkpoint={"resume": "never"}), stage="2")


@pytest.mark.slow
def test_a_stage_in_the_middle_of_which_a_run_stopped_goes_on(data, both, tmp_path):
    """Also a later one whose own checkpoint is the only one there is, and from a checkpoint in another folder."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    keep = {"every": 2, "keep": 0}
    main(*stages(out, *data, checkpoint=keep))
    for name in ("checkpoints/step-00000010", "final"):
        shutil.rmtree(out / name)
    for step in (2, 4, 6):
        shutil.rmtree(out / "checkpoints" / f"step-{step:08d}")
    main(*stages(out, *data, checkpoint=keep))
    assert exact(out) == exact(both)
    assert_equal_weights(out / "final", both / "final")

    source = tmp_path / "source"
    main(*stages(source, *data, checkpoint=keep))
    path = source / "checkpoints" / "step-00000006"
    main(*stages(elsewhere, *data, checkpoint=keep | {"resume": str(path)}))
    assert [r["step"] for r in records(elsewhere)] == [7, 8, 9, 10]
    assert_equal_weights(elsewhere / "final", both / "final")
    early = source / "checkpoints" / "step-00000004"
    main(*stages(tmp_path / "early", *data, checkpoint=keep | {"resume": str(early)}))  # it is for the first stage only
    assert_equal_weights(tmp_path / "early" / "final", both / "final")
    with pytest.raises(ValueError, match="resume is never"):
        main(*stages(elsewhere, *data, checkpoint=keep | {"resume": "never"}))


def test_a_run_of_one_part_may_get_a_second_one(data, both, tmp_path):
    """Its checkpoint knows nothing of stages."""
    out = tmp_path / "out"
    main(*stages(out, data[0]))
    assert "stage" not in json.loads((out / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert "stage" not in records(out)[0]
    main(*stages(out, *data))
    assert exact(out)[6:] == exact(both)[6:]
    assert_equal_weights(out / "final", both / "final")


def test_other_steps_of_an_earlier_stage_are_refused(data, tmp_path):
    out = tmp_path / "out"
    main(*stages(out, *data))
    with pytest.raises(ValueError, match=r"is of stage 2, which began at step 6; expected stage 2, .* at step 5"):
        main(*stages(out, *data, steps=(5, 4)))
    with pytest.raises(ValueError, match=r"is at step 10, past train.steps = 9 of stages 1..2 together"):
        main(*stages(out, *data, steps=(6, 3)))
    with pytest.raises(ValueError, match=r"is of stage 2; expected at most 1|is of stage 2, which began at step 6"):
        main(*stages(out, data[0]))
    with pytest.raises(config.ConfigError, match=r"stage 1: checkpoint.trainable_only is true; expected false"):
        main(*stages(tmp_path / "new", *data, checkpoint={"trainable_only": True}))


def test_the_end_of_the_data_in_a_later_stage(data, tmp_path):
    once = ([{"path": str(data[0])}], [{"path": str(data[1]), "max_epochs": 1}])
    with pytest.raises(ValueError, match=r"after step (\d+), which is saved: .*max_epochs; stage\.2\.train\.steps=\d+"):
        main(*stages(tmp_path / "out", *data, steps=(2, 500), data={"sources": once}))


SHAPES = {"root.model.norm": (8,), "root.model.head.text": (128, 8), "root.model.layers.0.out": (8, 8)}


def test_weights_are_taken_over_strictly():
    def match(wanted, held, **init):
        return matched(wanted, held, Init(**init))

    assert match(SHAPES, SHAPES) == {name: name for name in SHAPES}
    averages = {"ema.model.norm": (8,)}
    assert match(SHAPES, SHAPES | averages, weights="ema")["root.model.norm"] == "ema.model.norm"
    assert match(SHAPES, SHAPES | averages, weights="ema")["root.model.head.text"] == "root.model.head.text"
    more = SHAPES | {"root.model.layers.1.out": (8, 8)}
    assert match(more, SHAPES, new=("layers.1.*",)) == {name: name for name in SHAPES}
    assert match(SHAPES, more, drop=("layers.1.*",)) == {name: name for name in SHAPES}
    wider = SHAPES | {"root.model.norm": (9,)}
    assert "root.model.norm" not in match(wider, SHAPES, new=("norm",))
    for wanted, held, init, message in (
        (
            more,
            SHAPES,
            {},
            r"^the weights of the stage before: missing layers\.1\.out, which is not in init\.new$",
        ),
        (SHAPES, more, {}, r"unexpected layers\.1\.out, which is not in init\.drop"),
        (wider, SHAPES, {}, r"norm, which is not in init\.new, is \[8\], expected \[9\]$"),
        (SHAPES, SHAPES, {"drop": ("norm",)}, r"missing norm, which is not in init\.new"),
        (SHAPES, SHAPES, {"new": ("lm_head*",)}, r"init\.new: 'lm_head\*' matches none of 3 parameters"),
        (SHAPES, SHAPES, {"drop": ("x", "y")}, r"init\.drop: 'x' matches none of 3.*init\.drop: 'y' matches none"),
    ):
        with pytest.raises(ValueError, match=message):
            match(wanted, held, **init)


def test_a_range_of_another_size_begins_anew(data, tmp_path):
    """Both tables have 128 rows in storage: padding must not pass for trained rows."""
    grown = write_dataset(tmp_path / "grown", 30, side=4, seed=3, vocab=Vocabulary.of(text=30, visual=20))
    main(*stages(tmp_path / "out", data[0], grown, steps=(1, 1), init={"new": ([], ["*.visual"])}, optim={"lr": 1e-30}))
    before, after = (weights(tmp_path / "out" / name) for name in ("stage-1", "final"))
    assert torch.allclose(after["model.embed_tokens.weight"][:30], before["model.embed_tokens.weight"][:30])
    assert after["model.embed_tokens.weight"].shape == (50, 32)
    assert float(after["model.embed_tokens.weight"][30:].std()) > 0.01


@pytest.mark.parametrize("rows", ["padding", "codes"])
def test_what_a_model_from_elsewhere_has_not_begins_as_the_mean(tmp_path, capsys, rows):
    """It has padding where the dataset's tokenizer has its specials, or just the rows of the whole vocabulary."""
    specials = ("<|t2i|>", "<|i2t|>", "<|soi|>")
    train_sentencepiece(["a red square", "the second one, blue", "three"], 20, tmp_path / "text.model")
    tokenizer = load_text_tokenizer(tmp_path / "text.model", specials)
    used = tokenizer.vocab_size - len(specials)
    vocab = Vocabulary.of(text=tokenizer.vocab_size, visual=16)
    grown = write_dataset(tmp_path / "grown", 20, side=4, vocab=vocab)
    tokenizer.save(grown / "text_tokenizer")
    shape = preset("digits", layers=1, hidden=16, heads=2, kv_heads=2, ffn=24)
    old = Decoder(shape, Vocabulary.of(text=used + 10 if rows == "padding" else vocab.size))
    old.init_weights(1)
    export_hf(old.named_parameters(), shape, old.vocab, tmp_path / "init")
    (tmp_path / "init" / "vocabulary.json").unlink()
    (settings,) = stages(tmp_path / "out", grown, steps=(1,), optim={"lr": 1e-30})
    tree = tomllib.loads(config.dump(settings)) | {"model": {"init": str(tmp_path / "init")}}
    main(config.build(PretrainSettings, tree))
    found, before = weights(tmp_path / "out" / "final")["model.embed_tokens.weight"], old.embed.text.detach()
    said = f"weights from {tmp_path / 'init'}"
    if rows == "codes":
        torch.testing.assert_close(found, before[: vocab.size])
        assert f"{said}\n" in capsys.readouterr().out
        return
    torch.testing.assert_close(found[:used], before[:used])
    torch.testing.assert_close(found[used:], before[:used].mean(0).expand(len(specials) + 16, -1))
    new = len(specials) + 16
    assert f"{said}, rows 0..{used - 1} of {used + 10}; their mean for the other {new} ids" in capsys.readouterr().out


@pytest.mark.parametrize("dry_run", [False, True])
def test_first_weights_of_another_vocabulary_are_refused(data, tmp_path, dry_run):
    """Two datasets whose tokenizers have other specials; a dry run tells it as well."""
    (settings,) = stages(tmp_path / "out", data[0], steps=(1,))
    main(settings)
    grown = write_dataset(tmp_path / "grown", 20, side=4, vocab=Vocabulary.of(text=31, visual=16))
    (settings,) = stages(tmp_path / "next", grown, steps=(1,))
    tree = tomllib.loads(config.dump(settings)) | {"model": {"init": str(tmp_path / "out" / "final")}}
    with pytest.raises(ValueError, match=r"vocabulary.json: another vocabulary than the data's: text 30, expected 31"):
        main(config.build(PretrainSettings, tree), dry_run=dry_run)


def test_dry_run_shows_every_stage(data, tmp_path, capsys):
    main(*stages(tmp_path / "out", *data), dry_run=True)
    shown = capsys.readouterr().out
    assert "stage 1 of 2, from step 0" in shown
    assert "stage 2 of 2, from step 6" in shown
    assert not (tmp_path / "out").exists()


def test_the_configuration_of_all_stages_is_kept(data, both):
    for path in (both / "config.toml", both / "checkpoints" / "step-00000010" / "config.toml"):
        assert config.load_stages(PretrainSettings, path) == stages(both, *data)
