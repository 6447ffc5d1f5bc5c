"""A run's recipe, typed and frozen: what each key means, its unit, and which values cannot go together.

A recipe is one YAML file. `base:` names another recipe that it changes; `a.b=c` on the command line changes it last.
Reading files is in llama/recipe.py; this file is only the meaning.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from llama.targets import HEAD, HF_MODULES, ROW_PARALLEL, adapted, linear_shape

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A frozen part of the recipe that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class RopeScaling(Section):
    """Llama 3.1's stretching of rotary frequencies (Llama 3 paper, section 3.4; the `llama3` rope type)."""

    factor: Annotated[float, Field(ge=1)] = 8.0
    """How much the longest wavelengths are stretched."""
    low_freq_factor: float = 1.0
    """Wavelengths above original_max_position / this are stretched fully."""
    high_freq_factor: float = 4.0
    """Wavelengths below original_max_position / this are left alone."""
    original_max_position: Count = 8192
    """Tokens of context before stretching."""

    @model_validator(mode="after")
    def _check(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor (Llama 3.1 uses 4 and 1)")
        return self


class Model(Section):
    """The network's shape. Names follow Hugging Face's config where the meaning is the same."""

    family: Literal["llama", "mistral"] = "llama"
    """Which Hugging Face architecture an export declares; the mathematics are the same (Mistral without window)."""
    vocab_size: Count
    """Number of token ids of the tokenizer."""
    hidden_size: Count
    intermediate_size: Count
    """Width of the SwiGLU layer."""
    num_layers: Count
    num_heads: Count
    """Query heads."""
    num_kv_heads: Count | None = None
    """Key/value heads of grouped-query attention; as many as query heads when not given."""
    head_dim: Count | None = None
    """Width of one head; hidden_size / num_heads when not given."""
    max_position: Count = 4096
    """Tokens of context that the model is made for."""
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    tie_embeddings: bool = False
    """Whether the output projection shares the embedding's weights (Llama 3.2 1B and 3B)."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of initial weights."""
    scaled_residual_init: bool = True
    """Divide the standard deviation of attention.o and mlp.down by sqrt(2 × num_layers) (GPT-2, Megatron-LM)."""
    vocab_multiple: Count = 128
    """The vocabulary is padded to a multiple of this, so that it divides over tensor ranks; padding is never predicted."""

    @model_validator(mode="after")
    def _check(self) -> Model:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}; set head_dim, or change one"
            )
        if self.num_heads % self.kv_heads:
            fits = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ValueError(
                f"num_kv_heads={self.kv_heads} does not divide num_heads={self.num_heads}; one of {fits} does"
            )
        if self.head_size % 2:
            raise ValueError(f"head_dim={self.head_size} is odd; rotary embedding turns pairs, so it must be even")
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the output projection."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


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


ScheduleName = Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"]
LOOPED = ("interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble")
ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv_zero_bubble")


class Parallel(Section):
    """How the work is laid over ranks; mesh axes, outermost first: pp, dp_replicate, dp_shard, cp, tp."""

    tensor_parallel: Count = 1
    """Ranks that share each matrix."""
    sequence_parallel: bool = True
    """Also share norms and residuals over the tensor ranks, along the sequence; matters when tensor_parallel > 1."""
    pipeline_parallel: Count = 1
    """Ranks that share the layers."""
    pipeline_schedule: ScheduleName = "1f1b"
    stages_per_rank: Count | None = None
    """Layer groups on each pipeline rank; 1 for gpipe and 1f1b, 2 for the others when not given."""
    context_parallel: Count = 1
    """Ranks that share each sequence."""
    replicate: Count = 1
    """Ranks that hold copies of the weights (HSDP when `shard` is above 1, plain data parallel when it is 1)."""
    shard: Count | None = None
    """Ranks over which FSDP spreads weights and optimizer; all that remain when not given."""
    reshard_after_forward: bool | None = None
    """Free gathered weights between forward and backward; yes unless a pipeline runs when not given."""

    @property
    def stages(self) -> int:
        """Layer groups of the whole pipeline."""
        return self.pipeline_parallel * self.rank_stages

    @property
    def rank_stages(self) -> int:
        default = 2 if self.pipeline_schedule in LOOPED else 1
        return (self.stages_per_rank or default) if self.pipeline_parallel > 1 else 1

    @property
    def reshard(self) -> bool:
        return self.pipeline_parallel == 1 if self.reshard_after_forward is None else self.reshard_after_forward

    @model_validator(mode="after")
    def _check(self) -> Parallel:
        if self.context_parallel > 1:
            raise ValueError(
                f"context_parallel={self.context_parallel} is not supported yet; use tensor_parallel with sequence_parallel=true"
            )
        if self.pipeline_parallel == 1:
            return self
        looped = self.pipeline_schedule in LOOPED
        if looped and self.rank_stages < 2:
            raise ValueError(
                f"pipeline_schedule={self.pipeline_schedule} needs stages_per_rank of 2 or more; 1f1b takes 1"
            )
        if not looped and self.rank_stages != 1:
            raise ValueError(
                f"pipeline_schedule={self.pipeline_schedule} takes stages_per_rank=1; interleaved_1f1b takes more"
            )
        if self.pipeline_schedule == "zbv_zero_bubble" and self.rank_stages != 2:
            raise ValueError("pipeline_schedule=zbv_zero_bubble lays the stages in a V and needs stages_per_rank=2")
        if self.reshard and self.pipeline_schedule in ZERO_BUBBLE:
            # Torch leaves gradients of the last stage unset then, silently.
            raise ValueError(
                f"reshard_after_forward=true loses gradients under pipeline_schedule={self.pipeline_schedule}; set it to false"
            )
        return self


