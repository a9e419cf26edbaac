"""Byte-level BPE files against Hugging Face's tokenizers and against tiktoken."""

from __future__ import annotations

import base64
import json
import random

import pytest
import tiktoken
import tokenizers
from text.text_samples import SENTENCES, random_text
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from vtrain.text import load_text_tokenizer
from vtrain.text.bpe import GPT2_SPLIT, LLAMA3_SPLIT, QWEN2_SPLIT

WORDS = ("hello", " world", "2024", "it's", "WE'LL", "\u1e9b\u0323", "e\u0301", "  ", "\n\n")


def train(pattern: str, *, normalizer=None, ignore_merges=False, vocab_size=600) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def edited(tokenizer: Tokenizer, edit) -> Tokenizer:
    value = json.loads(tokenizer.to_str())
    edit(value)
    return Tokenizer.from_str(json.dumps(value))


def shuffle_ids(seed: int):
    def edit(value: dict) -> None:
        ids = list(value["model"]["vocab"].values())
        random.Random(seed).shuffle(ids)
        value["model"]["vocab"] = dict(zip(value["model"]["vocab"], ids))

    return edit


def add_unreachable(value: dict) -> None:
    """Tokens that no merge makes: they count only where merges are ignored for whole pieces."""
    vocab = value["model"]["vocab"]
    for token in ("Ġphoto", "Ġworld", "Ġof", "hello", "zqzq", " of", " world"):  # the last two with a bare space
        vocab.setdefault(token, len(vocab))


def shuffle_merges(value: dict) -> None:
    """Merges that no training would give: tokens that come after the tokens they are part of."""
    random.Random(5).shuffle(value["model"]["merges"])


def all_splits(value: dict) -> None:
    """Every way to cut a token into two, in the order of the tokens: how rank files become `tokenizer.json`."""
    vocab = value["model"]["vocab"]
    pairs = [
        (token[:i], token[i:])
        for token in sorted(vocab, key=vocab.get)
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    value["model"]["merges"] = [list(pair) for pair in pairs]


VARIANTS = {
    "qwen": lambda: train(QWEN2_SPLIT, normalizer=normalizers.NFC()),
    "llama3": lambda: train(LLAMA3_SPLIT, ignore_merges=True),
    "gpt2": lambda: train(GPT2_SPLIT),
    "letters_only": lambda: train(r"\p{L}+|\d"),  # a pattern with gaps
    "nfkd_then_nfc": lambda: train(
        QWEN2_SPLIT, normalizer=normalizers.Sequence([normalizers.NFKD(), normalizers.NFC()])
    ),
    "shuffled_ids": lambda: edited(train(QWEN2_SPLIT, normalizer=normalizers.NFC()), shuffle_ids(3)),
    "unreachable": lambda: edited(train(QWEN2_SPLIT), add_unreachable),
    "unreachable_ignoring": lambda: edited(train(QWEN2_SPLIT, ignore_merges=True), add_unreachable),
    "shuffled_merges": lambda: edited(train(QWEN2_SPLIT), shuffle_merges),
    "shuffled_merges_ignoring": lambda: edited(train(QWEN2_SPLIT, ignore_merges=True), shuffle_merges),
    "all_splits": lambda: edited(train(LLAMA3_SPLIT, ignore_merges=True), all_splits),
}


def assert_equal(ours, theirs: Tokenizer, texts) -> None:
    for text in texts:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, allow_specials=True) == expected, repr(text)
        assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=False), repr(text)


def fuzz(count: int, seed: int, pieces: tuple[str, ...] = WORDS) -> list[str]:
    rng = random.Random(seed)
    return [random_text(rng, pieces) for _ in range(count)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokenizer_json_equals_hugging_face(variant, tmp_path):
    theirs = VARIANTS[variant]()
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_text_tokenizer(tmp_path, specials=())
    assert ours.vocab_size == theirs.get_vocab_size()
    assert_equal(ours, theirs, [*SENTENCES, "", *fuzz(300, seed=1)])


def test_several_merges_make_the_same_token(tmp_path):
    """The merge listed first wins, not the leftmost place: "aa a aa" becomes "aa" + "aaa"."""
    table = dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), range(256)))
    table |= {"aa": 256, "aaa": 257, "aaaa": 258, "ab": 259, "aab": 260}
    merges = [("a", "aa"), ("a", "a"), ("aa", "a"), ("aa", "b"), ("aa", "aa"), ("a", "ab"), ("a", "b"), ("aaa", "a")]
    for seed in range(20):
        random.Random(seed).shuffle(merges)
        theirs = Tokenizer(models.BPE(vocab=table, merges=merges))
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.decoder = decoders.ByteLevel()
        theirs.save(str(tmp_path / "tokenizer.json"))
        rng = random.Random(seed)
        texts = ["a" * n for n in range(1, 24)] + ["".join(rng.choices("aaab", k=12)) for _ in range(100)]
        assert_equal(load_text_tokenizer(tmp_path, specials=()), theirs, texts)


