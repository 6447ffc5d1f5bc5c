"""Texts that are hard to tokenize: what an engine must encode as the official tokenizer does before it is trusted."""

from __future__ import annotations

import random
from collections.abc import Iterator

from data_prep.tokenizers import Tokenizer

RUNS = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 4097)
_WHITE = " \t\n\r\v\f\x1c\x1f\x85\xa0\u1680\u2000\u2003\u200a\u2028\u2029\u202f\u205f\u3000\u200b\u2060\ufeff"
_WORDS = (
    "don't DON'T they'Re I'll we'VE it'S 'tis l'été 's't're've'm'll'd",  # English endings, in both cases
    "'\u017f '\u212a x'\u017f",  # letters that fold to s and k
    "naïve nai\u0308ve e\u0301\u0323\u0302 \u0301a Z̸̢̛a̷l̶g̷o̵ ﬁ ﬃ ½ ² Ⅷ ㎏ ｆｕｌｌ İı ẞß ǅ",  # composed, combining, compatibility
    "👩‍👩‍👧‍👦 👍🏽 🇫🇷🇩🇪 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ❤️ ☺︎ 1️⃣ 🦙🦙🦙",
    "שָׁלוֹם עולם يولد جميع الناس أحرارًا \u202eabc\u202c \u200fא\u200e",
    "人人生而自由，在尊严和权利上一律平等。すべての人間は自由である。모든 인간은 한국어 ㄱㄴ 각 각",
    "มนุษย์ทั้งหลายเกิดมามีอิสระ सभी मनुष्यों को गौरव ತೆಲುಗు தமிழ் বাংলা ខ្មែរ မြန်မာ བོད་",
    "\x00 \x00\x00a\x01\x07\x08\x1b[0m\x7f\x80\x9f \ufffe\uffff\U0010ffff \ue000\uf8ff\U000f0000",
    "\u0378\u0530\U000e0fff unassigned, \ufffd replaced, \ufeffa mark\ufeff inside",
    "\u2581 ▁a ▁▁ a▁b ▁ ▁ x▁ _ ＿ <0x0A> <0xFF> Ġ Ċ ĠĠa âĢĻ",  # what vocabularies write for spaces and bytes
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F ١٢٣٤ १२३४ １２３ ⅓ 1e-9 v1.2.3",
    "def f(x):\n\tif x >= 12345:\r\n        return {'a': [1.5e-7, \"it''s\"]}   # done\n\n\n",
    'https://example.org/a_b?c=%20&d=[e]#f user@mail.net C:\\path\\to /usr/bin $x+=--y; <a href="x">&amp;</a>',
    "\U00032ada\U00075ac1m \U000332d6\U000e9124\ud2df",  # gigatoken 0.10.0 merges these bytes of Llama-3's wrongly
    "!!! ??? ... --- === *** ___ ~~~ ((( ))) !?#$%^&*",
)


def probes(tokenizer: Tokenizer) -> list[str]:
    """Texts for one tokenizer, the same each time: about a megabyte, some of it made of its own vocabulary."""
    return [*_fixed(), *_of_control(tokenizer), *_of_vocabulary(tokenizer), *fuzz(1500)]


def _fixed() -> Iterator[str]:
    yield from ("", *_WHITE)
    for word in _WORDS:
        yield from (word, f" {word}", f"{word} ", f"  {word}\n", f"\n{word}\n\n", word.upper(), word[::-1])
    yield "\n".join(_WORDS)
    for letter in (*_WHITE, *"aA1'.-_=▁é日🦙\x00"):
        yield from (letter * count for count in RUNS)
    for count in RUNS:
        yield " " * count + "x" + "\n" * count + " y" + "\t" * count + "z" + "\r\n" * count + " " * count
        yield "ab" * count + " " + "12345" * count + " " + "日本" * count + "!?" * count
    yield "a" * 100_000 + " " + "xyz" * 30_000


def _of_control(tokenizer: Tokenizer) -> Iterator[str]:
    names = [
        *tokenizer.control,
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "<|endoftext|>",
        "<|eot_id|>",
        "[INST]",
        "<|im_start|>",
    ]
    for name in names:
        yield from (name, f"a{name}b", f" {name} {name}{name}\n", name[:-1], name[1:], name.upper())
    yield "".join(names)
    yield " ".join(names)


def _of_vocabulary(tokenizer: Tokenizer) -> Iterator[str]:
    """Each token's text alone, and all in a row, so that every merge is made once."""
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    yield from texts
    for start in range(0, len(texts), 50):
        yield "".join(texts[start : start + 50])


def fuzz(count: int, seed: int = 0) -> Iterator[str]:
    """Random texts of a few kinds: any characters, white space, control tokens, one script."""
    draw = random.Random(seed)
    alphabets = [
        [chr(i) for i in (*range(32, 127), *range(0, 0xD800, 37), *range(0xE000, 0x110000, 511))],
        [*_WHITE, " ", " ", "a", "b", ".", "1", "é"],
        ["<s>", "</s>", "<unk>", "<|begin_of_text|>", "<0x0A>", " ", "hello", "\n", "▁", "  ", "don't", "123456"],
        list(" ▁a\n"),
        list("aeiouAE étñ日本のはк'ſ0179.,-"),
        [word for line in _WORDS for word in line.split(" ")],
    ]
    for i in range(count):
        yield "".join(draw.choices(alphabets[i % len(alphabets)], k=draw.randrange(120)))