class Optimizer(Section):
    """AdamW (Loshchilov and Hutter 2019), decay on matrices only, clipping by the global norm."""

    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Highest learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Applied to matrices, embeddings among them; never to norms."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; no clipping when null."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of both moments under precision=bf16_sr; otherwise they follow the fp32 weights."""


class Schedule(Section):
    """Learning rate over steps: linear warm-up to optimizer.lr, then `kind` down to min_lr."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """wsd: warm-up, stable, then linear decay over the last decay_steps."""
    warmup_steps: NonNegative = 0
    decay_steps: Count | None = None
    """Steps at which linear and cosine reach min_lr (train.steps when not given); for wsd the length of the decay."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0


class Guard(Section):
    """Steps that are not taken: all ranks agree, the step is counted, and too many in a row end the run."""

    max_skips: Count = 10
    """Skipped steps in a row after which the run stops."""
    loss_spike: Annotated[float, Field(gt=1)] | None = None
    """Skip when the loss is above this multiple of its recent median; null: only non-finite values are skipped."""
    gradient_spike: Annotated[float, Field(gt=1)] | None = None
    """The same for the gradient norm."""
    window: Count = 128
    """Taken steps that the median looks back on; spikes are judged once a quarter of it is filled."""


Precision = Literal["bf16_mixed", "bf16_sr", "fp32"]


class Train(Section):
    """The training run itself."""

    steps: Count
    """Optimizer steps of the whole run, resumed parts included."""
    global_batch_size: Count
    """Sequences in one optimizer step, over all ranks."""
    micro_batch_size: Count = 1
    """Sequences that one rank computes at once."""
    precision: Precision = "bf16_mixed"
    """bf16_mixed: bf16 arithmetic, fp32 weights; bf16_sr: everything bf16, updates rounded stochastically; fp32."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute in backward: nothing, all but matrix products and attention, or each whole block."""
    compile: bool = False
    """torch.compile each block."""
    loss_chunk: Count = 1024
    """Tokens whose logits exist at once; memory is loss_chunk × vocabulary / tensor_parallel."""
    seed: int = 1234
    """Seed of initial weights and of stochastic rounding."""
    init_from: str | None = None
    """Hugging Face directory whose weights the run starts from; random weights when not given."""
    garbage_collection_steps: Count = 50
    """Python's collector runs every so many steps on all ranks together, so that none makes the others wait."""
    guard: Guard = Guard()