@pytest.mark.parametrize("variant", ["qwen", "llama3", "all_splits"])
def test_ten_thousand_strings(variant, tmp_path):
    theirs = VARIANTS[variant]()
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert_equal(load_text_tokenizer(tmp_path, specials=()), theirs, fuzz(10_000, seed=2))


ADDED = {
    "<|im_start|>": {"special": True, "normalized": False},
    "<|im_start|>x": {"special": True, "normalized": False},  # the longer of two wins
    "<image>": {"special": False, "normalized": False},
    "caf\u00e9": {"special": False, "normalized": True},
    "A\u030ang": {"special": False, "normalized": True},  # not in normal form C itself
    "<mask>": {"special": True, "normalized": False, "lstrip": True},
    "</s>": {"special": True, "normalized": False, "rstrip": True},
    "<both>": {"special": False, "normalized": True, "lstrip": True, "rstrip": True},
    "word": {"special": False, "normalized": True, "single_word": True},
    "\n\n\n": {"special": False, "normalized": False},
    "the": {"special": False, "normalized": False, "single_word": True},
}


def with_added(tokenizer: Tokenizer) -> Tokenizer:
    for content, flags in ADDED.items():
        add = tokenizer.add_special_tokens if flags["special"] else tokenizer.add_tokens
        add([AddedToken(content, **flags)])
    return tokenizer


@pytest.mark.parametrize("variant", ["qwen", "llama3", "nfkd_then_nfc"])
@pytest.mark.parametrize("allow_specials", [False, True])
def test_added_tokens_inside_text(variant, allow_specials, tmp_path):
    theirs = with_added(VARIANTS[variant]())
    theirs.save(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = not allow_specials
    ours = load_text_tokenizer(tmp_path, specials=())
    spaced = (*ADDED, "<mask>  ", " \u3000<mask>", "</s> \n", "_the ", "\u0301the", "\u24d0word ", "words", "\u00c5ng")
    for text in fuzz(1000, seed=4, pieces=spaced):
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, allow_specials=allow_specials) == expected, repr(text)


