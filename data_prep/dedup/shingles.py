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
from dataclasses import dataclass
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
BLOCK = 128  # code points looked at together
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
def _tables() -> tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.bool_]]:
    """Code point -> SPACE, WORD or ALONE; its lower case; whether `_plain` must see a text that has it.

    The last are what NFC may change, move or join with what stands before it (Unicode's NFC_Quick_Check No or Maybe,
    and combining classes), and letters whose lower case has another length in UTF-8 or depends on its place (sigma).
    """
    kinds = np.zeros(KNOWN, dtype=np.uint8)
    lower = np.arange(KNOWN, dtype=np.int32)
    odd = np.zeros(KNOWN, dtype=bool)
    for first, last in ((0x3400, 0x9FFF), (0xAC00, 0xD7A3), (0x20000, KNOWN - 1)):  # ideographs, Hangul: asked below
        kinds[first : last + 1] = WORD  # only where these ranges have something else, which saves 0.1 s a process
    spans = (
        (0x80, 0x3400),
        (0x4D80, 0x4E00),
        (0xA000, 0xAC00),
        (0xD780, 0xD800),
        (0xF900, 0x20000),
        (0x2F800, 0x2FA80),
    )
    for start in (start for span in spans for start in range(*span, BLOCK)):
        block = "".join(map(chr, range(start, start + BLOCK)))
        categories = [unicodedata.category(letter) for letter in block]
        kinds[start : start + BLOCK] = [category[0] in "LMN" for category in categories]
        for point, category in enumerate(categories, start):
            if category[0] == "M":
                odd[point] = unicodedata.combining(chr(point)) > 0
        if block.lower() == block and unicodedata.is_normalized("NFD", block):
            continue  # most blocks: no case and nothing to compose
        for point, letter in enumerate(block, start):
            low = letter.lower()
            if low != letter:
                same = len(low) == 1 and len(low.encode()) == len(letter.encode()) and letter != "Σ"
                lower[point] = ord(low) if same else point
                odd[point] |= not same
            parts = unicodedata.decomposition(letter).split()
            if len(parts) == 2 and parts[0][0] != "<":
                odd[min(int(parts[1], 16), KNOWN - 1)] = True
            odd[point] |= not unicodedata.is_normalized("NFC", letter)
    kinds[-1] = SPACE  # stands for all beyond
    odd[0x1161:0x1200] = True  # jamo that join with one before
    for first, last in UNSPACED:
        kinds[first : last + 1] *= ALONE
    return kinds, lower, odd


def _plain(text: str) -> str:
    """NFC and lower case, by the book."""
    return unicodedata.normalize("NFC", text).lower()


def mix(values: U64) -> U64:
    """MurmurHash3's finalizer, in place: every bit of the input moves every bit of the output."""
    shift = np.uint64(33)
    values ^= values >> shift
    values *= MIX_1
    values ^= values >> shift
    values *= MIX_2
    values ^= values >> shift
    return values


def encoded(texts: Sequence[str]) -> list[bytes]:
    """Texts in UTF-8; half characters, which have none, become question marks."""
    return [text.encode("utf-8", "replace") for text in texts]


def _joined(parts: Sequence[bytes]) -> tuple[bytearray, NDArray[np.int64]]:
    """Texts end to end, ASCII in lower case, a space after each; and where each begins, and the last one ends."""
    starts = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) + 1 for part in parts], out=starts[1:])
    joined = bytearray(b" ".join(parts).translate(_ASCII))
    joined += b" " * 16  # room for reading 8 bytes at a time
    return joined, starts


@dataclass
class _Beyond:
    """The characters beyond ASCII: where each begins, its length in bytes, and its code point."""

    at: NDArray[np.int64]
    width: NDArray[np.int64]
    point: NDArray[np.int64]


def _beyond(data: NDArray[np.uint8]) -> _Beyond:
    at = np.flatnonzero(data >= 0xC0)
    first = data[at]
    width = 2 + (first >= 0xE0).astype(np.int64) + (first >= 0xF0)
    point = (first & (0x7F >> width).astype(np.uint8)).astype(np.int64)
    for k in (1, 2, 3):
        if k == 1 or (width > k).any():
            point = np.where(width > k, point << 6 | (data[at + k] & 0x3F), point)
    return _Beyond(at, width, np.minimum(point, KNOWN - 1))


