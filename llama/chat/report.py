"""What a recipe's conversations come to, in numbers and in the tokens that the model will see: for herd preview."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np

from data_prep.tokenizers import Tokenizer
from llama.chat.dataset import PackedSamples
from llama.config import Recipe

BINS = 12


def report(
    recipe: Recipe, tokenizer: Tokenizer, samples: PackedSamples, validation: PackedSamples | None
) -> dict[str, Any]:
    """Numbers of the training part, with `warnings` in words; JSON can hold all of it."""
    encoded, train = samples.encoded, recipe.train
    facts, chosen = encoded.facts, samples.examples
    ids = np.memmap(encoded.folder / "tokens.bin", encoded.tokens.dtype, mode="r")
    flags = np.memmap(encoded.folder / "trained.bin", np.uint8, mode="r")
    ends = np.cumsum(encoded.lengths, dtype=np.int64)
    trained = np.add.reduceat(flags, ends - encoded.lengths, dtype=np.int64)[chosen]
    lengths = encoded.lengths[chosen]
    names = {number: text for text, number in tokenizer.control.items()}
    counts = np.bincount(ids, minlength=tokenizer.vocab_size)
    last = ids[ends[chosen] - 1]
    unended = int((~np.isin(last, list(names))).sum())
    steps = len(samples) / train.global_batch_size
    wanted = train.steps_for(len(samples))
    edges = np.linspace(0, max(BINS, int(lengths.max())), BINS + 1).round().astype(int)
    histogram, _ = np.histogram(lengths, np.r_[edges[:-1] + 1, edges[-1] + 1])
    share = trained / lengths
    out: dict[str, Any] = {
        "files": facts["files"],
        "formats": facts["formats"],
        "tokenizer": facts["tokenizer"],
        "template": facts["template"],
        "loss": recipe.chat and recipe.chat.loss,
        "records": facts["records"],
        "unreadable": facts["unreadable"],
        "unreadable_first": facts["unreadable_first"],
        "odd": facts["odd"],
        "left_out_or_cut": facts["counts"],
        "left_out_or_cut_first": facts["first"],
        "conversations": facts["conversations"],
        "duplicates": facts["duplicates"],
        "double_bos": facts["counts"].get("double BOS", 0),
        "examples": len(chosen),
        "held_out_examples": 0 if validation is None else len(validation.examples),
        "lengths": {
            "shortest": int(lengths.min()),
            "mean": round(float(lengths.mean()), 1),
            "median": int(np.median(lengths)),
            "p99": int(np.quantile(lengths, 0.99)),
            "longest": int(lengths.max()),
            "histogram": [
                [int(low) + 1, int(high), int(n)]
                for low, high, n in zip(edges[:-1], edges[1:], histogram.tolist(), strict=True)
            ],
        },
        "trained_share": {
            "all": round(int(trained.sum()) / int(lengths.sum()), 4),
            "lowest": round(float(share.min()), 4),
            "highest": round(float(share.max()), 4),
        },
        "packing": {
            "packed": samples.packed,
            "seq_length": samples.seq_length,
            "sequences": len(samples),
            "fill": round(samples.fill, 4),
            "padded_would_fill": round(int(samples.positions.sum()) / (len(chosen) * samples.seq_length), 4),
            "examples_a_sequence": round(len(chosen) / len(samples), 2),
        },
        "epoch": {
            "tokens": int(lengths.sum()),
            "trained_tokens": int(trained.sum()),
            "steps": round(steps, 2),
        },
        "run": {"steps": wanted, "epochs": round(wanted / steps, 2)},
        "special_tokens": {names[i]: int(counts[i]) for i in sorted(names) if i < len(counts) and counts[i]},
        "answers_without_end": unended,
        "largest_id": facts["largest_id"],
        "vocab_size": recipe.model.vocab_size,
    }
    out["warnings"] = warnings(recipe, out)
    return out


def warnings(recipe: Recipe, numbers: dict[str, Any]) -> list[str]:
    """What of these numbers would spoil a run, or probably is not meant."""
    found = []
    if numbers["largest_id"] >= numbers["vocab_size"]:
        found.append(
            f"token id {numbers['largest_id']} is beyond model.vocab_size={numbers['vocab_size']}; training will refuse it"
        )
    if numbers["double_bos"]:
        found.append(f"{numbers['double_bos']:,} conversations begin with BOS twice; the template adds one too many")
    if numbers["answers_without_end"]:
        found.append(
            f"{numbers['answers_without_end']:,} examples end without a control token, so the model does not learn to "
            "stop; choose a template with an end of turn"
        )
    if numbers["duplicates"]:
        found.append(f"{numbers['duplicates']:,} conversations are there twice; herd prep dedup leaves one of each")
    if numbers["run"]["epochs"] > 10:
        found.append(f"{numbers['run']['steps']:,} steps read everything {numbers['run']['epochs']} times")
    return found


def segments(tokenizer: Tokenizer, samples: PackedSamples, example: int) -> list[dict[str, Any]]:
    """An example as the model sees it: runs of tokens of one kind, with text, kind (control, trained) and ids."""
    ids = samples.encoded.tokens.get(example).tolist()
    flags = samples.encoded.trained.get(example).tolist()
    names = {number: text for text, number in tokenizer.control.items()}
    key: Callable[[int], tuple[bool, bool]] = lambda i: (bool(flags[i]), ids[i] in names)  # noqa: E731
    out = []
    for (trained, control), group in groupby(range(len(ids)), key):
        run = [ids[i] for i in group]
        text = "".join(names[i] for i in run) if control else tokenizer.decode(run)
        out.append({"text": text, "trained": trained, "control": control, "ids": run})
    return out
