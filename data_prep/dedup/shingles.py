"""Texts to shingles: 64-bit hashes of n tokens in a row, for many documents at once, in numpy.

Normalisation, in this order: Unicode NFC; lower case; every character that is no letter, mark or digit (Unicode
categories L, M, N; the underscore is none) counts as a space. Tokens are then, by `unit`:

    auto   words between spaces; characters one by one in scripts that put no spaces between words: Han, kana,
           bopomofo, Thai, Lao, Khmer, Burmese. A text of several scripts gives both, so there is no line at which a
           document would change from one kind to the other and stop being like its twin.
    word   words between spaces, whatever the script
    char   every letter, mark and digit by itself; spaces do not count

Shingles are `n` tokens in a row. A document of fewer tokens is one shingle of all it has; one of none has no shingle
and cannot be a near duplicate. Two different shingles share a hash with probability 2**-64.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

Unit = Literal["auto", "word", "char"]
U64 = NDArray[np.uint64]

# Code points of scripts without spaces between words
UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x19E0, 0x19FF), (0x3005, 0x3007), (0x3040, 0x312F),
    (0x31A0, 0x31BF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F),
    (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x1B000, 0x1B16F), (0x20000, 0x3FFFD),
)  # fmt: skip
KNOWN = 0x40000  # no letter, mark or digit beyond, but for variation selectors (0xE0100)
SPACE, WORD, ALONE = 0, 1, 2
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd
MIX_1, MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)  # of MurmurHash3's 64-bit finalizer
MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], dtype=np.uint64)  # keep the first `size` of 8 bytes
LONG_TOKEN = 64  # bytes; longer ones are few and hashed one by one

# Bytes below 128: letters to lower case, digits stay, all else is a space; others stay for the second look
_ASCII = bytes(
    ord(chr(byte).lower()) if byte >= 128 or chr(byte).isalnum() else 32 for byte in range(128)
) + bytes(range(128, 256))  # fmt: skip


@cache
def _classes() -> NDArray[np.uint8]:
    """Code point -> SPACE, WORD or ALONE."""
    kinds = np.array([unicodedata.category(chr(point))[0] in "LMN" for point in range(KNOWN)], dtype=np.uint8)
    for first, last in UNSPACED:
        kinds[first : last + 1] *= ALONE
    return kinds


def mix(values: U64) -> U64:
    """MurmurHash3's finalizer, in place: every bit of the input moves every bit of the output."""
    shift = np.uint64(33)
    values ^= values >> shift
    values *= MIX_1
    values ^= values >> shift
    values *= MIX_2
    values ^= values >> shift
    return values


def _joined(texts: Sequence[str]) -> tuple[bytearray, NDArray[np.int64]]:
    """Texts in UTF-8, lower case, a space after each, and where each begins (one more: where the last ends)."""
    parts = []
    for text in texts:
        if not text.isascii():
            if not unicodedata.is_normalized("NFC", text):
                text = unicodedata.normalize("NFC", text)
            text = text.lower()  # ASCII is lowered by the table, all texts at once
        parts.append(text.encode("utf-8", "replace"))
    starts = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) + 1 for part in parts], out=starts[1:])
    joined = bytearray(b" ".join(parts).translate(_ASCII))
    joined += b" " * (16 + -len(joined) % 8)  # room for reading 8 bytes at a time
    return joined, starts


