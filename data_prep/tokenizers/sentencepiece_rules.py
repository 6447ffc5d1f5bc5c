"""What a SentencePiece model file says of itself: white space, characters, symbols of a user."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

BPE = 2  # of model_type
_USER_DEFINED = 4  # of a piece's type
# Part of the file -> number of a field -> its name here, which is the one in sentencepiece_model.proto.
_NAMES = {
    2: {3: "model_type", 24: "treat_whitespace_as_suffix"},
    3: {2: "charsmap", 3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"},
}


@dataclass
class Rules:
    """Defaults are those of sentencepiece_model.proto."""

    model_type: int = 1  # unigram
    treat_whitespace_as_suffix: int = 0
    charsmap: bytes = b""  # how characters are normalised, compiled; empty: as they are
    add_dummy_prefix: int = 1
    remove_extra_whitespaces: int = 1
    escape_whitespaces: int = 1
    user_defined: list[str] = field(default_factory=list)  # pieces that are found before all rules


def read_rules(data: bytes) -> Rules:
    rules = Rules()
    for part, value in _fields(data):  # 1 is a piece, 2 is trainer_spec, 3 is normalizer_spec
        if part == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))  # 1 its text, 2 its score, 3 its type
            if piece.get(3) == _USER_DEFINED and isinstance(text := piece[1], bytes):
                rules.user_defined.append(text.decode("utf-8"))
        elif part in _NAMES and isinstance(value, bytes):
            for number, inner in _fields(value):
                if number in _NAMES[part]:
                    setattr(rules, _NAMES[part][number], inner)
    return rules


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of a protobuf message's fields; fixed-width ones as bytes.

    Twenty lines spare the protobuf package, whose generated code refuses to load under other releases of itself.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        tag = varint()
        width = {0: 0, 1: 8, 2: -1, 5: 4}[tag & 7]
        if width == 0:
            yield tag >> 3, varint()
            continue
        size = varint() if width < 0 else width
        yield tag >> 3, data[at : at + size]
        at += size
