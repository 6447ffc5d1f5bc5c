"""Tokenizers: SentencePiece, Llama-3's tiktoken ranks and Hugging Face tokenizer.json behind one small protocol.

The kind is told from the file's content. Text is only text unless asked: "</s>" or "<|begin_of_text|>" in a document is
spelled with ordinary tokens and becomes a control id with `special=True` alone. Nothing in a tokenizer's files is ever
executed.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from data_prep.errors import UserError
from data_prep.tokenizers.base import Tokenizer, damaged
from data_prep.tokenizers.huggingface import HF_FILES, HuggingFace
from data_prep.tokenizers.sentencepiece import SentencePiece
from data_prep.tokenizers.tiktoken import LLAMA3_SPLIT, Tiktoken

__all__ = [
    "HF_FILES",
    "LLAMA3_SPLIT",
    "HuggingFace",
    "SentencePiece",
    "Tiktoken",
    "Tokenizer",
    "load_tokenizer",
    "sha256",
]

FILES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")  # looked for in a folder, in this order


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from its file, or from a folder that holds tokenizer.json or tokenizer.model.

    Raises UserError when there is none, or when the file is damaged or of a kind that is not known.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: no {' or '.join(FILES[:2])} in this folder; name the tokenizer's file", 2)
        path = found[0]
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such tokenizer file; check the path", 2) from None
    except OSError as error:
        raise UserError(
            f"{path}: tokenizer cannot be read: {error.strerror}; check the path and its permissions"
        ) from error
    if not data.strip():
        raise damaged(path, "the file is empty")
    if data.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a git-lfs pointer, not the tokenizer itself; run `git lfs pull` where it came from")
    if data[:256].lstrip()[:1] == b"{":
        return HuggingFace(path, data)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", data[:512]):
        return Tiktoken(path, data)
    return SentencePiece(path, data)


def sha256(path: str | Path) -> str:
    """Hex digest of a file: which tokenizer made a token file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
