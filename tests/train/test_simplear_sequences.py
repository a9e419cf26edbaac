"""SimpleAR's sequences through a plan and a run: style prefixes before stored captions, codes scored on their own."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from toys import pretrain_settings, write_dataset

from vtrain.data.format import SEGMENT, Modality, Role, Schema
from vtrain.data.manifest import publish
from vtrain.data.prefixes import encode_prefixes
from vtrain.data.reader import Dataset
from vtrain.data.writer import ShardWriter
from vtrain.dist.mesh import world
from vtrain.models.flops import train_flops
from vtrain.pretrain import main
from vtrain.text import TextTokenizer, load_text_tokenizer, train_sentencepiece
from vtrain.text.bpe import QWEN2_SPLIT
from vtrain.train.tasks.pretrain import Plan, PretrainTask
from vtrain.vocab import Vocabulary

SPECIALS = ("<|t2i|>", "<|soi|>")
SHORT = ["A cat.", "Two dogs.", "3 birds.", '"Quoted" boats.']
CAPTIONS = [[s, f"{s} They are in the garden, {i} of them."] for i, s in enumerate(SHORT * 5)]
PREFIXES = ("A photo of ", "A surreal dreamscape of ", "Painting:")
CODES, SIDE = 16, 3


def byte_level(folder: Path, words: bool = True) -> TextTokenizer:
    """Like Qwen's: a word takes the space before it. words false: tokens may hold several words."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT if words else r"[^.]+|."), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([p + c for p in PREFIXES for pair in CAPTIONS for c in pair], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_text_tokenizer(folder, SPECIALS)


def sentencepiece(folder: Path) -> TextTokenizer:
    folder.mkdir()
    train_sentencepiece([p + c for p in PREFIXES for pair in CAPTIONS for c in pair], 150, folder / "tokenizer.model")
    return load_text_tokenizer(folder, SPECIALS)


def write_captions(folder: Path, tokenizer: TextTokenizer, *, space: bool, key: int = 1, codes_first=False) -> Path:
    """A dataset of CAPTIONS, each sample with its number as its codes."""
    sizes = {"text": tokenizer.vocab_size, "visual": CODES}
    vocab = Vocabulary.of(**dict(reversed(sizes.items())) if codes_first else sizes)
    base = vocab["text"].base
    schema = Schema(
        vocab,
        {name: base + tokenizer.special_id(name) for name in SPECIALS},
        text_tokenizer=tokenizer.sha256,
        text={"caption_space": True} if space else {},
    )
    folder.mkdir()
    with ShardWriter(folder / "00000.vts", schema, uuid=bytes([key] * 16)) as writer:
        for number, captions in enumerate(CAPTIONS):
            parts = [[base + token for token in tokenizer.encode(f" {c}" if space else c)] for c in captions]
            parts.append([vocab["visual"].base + number % CODES] * SIDE**2)
            segments = np.zeros(3, dtype=SEGMENT)
            segments["start"] = np.cumsum([0, *map(len, parts[:2])])
            segments["modality"] = [Modality.TEXT, Modality.TEXT, Modality.IMAGE]
            segments["role"] = [Role.INPUT, Role.INPUT, Role.TARGET]
            for name, value in (("t", 1), ("h", SIDE), ("w", SIDE)):
                segments[name][2] = value
            ids = np.concatenate(parts).astype(np.int64)
            keys = np.array([1000 * key + number], dtype=np.uint64)
            writer.append_batch(ids, np.array([0, len(ids)]), segments, np.array([0, 3]), keys=keys)
        info = writer.close()
    publish(folder, schema, [info])
    tokenizer.save(folder / "text_tokenizer")
    return folder


def settings(out: Path, train: Path, valid: Path | None = None, **changes):
    changes = {"data": {}, "train": {"steps": 3, "tokens_per_step": 512}, **changes}
    changes["data"] = {"sources": [{"path": str(train)}], "pack_tokens": 256, "prefetch": 0, **changes["data"]}
    return pretrain_settings(out, train, valid, **changes)


def texts_of(batch, vocab: Vocabulary, tokenizer: TextTokenizer) -> list[str]:
    """Of each document, what stands before its codes; checks that these are whole."""
    found, bounds = [], batch.cu_seqlens.tolist()
    for n in range(batch.documents):
        ids = batch.ids[bounds[n] : bounds[n + 1]].tolist()
        assert all(i >= vocab["visual"].base for i in ids[-(SIDE**2) :])
        assert len(set(ids[-(SIDE**2) :])) == 1
        text = ids[: -(SIDE**2)]
        decoded = tokenizer.decode(text)
        assert decoded.startswith("<|t2i|>")
        assert decoded.endswith("<|soi|>")
        inside = decoded.removeprefix("<|t2i|>").removesuffix("<|soi|>")
        assert text[1:-1] == tokenizer.encode(inside), "not what the tokenizer makes of the joined text"
        found.append(inside)
    return found


