"""What a blend comes to: weights from epochs and token budgets, and what each source gives, before anything is trained.

Only weights are derived here; the order of samples stays Megatron's (blend.py), and weights alone go to it as they were
written. A source with epochs draws epochs × the tokens of its training part, one with a budget the budget; weights share
what these leave of the whole.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.indexed import IndexedDataset
from llama.config import Recipe, Source
from llama.data.blend import normalized, source_sizes
from llama.data.blend_file import prefixes
from llama.data.samples import split_ranges

WHOLE = "1,0,0"
# Up to 4 epochs repeated tokens are nearly worth new ones, then quickly less (Muennighoff et al. 2023, section 6).
MANY_EPOCHS = 4
NEAR = 0.01  # two totals closer than this are the same, said in round numbers


@dataclass(frozen=True)
class File:
    """A token file of a blend, and its weight."""

    prefix: str
    tokens: int
    """Of its training part."""
    weight: float


@dataclass(frozen=True)
class Row:
    """What one source gives."""

    path: str
    asked: str
    files: int
    tokens: int
    """Of its training part."""
    share: float
    drawn: int | None
    """Tokens drawn in all; None where the whole is not known."""

    @property
    def epochs(self) -> float | None:
        return self.drawn / self.tokens if self.drawn is not None and self.tokens else None

    @property
    def repeats(self) -> int | None:
        """Times that a document comes again; a surplus below half a percent is rounding."""
        return None if self.epochs is None else max(0, math.ceil(self.epochs - 0.005) - 1)


@dataclass(frozen=True)
class Plan:
    """A blend worked out."""

    files: tuple[File, ...]
    """Every token file with its weight, in the order of the sources."""
    rows: tuple[Row, ...]
    drawn: int | None
    """Tokens drawn from all."""
    notes: tuple[str, ...]
    """How the whole, the split and the sources hang together, in words."""
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        rows = [{**asdict(row), "epochs": row.epochs, "repeats": row.repeats} for row in self.rows]
        return {
            "tokens_drawn": self.drawn,
            "sources": rows,
            "files": [asdict(file) for file in self.files],
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }

    def lines(self) -> list[str]:
        """The table for people, then notes and warnings."""
        table = [("source", "asked", "share", "tokens drawn", "has", "epochs", "repeats")]
        for row in self.rows:
            name = row.path if row.files == 1 else f"{row.path} ({row.files} files)"
            epochs = "–" if row.epochs is None else f"{row.epochs:.3g}"
            repeats = "–" if row.repeats is None else str(row.repeats)
            table.append((name, row.asked, f"{row.share:.2%}", short(row.drawn), short(row.tokens), epochs, repeats))
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in table
        ]
        return [*lines, *self.notes, *(f"warning: {warning}" for warning in self.warnings)]


def short(tokens: int | None) -> str:
    """1234567 as 1.23M, – for what is not known."""
    if tokens is None:
        return "–"
    value = float(tokens)
    for unit in ("", "K", "M", "B"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.4g}T"


def training_tokens(dataset: IndexedDataset, split: str) -> int:
    """Tokens of the sequences that `split` gives to training."""
    begin, end = split_ranges(split, len(dataset))[0]
    return int(dataset.lengths[begin:end].sum(dtype=np.int64))


def asked(source: Source) -> str:
    """What a source asks for, in words."""
    if source.epochs is not None:
        return f"epochs {source.epochs:g}"
    return f"tokens {short(source.tokens)}" if source.tokens is not None else f"weight {source.weight:g}"


def budgets(sources: Sequence[Source], sizes: Sequence[int]) -> list[float]:
    """Tokens that each source shall give by its epochs or its budget; 0 for those with a weight."""
    return [
        source.epochs * size if source.epochs is not None else float(source.tokens or 0)
        for source, size in zip(sources, sizes, strict=True)
    ]


def source_weights(
    sources: Sequence[Source], sizes: Sequence[int], whole: int | None, named: bool = False
) -> list[float]:
    """A weight for each source: as written where all have weights, else tokens drawn of the `whole`.

    sizes: tokens of each training part. whole: tokens of all, None where unknown; `named`: in so many words, and not by
    train.steps. Raises UserError, with the remedy, when the numbers contradict one another.
    """
    wanted = budgets(sources, sizes)
    weights = [source.weight or 0.0 for source in sources]
    if not any(wanted):
        return weights
    total = sum(wanted)
    if not any(weights):
        if named and whole is not None and abs(total / whole - 1) > NEAR:
            raise UserError(
                f"data.train: epochs and budgets add up to {short(round(total))} tokens, but tokens: says {short(whole)}; "
                f"leave tokens: out, or give a source a weight, which takes what is left",
                2,
            )
        return wanted
    light = next(source for source in sources if source.weight is not None)
    if whole is None:
        raise UserError(
            f"data.train: {light.path} has a weight beside sources with epochs or budgets, so its share hangs on the "
            f"whole; give tokens: in the blend, --tokens N, or a RECIPE",
            2,
        )
    if total >= whole:
        raise UserError(
            f"data.train: epochs and budgets take {short(round(total))} of {short(whole)} tokens and leave nothing for "
            f"{light.path} ({asked(light)}); raise the whole ({'tokens:' if named else 'tokens:, --tokens or train.steps'}) "
            f"or lower the budgets",
            2,
        )
    scale = (whole - total) / sum(weights)
    return [draw or weight * scale for draw, weight in zip(wanted, weights, strict=True)]


def blend_files(
    sources: Sequence[Source], opened: Mapping[str, IndexedDataset], split: str, whole: int | None, named: bool = False
) -> list[list[File]]:
    """The token files of each source with their weights. Files of one pattern share by their tokens."""
    groups = [[(prefix, training_tokens(opened[prefix], split)) for prefix in prefixes(source)] for source in sources]
    sizes = [sum(tokens for _, tokens in group) for group in groups]
    files = []
    weights = source_weights(sources, sizes, whole, named)
    for source, group, size, weight in zip(sources, groups, sizes, weights, strict=True):
        if not size:
            raise UserError(
                f"{source.path} has no token to train on; use more text, or a larger first share in data.split"
            )
        if len(group) == 1:
            files.append([File(*group[0], weight)])
        else:  # a file without tokens has no share, and Megatron's order knows none of weight 0
            files.append([File(prefix, tokens, weight * tokens / size) for prefix, tokens in group if tokens])
    return files


def plan_training(recipe: Recipe, opened: Mapping[str, IndexedDataset]) -> Plan:
    """What a recipe's run draws from its training files, counted as build_data lays it out. Raises UserError."""
    data, batch = recipe.data, recipe.train.global_batch_size
    split = WHOLE if data.validation else data.split
    groups = training_files(recipe, opened)
    samples, flat = recipe.train.steps * batch, [file.weight for group in groups for file in group]
    counts = iter([samples] if len(flat) == 1 else source_sizes(flat, samples)[0])
    drawn = [sum(next(counts) for _ in group) * data.seq_length for group in groups]
    notes, run = [], samples * data.seq_length
    wanted = sum(budgets(data.train, [sum(file.tokens for file in group) for group in groups]))
    planned = data.blend_tokens or (round(wanted) if all(source.weight is None for source in data.train) else None)
    if wanted and planned and abs(run / planned - 1) > NEAR:
        notes.append(
            f"the blend is of {short(planned)} tokens and this run draws {short(run)}: each source gives the same share "
            f"of it; train.steps={math.ceil(planned / recipe.tokens_per_step)} would draw all"
        )
    if data.validation:
        notes.append("all of the files is trained on; data.validation names what is held out")
    else:
        ranges = [[end - begin for begin, end in split_ranges(split, len(opened[f.prefix]))] for g in groups for f in g]
        parts, total = np.array(ranges).sum(axis=0), max(1, np.array(ranges).sum())
        if parts[0] < total:
            notes.append(
                f"data.split={split}: {parts[0] / total:.1%} of the documents are trained on, "
                f"{parts[1] / total:.1%} kept for validation"
            )
    return _plan(data.train, groups, drawn, notes)


