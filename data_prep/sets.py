"""Which token files a person means, and what can be said of several together."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.parts_file import find_parts

Meta = dict[str, Any]

ENDINGS = (".bin", ".idx", ".meta.json")
# What makes ids of one set mean something else in another, and what a training run relies on.
MUST_AGREE = ("tokenizer_sha256", "vocab_size", "bos", "eod", "append_eod", "prepend_bos", "parse_special")
SUMS = ("text_bytes", "lines", "blank_lines", "repaired_documents", "bad_lines", "checked_documents")
EXAMPLES = 10


def expand_sets(inputs: Iterable[str | Path]) -> list[str]:
    """Prefixes and folders of parts, in the order given, from these, from .bin or .idx, folders of pairs, and globs.

    A folder's pairs come by file name, as Megatron's tools/merge_datasets.py takes them. Raises UserError for a folder
    or glob without any, half a pair in a folder, and a set that is named twice.
    """
    found: dict[str, None] = {}
    for name, sure in _expand(inputs):
        if name in found and sure:
            raise UserError(f"{name} is named twice; leave one out (repeats belong in the weights of a blend)", 2)
        found[name] = None
    return list(found)


def _expand(inputs: Iterable[str | Path]) -> Iterator[tuple[str, bool]]:
    """(prefix, whether naming it again is a mistake): a shell's glob names both .bin and .idx."""
    for item in map(str, inputs):
        if (folder := find_parts(item)) is not None:
            yield str(folder), True
        elif Path(item).is_dir():
            yield from ((prefix, True) for prefix in _pairs(Path(item)))
        elif any(character in item for character in "*?[") and not (
            Path(item).exists() or Path(f"{item}.idx").exists()
        ):
            # A pattern for files, which may find logs and text too, or for prefixes; it may be absolute.
            names = sorted(glob.glob(item, recursive=True))  # noqa: PTH207
            names = [name for name in names if name.endswith(ENDINGS) or Path(name).is_dir()]
            names += sorted(glob.glob(f"{item}.idx", recursive=True))  # noqa: PTH207
            if not names:
                raise UserError(f"{item}: no token file has such a name; check the pattern", 2)
            yield from _expand(names)
        elif ending := next((end for end in ENDINGS if item.endswith(end)), None):
            yield item.removesuffix(ending), False
        else:
            yield item, True


def _pairs(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".idx") and path.is_file())
    prefixes = list(dict.fromkeys(name[:-4] for name in names))
    if not prefixes:
        raise UserError(f"{folder}: holds no token file, a pair of .bin and .idx; check the path", 2)
    for prefix in prefixes:
        for ending in (".bin", ".idx"):
            if prefix + ending not in names:
                raise UserError(f"{folder}/{prefix}{ending} does not exist; complete the pair, or remove the rest", 2)
    return [str(folder / prefix) for prefix in prefixes]


def combine_metas(named: Sequence[tuple[str, Meta | None]], force: bool = False) -> Meta:
    """What holds of all sets together: facts on which all agree, sums of what was counted, all inputs.

    named: each set, and its meta.json (None: it has none; the result then knows no tokenizer, unless forced). Raises
    UserError for two sets of different tokenizers, unless forced: then those facts are left out.
    """
    known = [(name, meta) for name, meta in named if meta]
    together: Meta = {"merged": [name for name, _ in named]}
    if not known or (len(known) < len(named) and not force):
        return together
    first, facts = known[0]
    for name, meta in known:
        differ = [key for key in MUST_AGREE if meta.get(key) != facts.get(key)]
        if differ and not force:
            key = differ[0]
            raise UserError(
                f"{first} and {name} are not of one tokenizer and its settings: {key} is {facts.get(key)} and "
                f"{meta.get(key)}; tokenize one of them again, or --force",
                2,
            )
    metas = [meta for _, meta in known]
    for key, value in facts.items():
        if all(key in meta and meta[key] == value for meta in metas):
            together[key] = value
    tokenizers = [meta["tokenizer"] for meta in metas if isinstance(meta.get("tokenizer"), str)]
    if "tokenizer_sha256" in together and tokenizers:  # one tokenizer, in several places
        together["tokenizer"] = next((path for path in tokenizers if Path(path).exists()), tokenizers[0])
    for key in SUMS:
        counts = [meta.get(key) for meta in metas]
        together.pop(key, None)
        if len(known) == len(named) and all(isinstance(count, int) for count in counts):
            together[key] = sum(count for count in counts if isinstance(count, int))
    causes: Counter[str] = Counter()
    for meta in metas:
        causes.update(meta.get("bad_causes") or {})
    together["bad_causes"] = dict(sorted(causes.items()))
    together["bad_examples"] = [line for meta in metas for line in meta.get("bad_examples") or []][:EXAMPLES]
    together["inputs"] = [source for meta in metas for source in meta.get("inputs") or []]
    return together
