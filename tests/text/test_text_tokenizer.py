"""The face of all text tokenizers: appended specials, saving, identity, and one-line errors for broken files."""

from __future__ import annotations

import base64
import json
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from vtrain.text import DEFAULT_SPECIALS, load_text_tokenizer, train_sentencepiece

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def small(tmp_path, vocab: dict | None = None, merges=(("t", "h"), ("th", "e"))) -> Tokenizer:
    vocab = vocab or {token: i for i, token in enumerate([*ALPHABET, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tokenizer


def edited_json(tmp_path, **changes) -> None:
    """Save the small tokenizer with `a__b=value` put at value["a"]["b"]."""
    small(tmp_path)
    root = json.loads((tmp_path / "tokenizer.json").read_text())
    for place, value in changes.items():
        *tables, key = place.split("__")
        node = root
        for table in tables:
            node = node[table]
        node[key] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(root))


def test_specials_follow_the_last_id_and_are_found_on_request(tmp_path):
    small(tmp_path)
    tokenizer = load_text_tokenizer(tmp_path)
    assert tokenizer.specials == DEFAULT_SPECIALS
    assert [tokenizer.special_id(name) for name in DEFAULT_SPECIALS] == [258, 259, 260, 261]
    assert tokenizer.vocab_size == 262
    text = "<|soi|>the<|pad|><|eoi|"
    assert tokenizer.encode(text, allow_specials=True)[:3] == [259, 257, 261]
    assert max(tokenizer.encode(text)) < 258
    for allow_specials in (False, True):
        assert tokenizer.decode(tokenizer.encode(text, allow_specials)) == text
    with pytest.raises(KeyError, match=r"no special token '<\|x\|>'; it has <\|t2i\|>, <\|soi\|>"):
        tokenizer.special_id("<|x|>")
    for wrong in (-1, 262):
        with pytest.raises(ValueError, match=rf"token id {wrong} is outside the tokenizer's 0..261"):
            tokenizer.decode([3, wrong])


def test_specials_that_the_file_has_are_reused(tmp_path):
    theirs = small(tmp_path)
    theirs.add_special_tokens([AddedToken("<|eoi|>", special=True)])
    theirs.add_tokens([AddedToken("<|t2i|>", special=False)])
    theirs.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_text_tokenizer(tmp_path, specials=("<|t2i|>", "<|soi|>", "<|eoi|>", "the"))
    assert [tokenizer.special_id(name) for name in tokenizer.specials] == [259, 260, 258, 257]
    assert tokenizer.vocab_size == 261
    assert tokenizer.encode("<|t2i|><|eoi|>", allow_specials=True) == [259, 258]
    assert 259 not in tokenizer.encode("<|t2i|>")  # a special now, whatever the file said


def test_specials_must_differ(tmp_path):
    small(tmp_path)
    for specials in (("a", "a"), ("",)):
        with pytest.raises(ValueError, match="different, non-empty strings"):
            load_text_tokenizer(tmp_path, specials=specials)


@pytest.fixture
def every_kind(tmp_path):
    """Paths of one tokenizer of each kind."""
    for name in ("json", "vocab", "spm", "ranks"):
        (tmp_path / name).mkdir()
    small(tmp_path / "json")
    small(tmp_path / "vocab").model.save(str(tmp_path / "vocab"))
    (tmp_path / "vocab" / "tokenizer.json").unlink()
    (tmp_path / "vocab" / "added_tokens.json").write_text('{"<extra>": 258}')
    train_sentencepiece(["the cat", "the dog"], 14, tmp_path / "spm" / "some.model")
    lines = [base64.b64encode(bytes([b])) + b" %d" % b for b in range(256)] + [base64.b64encode(b"the") + b" 256"]
    (tmp_path / "ranks" / "my.model").write_bytes(b"\n".join(lines))
    return [tmp_path / "json", tmp_path / "vocab", tmp_path / "spm/some.model", tmp_path / "ranks/my.model"]


def test_a_saved_folder_gives_the_same_ids(every_kind, tmp_path):
    for number, path in enumerate(every_kind):
        tokenizer = load_text_tokenizer(path, specials=("<|a|>", "<|b|>"))
        folder = tmp_path / f"saved{number}"
        tokenizer.save(folder)
        saved = load_text_tokenizer(folder)
        text = "the <extra> cat <|b|>"
        assert saved.encode(text, allow_specials=True) == tokenizer.encode(text, allow_specials=True)
        assert saved.decode(saved.encode(text)) == text
        assert (saved.specials, saved.vocab_size, saved.sha256) == (
            ("<|a|>", "<|b|>"),
            tokenizer.vocab_size,
            tokenizer.sha256,
        )
        main = path if path.is_file() else next(p for p in path.iterdir() if p.name in ("tokenizer.json", "vocab.json"))
        copy = folder / (main.name if main.suffix == ".json" else "tokenizer.model")
        assert copy.read_bytes() == main.read_bytes()


def test_the_hash_names_files_and_specials(every_kind, tmp_path):
    hashes = [load_text_tokenizer(path).sha256 for path in every_kind]
    hashes += [load_text_tokenizer(path, specials=("x",)).sha256 for path in every_kind]
    assert len(set(hashes)) == 8
    shutil.copy(every_kind[2], tmp_path / "renamed.model")
    assert load_text_tokenizer(tmp_path / "renamed.model").sha256 == hashes[2]


def error_of(path) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        load_text_tokenizer(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_and_unknown_files(tmp_path):
    assert error_of(tmp_path / "no.model") == f"{tmp_path / 'no.model'}: no such text tokenizer file"
    assert "no tokenizer.model, tokenizer.json or vocab.json" in error_of(tmp_path)
    (tmp_path / "tokenizer.bin").write_bytes(b"abc")
    assert "unknown text tokenizer; expected a .model or .json file" in error_of(tmp_path / "tokenizer.bin")
    (tmp_path / "vocab.json").write_text("{}")
    assert f"{tmp_path / 'merges.txt'}: no such file; vocab.json needs it" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"dGhl", '"dGhl"; expected `base64(token) rank`'),
        (b"dGhl 257 x", '"dGhl 257 x"; expected `base64(token) rank`'),
        (b"dG=l 257", '"dG=l 257"; expected `base64(token) rank`'),
        (b"dGhl x", '"dGhl x"; expected `base64(token) rank`'),
        (b"dGhl -1", "a rank >= 0"),
        (b" 257", "a token of some bytes"),
        (b"dGhl 255", "rank 255 is already given in line 256"),
        (b"QQ== 257", "token b'A' is already given in line 66"),
    ],
)
def test_a_broken_rank_line_is_named(line, said, tmp_path):
    lines = [base64.b64encode(bytes([b])) + b" %d" % b for b in range(256)]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join([*lines, b"", line]))
    assert error_of(tmp_path).startswith(f"{tmp_path / 'tokenizer.model'}:258: ")
    assert said in error_of(tmp_path)


