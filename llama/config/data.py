"""What is trained on: token files and their blends, or conversations."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from llama.config.section import Count, NonNegative, Section

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}


def _quantity(value: Any) -> Any:
    """Accept 20B, 1.5T or 3e9 for a number of tokens."""
    if not isinstance(value, (str, float)):
        return value
    text = str(value).strip().replace("_", "").replace(",", "")
    unit = text[-1:].upper() if text[-1:].isalpha() else ""
    try:
        number = Fraction(text[: len(text) - len(unit)]) * UNITS[unit]
    except (ValueError, KeyError, ZeroDivisionError):
        raise ValueError(f"{value!r} is not a number of tokens, such as 500M, 20B or 1.5T") from None
    return round(number)


Tokens = Annotated[int, Field(ge=1), BeforeValidator(_quantity)]


class Source(Section):
    """One token file, PREFIX.bin and PREFIX.idx, or all that a pattern names; how much of it: one of the other three."""

    path: str
    """The prefix, without .bin or .idx, or a glob such as data/cc-*, whose files share by their tokens; relative to the
    working directory, in a blend file to the file's folder."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share in the blend, relative to the other weights; 1 when nothing is given. Weights share what epochs and tokens
    leave of the whole."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Times that its training part is read in the whole."""
    tokens: Tokens | None = None
    """Tokens drawn from it in the whole."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """What its figures go by in a validation; the end of its path when not given."""

    @model_validator(mode="before")
    @classmethod
    def _default(cls, keys: Any) -> Any:
        given = isinstance(keys, dict) and any(keys.get(key) is not None for key in ("weight", "epochs", "tokens"))
        return {**keys, "weight": 1.0} if isinstance(keys, dict) and not given else keys

    @model_validator(mode="after")
    def _check(self) -> Source:
        given = [key for key in ("weight", "epochs", "tokens") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{self.path} has {' and '.join(given)}, which say the same in two ways; keep one of them")
        return self


def _sources(value: Any) -> Any:
    """Accept one prefix, a list of prefixes, or a list of {path, weight | epochs | tokens}."""
    items = [value] if isinstance(value, (str, dict)) else value
    return (
        [{"path": item} if isinstance(item, str) else item for item in items]
        if isinstance(items, (list, tuple))
        else items
    )


Sources = Annotated[tuple[Source, ...], BeforeValidator(_sources)]


class BlendKeys(Section):
    """A blend: what a blend file holds."""

    tokens: Tokens | None = None
    """Tokens of the whole, which epochs and token budgets are shares of."""
    sources: Annotated[tuple[Source, ...], BeforeValidator(_sources), Field(min_length=1)]


class Data(Section):
    """Which tokens are trained on, and in which order."""

    train: Sources = ()
    """Token files to train on; or the name of a blend file (.yaml), which a saved recipe holds written out."""
    blend_tokens: Tokens | None = None
    """Tokens of the whole that epochs and token budgets in `train` are shares of, where a blend file names them; the
    tokens of the run (or the sum of the budgets, when there are no weights) when not given."""
    validation: Sources = ()
    """Token files to validate on; when empty, `split` cuts the validation part off the training files."""
    split: str = "969,30,1"
    """Shares of train, validation, test documents in the training files, as Megatron-LM writes them."""
    seq_length: Count
    """Tokens in one sample."""
    seed: int = 1234
    """Seed of the sample order, as Megatron-LM's --seed."""
    order_samples: Count | None = None
    """Samples for which the order is laid out; train.steps × global_batch_size of the first start when not given."""
    document_mask: bool = False
    """Keep documents of one sample apart: attention inside each alone, positions restarting."""
    mask_eod_loss: bool = False
    """Do not train the prediction of the end-of-document token."""
    eod: NonNegative | None = None
    """Id of the end-of-document token; read from the token files' .meta.json when not given."""
    tokenizer: str | None = None
    """Tokenizer file or folder, carried into exports; read from the token files' .meta.json when not given."""
    allow_change: bool = False
    """Go on although the token files are not those of the run's first part."""
    prefetch: Count = 2
    """Steps of batches that are read ahead."""

    @model_validator(mode="before")
    @classmethod
    def _read_blends(cls, keys: Any) -> Any:
        values = [keys.get("train"), keys.get("validation")] if isinstance(keys, dict) else []
        if not any(isinstance(v, dict) or (isinstance(v, str) and v.endswith((".yaml", ".yml"))) for v in values):
            return keys
        from llama.data.blend_file import written_out  # only here: it opens files, and most recipes have no blend

        return written_out(keys)

    @model_validator(mode="after")
    def _check(self) -> Data:
        budget = next((source for source in self.validation if source.weight is None), None)
        if budget is not None:
            raise ValueError(f"validation: {budget.path} has epochs or tokens; validation takes weights alone")
        try:
            shares = [float(part) for part in self.split.replace("/", ",").split(",")]
        except ValueError:
            shares = []
        if not 1 <= len(shares) <= 3 or min(shares) < 0 or sum(shares) <= 0 or shares[0] <= 0:
            raise ValueError(
                f'split={self.split!r} is not up to three shares with a positive first, such as "969,30,1"'
            )
        return self


class Chat(Section):
    """Fine-tuning on conversations: data.train and data.validation then name files of them, not token files.

    What is trained are the assistant's turns. Positions and attention are each example's own. The tokenizer is
    data.tokenizer, else the one beside train.init_from.
    """

    format: str = "auto"
    """Format of the files: alpaca, prompt, sharegpt, messages, qnli, …; told from each file's records by auto."""
    template: str = "tokenizer"
    """tokenizer: the chat template that came with it; alpaca, alpaca_newline, plain, chatml, llama3; or a .jinja file."""
    loss: Literal["all", "last"] = "all"
    """Which of the assistant's turns are trained, where a turn does not say so itself (`train`, `weight`)."""
    truncation: Literal["error", "drop", "split", "left"] = "error"
    """A conversation longer than data.seq_length: refuse it; drop it; split it at turns, the system prompt repeated;
    cut its prompt's left side."""
    pack: bool = True
    """Put several examples in one sequence, apart from one another; false pads each to the full length."""
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of records that may be unreadable, or refused by the template, and are left out."""
    cache: str | None = None
    """Folder of the encoded examples, which runs may share and all nodes see; RUN/chat when not given."""