def _names(value: Any) -> Any:
    """Accept q,v for a list of names."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


class Lora(Section):
    """Adapters on a frozen base (LoRA, Hu et al. 2021; QLoRA, Dettmers et al. 2023); only they are trained and saved."""

    rank: NonNegative = 0
    """Width of the adapters; 0: none, everything is trained."""
    alpha: Annotated[float, Field(gt=0)] = 8.0
    """What an adapter adds is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs set to zero in training; a pure function of seed, step, adapter and input."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023)."""
    dora: bool = False
    """Train the length of each row of a weight apart from its direction (Liu et al. 2024)."""
    targets: Annotated[tuple[str, ...], BeforeValidator(_names), Field(min_length=1)] = ("q", "v")
    """Linears that get an adapter: q or q_proj, k, v, o, gate, up, down, lm_head; attention, mlp, all-linear (all but
    lm_head); or a regular expression that matches whole names such as model.layers.0.self_attn.q_proj."""
    bias: Literal["none"] = "none"
    """Llama's linears have no biases, so there are none to train."""
    init_from: str | None = None
    """Folder with a PEFT adapter that training starts from; a random one when not given."""
    quantize: Literal["nf4", "int8"] | None = None
    """Type in which the frozen linears of the blocks are held; as they are computed with when null."""
    double_quantization: bool = True
    """nf4: hold the scales of its blocks in 8 bits too, 4.127 instead of 4.5 bits a weight."""

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @model_validator(mode="after")
    def _check(self) -> Lora:
        given = [key for key in ("init_from", "quantize", "dora", "rslora") if getattr(self, key)]
        if given and not self.rank:
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])} is for adapters and there are none; set lora.rank, such as lora.rank=8"
            )
        return self


class Validation(Section):
    """Loss on held-out samples, the same ones each time."""

    interval: NonNegative = 0
    """Steps between validations; 0: never."""
    batches: Count = 8
    """Global batches in one validation."""


class Checkpoint(Section):
    """What is saved, when, and what is kept."""

    interval: NonNegative = 1000
    """Steps between checkpoints; 0: only at the end."""
    keep_last: Count = 2
    """Newest checkpoints that are kept."""
    keep_every: NonNegative = 0
    """Also keep each checkpoint whose step is a multiple of this; 0: none."""
    save_async: bool = True
    """Write in the background while training goes on."""
    at_end: bool = True
    """Save after the last step."""
    verify: bool = True
    """Compare checksums when resuming, so that a damaged checkpoint is noticed before it is used."""


class Resilience(Section):
    """When a run counts as stuck, and how often it is started again by itself."""

    hang_timeout: Annotated[float, Field(ge=0)] = 1800.0
    """Seconds without a finished step, validation batch or save after which all ranks write their stacks and the run is
    started again; 0: never."""
    first_step_timeout: Annotated[float, Field(ge=0)] = 7200.0
    """The same until the first step is done, which loads, builds the sample order and compiles."""
    stop_margin: Annotated[float, Field(ge=0)] = 60.0
    """Seconds kept free before the job's time limit, beside what the next step and a save are seen to take."""
    fruitless_attempts: Count = 5
    """Attempts in a row that reach no new checkpoint, after which the job fails instead of starting once more."""
    max_requeues: NonNegative = 100
    """Times that one Slurm job may go back into the queue."""


class Log(Section):
    """What is shown and recorded."""

    interval: Count = 1
    """Steps between lines and TensorBoard points."""
    tensorboard: bool = True


