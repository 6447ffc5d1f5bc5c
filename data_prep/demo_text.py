"""Real text that every machine has: Python's own language reference, docstrings and source, for the embedded demo.

The order is prose first: `pydoc_data.topics` (the language reference in English), then the docstrings of the standard
library, then its source, up to a few MB. Nothing is downloaded; a given Python gives the same bytes each time.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from data_prep import readers
from data_prep.errors import UserError

# Not prose, or not the same everywhere: tests, generated tables, installed packages, bundled wheels, Tk programs.
LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3", "pydoc_data"}
LEFT_OUT |= {"ensurepip", "turtledemo", "encodings", "config", "lib-dynload"}
DOCSTRING_CHARACTERS = 80  # shorter ones are labels, not prose


def _modules() -> list[Path]:
    """Source files of the standard library, sorted by their path below it."""
    root = Path(sysconfig.get_path("stdlib"))
    kept = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in LEFT_OUT and not name.startswith("config-")]
        # _sysconfigdata and its like are written when Python is built: they differ from machine to machine
        kept += [Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfig")]
    return sorted(kept, key=lambda path: path.relative_to(root).parts)


def _topics() -> Iterator[tuple[str, str]]:
    """(source, text) of pydoc's topics; none where a distribution leaves them out."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):
        return
    for name in sorted(topics):
        yield f"pydoc_data.topics:{name}", topics[name].strip()


def _docstrings(source: str) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, long enough to be prose, in the order of the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in strings
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text and len(text := inspect.cleandoc(text)) >= DOCSTRING_CHARACTERS:
                yield text


def documents(megabytes: float = 6.0) -> Iterator[tuple[str, str]]:
    """(source, text): topics, then docstrings module by module, then source files until about `megabytes` (10**6)."""
    budget, sources = megabytes * 1e6, []
    for name, text in _topics():
        if text:
            budget -= len(text.encode())
            yield name, text
    root = Path(sysconfig.get_path("stdlib"))
    for path in _modules():
        name = path.relative_to(root).as_posix()
        try:
            source = path.read_text(encoding="utf-8")
            prose = "\n\n".join(_docstrings(source))
        except (OSError, ValueError, SyntaxError):
            continue  # a broken or unreadable module is no reason to have no demo
        sources.append((name, source))
        if prose:
            budget -= len(prose.encode())
            yield f"docstrings:{name}", prose
        if budget <= 0:
            return
    for name, source in sources:
        if budget <= 0:
            return
        if source.strip():
            budget -= len(source.encode())
            yield name, source


def write_demo_text(directory: str | Path, megabytes: float = 6.0) -> Path:
    """Write DIRECTORY/text.jsonl (keys text, source), about `megabytes` of text, and return its path.

    Raises UserError where Python came without its library's sources, or the disk refuses.
    """
    path = Path(directory) / "text.jsonl"
    aside = path.with_name(path.name + ".tmp")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as file:
            for count, (source, text) in enumerate(documents(megabytes), 1):  # noqa: B007
                file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if not count:
            raise UserError("this Python has neither pydoc_data.topics nor library sources; give text of your own")
        aside.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space there, or write elsewhere") from error
    finally:
        aside.unlink(missing_ok=True)
    return path


def train_tokenizer(jsonl: str | Path, model: str | Path, vocab_size: int = 4096) -> Path:
    """Train a SentencePiece BPE on a JSONL file, with the settings of Llama-2's, and write it to `model`.

    Seconds for a few MB and 4,096 pieces. Raises UserError when the text is too little for `vocab_size`.
    """
    import sentencepiece

    target, trained = Path(model), io.BytesIO()
    lines = (line for text, _ in readers.read_documents([jsonl]) for line in text.split("\n") if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=trained,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,  # no text is unknown
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,  # indentation is meaning
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=True,
            character_coverage=0.99995,
            max_sentence_length=1 << 16,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"{jsonl}: no tokenizer of {vocab_size} pieces can be trained on it: {error}") from error
    aside = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(trained.getvalue())
        aside.replace(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; free space there, or write elsewhere") from error
    finally:
        aside.unlink(missing_ok=True)
    return target