def test_rank_files_with_holes(tmp_path):
    lines = [base64.b64encode(bytes([b])) + b" %d" % b for b in range(256)]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n".join([*lines, b"dGhl 257"]))
    assert error_of(path) == f"{path}: no token has the id 256; the ids must be 0..257 without holes"
    path.write_bytes(b"\n".join([*lines[:-1], b"dGhl 255"]))
    assert error_of(path) == f"{path}: 1 of the 256 bytes are no tokens, the first is 0xff"
    path.write_bytes(b"")
    assert error_of(path) == f"{path}: no tokens in it"


VOCAB = {token: i for i, token in enumerate([*ALPHABET, "th", "the"])}


@pytest.mark.parametrize(
    ("vocab", "merges", "said"),
    [
        (VOCAB, "#version: 0.2\nt h\nth e x\n", 'merges.txt:3: ["th", "e", "x"]; expected two tokens'),
        (VOCAB, "#version: 0.2\nt h\n\nth\n", 'merges.txt:4: ["th"]; expected two tokens'),
        (VOCAB, "t h\nqq e\n", 'merges.txt:2: "qq" is not in the vocabulary'),
        (VOCAB, "t h\nh e\n", 'merges.txt:2: "he" is not in the vocabulary'),
        (VOCAB, "t h\nth e\nt h\n", 'merges.txt:3: the merge "t h" repeats'),
        (VOCAB | {"the": 300}, "t h\n", "vocab.json: no token has the id 257; the ids must be 0..300 without holes"),
        (VOCAB | {"the": 256}, "t h\n", 'vocab.json: "th" and "the" both have the id 256'),
        (VOCAB | {"the": "x"}, "t h\n", 'vocab.json: the id of "the" is "x"; expected an integer 0..2**31-1'),
        (VOCAB | {"the": 2**31}, "t h\n", 'vocab.json: the id of "the" is 2147483648; expected an integer 0..'),
        ({"a": 0}, "", "vocab.json: 255 of the 256 bytes are no tokens"),
        ({}, "", "vocab.json: the vocabulary is empty"),
    ],
)
def test_broken_vocab_and_merges(vocab, merges, said, tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text(merges)
    assert error_of(tmp_path).startswith(f"{tmp_path}/{said}")


def test_json_that_does_not_parse(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model":\n{,}}')
    assert error_of(tmp_path).startswith(f"{tmp_path / 'tokenizer.json'}:2: not JSON")
    (tmp_path / "tokenizer.json").write_bytes(b'{"\xff": 1}')
    assert "not UTF-8" in error_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    assert "a JSON list; expected an object" in error_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "model is null; expected an object" in error_of(tmp_path)
    small(tmp_path)
    (tmp_path / "specials.json").write_text('{"a": 1}')
    assert "specials.json: expected a list of strings" in error_of(tmp_path)


SPLIT = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
ADDED = {"id": 258, "content": "<x>", "single_word": False, "lstrip": False, "rstrip": False, "special": False}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__type": "Unigram"}, 'model.type is "Unigram", which is not supported; expected "BPE"'),
        ({"model__dropout": 0.1}, "model.dropout is 0.1, which is not supported"),
        ({"model__byte_fallback": True}, "model.byte_fallback is true, which is not supported"),
        ({"model__end_of_word_suffix": "</w>"}, 'model.end_of_word_suffix is "</w>", which is not supported'),
        ({"model__merges": [["t"]]}, 'model.merges[0]: ["t"]; expected two tokens'),
        ({"model__merges": [7]}, "model.merges[0]: 7; expected two tokens"),
        ({"model__merges": ["t h", "t zz"]}, 'model.merges[1]: "zz" is not in the vocabulary'),
        ({"model__merges": None}, "model.merges is null; expected a list"),
        ({"normalizer": {"type": "Lowercase"}}, 'normalizer is "Lowercase", which is not supported'),
        ({"pre_tokenizer": None}, "pre_tokenizer is [null]; expected ByteLevel"),
        ({"pre_tokenizer": {"type": "Sequence"}}, "pre_tokenizer is []; expected ByteLevel"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, 'pre_tokenizer is ["Whitespace"]; expected ByteLevel'),
        ({"pre_tokenizer__add_prefix_space": True}, "pre_tokenizer.add_prefix_space is true, which is not supported"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT | {"behavior": "Removed"}, BYTES]}},
            'pre_tokenizer.behavior is "Removed", which is not supported',
        ),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"String": " "}}, BYTES]}},
            'pre_tokenizer.pattern is {"String": " "}; expected a Regex',
        ),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"Regex": "("}}, BYTES]}},
            'pre_tokenizer.pattern "(" is not a regular expression',
        ),
        ({"added_tokens": [ADDED | {"id": 3}]}, 'added token "<x>" has the id 3; the vocabulary has'),
        ({"added_tokens": [ADDED | {"content": "the"}]}, 'added token "the" has the id 258; the vocabulary has'),
        ({"added_tokens": [ADDED | {"id": 260}]}, "no token has the id 258; the ids must be 0..260 without holes"),
        ({"added_tokens": [ADDED, ADDED]}, "an added token is listed twice"),
        ({"added_tokens": [ADDED | {"content": ""}]}, "added_tokens[0] is"),
    ],
)
def test_what_a_tokenizer_json_may_not_ask_for(changes, said, tmp_path):
    edited_json(tmp_path, **changes)
    assert error_of(tmp_path).startswith(f"{tmp_path / 'tokenizer.json'}: {said}")


def test_what_is_harmless_is_accepted(tmp_path):
    theirs = small(tmp_path)
    theirs.normalizer = normalizers.Sequence([])
    theirs.enable_truncation(2)  # a template's business, like padding and post-processing
    theirs.save(str(tmp_path / "tokenizer.json"))
    theirs.no_truncation()
    assert load_text_tokenizer(tmp_path).encode("the other the") == theirs.encode("the other the").ids


def test_training_ids_are_hugging_faces(tmp_path):
    """The whole way a user goes: train with tokenizers, save, load here, ids of added tokens included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=ALPHABET, special_tokens=["<pad>", "<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(["low lower lowest", "new newer newest"] * 3, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_text_tokenizer(tmp_path, specials=("<end>",))
    assert ours.vocab_size == tokenizer.get_vocab_size()
    text = "the lowest<end> newer <pad>"
    assert ours.encode(text, allow_specials=True) == tokenizer.encode(text).ids