class Recipe(Section):
    """Everything that decides a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run's folder."""
    run_dir: str = ""
    """Folder of the run; runs/NAME when empty."""
    model: Model
    data: Data
    chat: Chat | None = None
    """Given: train on conversations."""
    train: Train
    parallel: Parallel = Parallel()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    lora: Lora = Lora()
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    resilience: Resilience = Resilience()
    log: Log = Log()

    @model_validator(mode="before")
    @classmethod
    def _keep_apart(cls, keys: Any) -> Any:
        """Packed conversations are kept apart unless the recipe says something about it."""
        chat, data = (keys.get("chat"), keys.get("data")) if isinstance(keys, dict) else (None, None)
        if isinstance(chat, dict) and isinstance(data, dict) and "document_mask" not in data:
            return {**keys, "data": {**data, "document_mask": chat.get("pack", True)}}
        return keys

    @property
    def folder(self) -> str:
        return self.run_dir or f"runs/{self.name}"

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch_size * self.data.seq_length

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        model, parallel, train = self.model, self.parallel, self.train
        tp, stages = parallel.tensor_parallel, parallel.stages
        for key, heads in (("num_kv_heads", model.kv_heads), ("num_heads", model.num_heads)):
            if heads % tp:
                fits = [n for n in range(1, heads + 1) if heads % n == 0]
                raise ValueError(
                    f"parallel.tensor_parallel={tp} does not divide model.{key}={heads}; one of {fits} does"
                )
        if model.intermediate_size % tp:
            raise ValueError(
                f"parallel.tensor_parallel={tp} does not divide model.intermediate_size={model.intermediate_size}; choose a divisor"
            )
        if model.padded_vocab_size % tp:
            raise ValueError(
                f"parallel.tensor_parallel={tp} does not divide the padded vocabulary of {model.padded_vocab_size}; "
                f"set model.vocab_multiple={model.vocab_multiple * tp}"
            )
        if tp > 1 and parallel.sequence_parallel and self.data.seq_length % tp:
            raise ValueError(
                f"data.seq_length={self.data.seq_length} is not a multiple of parallel.tensor_parallel={tp}, over which "
                f"sequence_parallel cuts it; use {self.data.seq_length // tp * tp or tp}, or parallel.sequence_parallel=false"
            )
        if self.data.seq_length > model.max_position:
            raise ValueError(
                f"data.seq_length={self.data.seq_length} is above model.max_position={model.max_position}; shorten it or raise max_position"
            )
        if stages > model.num_layers:
            raise ValueError(
                f"{stages} pipeline stages (pipeline_parallel={parallel.pipeline_parallel} × stages_per_rank={parallel.rank_stages}) "
                f"cannot share model.num_layers={model.num_layers}; at most one stage a layer"
            )
        if parallel.pipeline_parallel > 1 and parallel.pipeline_schedule == "zbv_zero_bubble":
            if self.validation.interval:
                raise ValueError(
                    "pipeline_schedule=zbv_zero_bubble cannot validate (torch runs no forward-only V schedule); "
                    "set validation.interval=0, or use interleaved_zero_bubble"
                )
            if train.compile:
                raise ValueError(
                    "pipeline_schedule=zbv_zero_bubble cannot take compiled blocks; set train.compile=false"
                )
        if train.global_batch_size % train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size={train.micro_batch_size}"
            )
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(f"schedule.min_lr={self.schedule.min_lr} is above optimizer.lr={self.optimizer.lr}")
        self._check_lora()
        if self.chat is not None:
            if self.chat.pack and not self.data.document_mask:
                raise ValueError(
                    "chat.pack=true needs data.document_mask=true: packed examples must not see each other"
                )
            if self.data.mask_eod_loss:
                raise ValueError("data.mask_eod_loss is for token files; conversations train the end of each answer")
            if any(source.weight != 1 for source in (*self.data.train, *self.data.validation)):
                raise ValueError("data.train: conversations take no weight, epochs or tokens; name the files alone")
        if self.data.mask_eod_loss and self.data.eod is None and not self.data.train:
            raise ValueError("data.mask_eod_loss needs data.eod, the id of the end-of-document token")
        return self

    def _check_lora(self) -> None:
        """Adapters and a quantised base must fit the model and the layout."""
        lora, model, tp = self.lora, self.model, self.parallel.tensor_parallel
        if not lora.rank:
            return
        names = adapted(lora.targets, model.num_layers)
        if HEAD in names and model.tie_embeddings:
            raise ValueError(
                "lora.targets has lm_head, whose weights are the embedding's here (model.tie_embeddings=true), so it could "
                "not be merged; leave it out"
            )
        if HEAD in names and lora.dora and lora.dropout:
            raise ValueError("lora.dora on lm_head takes no lora.dropout; set it to 0, or leave lm_head out")
        bare = set(range(model.num_layers)) - {int(name.split(".")[1]) for name in names if name != HEAD}
        if bare and self.parallel.stages > 1:
            raise ValueError(
                f"lora.targets leave layer {min(bare)} without an adapter, and a pipeline stage needs something to train; "
                "target some linear of every layer, or set parallel.pipeline_parallel=1"
            )
        if lora.quantize and self.train.compile:
            raise ValueError(
                "lora.quantize takes no train.compile=true: torch traces the unpacking for minutes; set train.compile=false"
            )
        if lora.quantize != "nf4":
            return
        widths = {name: linear_shape(f"layers.0.{name}", model)[1] for name in HF_MODULES}
        for name, width in widths.items():
            cut = tp if name in ROW_PARALLEL else 1
            if width % (64 * cut):
                over = f" over {cut} tensor ranks" if width % 64 == 0 else ""
                raise ValueError(
                    f"lora.quantize=nf4 has blocks of 64 weights along a row, and the {width} of {name} do not divide{over}; "
                    + ("use a smaller parallel.tensor_parallel, or " if over else "use ")
                    + "lora.quantize=int8"
                )
