"""Encoded conversations on the disk: made once, by one process, and memory-mapped by all.

CACHE/DIGEST holds two token files of data_prep/indexed.py, `tokens` and `trained` (0 or 1 for each token), and facts.json.
A document is a conversation, a sequence an example. DIGEST covers all that decides the bytes: the files' content, the
tokenizer, the template, the settings. The folder is written aside and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.conversations import Conversation, Tally, read_conversations
from data_prep.conversations.files import SUFFIXES
from data_prep.errors import UserError
from data_prep.indexed import IndexedDataset, IndexedWriter, token_dtype
from data_prep.inputs import expand_inputs
from data_prep.tokenizers import Tokenizer, load_tokenizer
from llama.chat.choose import load_template
from llama.chat.encode import TOO_LONG, Encoder
from llama.chat.template import ChatTemplate
from llama.config import Recipe, Source

VERSION = 2  # of what the same input is encoded to, facts included
DAY = 86400.0


@dataclass(frozen=True)
class EncodedSet:
    """An encoded set, opened. facts: what was read, left out and why; `conversations_of`: how many each file gave."""

    tokens: IndexedDataset
    trained: IndexedDataset
    facts: dict[str, Any]
    folder: Path

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each example."""
        return self.tokens.lengths

    @property
    def fingerprint(self) -> str:
        """Changes when any example could."""
        return str(self.facts["digest"])


def tokenizer_of(recipe: Recipe) -> Tokenizer:
    """The tokenizer that conversations are encoded with. Raises UserError where none is named."""
    named = recipe.data.tokenizer
    start = recipe.train.init_from
    if named is None and start is not None and any(Path(start).glob("tokenizer.*")):
        named = start
    if named is None:
        raise UserError("conversations need a tokenizer; set data.tokenizer to its folder, or train.init_from", 2)
    return load_tokenizer(named)