KINDS = {"byte level": (byte_level, True), "sentencepiece": (sentencepiece, False)}


@pytest.fixture(scope="module", params=KINDS)
def captioned(request, tmp_path_factory):
    """(dataset, its tokenizer, a dataset of the same captions made with the other extract.caption_space)."""
    make, space = KINDS[request.param]
    folder = tmp_path_factory.mktemp("captioned")
    tokenizer = make(folder / "tokenizer")
    good = write_captions(folder / "good", tokenizer, space=space)
    return good, tokenizer, write_captions(folder / "bad", tokenizer, space=not space, key=2)


def test_prefix_and_caption_are_the_joined_text(captioned, tmp_path):
    train, tokenizer, _ = captioned
    plan = Plan(settings(tmp_path, train, train, data={"prefixes": list(PREFIXES)}))
    loader = plan.loader()
    found = [
        text for _, step in zip(range(8), loader) for b in step.batches for text in texts_of(b, plan.vocab, tokenizer)
    ]
    bare = [p.removesuffix(" ") for p in PREFIXES]
    expected = {f"{p} {c}" for p in bare for pair in CAPTIONS for c in pair} | {""}
    assert set(found) <= expected
    share = found.count("") / len(found)
    assert abs(share - 0.1) < 3 * np.sqrt(0.09 / len(found))
    for start in bare:
        assert 0.15 < np.mean([text.startswith(f"{start} ") for text in found]) < 0.45
    assert 0.3 < np.mean([text.endswith("of them.") for text in found]) < 0.6  # sample_short: either caption

    state = json.loads(json.dumps(loader.state_dict()))
    plan.loader().load_state_dict(state)
    other = Plan(settings(tmp_path, train, data={"prefixes": list(PREFIXES[:2])}))
    with pytest.raises(ValueError, match=r"composer\.prefixes is "):
        other.loader().load_state_dict(state)


def test_evaluation_draws_prefixes_and_takes_the_second_caption(captioned, tmp_path):
    train, tokenizer, _ = captioned
    plan = Plan(settings(tmp_path, train, train, data={"prefixes": list(PREFIXES), "drop_caption": 1.0}))
    [source] = plan.eval_sources
    pieces = source.composer.compose(source.dataset, np.arange(20), 0)
    again = source.composer.compose(source.dataset, np.arange(20), 0)
    assert pieces.token.tolist() == again.token.tolist()
    captions = pieces.cu[1:] - 3
    assert pieces.count[captions].tolist() == [
        len(tokenizer.encode(f" {long}" if source.dataset.schema.text else long)) for _, long in CAPTIONS
    ]
    assert len(set(np.diff(pieces.cu).tolist())) > 1  # several prefixes


def test_sample_short_false_takes_the_second_caption(captioned, tmp_path):
    train, tokenizer, _ = captioned
    plan = Plan(settings(tmp_path, train, data={"sample_short": False, "drop_caption": 0}))
    [batch, *_] = next(iter(plan.loader())).batches
    assert {t.strip() for t in texts_of(batch, plan.vocab, tokenizer)} <= {long for _, long in CAPTIONS}


def test_the_plan_shows_the_prefix(captioned, tmp_path):
    train = captioned[0]
    shown = Plan(settings(tmp_path, train, data={"prefixes": ["A photo of "], "drop_caption": 0})).describe_batch(1)
    pieces = re.findall(r"^ +\d+ +\d+ +(<\S+>|'[^']*')", shown, re.MULTILINE)
    assert [piece.strip("' ") for piece in pieces[:4]] == ["<|t2i|>", "A", "photo", "of"], shown


def test_captions_that_do_not_join_are_refused(captioned, tmp_path):
    good, _, bad = captioned
    prefixes = {"prefixes": ["A photo of "]}
    space = str(bool(Dataset(good).schema.text)).lower()
    said = rf"data.prefixes: 'A photo of' before the caption '.*', as {bad} has it .*; "
    said += f"expected a dataset made with extract.caption_space = {space}"
    with pytest.raises(ValueError, match=said):
        Plan(settings(tmp_path, bad, data=prefixes))
    with pytest.raises(ValueError, match=said):
        Plan(settings(tmp_path, good, data=prefixes | {"sources": [{"path": str(good)}, {"path": str(bad)}]}))
    with pytest.raises(ValueError, match=said):
        Plan(settings(tmp_path, good, bad, data=prefixes))
    Plan(settings(tmp_path, bad))  # without prefixes there is nothing to join


def test_prefixes_that_cannot_be_used_are_named(captioned, tmp_path):
    good = captioned[0]
    plain = write_dataset(tmp_path / "plain", 8)
    with pytest.raises(ValueError, match=f"data.prefixes: {plain} has no text_tokenizer to encode them with"):
        Plan(settings(tmp_path, plain, data={"prefixes": ["A "]}))
    other = write_captions(tmp_path / "other", sentencepiece_of_other_size(tmp_path / "tokenizer"), space=False)
    with pytest.raises(ValueError, match=f"data.prefixes: {other} has the text tokenizer .*; expected that of {good}"):
        Plan(settings(tmp_path, good, other, data={"prefixes": ["A "]}))


