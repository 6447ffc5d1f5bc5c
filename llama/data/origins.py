"""Which source of the recipe held-out tokens come from, and what the sources are called in figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray

from llama.config import Recipe, Source
from llama.data.batches import Batches
from llama.data.blend_file import prefixes

ENDINGS = re.compile(r"(\.(jsonl?|ndjson|tsv|csv|parquet|txt))?(\.(gz|zst))?$")


def names_of(sources: Sequence[Source]) -> list[str]:
    """A name for each source: its own, else as much of its path's end as tells it from the others."""
    names = [source.name or "" for source in sources]
    bare = [PurePath(ENDINGS.sub("", source.path)).parts for source in sources]
    for i, source in enumerate(sources):
        others = {parts for k, parts in enumerate(bare) if sources[k].name is None and parts != bare[i]}
        if source.name is None:
            lengths = range(1, len(bare[i]) + 1)
            length = next((n for n in lengths if all(o[-n:] != bare[i][-n:] for o in others)), len(bare[i]))
            names[i] = "-".join(bare[i][-length:])
    return [re.sub(r"[^\w.+-]+", "_", name).strip("-_.") or f"source_{i}" for i, name in enumerate(names, 1)]


class Origins:
    """Tells the source of each position of a held-out sample.

    `names`: of the sources, each once; sources of one name are one.
    """

    def __init__(self, recipe: Recipe, data: Batches):
        sources = recipe.data.validation or recipe.data.train
        called = names_of(sources)
        self.names = tuple(dict.fromkeys(called))
        self.numbers = [self.names.index(name) for name in called]
        self.data = data
        self.by_file: dict[str, int] = {}
        self.by_example = np.empty(0, np.int64)
        if len(self.names) == 1:
            return
        if recipe.chat is None:
            for number, source in zip(self.numbers, sources, strict=True):
                self.by_file |= {prefix: number for prefix in prefixes(source) if prefix not in self.by_file}
        else:
            self.by_example = self._of_examples(sources)

    def _of_examples(self, sources: Sequence[Source]) -> NDArray[np.int64]:
        """Number of the source of each example of the held-out conversations' set."""
        from llama.chat.encoded import files_of  # only here: most runs need no templates

        encoded = self.data.samples.encoded  # type: ignore[attr-defined]
        files = files_of(sources)
        of_file: dict[object, int] = {}
        for number, source in zip(self.numbers, sources, strict=True):
            of_file |= {file.resolve(): number for file in files_of([source]) if file.resolve() not in of_file}
        of_conversation = np.repeat([of_file[file.resolve()] for file in files], encoded.facts["conversations_of"])
        return np.repeat(of_conversation, np.diff(encoded.tokens.documents))

    def of(self, sample: int) -> NDArray[np.int64]:
        """Number of the source that each position of a sample comes from, (seq_length,)."""
        if len(self.names) == 1:
            return np.zeros(self.data.seq_length, np.int64)
        if self.by_file:
            return np.full(self.data.seq_length, self.by_file[self.data.samples.source(sample)])
        spread: NDArray[np.int64] = self.data.samples.spread(sample, self.by_example)  # type: ignore[attr-defined]
        return spread