def test_vocab_and_merges_equal_qwen2_of_transformers(tmp_path):
    trained = VARIANTS["shuffled_ids"]()
    trained.model.save(str(tmp_path))
    size = trained.get_vocab_size()
    added = {
        size: {"content": "<|endoftext|>", "special": True, "normalized": False},
        size + 1: {"content": "<tool>", "special": False, "normalized": False},
    }
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    config = {"added_tokens_decoder": {str(i): token | flags for i, token in added.items()}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_text_tokenizer(tmp_path, specials=["<|endoftext|>", "<|soi|>"])
    assert ours.vocab_size == size + 3
    assert ours.special_id("<|endoftext|>") == size
    assert ours.special_id("<|soi|>") == size + 2
    vocab, merges = tokenizers.models.BPE.read_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    theirs = Qwen2Tokenizer(vocab=vocab, merges=merges)
    theirs.add_tokens([tokenizers.AddedToken(**(token | flags)) for token in added.values()])
    for text in [*SENTENCES, *fuzz(300, seed=6, pieces=(*WORDS, "<|endoftext|>", "<tool>"))]:
        assert ours.encode(text, allow_specials=True) == theirs.encode(text, add_special_tokens=False), repr(text)


def test_added_tokens_json_beside_the_vocabulary(tmp_path):
    trained = VARIANTS["gpt2"]()
    trained.model.save(str(tmp_path))
    size = trained.get_vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": size, "<think>": size + 1}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    ours = load_text_tokenizer(tmp_path / "vocab.json", specials=())
    assert ours.vocab_size == size + 2
    assert ours.encode("<|end|><think>", allow_specials=True) == [size, size + 1]
    assert ours.encode("<think>") == [size + 1]
    assert size not in ours.encode("<|end|>")


def rank_lines(tokenizer: Tokenizer) -> list[bytes]:
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    return [base64.b64encode(bytes(byte_of[c] for c in t)) + b" %d" % i for i, t in enumerate(tokens)]


def test_rank_file_equals_hugging_face_and_tiktoken(tmp_path):
    theirs = VARIANTS["llama3"]()
    lines = rank_lines(theirs)
    random.Random(0).shuffle(lines)  # the order of lines means nothing
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    ours = load_text_tokenizer(tmp_path)
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    reference = tiktoken.Encoding("x", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
    for text in [*SENTENCES, *fuzz(1000, seed=7)]:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == expected == reference.encode_ordinary(text), repr(text)
        assert ours.decode(expected) == text
    assert ours.vocab_size == len(ranks) + 4


def test_a_file_of_128000_ranks_is_llama_3(tmp_path):
    tokens = [bytes([b]) for b in range(256)] + [i.to_bytes(3, "big") for i in range(127744)]
    lines = [base64.b64encode(token) + b" %d" % i for i, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines))
    ours = load_text_tokenizer(tmp_path)
    expected = {"begin_of_text": 128000, "finetune_right_pad_id": 128004, "start_header_id": 128006}
    expected |= {"eot_id": 128009, "reserved_special_token_2": 128005, "reserved_special_token_247": 128255}
    assert {name: ours.special_id(f"<|{name}|>") for name in expected} == expected
    assert ours.special_id("<|t2i|>") == 128256
    assert ours.vocab_size == 128260


def test_lone_surrogates_become_replacement_characters(tmp_path):
    hf = VARIANTS["qwen"]()
    hf.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "ranks.model").write_bytes(b"\n".join(rank_lines(VARIANTS["llama3"]())))
    for path in (tmp_path / "tokenizer.json", tmp_path / "ranks.model"):
        ours = load_text_tokenizer(path)
        for text, meant in [
            ("a\ud800b", "a\ufffdb"),
            ("\udc00\ud800", "\ufffd\ufffd"),
            ("\ud83d\ude00!", "\U0001f600!"),  # a pair is the character it stands for
        ]:
            assert ours.encode(text) == ours.encode(meant)
            assert ours.decode(ours.encode(text)) == meant


def test_enormous_words_take_no_quadratic_time(tmp_path):
    hf = VARIANTS["qwen"]()
    hf.save(str(tmp_path / "tokenizer.json"))
    text = "".join(random.Random(1).choices("abcdefghij", k=300_000))  # quadratic: hours
    ours = load_text_tokenizer(tmp_path, specials=())
    assert ours.encode(text) == hf.encode(text).ids
    (tmp_path / "ranks.model").write_bytes(b"\n".join(rank_lines(VARIANTS["llama3"]())))
    ranks = load_text_tokenizer(tmp_path / "ranks.model")
    for text in ("a" * 1_000_000, " " * 1_000_000, "!?" * 500_000):  # tiktoken runs out of stack on these
        assert ranks.decode(ranks.encode(text)) == text


def test_ranks_merge_whatever_makes_a_token(tmp_path):
    """tiktoken has no list of merges: neighbours that make a token merge, the lowest rank first, then the leftmost."""
    tokens = [bytes([b]) for b in range(256)] + [b"aa", b"bc", b"aaa", b"ab", b"abc", b"aaaa", b"cab", b"aaab"]
    for seed in range(20):
        rng = random.Random(seed)
        ranks = {token: i for i, token in enumerate(tokens[:256] + rng.sample(tokens[256:], len(tokens) - 256))}
        lines = [base64.b64encode(token) + b" %d" % i for token, i in ranks.items()]
        (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines))
        ours = load_text_tokenizer(tmp_path, specials=())
        theirs = tiktoken.Encoding("x", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
        for _ in range(200):
            text = "".join(rng.choices("aaabc", k=rng.randint(1, 20)))
            assert ours.encode(text) == theirs.encode_ordinary(text), text
