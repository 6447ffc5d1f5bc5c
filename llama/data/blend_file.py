"""Blend files: a YAML of sources with weights, epochs or token budgets, usable as data.train.

    tokens: 1T            # of the whole, where weights stand beside epochs or budgets
    sources:
      - {path: data/web, weight: 7}
      - {path: data/code, epochs: 2}
      - {path: data/books-*, tokens: 20B}

Paths are relative to the file's folder. What becomes of the numbers is in blend_plan.py.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from data_prep.errors import UserError
from data_prep.indexed import IndexedDataset
from data_prep.joined import open_tokens
from llama.config import BlendKeys, Source

ENDINGS = (".yaml", ".yml")


def read_blend(path: str | Path) -> BlendKeys:
    """A blend file, its paths made relative to the working directory. Raises UserError that names line or key."""
    from llama.recipe import _Loader  # not above: recipes are made of what is made here

    path = Path(path)
    try:
        keys = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such blend file; check the path, or give a prefix without {path.suffix}", 2
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}", 2) from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        problem = problem or " ".join(str(error).split())
        raise UserError(f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML: {problem}", 2) from error
    if isinstance(keys, list):
        keys = {"sources": keys}
    if not isinstance(keys, dict):
        raise UserError(f"{path}: a blend is a mapping with sources:, found {type(keys).__name__}", 2)
    try:
        blend = BlendKeys.model_validate(keys)
    except ValidationError as error:
        raise UserError(f"{path}: " + "; also ".join(map(_explain, error.errors())), 2) from None
    sources = (source.model_copy(update={"path": (path.parent / source.path).as_posix()}) for source in blend.sources)
    return blend.model_copy(update={"sources": tuple(sources)})


def _explain(item: Any) -> str:
    dotted = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        known = list((Source if len(item["loc"]) > 1 else BlendKeys).model_fields)
        near = difflib.get_close_matches(str(item["loc"][-1]), known, 1, 0.5)
        return f"{dotted}: unknown key; " + (f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}")
    if item["type"] == "missing":
        return f"{dotted}: missing; a {'source' if len(item['loc']) > 1 else 'blend'} must give it"
    if item["type"] == "value_error":
        return (f"{dotted}: " if dotted else "") + str(item["ctx"]["error"])
    return f"{dotted}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}"


def written_out(data: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's data section with the blend files it names written out, so that a saved recipe is whole."""
    keys = dict(data)
    for name in ("train", "validation"):
        value = keys.get(name)
        if isinstance(value, str) and value.endswith(ENDINGS):
            blend = read_blend(value).model_dump()
        elif isinstance(value, dict) and "sources" in value:
            blend = dict(value)
        else:
            continue
        keys[name] = blend.pop("sources")
        tokens = blend.pop("tokens", None)
        if blend:
            raise ValueError(f"{name}: {', '.join(map(repr, blend))} is no key of a blend; tokens and sources are")
        if name == "train" and keys.get("blend_tokens") is None:
            keys["blend_tokens"] = tokens
    return keys


def prefixes(source: Source) -> list[str]:
    """The token files that a source names: one, or all that its pattern finds, sorted. Raises UserError for none."""
    path = source.path
    if not glob.has_magic(path) or Path(f"{path}.idx").exists():
        return [path]
    found = {name.removesuffix(end) for end in (".idx", ".parts") for name in glob.glob(path + end)}  # noqa: PTH207
    if not found:
        raise UserError(f"{path}: no token file matches; PREFIX.idx or PREFIX.parts must exist, check the pattern", 2)
    return sorted(found)


def open_sources(sources: Iterable[Source], thorough: bool = False) -> dict[str, IndexedDataset]:
    """Every token file of the sources, opened, by its prefix. Raises UserError for one that is missing or damaged.

    thorough: of a folder of parts, look at the size of each part now.
    """
    opened: dict[str, IndexedDataset] = {}
    for source in sources:
        for prefix in prefixes(source):
            if prefix not in opened:
                opened[prefix] = open_tokens(prefix, thorough)
    return opened