def template_of(recipe: Recipe, tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template of the recipe."""
    assert recipe.chat is not None
    return load_template(recipe.chat.template, tokenizer)


def files_of(sources: Sequence[Source]) -> list[Path]:
    """The files of conversations that the sources name. Raises UserError for a name that leads nowhere."""
    if not sources:
        raise UserError("data.train names no file of conversations; set data.train=FILE.json, a folder or a pattern", 2)
    for source in sources:
        if Path(f"{source.path}.idx").is_file() and not Path(source.path).exists():
            raise UserError(
                f"data.train={source.path} is a token file, and chat: trains on conversations; name files of "
                "conversations, or leave chat: out",
                2,
            )
    return expand_inputs([source.path for source in sources], SUFFIXES)


def check_chat(recipe: Recipe) -> None:
    """What can be refused before anything is encoded. Raises UserError."""
    tokenizer = tokenizer_of(recipe)
    template_of(recipe, tokenizer)
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.vocab_size} ids, more than model.vocab_size={recipe.model.vocab_size}; "
            "give the model's own tokenizer",
            2,
        )
    files_of(recipe.data.train)
    if recipe.data.validation:
        files_of(recipe.data.validation)


def cache_of(recipe: Recipe) -> Path:
    """Where the recipe's encoded sets lie."""
    assert recipe.chat is not None
    return Path(recipe.chat.cache or f"{recipe.folder}/chat")


def open_encoded(
    recipe: Recipe, sources: Sequence[Source], cache: Path | None = None, say: Callable[[str], None] | None = None
) -> EncodedSet:
    """The encoded conversations of `sources`, encoded now if that was not done before.

    Raises UserError for files that are not understood, a conversation that is too long where that is an error, more
    records left out than chat.max_bad, and a set in which nothing is trained.
    """
    chat, tokenizer = recipe.chat, tokenizer_of(recipe)
    assert chat is not None
    template, files = template_of(recipe, tokenizer), files_of(sources)
    digest = _digest(recipe, tokenizer, template, files)
    folder = (cache or cache_of(recipe)) / digest
    if not (folder / "facts.json").is_file():
        if say is not None:
            say(f"encoding conversations of {files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else ""))
        encoder = Encoder(tokenizer, template, chat.loss, chat.truncation, recipe.data.seq_length + 1)
        try:
            _publish(folder, digest, encoder, files, chat.format, chat.max_bad)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}; free space, or set chat.cache") from error
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return EncodedSet(IndexedDataset(folder / "tokens"), IndexedDataset(folder / "trained"), facts, folder)


def _digest(recipe: Recipe, tokenizer: Tokenizer, template: ChatTemplate, files: Sequence[Path]) -> str:
    assert recipe.chat is not None
    settings = recipe.chat.model_dump(include={"format", "loss", "truncation", "max_bad"})
    facts = [
        VERSION,
        hashlib.sha256(tokenizer.path.read_bytes()).hexdigest(),
        [tokenizer.bos, sorted(template.control.items()), sorted(template.names.items()), template.source],
        sorted(settings.items()),
        recipe.data.seq_length,
        [[file.name, _content(file)] for file in files],
    ]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


def _content(path: Path) -> str:
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _publish(folder: Path, digest: str, encoder: Encoder, files: Sequence[Path], form: str, max_bad: float) -> None:
    """Encode into a folder aside, then give it its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob("*.writing-*"):  # of processes that were killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > DAY:
                shutil.rmtree(left, ignore_errors=True)
    aside = folder.with_name(f"{digest}.writing-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        facts = _write(aside, encoder, files, form, max_bad) | {"digest": digest}
        with (aside / "facts.json").open("w", encoding="utf-8") as file:
            json.dump(facts, file, indent=2, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / "facts.json").is_file():  # else another run was as fast
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(folder: Path, encoder: Encoder, files: Sequence[Path], form: str, max_bad: float) -> dict[str, Any]:
    started = time.monotonic()
    tally, seen = Tally(), Counter[int]()
    examples = trained = 0
    largest = -1
    read_from: deque[str] = deque()  # the file of each conversation that is on its way through the encoder
    kept = {str(file): 0 for file in files}

    def read() -> Iterator[Conversation]:
        for conversation in read_conversations(files, form, 1.0, tally):
            read_from.append(next(reversed(tally.formats)))  # the file that was begun last
            yield conversation

    dtype = token_dtype(encoder.tokenizer.vocab_size)
    with IndexedWriter(folder / "tokens", dtype) as ids, IndexedWriter(folder / "trained", np.uint8) as flags:
        for _, parts in encoder.examples(read()):
            lengths, file = [len(part) for part in parts], read_from.popleft()
            if not parts:
                continue
            kept[file] += 1
            whole = np.concatenate([part.ids for part in parts])
            marks = np.concatenate([part.trained for part in parts])
            ids.add_document(whole, lengths)
            flags.add_document(marks.astype(np.uint8), lengths)
            examples, trained = examples + len(parts), trained + int(marks.sum())
            largest = max(largest, int(whole.max()))
            seen[xxhash.xxh3_64_intdigest(whole.tobytes())] += 1
        _check(encoder, tally, trained, max_bad)
    return {
        "files": [str(file) for file in files],
        "formats": tally.formats,
        "records": tally.records,
        "conversations": len(seen) and seen.total(),
        "conversations_of": list(kept.values()),
        "unreadable": dict(tally.bad),
        "unreadable_first": tally.examples,
        "odd": dict(tally.notes),
        "counts": dict(encoder.counts),
        "first": encoder.places,
        "examples": examples,
        "tokens": ids.tokens,
        "trained_tokens": trained,
        "largest_id": largest,
        "duplicates": seen.total() - len(seen),
        "template": encoder.template.name,
        "tokenizer": str(encoder.tokenizer.path),
        "seconds": round(time.monotonic() - started, 2),
    }


def _check(encoder: Encoder, tally: Tally, trained: int, max_bad: float) -> None:
    """Refuse a set of which too much is left out or too long, or in which nothing is trained."""
    refused = {what: count for what, count in encoder.counts.items() if what.startswith("refused")}
    bad = tally.refused + sum(refused.values())
    if bad > max_bad * tally.records:
        causes = [f"{count:,} × {cause}" for cause, count in tally.bad.most_common(4)]
        causes += [f"{count:,} × {what} (first: {encoder.places[what]})" for what, count in list(refused.items())[:3]]
        raise UserError(
            f"{bad:,} of {tally.records:,} records are left out ({bad / tally.records:.2%}; chat.max_bad allows "
            f"{max_bad:.2%}): {'; '.join(causes)}. {' First: ' + '; '.join(tally.examples) if tally.examples else ''}"
        )
    if encoder.truncation == "error" and encoder.counts[TOO_LONG]:
        raise UserError(
            f"{encoder.counts[TOO_LONG]:,} of {tally.conversations:,} conversations have more tokens than "
            f"data.seq_length={encoder.limit - 1} takes, up to {encoder.longest:,} (first: {encoder.places[TOO_LONG]}); "
            "raise it, or set chat.truncation to drop, split or left"
        )
    if not trained:
        told = "; ".join(
            f"{count:,} × {what} (first: {encoder.places[what]})" for what, count in encoder.counts.items()
        )
        raise UserError(
            f"nothing would be trained: {told or 'no answer of the assistant'}; see chat.loss, chat.truncation"
        )
