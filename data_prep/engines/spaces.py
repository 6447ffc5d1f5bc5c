"""Tokenizers that write a space as ▁, told to an engine with plain spaces instead: the same ids, without rewriting text.

SentencePiece models, and tokenizer.json made of them, replace each space of a text by ▁ (three bytes for one) before
they look at it; for a fast engine that costs as much as all the rest. If the vocabulary spells ▁ as a space, the text
can stay as it is, once the few ▁ that stand in it are spaces too, which is what the tokenizer takes them for.
"""

from __future__ import annotations

import json
from typing import Any

from data_prep.tokenizers.spec import are, steps

ESCAPE = "▁"
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": ESCAPE}


def with_spaces(text: str) -> str | None:
    """A tokenizer.json as one that gives the same ids for texts whose every ▁ is a space; None where it is no such kind.

    Taken are BPE models over the whole text, with or without a ▁ put before it. Not taken: a vocabulary that holds
    spaces already (two pieces could become one), that has no piece ▁ (its bytes would be those of a space), or added
    tokens with either in them (they are looked for in the text itself).
    """
    if ESCAPE not in text:
        return None
    spec: dict[str, Any] = json.loads(text)
    model, normalizers = spec["model"], steps(spec.get("normalizer"), "normalizers")
    if model.get("type") != "BPE" or spec.get("pre_tokenizer"):
        return None
    prefixed = are(normalizers, [{"type": "Prepend", "prepend": ESCAPE}, _REPLACE])
    if not prefixed and not are(normalizers, [_REPLACE]):
        return None
    vocabulary: dict[str, int] = model["vocab"]
    added = [token["content"] for token in spec.get("added_tokens") or ()]
    if ESCAPE not in vocabulary or any(" " in piece for piece in vocabulary):
        return None
    if any(" " in name or ESCAPE in name for name in added) or any(
        token["normalized"] for token in spec.get("added_tokens") or ()
    ):
        return None
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    model["vocab"] = {_spaced(piece): number for piece, number in vocabulary.items()}
    model["merges"] = [[_spaced(left), _spaced(right)] for left, right in merges]
    spec["normalizer"] = {"type": "Prepend", "prepend": " "} if prefixed else None
    spec["decoder"] = None  # engines only encode
    return json.dumps(spec, ensure_ascii=False)


def _spaced(piece: str) -> str:
    return piece.replace(ESCAPE, " ")