def test_ids_begin_where_the_range_of_texts_does(tmp_path):
    tokenizer = byte_level(tmp_path / "tokenizer")
    folder = write_captions(tmp_path / "data", tokenizer, space=True, codes_first=True)
    tokens = tokenizer.encode("A photo of")
    assert encode_prefixes(["A photo of "], [folder]) == (tuple(CODES + token for token in tokens),)


def test_a_tokenizer_without_words_cannot_join(tmp_path):
    train = write_captions(tmp_path / "data", byte_level(tmp_path / "tokenizer", words=False), space=True)
    said = r"'A photo of' before the caption 'a cat', as .*; expected a prefix and captions that it cuts at the space"
    with pytest.raises(ValueError, match=said):
        Plan(settings(tmp_path, train, data={"prefixes": ["A photo of "]}))


def sentencepiece_of_other_size(folder: Path) -> TextTokenizer:
    folder.mkdir()
    train_sentencepiece([c for pair in CAPTIONS for c in pair], 120, folder / "tokenizer.model")
    return load_text_tokenizer(folder, SPECIALS)


def records(out: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if r["kind"] == kind]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains for two steps and evaluates, with text weighed at 0.3: (softmax, ranks) -> the run's folder."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_dataset(folder / "train", 60), write_dataset(folder / "valid", 20, seed=1)

    @functools.cache
    def run(softmax: str, ranks: int = 1) -> Path:
        out = folder / f"{softmax}-{ranks}"
        loss = {"visual_softmax": softmax, "text_weight": 0.3}
        train = {"steps": 2, "tokens_per_step": 192}  # three bins: of two ranks one has a batch that is all padding
        arguments = pretrain_settings(out, *data, loss=loss, train=train, eval={"every": 1}, optim={"lr": 1e-3})
        if ranks == 1:
            main(arguments)
        else:
            run_ranks(ranks, main, arguments)
        return out

    return run


def test_visual_only_tells_codes_from_codes(trained):
    """Hardly learned as yet: of 16 codes, not of 30 texts, too; what is learned of text is the same."""
    full, alone = trained("full"), trained("visual_only")
    for kind, prefix in (("train", "loss/"), ("eval", "eval/valid/")):
        [theirs, *_], [mine, *_] = records(full, kind), records(alone, kind)
        assert theirs[f"{prefix}visual"] == pytest.approx(np.log(46), abs=0.1)
        assert mine[f"{prefix}visual"] == pytest.approx(np.log(16), abs=0.1)
        assert mine[f"{prefix}text"] == pytest.approx(theirs[f"{prefix}text"], rel=1e-3)


@pytest.mark.slow
def test_visual_only_ranks_agree_with_one(trained):
    one, two = trained("visual_only", 1), trained("visual_only", 2)
    for mine, theirs in zip(records(two, "train"), records(one, "train"), strict=True):
        for name in ("loss", "loss/text", "loss/visual", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5)
    for mine, theirs in zip(records(two, "eval"), records(one, "eval"), strict=True):
        for name in ("loss", "text", "visual"):
            assert mine[f"eval/valid/{name}"] == pytest.approx(theirs[f"eval/valid/{name}"], rel=1e-5)


def test_mfu_counts_the_logits_that_are_made(tmp_path):
    data = write_dataset(tmp_path / "data", 20)
    plans = [Plan(pretrain_settings(tmp_path, data, loss={"visual_softmax": s})) for s in ("full", "visual_only")]
    flops = []
    with world("cpu") as here:
        for plan in plans:
            task = PretrainTask(plan.settings, here, plan)
            [batch, *_] = next(iter(plan.loader())).batches
            flops.append(task._flops(batch))
    full = train_flops(plans[0].config, plans[0].vocab, batch.lengths, batch.scored)
    codes = int((batch.labels >= 30).sum())
    assert flops == [full, full - 6 * plans[0].config.hidden * 30 * codes]


def test_a_vocabulary_without_codes_is_refused_before_training(tmp_path):
    vocab = Vocabulary.of(text=30, pictures=16)
    data = tmp_path / "data"
    schema = Schema(vocab, {})
    data.mkdir()
    with ShardWriter(data / "00000.vts", schema, uuid=bytes(16)) as writer:
        nothing = np.zeros(0, dtype=SEGMENT), np.zeros(2, dtype=np.int64)
        writer.append_batch(np.arange(9), np.array([0, 9]), *nothing, keys=np.array([5], dtype=np.uint64))
        info = writer.close()
    publish(data, schema, [info])
    changes = {"loss": {"visual_softmax": "visual_only"}, "data": {"composer": "language_model"}}
    said = r"loss.visual_softmax is visual_only; the vocabulary .* has no range 'visual'"
    with pytest.raises(ValueError, match=said):
        Plan(pretrain_settings(tmp_path, data, **changes))
