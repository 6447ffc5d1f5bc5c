"""A SentencePiece model: Llama-2's tokenizer.model and its kin."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from data_prep.errors import UserError
from data_prep.tokenizers import build
from data_prep.tokenizers.base import Flat, damaged, flat, in_range, transformers_config, whole, write_json
from data_prep.tokenizers.sentencepiece_rules import Rules, read_rules

_PROBES = (
    "",
    " ",
    "Hello world",
    "  two  spaces\n\n\tand\ttabs ",
    "naïve façade 12345",
    "日本語 🦙 \u0000",
    "</s><s><unk>",
)


class SentencePiece:
    """A loaded SentencePiece model. Meanings of methods: see `base.Tokenizer`."""

    kind = "sentencepiece"

    def __init__(self, path: Path, data: bytes) -> None:
        import sentencepiece

        self.path, self._data = path, data
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError:
            raise damaged(path, "neither SentencePiece, nor tiktoken ranks, nor JSON") from None
        model = self._model
        self.vocab_size: int = model.get_piece_size()
        if self.vocab_size == 0:
            raise damaged(path, "a SentencePiece model without pieces")
        bos, eos = model.bos_id(), model.eos_id()
        self.bos: int | None = bos if bos >= 0 else None
        self.eod: int | None = eos if eos >= 0 else None
        control = (i for i in range(self.vocab_size) if model.is_control(i) or model.is_unknown(i))
        self.control: dict[str, int] = {model.id_to_piece(i): i for i in control}

    @cached_property
    def rules(self) -> Rules:
        return read_rules(self._data)

    @cached_property
    def pieces(self) -> set[str]:
        """What text can be made of: not control tokens, nor single bytes."""
        model, ids = self._model, range(self.vocab_size)
        return {
            model.id_to_piece(i) for i in ids if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
        }

    @cached_property
    def symbols(self) -> list[str]:
        return self.rules.user_defined

    def encode(self, text: str, special: bool = False) -> list[int]:
        text = whole(text)
        if not special:
            ids: list[int] = self._model.encode(text)
            return ids
        # As transformers does: each stretch between two control tokens is encoded as a text of its own.
        mixed: list[int] = []
        for i, part in enumerate(self._control.split(text)):
            mixed += [self.control[part]] if i % 2 else self._model.encode(part)
        return mixed

    @cached_property
    def _control(self) -> re.Pattern[str]:
        names = sorted(self.control, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})")

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        if special:
            return [self.encode(text, special) for text in texts]
        ids: list[list[int]] = self._model.encode([whole(text) for text in texts], num_threads=1)
        return ids

    def encode_flat(self, texts: Sequence[str], special: bool = False) -> Flat:
        return flat(self.encode_batch(texts, special))

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._model.decode(in_range(self.path, ids, self.vocab_size))
        return text

    def as_json(self, special: bool = False) -> str:
        # A symbol with a space, or one that normalised characters may form, cannot be looked for in the text as it is.
        if self.symbols and (self.rules.charsmap or any(" " in name or "▁" in name for name in self.symbols)):
            raise UserError(f"{self.path}: tokenizer.json cannot express the user's symbols of this model")
        text: str = build.from_sentencepiece(
            self.path, self._model, self.rules, self.control if special else {}
        ).to_str()
        return text

    def save_for_transformers(self, directory: str | Path, add_bos: bool = True) -> None:
        """tokenizer.model as it is, and a tokenizer.json built from it.

        Raises UserError for models whose rules tokenizer.json cannot say (unigram models, say).
        """
        add_bos = add_bos and self.bos is not None
        directory = Path(directory)
        built = build.from_sentencepiece(
            self.path, self._model, self.rules, self.control, self.bos if add_bos else None
        )
        built.encode_special_tokens = True  # as encode does, for the comparison alone; not saved
        for probe in _PROBES:
            if built.encode(probe, add_special_tokens=False).ids != self.encode(probe):
                raise UserError(f"{self.path}: tokenizer.json cannot express this model (differs on {probe!r})")
        directory.mkdir(parents=True, exist_ok=True)
        built.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer.model").write_bytes(self._data)
        bos, eos = (None if i is None else self._model.id_to_piece(i) for i in (self.bos, self.eod))
        unknown = self._model.id_to_piece(self._model.unk_id())
        write_json(directory / "tokenizer_config.json", transformers_config(bos, eos, add_bos, unk_token=unknown))