def _normalized(texts: Sequence[bytes]) -> tuple[bytearray, NDArray[np.int64], _Beyond]:
    """As `_joined`, normalised: what is no letter, mark or digit is a space.

    Characters are lowered where they stand, all texts at once; only texts with odd characters go through `_plain`.
    """
    kinds, lower, odd = _tables()
    joined, starts = _joined(texts)
    data = np.frombuffer(joined, dtype=np.uint8)
    beyond = _beyond(data)
    strange = odd[beyond.point]
    if strange.any():
        again = list(texts)
        for number in np.unique(np.searchsorted(starts, beyond.at[strange], side="right") - 1).tolist():
            again[number] = _plain(texts[number].decode()).encode()
        joined, starts = _joined(again)
        data = np.frombuffer(joined, dtype=np.uint8)
        beyond = _beyond(data)
    low = lower[beyond.point]
    for width in (2, 3, 4):
        chosen = np.flatnonzero((low != beyond.point) & (beyond.width == width))
        at, value = beyond.at[chosen], low[chosen]
        for k in range(width - 1, 0, -1):
            data[at + k] = 0x80 | (value & 0x3F)
            value = value >> 6
        data[at] = value | (0xF0 << (4 - width)) & 0xFF
    space = kinds[beyond.point] == SPACE
    for k in range(4):
        data[beyond.at[space & (beyond.width > k)] + k] = 32
    return joined, starts, beyond


def _tokens(joined: bytearray, beyond: _Beyond, unit: Unit) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each token begins and ends."""
    data = np.frombuffer(joined, dtype=np.uint8)
    own = _tables()[0][beyond.point] == ALONE
    inside = np.zeros(len(data) + 1, dtype=bool)  # a token; one place later: something is before the first byte
    np.not_equal(data, 32, out=inside[1:])
    cut = inside[1:] != inside[:-1]
    if unit == "word" or (unit == "auto" and not own.any()):
        edges = np.flatnonzero(cut)  # the text ends in spaces: as many ends as beginnings
        return edges[::2].copy(), edges[1::2].copy()
    now = inside[1:]
    if unit == "char":
        cut |= now & ((data & 0xC0) != 0x80)
    else:
        alone = beyond.at[own]
        cut[alone] = True
        cut[alone + beyond.width[own]] = True
    edges = np.flatnonzero(cut)
    token = now[edges[:-1]]  # whether what begins at this edge is a token; the last thing is a space
    return edges[:-1][token], edges[1:][token]


def _hashes(joined: bytearray, begin: NDArray[np.int64], end: NDArray[np.int64]) -> U64:
    """A hash for each token, eight bytes at a time."""
    # Eight bytes from any byte on. numpy gathers from such a view six times as fast as from whole words shifted.
    window = np.ndarray(len(joined) - 7, dtype="<u8", buffer=joined, strides=(1,))
    size = end - begin

    def eight(at: NDArray[np.int64], left: NDArray[np.int64]) -> U64:
        value: U64 = window[at]
        value &= MASKS.take(left, mode="clip")
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


def shingle(texts: Sequence[bytes], n: int = 5, unit: Unit = "auto") -> tuple[U64, NDArray[np.int64]]:
    """All shingles of all texts (UTF-8), in order and with repeats, and how many each text has."""
    joined, starts, beyond = _normalized(texts)
    begin, end = _tokens(joined, beyond, unit)
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


def token_streams(texts: Sequence[bytes]) -> list[bytes]:
    """Each normalised text with single spaces; a text without any token as it is."""
    joined, starts, _ = _normalized(texts)
    streams = (b" ".join(joined[a:b].split()) for a, b in itertools.pairwise(starts.tolist()))
    return [stream or text for stream, text in zip(streams, texts, strict=True)]


def flat_sets(texts: Sequence[str], n: int = 5, unit: Unit = "auto") -> tuple[U64, NDArray[np.int64]]:
    """Each text's set of shingles, sorted, end to end; and the size of each."""
    values, counts = shingle(encoded(texts), n, unit)
    ends = np.cumsum(counts)
    begins = ends - counts
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        values[begin:end].sort()
    first = np.ones(len(values), dtype=bool)  # of equal ones
    first[1:] = values[1:] != values[:-1]
    first[begins[counts > 0]] = True
    before = np.concatenate([[0], np.cumsum(first)])
    return values[first], before[ends] - before[begins]


def shingle_sets(texts: Sequence[str], n: int = 5, unit: Unit = "auto") -> list[U64]:
    """Each text's set of shingles, sorted."""
    values, sizes = flat_sets(texts, n, unit)
    ends = np.cumsum(sizes)
    return [values[end - size : end] for end, size in zip(ends.tolist(), sizes.tolist(), strict=True)]


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
