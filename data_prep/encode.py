"""From batches of texts to the ids that go into a part: BOS, EOD, and a watch on the engine."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep import engines
from data_prep.cutting import Cutter, encode_long
from data_prep.errors import UserError
from data_prep.indexed import token_dtype
from data_prep.readers import Batch, Fault
from data_prep.tokenizers import Tokenizer

LONG = 1 << 20  # characters from which a document is encoded piece by piece, to bound memory
FEW = 1500  # ids of a document on average, from which copying document by document pays
CHECKED = 1 / 4096  # share of the text that is encoded again by the official tokenizer, ten times as slow or more
STRETCH = 1024  # characters of a document that are checked at a time


def _of_the_text(error: BaseException) -> bool:
    """Is this what a tokenizer raises over a text, rather than an order to stop or a lack of memory?"""
    return not isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError | OSError)


class EngineMismatchError(Exception):
    """A fast engine gave other ids than the official tokenizer. The message says for which text."""


class Encoder:
    """A tokenizer and how it is used. `mark` begins a part: what is checked then depends on the part alone."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        engine: engines.Engine,
        cutter: Cutter | None,
        append_eod: bool,
        prepend_bos: bool,
    ) -> None:
        self.tokenizer, self.engine, self.cutter = tokenizer, engine, cutter
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.eod = tokenizer.eod if append_eod else None
        self.bos = tokenizer.bos if prepend_bos else None
        self.checked = 0  # documents of this part of which a stretch was checked
        self._credit, self._random = float(STRETCH), random.Random(0)

    def mark(self, name: str) -> None:
        self.checked, self._credit, self._random = 0, float(STRETCH), random.Random(name)

    def __call__(self, batch: Batch) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Ids of a batch's documents end to end in the file's type, and the length of each.

        Documents that the tokenizer cannot encode are taken out of the batch and counted in it as bad. Raises
        EngineMismatchError.
        """
        texts = batch.texts
        if batch.goes_on and self.cutter is not None:
            texts = [self.cutter.continuation(text) for text in texts]
        try:
            ids, lengths = self._encode(texts)
        except BaseException as error:  # a panic of Rust code is no Exception
            if not _of_the_text(error):
                raise
            texts = self._good(batch, texts)
            ids, lengths = self._encode(texts) if texts else (np.empty(0, np.uint32), np.empty(0, np.int64))
        self._check(texts)
        return self._marked(ids, lengths, not batch.goes_on, not batch.more)

    def _encode(self, texts: list[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        if self.cutter is None or not texts or max(map(len, texts)) <= LONG:
            return self.engine.encode_flat(texts)
        flats, sizes, start = [], [], 0
        for i, text in enumerate(texts):
            if len(text) > LONG:
                for ids, lengths in (
                    self.engine.encode_flat(texts[start:i]),
                    encode_long(self.engine, self.cutter, text),
                ):
                    flats.append(ids)
                    sizes.append(lengths)
                start = i + 1
        ids, lengths = self.engine.encode_flat(texts[start:])
        return np.concatenate([*flats, ids]), np.concatenate([*sizes, lengths])

    def _good(self, batch: Batch, texts: list[str]) -> list[str]:
        """The texts that can be encoded one by one; the others become faults of the batch."""
        good = []
        for line, text in zip(batch.lines, texts, strict=True):
            try:
                self._encode([text])
            except BaseException as error:
                if not _of_the_text(error):
                    raise
                if batch.goes_on or batch.more:  # what was written of the document would be left without it
                    shown = f"{text[:40]!r}…: {str(error)[:200]}"
                    raise UserError(f"the tokenizer failed within a large text, at {shown}; leave it out") from error
                cause = "the tokenizer failed"
                batch.tally.bad[cause] += 1
                batch.tally.documents -= 1
                batch.faults.append(Fault(line, -1, cause, str(error)[:200], text[:200]))
            else:
                good.append(text)
        return good

    def _check(self, texts: list[str]) -> None:
        """Now and then encode a stretch of a document by the official tokenizer too; of each part, at least one."""
        if self.engine.name == "official" or not texts:
            return
        self._credit += sum(map(len, texts)) * CHECKED
        if self._credit < STRETCH:
            return
        text = texts[self._random.randrange(len(texts))]
        if len(text) > STRETCH:
            start = max(0, text.find(" ", self._random.randrange(len(text) - STRETCH)))  # a word, as texts begin with
            text = text[start : start + STRETCH]
        self._credit -= STRETCH
        self.checked += 1
        if engines.check(self.engine, self.tokenizer, [text]) is not None:
            raise EngineMismatchError(f"{text[:80]!r}")

    def _marked(
        self, ids: NDArray[np.uint32], lengths: NDArray[np.int64], begins: bool, ends: bool
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Put BOS before and EOD behind each document; one that came out without ids gets no EOD, as in Megatron."""
        before = (self.bos is not None) & begins & np.ones(len(lengths), bool)
        behind = (self.eod is not None) & ends & ((lengths > 0) | before)
        if not before.any() and not behind.any():
            return ids.astype(self.dtype), lengths
        sizes = lengths + before + behind
        ends_at = np.cumsum(sizes)
        marked = np.empty(int(ends_at[-1]), self.dtype)
        if before.any():
            marked[(ends_at - sizes)[before]] = self.bos
        if behind.any():
            marked[(ends_at - 1)[behind]] = self.eod
        if len(lengths) * FEW < len(ids):  # long documents: a copy of each is quicker than a mask over all
            at = 0
            for size, start in zip(lengths.tolist(), (ends_at - sizes + before).tolist(), strict=True):
                marked[start : start + size] = ids[at : at + size]
                at += size
            return marked, sizes
        plain = np.ones(len(marked), bool)
        plain[(ends_at - sizes)[before]] = False
        plain[(ends_at - 1)[behind]] = False
        marked[plain] = ids
        return marked, sizes
