"""A full check of a token file or a folder of parts, and a look at its text."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from data_prep import tokenizers
from data_prep.errors import UserError
from data_prep.index_format import read_header
from data_prep.joined import joined_index, open_tokens, write_joined_index
from data_prep.parts_file import NAME, Part, Parts, find_parts, read_meta, read_parts
from data_prep.placed import Digests
from data_prep.ranges import RangeFile, in_order
from data_prep.token_checks import Report, Rules, check_pair

LOOKED_AT = 2048  # tokens of a sampled document


def verify(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    workers: int = 1,
    samples: int = 8,
    update: Callable[[int], None] = lambda _: None,
) -> Report:
    """Check the token file PREFIX, or each part of PREFIX.parts, against its index, its account and its digests.

    tokenizer, vocab_size: to check against where the account does not tell. samples: documents decoded with the
    tokenizer. update: called with the bytes of data read since its last call. What is wrong with the files is in the
    report. Raises UserError for what was asked wrongly: no token file of this name, no such tokenizer, a folder of
    parts that is not finished.
    """
    folder = find_parts(path)
    name = str(path).removesuffix(".bin").removesuffix(".idx") if folder is None else str(folder)
    if folder is None and not any(Path(f"{name}.{kind}").exists() for kind in ("bin", "idx")):
        raise UserError(f"{name}.idx does not exist; check the path", 2)
    report = Report(name)
    meta: dict[str, Any] = {}
    try:
        meta = read_meta(name) or {}
    except UserError as error:
        if folder is not None:
            raise
        report.fault(str(error))
    loaded = _load_tokenizer(tokenizer, meta, report)
    if vocab_size is None and tokenizer is not None and loaded is not None:
        vocab_size = loaded.vocab_size
    rules = Rules.of(meta, vocab_size)
    if folder is None:
        digests = [_digests(meta)]
        report.add(check_pair(name, rules, digests[0], workers, update))
    else:
        parts = read_parts(folder)
        digests = parts.digests
        _check_parts(parts, rules, report, workers, update)
        _check_joined(parts, report)
    account = f"{name}.meta.json" if folder is None else f"{name}/{NAME}"
    for kind in ("documents", "sequences", "tokens"):
        if kind in meta and meta[kind] != getattr(report, kind):
            report.fault(f"{account} tells of {meta[kind]} {kind}, and there are {getattr(report, kind)}")
    _tell(report, rules, all(each for told in digests for each in told))
    if loaded is None:
        report.skipped.append("text: the tokenizer is not noted, or not there; --tokenizer names one")
    elif report.ok:
        _check_text(name, loaded, samples, report)
    return report


def _digests(meta: dict[str, Any]) -> Digests:
    data, index = (str(told) if (told := meta.get(f"{kind}_xxh3")) else None for kind in ("bin", "idx"))
    return data, index


def _check_parts(parts: Parts, rules: Rules, report: Report, workers: int, update: Callable[[int], None]) -> None:
    """Each part by itself, and against what parts.json lists."""

    def check(part: Part) -> Report:
        prefix = str(parts.folder / part.name)
        found = check_pair(prefix, rules, (part.bin_xxh3, part.idx_xxh3))
        if found.ok:
            if (dtype := read_header(prefix).dtype) != parts.dtype:
                found.fault(f"{prefix}.idx holds {dtype} tokens, and {NAME} says {parts.dtype}")
            try:
                parts.check(part, found.documents, found.sequences, found.tokens * dtype.itemsize)
            except UserError as error:
                found.fault(str(error))
        return found

    for part, found in in_order(check, parts.parts, workers):
        report.add(found)
        update(part.tokens * parts.dtype.itemsize)


def _check_joined(parts: Parts, report: Report) -> None:
    """The index that training from parts reads, where there is one, is that of these parts."""
    path, digests = joined_index(parts), []
    if not path.exists() or not report.ok:
        return
    with tempfile.TemporaryDirectory(prefix="herd-verify-") as folder:
        fresh = Path(folder) / path.name
        write_joined_index(parts, fresh)
        for each in (path, fresh):
            hasher = xxhash.xxh3_128()
            with RangeFile(each) as file:
                file.hash_into(hasher, 0, file.size)
            digests.append(hasher.hexdigest())
    if digests[0] != digests[1]:
        report.fault(f"{path} is not the index of these parts; remove it, the next run makes it again")


def _tell(report: Report, rules: Rules, digests: bool) -> None:
    """Say in words what was checked and what could not be."""
    report.checked.append("every length, pointer and document of the index, and the size of the data")
    for done, told, why in (
        (digests, "digests of .bin and .idx", "digests of .bin and .idx: none are recorded"),
        (rules.vocab_size is not None, f"every id is below {rules.vocab_size}", "ids: the vocabulary is not known"),
        (rules.ends, f"each document ends with id {rules.eod}", "ends: no account says what a document ends with"),
        (rules.plain, "no control id stands elsewhere", "control ids: they may stand in text"),
    ):
        (report.checked if done else report.skipped).append(told if done else why)


def _load_tokenizer(given: str | Path | None, meta: dict[str, Any], report: Report) -> tokenizers.Tokenizer | None:
    """The tokenizer that was given, or the noted one where it is still there and still the same."""
    path = given or meta.get("tokenizer")
    if not isinstance(path, str | Path) or not (given or Path(path).exists()):
        return None
    try:
        loaded = tokenizers.load_tokenizer(path)
    except UserError as error:
        if given:
            raise
        report.skipped.append(f"tokenizer: {error}")
        return None
    noted = meta.get("tokenizer_sha256")
    if noted and tokenizers.sha256(loaded.path) != noted:
        told = f"{loaded.path} is not the tokenizer that {report.prefix} was made with: its sha256 is another"
        if given:
            report.fault(told)
        else:
            report.skipped.append(told)
        return None
    return loaded


def _check_text(path: str, tokenizer: tokenizers.Tokenizer, samples: int, report: Report) -> None:
    """Documents from all over the file decode, and encode to the same ids again.

    A few may not: not every sequence of ids is what a tokenizer would choose. That none does is another tokenizer's.
    """
    data = open_tokens(path)
    number = len(data.documents) - 1
    chosen = sorted(random.Random(0).sample(range(number), min(samples, number)))
    whole = same = 0
    for document in chosen:
        ids = data.document(document, LOOKED_AT + 1).tolist()
        try:
            tokenizer.decode(ids[:LOOKED_AT])
        except UserError as error:
            report.fault(f"{path}: document {document}: {error}")
            continue
        if ids and len(ids) <= LOOKED_AT:
            body = ids[int(ids[0] == tokenizer.bos) :]
            body = body[: len(body) - int(body[-1:] == [tokenizer.eod])]
            whole += 1
            same += tokenizer.encode(tokenizer.decode(body)) == body
    report.checked.append(f"{len(chosen)} documents decode; {same} of {whole} short ones encode to the same ids again")
    if whole >= 3 and not same:
        report.fault(f"{path}: text encodes to other ids with {tokenizer.path}; is it the tokenizer of this file?")
