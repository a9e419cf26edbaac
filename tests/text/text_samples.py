"""Texts and random strings that tokenizer tests share."""

from __future__ import annotations

import random

SENTENCES = [
    "The quick brown fox jumps over the lazy dog; it's 12345 o'clock, we'll see what they've DONE.",
    "Ein großer Bär saß am Fluß. ÄÖÜ äöü, naïve café, déjà-vu, Ångström!",
    "Быстрая коричневая лиса прыгает через ленивую собаку 2024 года.",
    "素早い茶色の狐がのろまな犬を飛び越える。漢字かな交じり文、カタカナ。",
    "빠른 갈색 여우가 게으른 개를 뛰어넘는다. 한국어 문장입니다.",
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है। ١٢٣ ४५६",
    "a photo of a red cube\n\nand two   blue spheres\t on a table\r\n  (studio light, 8k)",
    "def f(x):\n    return x ** 2 + 3.14159  # comment\n\n\n\tif x != y: pass",
    "emoji 😀👩‍👩‍👧‍👦🇫🇷 and math ∑∫√ ≠ ½ ²",
] * 4

_ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz ABC",
    "aab bba'stTDdLlRreEvVmM ",
    " \t\n\r\x0b\x0c\x85\xa0\u2003\u3000 a1!",
    "0123456789٣४½² .,",
    "é\u0301e\u0308\u0327a\u030aÅÅ가각ﬁﬀ\u1100\u1161\u11a8",  # composes, decomposes, is out of canonical order
    "äöüßÄÖÜéèêñçåøæœ",
    "абвгдежзийклмнопрстуфхцчшщъыьэюя ",
    "漢字仮名交じり文学校生日本人 、。",
    "<|>imag_ends/x[] \n",
    "😀👩\u200d👧\ufe0f🇫🇷𝒳\U0010ffff",
    "\x00\x01\x1c\x1d\x1e\x1f\x7f\xad\ufeff\ufffd\uffff",
    "'’ʼſK-–—_!?\"#$%&()*+,./:;=@\\^`{}~",
]


def random_text(rng: random.Random, pieces: tuple[str, ...] = ()) -> str:
    """A short string over a few alphabets, with whole `pieces` (added tokens, words) now and then."""
    out = []
    alphabets = rng.sample(_ALPHABETS, rng.randint(1, 3))
    for _ in range(rng.randint(0, 8)):
        if pieces and rng.random() < 0.35:
            out.append(rng.choice(pieces))
        elif rng.random() < 0.2:
            out.append(rng.choice(SENTENCES)[rng.randint(0, 20) :][: rng.randint(1, 40)])
        else:
            out.append("".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randint(1, 12))))
    return "".join(out)