def training_files(recipe: Recipe, opened: Mapping[str, IndexedDataset]) -> list[list[File]]:
    """The training files of a recipe, source by source, with the weights that their order is laid out by."""
    data = recipe.data
    samples = data.order_samples or recipe.train.steps * recipe.train.global_batch_size
    split = WHOLE if data.validation else data.split
    whole = data.blend_tokens or samples * data.seq_length
    return blend_files(data.train, opened, split, whole, data.blend_tokens is not None)


def plan_tokens(
    sources: Sequence[Source], opened: Mapping[str, IndexedDataset], whole: int | None, named: bool = False
) -> Plan:
    """The same without a recipe: of `whole` tokens (`named`: by the blend), or of the sum of the budgets.

    Raises UserError.
    """
    groups = blend_files(sources, opened, WHOLE, whole, named)
    wanted = budgets(sources, [sum(file.tokens for file in group) for group in groups])
    if whole is None and all(wanted):
        whole = round(sum(wanted))
    shares = normalized([sum(file.weight for file in group) for group in groups])
    drawn = [None if whole is None else round(share * whole) for share in shares]
    notes = ["without a recipe: all tokens of the files counted, none kept for validation"]
    if whole is None:
        notes.append("how many tokens are drawn hangs on the run; name a RECIPE, or --tokens N")
    return _plan(sources, groups, drawn, notes)


def _plan(
    sources: Sequence[Source], groups: Sequence[Sequence[File]], drawn: Sequence[int | None], notes: Sequence[str]
) -> Plan:
    shares = normalized([sum(file.weight for file in group) for group in groups])
    rows = tuple(
        Row(source.path, asked(source), len(group), sum(file.tokens for file in group), share, tokens)
        for source, group, share, tokens in zip(sources, groups, shares, drawn, strict=True)
    )
    warnings, whole = [], list(notes)
    for row in rows:
        if row.epochs is not None and row.epochs > MANY_EPOCHS * 1.005:
            warnings.append(
                f"{row.path} is read {row.epochs:.3g} times; above {MANY_EPOCHS} epochs repeats add little "
                f"(Muennighoff et al. 2023): give it less weight, or more text"
            )
    named = Counter(file.prefix for group in groups for file in group)
    warnings += [f"{name} is in {count} sources, each of which reads it" for name, count in named.items() if count > 1]
    unfinished = [f"{row.path} {row.epochs:.1%}" for row in rows if row.epochs is not None and row.epochs < 0.995]
    if unfinished:
        whole.append(f"never finished, and how much of it is read: {', '.join(unfinished)}")
    known = [row.drawn for row in rows if row.drawn is not None]
    files = tuple(file for group in groups for file in group)
    return Plan(files, rows, sum(known) if len(known) == len(rows) else None, tuple(whole), tuple(warnings))
