"""The pretraining job end to end on toy data: ranks, packing, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from toys import VOCAB, pretrain_settings, write_dataset

from vtrain.batch import Document, PackedBatch
from vtrain.data import BlockOrder, Dataset, LanguageModel
from vtrain.data.manifest import publish
from vtrain.models.decoder import Decoder, DecoderConfig
from vtrain.objectives.next_token import NextToken
from vtrain.pretrain import main
from vtrain.train import checkpoint
from vtrain.train.tasks.pretrain import Plan
from vtrain.vocab import Vocabulary


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_dataset(folder / "train", 100), write_dataset(folder / "valid", 30, seed=1)


def records(out: Path, kind: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if r["kind"] == kind]


EXACT = ("step", "loss", "loss/text", "loss/visual", "lr", "grad_norm", "tokens", "padding")


def exact(out: Path) -> list[dict]:
    return [{k: r[k] for k in EXACT} for r in records(out)]


@pytest.fixture(scope="module")
def one_rank(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    run_ranks(1, main, pretrain_settings(out, *data, train={"steps": 20, "tokens_per_step": 256}))
    return out


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_agree_with_one(data, one_rank, tmp_path, ranks):
    out = tmp_path / "out"
    run_ranks(ranks, main, pretrain_settings(out, *data, train={"steps": 20, "tokens_per_step": 256}))
    mine, one = records(out), records(one_rank)
    assert len(mine) == len(one) == 20
    for name in ("loss", "loss/text", "loss/visual", "grad_norm"):
        np.testing.assert_allclose([r[name] for r in mine], [r[name] for r in one], rtol=1e-5, atol=1e-5)
    assert [r["tokens"] for r in mine] == [r["tokens"] for r in one]
    for mine_eval, one_eval in zip(records(out, "eval"), records(one_rank, "eval")):
        assert mine_eval["eval/valid/loss"] == pytest.approx(one_eval["eval/valid/loss"], abs=1e-5)
    assert one[-1]["loss"] < one[0]["loss"] - 0.5


def test_metrics_and_files(one_rank, data):
    assert {"config.toml", "metrics.jsonl", "loss.png", "checkpoints", "final"} <= {p.name for p in one_rank.iterdir()}
    assert {"config.json", "model.safetensors", "vocabulary.json"} <= {p.name for p in (one_rank / "final").iterdir()}
    plan = Plan(pretrain_settings(one_rank, *data, train={"steps": 20, "tokens_per_step": 256}))
    for r, step in zip(records(one_rank), plan.loader()):  # the mean over tokens: the ranges weigh by their labels
        text, visual = (sum(b.counts[name] for b in step.batches) for name in ("text", "visual"))
        mean = (text * r["loss/text"] + visual * r["loss/visual"]) / (text + visual)
        assert r["loss"] == pytest.approx(mean, rel=1e-6)
    best = min(records(one_rank, "eval"), key=lambda r: r["eval/valid/loss"])
    assert (one_rank / "checkpoints" / f"step-{best['step']:08d}").is_dir()


def test_resume_is_bitwise_on_cpu(data, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    changes = {"checkpoint": {"every": 2, "keep": 0}}
    run_ranks(2, main, pretrain_settings(straight, *data, **changes))
    run_ranks(2, main, pretrain_settings(resumed, *data, **changes))
    for step in (4, 6):  # as after a crash behind step 2: later checkpoints and the result never came to be
        shutil.rmtree(resumed / "checkpoints" / f"step-{step:08d}")
    shutil.rmtree(resumed / "checkpoints" / "step-00000003", ignore_errors=True)
    shutil.rmtree(resumed / "final")
    run_ranks(2, main, pretrain_settings(resumed, *data, **changes))
    assert exact(resumed) == exact(straight)
    assert [r["step"] for r in records(resumed)] == [1, 2, 3, 4, 5, 6]
    mine, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (resumed, straight))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_resume_on_other_ranks(data, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    main(pretrain_settings(straight, *data))
    run_ranks(3, main, pretrain_settings(resumed, *data, checkpoint={"every": 3, "best": False}))
    shutil.rmtree(resumed / "checkpoints" / "step-00000006")
    shutil.rmtree(resumed / "final")
    run_ranks(2, main, pretrain_settings(resumed, *data, checkpoint={"every": 3, "best": False}))
    np.testing.assert_allclose([r["loss"] for r in records(resumed)], [r["loss"] for r in records(straight)], rtol=1e-5)


DIVERGING = {"lr": 2.0, "warmup": 6, "schedule": "constant", "grad_clip": 0}  # the best evaluation is not the last


def training(out: Path) -> dict:
    return json.loads((out / "final" / "training.json").read_text())


def test_without_best_checkpoints_the_last_weights_are_exported(data, tmp_path):
    out = tmp_path / "out"
    main(pretrain_settings(out, *data, optim=DIVERGING, checkpoint={"best": False}))
    assert [r["best"] for r in records(out, "eval")] == [True, False]
    assert training(out) == {"step": 6, "trained_steps": 6}


def test_a_best_checkpoint_that_is_gone_is_forgotten(data, tmp_path, capsys):
    """It stays in the folder that the run left, or newer best ones that were moved away had it deleted."""
    first, second = tmp_path / "first", tmp_path / "second"
    main(pretrain_settings(first, *data, optim=DIVERGING, checkpoint={"every": 2, "keep": 0}))
    assert training(first)["step"] == 3
    source = {"resume": str(first / "checkpoints" / "step-00000004"), "every": 2}
    main(pretrain_settings(second, *data, optim=DIVERGING, checkpoint=source))
    assert f"the best checkpoint so far, step 3, is not in {second / 'checkpoints'}" in capsys.readouterr().out
    assert training(second) == {"step": 6, "trained_steps": 6}


def test_a_resume_reads_the_files_to_check_them_once(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    main(pretrain_settings(out, *data, checkpoint={"export": "last"}))
    shutil.rmtree(out / "final")
    checked = []
    monkeypatch.setattr(checkpoint, "check_manifest", checked.append)
    main(pretrain_settings(out, *data, checkpoint={"export": "last"}))
    assert checked == [out / "checkpoints" / "step-00000006"]


def test_finished_run_is_left_alone(one_rank, data, capsys):
    before = (one_rank / "metrics.jsonl").read_bytes()
    main(pretrain_settings(one_rank, *data, train={"steps": 20, "tokens_per_step": 256}))
    assert "already trained to step 20" in capsys.readouterr().out
    assert (one_rank / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"preset": "digits", "layers": 1, "hidden": 32, "heads": 2, "kv_heads": 2, "ffn": 48}},
            r"'layers': 2.*this run.*'layers': 1",
        ),
        ({"checkpoint": {"resume": "never"}}, "resume is never"),
        ({"checkpoint": {"resume": "/nowhere/step-1"}}, "/nowhere/step-1: no such checkpoint"),
        ({"train": {"steps": 5, "tokens_per_step": 256}}, "at step 20, past train.steps = 5"),
        ({"train": {"steps": 20, "tokens_per_step": 128}}, "step-00000020: .*bins_per_step"),
    ],
)
def test_refuses_another_run(one_rank, data, changes, message):
    with pytest.raises(ValueError, match=message):
        main(pretrain_settings(one_rank, *data, **{"train": {"steps": 20, "tokens_per_step": 256}, **changes}))


def test_refuses_a_damaged_checkpoint(data, tmp_path):
    out = tmp_path / "out"
    main(pretrain_settings(out, *data))
    path = out / "checkpoints" / "step-00000006" / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rank-00000.safetensors: found .*crc32c.*the manifest says"):
        main(pretrain_settings(out, *data, train={"steps": 8, "tokens_per_step": 256}))


@pytest.mark.parametrize(
    ("schema", "differs"),
    [({"vocab": Vocabulary.of(text=30, visual=18)}, "vocab"), ({"text_tokenizer": "abc"}, "text tokenizer")],
)
def test_refuses_sources_that_differ(data, tmp_path, schema, differs):
    other = write_dataset(tmp_path / "other", 10, seed=2, **schema)
    settings = pretrain_settings(
        tmp_path / "out", data[0], data={"sources": [{"path": str(data[0])}, {"path": str(other)}], "pack_tokens": 64}
    )
    with pytest.raises(ValueError, match=differs) as error:
        main(settings)
    assert "train" in str(error.value)
    assert "other" in str(error.value)


def test_every_key_of_the_data_reaches_the_loader(data, tmp_path):
    """Two sources with composers of their own, one by schedule; block order, splits, read-ahead."""
    train, valid = data
    tree = {
        "sources": [
            {"path": str(train), "weight_schedule": [[0, 1.0], [2000, 3.0]]},
            {"path": str(valid), "composer": "language_model", "max_epochs": 3, "name": "plain"},
        ],
        "composer": "text_to_image",
        "overlong": "split",
        "pack_tokens": 64,
        "pool": 20,
        "order": "blocks",
        "block": 8,
        "open_blocks": 3,
        "readahead": 2,
    }
    settings = pretrain_settings(tmp_path / "out", train, train={"steps": 2, "tokens_per_step": 256}, data=tree)
    plan = Plan(settings)
    first, second = plan.sources
    assert (first.weight, first.composer, first.order) == (((0, 1), (2000, 3)), None, BlockOrder(8, 3))
    assert (second.weight, second.composer, second.max_epochs) == (1.0, LanguageModel(seed=3), 3)
    assert "train source train: 100 samples, weight 0: 1, 2000: 3" in plan.describe()
    loader = plan.loader()
    state = loader.state_dict()
    assert {n: state["settings"][n] for n in ("overlong", "pool", "pack_tokens")} == {
        "overlong": "split",
        "pool": 20,
        "pack_tokens": 64,
    }
    assert (loader.readahead, loader.prefetch) == (2, 1)
    main(settings)
    assert [r["step"] for r in records(tmp_path / "out")] == [1, 2]


def test_a_grown_dataset_is_taken_where_resuming_is_not_strict(data, tmp_path):
    folder, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data[0], folder)
    main(pretrain_settings(out, folder, train={"steps": 2, "tokens_per_step": 256}))
    schema = Dataset(folder).schema
    extra = Dataset(write_dataset(tmp_path / "more", 20, seed=9))
    shutil.copy(extra.path / extra.manifest.shards[0].file, folder / "more.vts")
    publish(folder, schema, [*Dataset(folder).manifest.shards, replace(extra.manifest.shards[0], file="more.vts")])
    longer = {"train": {"steps": 4, "tokens_per_step": 256}}
    with pytest.raises(ValueError, match=r"source\.data\.hash is"):
        main(pretrain_settings(out, folder, **longer))
    main(pretrain_settings(out, folder, data={"strict": False}, **longer))
    assert [r["step"] for r in records(out)] == [1, 2, 3, 4]


def test_frozen_parameters_stay(data, tmp_path):
    out = tmp_path / "out"
    main(pretrain_settings(out, data[0], train={"steps": 2, "tokens_per_step": 256, "trainable": ["layers.1.*"]}))
    trained = load_file(out / "final" / "model.safetensors")
    main(pretrain_settings(tmp_path / "other", data[0], train={"steps": 3, "tokens_per_step": 256}))
    moved = load_file(tmp_path / "other" / "final" / "model.safetensors")
    start = Decoder(DecoderConfig(2, 32, 2, 2, 48, max_positions=1024), VOCAB)
    start.init_weights(3)
    expected = start.layers[0].down.detach()
    assert torch.equal(trained["model.layers.0.mlp.down_proj.weight"], expected)
    assert not torch.equal(moved["model.layers.0.mlp.down_proj.weight"], expected)
    assert not torch.equal(trained["model.layers.1.mlp.down_proj.weight"], start.layers[1].down.detach())
    with pytest.raises(ValueError, match=r"'layer.0.*' matches none of .* the nearest is"):
        main(pretrain_settings(out, data[0], train={"steps": 2, "trainable": ["layer.0.*"], "tokens_per_step": 256}))


def test_packed_equals_one_document_at_a_time():
    model = Decoder(DecoderConfig(2, 32, 4, 2, 48, qk_norm=True), VOCAB)
    rng = np.random.default_rng(0)
    documents = [
        Document(rng.integers(0, VOCAB.size, n).astype(np.int32), key=n + 1, loss=rng.random(n).astype(np.float32))
        for n in (1, 7, 2, 19, 0, 5)
    ]
    objective = NextToken()
    packed = PackedBatch.build(documents, VOCAB, pack_tokens=50, max_documents=9)
    terms, stats = objective(model, packed)
    terms["next_token"][0].backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    total, parts, count = 0.0, dict.fromkeys(stats, 0.0), 0.0
    for document in documents:
        if len(document):
            batch = PackedBatch.build([document], VOCAB)
            one, one_stats = objective(model, batch)
            one["next_token"][0].backward()
            total += one["next_token"][0].item()
            count += batch.counts["next_token"]
            parts = {n: parts[n] + one_stats[n].item() for n in parts}
    assert terms["next_token"][0].item() == pytest.approx(total, rel=1e-5)
    assert packed.counts["next_token"] == pytest.approx(count)
    assert {n: s.item() for n, s in stats.items()} == pytest.approx(parts, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_dry_run_shows_a_batch_and_trains_nothing(data, tmp_path, capsys):
    out = tmp_path / "out"
    main(pretrain_settings(out, *data), dry_run=True)
    shown = capsys.readouterr().out
    assert "train source train: 100 samples" in shown
    assert "<|t2i|>" in shown
    assert "visual[" in shown
    assert not out.exists()


def test_longer_training_goes_on_and_exports_anew(data, tmp_path):
    out = tmp_path / "out"
    last = {"every": 0, "best": False, "export": "last"}
    main(pretrain_settings(out, *data, checkpoint=last, optim={"schedule": "constant"}))
    first = load_file(out / "final" / "model.safetensors")
    assert json.loads((out / "final" / "training.json").read_text()) == {"step": 6, "trained_steps": 6}
    longer = {"steps": 8, "tokens_per_step": 256}
    main(pretrain_settings(out, *data, checkpoint=last, optim={"schedule": "constant"}, train=longer))
    second = load_file(out / "final" / "model.safetensors")
    assert json.loads((out / "final" / "training.json").read_text()) == {"step": 8, "trained_steps": 8}
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])
    assert [r["step"] for r in records(out)] == list(range(1, 9))
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []


def test_the_best_checkpoint_is_kept_and_exported(data, tmp_path):
    """A rate that ruins the model after the first evaluation: the weights before that are what comes out."""
    out = tmp_path / "out"
    settings = pretrain_settings(
        out,
        *data,
        checkpoint={"keep": 1},
        optim={"lr": 3.0, "schedule": "constant", "grad_clip": 0.0, "warmup": 6},
        train={"steps": 9, "tokens_per_step": 256},
    )
    main(settings)
    losses = {r["step"]: r["eval/valid/loss"] for r in records(out, "eval")}
    best = min(losses, key=losses.get)
    assert best != 9, "the test's rate does not ruin the model"
    assert json.loads((out / "final" / "training.json").read_text()) == {"step": best, "trained_steps": 9}
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [f"step-{best:08d}", "step-00000009"]


def test_frozen_parameters_can_be_left_out_of_checkpoints(data, tmp_path):
    whole, small, resumed = tmp_path / "whole", tmp_path / "small", tmp_path / "resumed"
    train = {"steps": 4, "tokens_per_step": 256, "trainable": ["layers.1.*"]}
    for out, only in ((whole, False), (small, True), (resumed, True)):
        checkpoint = {"every": 2, "keep": 0, "trainable_only": only}
        run_ranks(2, main, pretrain_settings(out, data[0], train=train, checkpoint=checkpoint))
    shutil.rmtree(resumed / "checkpoints" / "step-00000004")
    shutil.rmtree(resumed / "final")
    checkpoint = {"every": 2, "keep": 0, "trainable_only": True}
    run_ranks(2, main, pretrain_settings(resumed, data[0], train=train, checkpoint=checkpoint))
    expected = load_file(whole / "final" / "model.safetensors")
    for out in (small, resumed):
        found = load_file(out / "final" / "model.safetensors")
        assert all(torch.equal(found[k], expected[k]) for k in expected)
    saved = load_file(small / "checkpoints" / "step-00000004" / "rank-00000.safetensors")
    assert {name.split(".")[3] for name in saved if name.startswith("root.model.layers")} == {"1"}
    assert not any("embed" in name for name in saved)


def test_an_older_checkpoint_is_not_resumed_beneath_later_ones(data, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    keep = {"every": 2, "keep": 0}
    main(pretrain_settings(out, *data, checkpoint=keep))
    older = str(out / "checkpoints" / "step-00000002")
    with pytest.raises(ValueError, match=r"has a checkpoint at step 6, later than .*step-00000002 at step 2"):
        main(pretrain_settings(out, *data, checkpoint=keep | {"resume": older}))
    main(pretrain_settings(other, *data, checkpoint=keep | {"resume": older}))
    mine, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (other, out))
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
