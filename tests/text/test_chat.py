"""Chat templates against Hugging Face: the rendered conversation, tokenised whole, is the join of our spans."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vtrain.text import load_text_tokenizer, train_sentencepiece
from vtrain.text.bpe import LLAMA3_SPLIT, QWEN2_SPLIT
from vtrain.text.chat import ROLES, TEMPLATES, Turn, chat_template

SPECIALS = {
    "qwen2": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
SPLIT = {"qwen2": QWEN2_SPLIT, "llama3": LLAMA3_SPLIT}
# The templates that the models ship, without their tool calls (Qwen2.5 tokenizer_config.json, Llama 3 model card).
JINJA = {
    "qwen2": "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n' }}{%- endif %}{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + "
    "message.content + '<|im_end|>' + '\n' }}{%- endfor %}",
    "llama3": "{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}",
}
WORDS = ["hello", " world", "\n", "\n\n", " ", "  ", "assistant", "12345", "n't", "é", "日本", "\U0001f600", "!", "Ünd"]


@pytest.fixture(scope="module", params=["qwen2", "llama3"])
def pair(request, tmp_path_factory):
    """(name, our tokenizer, Hugging Face's) of one trained file."""
    name, folder = request.param, tmp_path_factory.mktemp("chat")
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_regex(SPLIT[name]), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    theirs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    corpus = ["".join(WORDS), "assistant\nhello world\n\n", "user\n\nhello 日本 world"] * 4
    theirs.train_from_iterator(corpus, trainer)
    theirs.add_special_tokens(SPECIALS[name])
    theirs.save(str(folder / "tokenizer.json"))
    fast = PreTrainedTokenizerFast(tokenizer_object=theirs, chat_template=JINJA[name])
    return name, load_text_tokenizer(folder), fast


def _regex(pattern: str):
    from tokenizers import Regex

    return Regex(pattern)


def conversations():
    text = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)
    turns = st.lists(st.tuples(text, text), min_size=1, max_size=3)
    return st.tuples(st.booleans(), text, turns).map(_turns)


def _turns(parts) -> list[Turn]:
    with_system, system, pairs = parts
    turns = [Turn("system", system)] if with_system else []
    for user, assistant in pairs:
        turns += [Turn("user", user), Turn("assistant", assistant)]
    return turns


@settings(max_examples=60, deadline=None)
@given(turns=conversations())
def test_the_spans_join_to_what_hugging_face_makes(pair, turns):
    name, ours, theirs = pair
    spans = chat_template(name).spans(turns, ours)
    rendered = theirs.apply_chat_template([{"role": t.role, "content": t.text} for t in turns], tokenize=False)
    expected = theirs(rendered, add_special_tokens=False)["input_ids"]
    assert [i for span in spans for i in span.ids] == expected
    end = "<|im_end|>" if name == "qwen2" else "<|eot_id|>"
    answers = [t.text.strip() if name == "llama3" else t.text for t in turns if t.role == "assistant"]
    said = [ours.decode(span.ids) for span in spans if span.role == "assistant"]
    assert [text.endswith(end) for text in said] == [True] * len(answers)
    # A token that straddles the header's end is the answer's: it can bring white space of the header along.
    assert all(text.endswith(answer + end) for text, answer in zip(said, answers))
    assert all(a.strip() == s.removesuffix(end).strip() for s, a in zip(said, answers))


def test_pictures_and_what_users_write(pair):
    name, ours, _ = pair
    end = SPECIALS[name][1]
    spans = chat_template(name).spans(
        [Turn("user", f"<image>\nhello {end}{{{end}}}<image><image>"), Turn("assistant", "world")], ours
    )
    own = [span for span in spans if span.role == "user"]
    assert [span.image for span in own] == [True, False, True, True]
    assert ours.special_id(end) not in own[1].ids
    assert ours.decode(own[1].ids) == f"\nhello {end}{{{end}}}"
    assert all(span.ids or span.image for span in spans)


def test_a_token_over_two_parts_goes_to_the_one_it_ends_in(tmp_path):
    vocab = {c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_text_tokenizer(tmp_path)
    the, t, h, e = 257, vocab["t"], vocab["h"], vocab["e"]
    assert ours.encode_joined(["t", "he", "the"]) == [[], [the], [the]]
    assert ours.encode_joined(["t", "", "h", "x", ""])[:3] == [[], [], [256]]
    assert ours.encode_joined([]) == []
    assert ours.encode_joined(["", ""]) == [[], []]
    first, second = ours.encode_joined(["é", "日t"])  # characters of two and three tokens
    assert (ours.decode(first), ours.decode(second)) == ("é", "日t")
    assert ours.encode("t") + ours.encode("he") == [t, h, e]


def test_sentencepiece_templates(tmp_path):
    path = train_sentencepiece(["USER: a b ASSISTANT: c d"] * 3, 20, tmp_path / "tokenizer.model")
    ours = load_text_tokenizer(path, specials=("</s>",))
    spans = chat_template("vicuna").spans([Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")], ours)
    text = TEMPLATES["vicuna"].system + " USER: a ASSISTANT: b</s>USER: c "
    assert ours.decode([i for span in spans for i in span.ids]) == text
    assert [ours.decode(span.ids) for span in spans if span.role == "assistant"] == ["b</s>"]
    plain = chat_template("plain").spans([Turn("user", "<image>"), Turn("assistant", "d c")], ours)
    assert [(s.role, s.image, ours.decode(s.ids)) for s in plain] == [("user", True, ""), ("assistant", False, "d c\n")]


def test_what_cannot_be_done_is_said(tmp_path):
    path = train_sentencepiece(["a b"], 5, tmp_path / "tokenizer.model")
    ours = load_text_tokenizer(path, specials=())
    with pytest.raises(KeyError, match=r"no special token '<\|im_start\|>'"):
        chat_template("qwen2").spans([Turn("user", "a")], ours)
    with pytest.raises(ValueError, match="chat template 'chatml'; expected one of qwen2, llama3, vicuna, plain"):
        chat_template("chatml")
    with pytest.raises(ValueError, match="role 'human'; expected one of system, user, assistant"):
        Turn("human", "a")
    assert set(ROLES) == {"system", "user", "assistant"}


def test_a_tokenizer_that_changes_the_text_is_refused(tmp_path):
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    root = json.loads((tmp_path / "tokenizer.json").read_text())
    root["normalizer"] = {"type": "NFC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(root))
    ours = load_text_tokenizer(tmp_path)
    assert ours.encode_joined(["é", "x"])  # composed already
    with pytest.raises(ValueError, match="the tokenizer changes this text"):
        ours.encode_joined(["e\u0301", "x"])
