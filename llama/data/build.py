"""From a recipe to batches: opens the token files, blends them, cuts off validation, and checks what can be checked.

The same recipe gives the order that Megatron-LM gives with --data-path (one file without weight, or weights and files),
--split, --seq-length, --seed and the same numbers of samples; with data.validation, --train-data-path and
--valid-data-path. Epochs, token budgets and patterns become weights and files first, see blend_plan.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from data_prep.errors import UserError
from data_prep.indexed import IndexedDataset
from data_prep.parts_file import read_meta
from llama.config import Recipe
from llama.data.batches import Batches, SampleSource
from llama.data.blend import Blend, source_sizes
from llama.data.blend_file import open_sources
from llama.data.blend_plan import WHOLE, File, blend_files, plan_training, training_files
from llama.data.samples import Samples, split_ranges


def build_data(
    recipe: Recipe, data_rank: int, data_size: int, say: Callable[[str], None] | None = None
) -> tuple[Batches, Batches | None]:
    """Training batches, and validation batches (None when validation.interval is 0), of one data rank.

    The order is laid out for data.order_samples (train.steps × global_batch_size when not given): a resumed run must
    be given the number it began with, or what was trained on already comes again in another order. Validation lays
    out validation.batches × global_batch_size samples; reading it from cursor 0 gives the same ones each time.
    `say` is told what the run draws from each source. With `chat:` in the recipe the files are conversations.
    Raises UserError for a missing or damaged file, too little text, an unknown eod, ids beyond the vocabulary, a blend
    whose numbers contradict one another.
    """
    if recipe.chat is not None:
        from llama.chat.dataset import build_chat  # only here: most runs need no templates

        return build_chat(recipe, data_rank, data_size, say)
    data, batch = recipe.data, recipe.train.global_batch_size
    if not data.train:
        raise UserError(
            "data.train names no token file; set data.train=PREFIX, where PREFIX.bin and PREFIX.idx come from "
            "herd prep tokenize TEXT.jsonl --tokenizer TOKENIZER --output PREFIX",
            2,
        )
    opened = open_sources((*data.train, *(data.validation if recipe.validation.interval else ())))
    split = WHOLE if data.validation else data.split
    train = [file for group in training_files(recipe, opened) for file in group]
    sources = [(train, split, 0, data.order_samples or recipe.train.steps * batch)]
    if recipe.validation.interval:
        held_out = [file for group in blend_files(data.validation, opened, WHOLE, None) for file in group]
        cut = (held_out, WHOLE, 0) if data.validation else (train, split, 1)
        sources.append((*cut, recipe.validation.batches * batch))
    eod = _checked_eod(recipe, list(opened))
    built = []
    for files, shares, part, count in sources:
        samples = _build_samples(recipe, files, opened, shares, part, count)
        batches = Batches(
            samples, batch, recipe.train.micro_batch_size, data_rank, data_size,
            data.document_mask, eod, data.mask_eod_loss,
        )  # fmt: skip
        batches.check_vocabulary(recipe.model.vocab_size)
        built.append(batches)
    if say is not None:
        for line in plan_training(recipe, opened).lines():
            say(line)
    return built[0], built[1] if len(built) > 1 else None


def _build_samples(
    recipe: Recipe, files: Sequence[File], opened: dict[str, IndexedDataset], shares: str, part: int, count: int
) -> SampleSource:
    """`count` samples of part 0 (train) or 1 (validation) of the files: plain for one file, a blend for several."""
    weights = [file.weight for file in files]
    # Megatron gives a lone file no surplus: its --data-path then has no weight, or its weight does not count.
    sizes = [count] if len(files) == 1 else source_sizes(weights, count)[1]
    parts = []
    for file, size in zip(files, sizes, strict=True):
        dataset = opened[file.prefix]
        cut = split_ranges(shares, len(dataset))[part]
        if part and cut[0] == cut[1]:
            raise UserError(
                f"data.split={shares!r} leaves no validation part of {file.prefix} ({len(dataset)} sequences); raise "
                f"its second share, name files in data.validation, or set validation.interval=0",
                2,
            )
        parts.append(Samples(dataset, cut, recipe.data.seq_length, size, recipe.data.seed))
    return parts[0] if len(parts) == 1 else Blend(parts, weights, count)


def _checked_eod(recipe: Recipe, prefixes: Sequence[str]) -> int | None:
    """The id that ends a document, from the recipe or else from the files' notes; refuses notes that do not fit."""
    data, vocab_size = recipe.data, recipe.model.vocab_size
    noted: dict[int, str] = {}
    for prefix in prefixes:
        meta = read_meta(prefix) or {}
        size, eod = meta.get("vocab_size"), meta.get("eod")
        if isinstance(size, int) and size > vocab_size:
            raise UserError(
                f"{prefix}.meta.json says the tokenizer has {size} ids, more than model.vocab_size={vocab_size}; "
                f"set model.vocab_size={size}, or tokenize again with the model's tokenizer",
                2,
            )
        if meta.get("append_eod") is False and (data.document_mask or data.mask_eod_loss):
            option = "document_mask" if data.document_mask else "mask_eod_loss"
            raise UserError(
                f"{prefix}.bin was written without end-of-document ids, so data.{option}=true could not tell documents "
                f"apart; tokenize again without --no-eod, or set data.{option}=false",
                2,
            )
        if isinstance(eod, int):
            noted.setdefault(eod, prefix)
    if data.eod is not None:
        eod = data.eod
    elif not (data.document_mask or data.mask_eod_loss):
        return next(iter(noted), None)
    elif len(noted) > 1:
        told = ", ".join(f"{eod} in {prefix}.meta.json" for eod, prefix in noted.items())
        raise UserError(f"the token files end documents with different ids ({told}); they need one tokenizer", 2)
    elif not noted:
        option = "document_mask" if data.document_mask else "mask_eod_loss"
        raise UserError(
            f"data.{option}=true needs the id of the end-of-document token, and {prefixes[0]}.meta.json does not tell "
            f"it; set data.eod",
            2,
        )
    else:
        eod = next(iter(noted))
    if eod >= vocab_size:
        raise UserError(f"the end-of-document id {eod} is beyond model.vocab_size={vocab_size}; correct data.eod", 2)
    return eod