def _tokens(joined: bytearray, unit: Unit) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each token begins and ends. Turns the separators beyond ASCII into spaces, in place."""
    data = np.frombuffer(joined, dtype=np.uint8)
    alone = np.empty(0, dtype=np.int64)
    leads = np.flatnonzero(data >= 0xC0)  # first bytes of characters beyond ASCII
    if leads.size:
        first = data[leads]
        width = 2 + (first >= 0xE0).astype(np.int64) + (first >= 0xF0)
        point = (first & (0x7F >> width).astype(np.uint8)).astype(np.int64)
        for k in (1, 2, 3):
            point = np.where(width > k, point << 6 | (data[leads + k] & 0x3F), point)
        kind = _classes()[np.minimum(point, KNOWN - 1)]
        for k in range(4):
            data[leads[(kind == SPACE) & (width > k)] + k] = 32
        if unit == "auto":
            own = kind == ALONE
            alone, alone_width = leads[own], width[own]
    inside = data != 32
    begin = inside.copy()
    if unit == "char":
        begin &= (data & 0xC0) != 0x80
    else:
        begin[1:] &= ~inside[:-1]
        if alone.size:
            begin[alone] = True
            after = alone + alone_width
            begin[after] = inside[after]
    finish = inside[:-1] & (~inside[1:] | begin[1:])
    return np.flatnonzero(begin), np.flatnonzero(finish) + 1


def _hashes(joined: bytearray, begin: NDArray[np.int64], end: NDArray[np.int64]) -> U64:
    """A hash for each token, eight bytes at a time."""
    words = np.frombuffer(joined, dtype="<u8")
    size = end - begin

    def eight(at: NDArray[np.int64], left: NDArray[np.int64]) -> U64:
        index, shift = at >> 3, ((at & 7) << 3).astype(np.uint64)
        upper = (words[index + 1] << (np.uint64(63) - shift)) << np.uint64(1)  # two steps: a shift by 64 is undefined
        value: U64 = ((words[index] >> shift) | upper) & MASKS[np.minimum(left, 8)]
        return value

    hashes = eight(begin, size) * MULTIPLIER
    hashes ^= hashes >> np.uint64(29)
    longer = np.flatnonzero((size > 8) & (size <= LONG_TOKEN))
    read = 8
    while longer.size:
        value = (hashes[longer] ^ eight(begin[longer] + read, size[longer] - read)) * MULTIPLIER
        hashes[longer] = value ^ (value >> np.uint64(29))
        read += 8
        longer = longer[size[longer] > read]
    for token in np.flatnonzero(size > LONG_TOKEN).tolist():
        hashes[token] = xxhash.xxh3_64_intdigest(joined[begin[token] : end[token]])
    return hashes


def shingle(texts: Sequence[str], n: int = 5, unit: Unit = "auto") -> tuple[U64, NDArray[np.int64]]:
    """All shingles of all texts, in order and with repeats, and how many each text has."""
    joined, starts = _joined(texts)
    begin, end = _tokens(joined, unit)
    tokens = _hashes(joined, begin, end)
    first = np.searchsorted(begin, starts)  # a text's first token
    first, count = first[:-1], np.diff(first)
    grams, kept = tokens.copy(), np.ones(len(tokens), dtype=bool)
    size = len(tokens) - n + 1
    if size > 0:
        rolled = grams[:size]
        for k in range(1, n):
            rolled *= MULTIPLIER
            rolled += tokens[k : k + size]
    stop = first + count
    for k in range(1, n):
        kept[stop[count >= k] - k] = False  # these would run into the next text
    short = np.flatnonzero((count > 0) & (count < n))
    if short.size:
        value = tokens[first[short]]
        for k in range(1, n - 1):
            more = count[short] > k
            value[more] = value[more] * MULTIPLIER + tokens[first[short[more]] + k]
        grams[first[short]] = value + count[short].astype(np.uint64)
        kept[first[short]] = True
    return mix(grams[kept]), np.where(count >= n, count - n + 1, np.minimum(count, 1))


def token_streams(texts: Sequence[str]) -> list[bytes]:
    """Each normalised text with single spaces; a text without any token as it is."""
    joined, starts = _joined(texts)
    _tokens(joined, "word")
    streams = (b" ".join(joined[a:b].split()) for a, b in itertools.pairwise(starts.tolist()))
    return [stream or text.encode("utf-8", "replace") for stream, text in zip(streams, texts, strict=True)]


def shingle_sets(texts: Sequence[str], n: int = 5, unit: Unit = "auto") -> list[U64]:
    """Each text's set of shingles, sorted."""
    values, counts = shingle(texts, n, unit)
    return [np.unique(part) for part in np.split(values, np.cumsum(counts)[:-1])]


def jaccard(a: U64, b: U64) -> float:
    """Shared over all of two sorted sets; 0 when both are empty."""
    if len(a) > len(b):
        a, b = b, a
    if not len(a):
        return 0.0
    place = np.searchsorted(b, a)
    place[place == len(b)] = 0
    shared = int(np.count_nonzero(b[place] == a))
    return shared / (len(a) + len(b) - shared)
