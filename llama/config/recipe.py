"""The whole recipe, and which values of its sections cannot go together."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from llama.config.data import Chat, Data
from llama.config.lora import Lora
from llama.config.model import Model
from llama.config.parallel import ZERO_BUBBLE, Parallel
from llama.config.running import Checkpoint, Log, Resilience
from llama.config.section import Section
from llama.config.train import Optimizer, Schedule, Train
from llama.config.validation import Validation
from llama.freeze import frozen
from llama.targets import HEAD, HF_MODULES, ROW_PARALLEL, adapted, linear_shape


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
        mode, schedule = train.activation_checkpointing, parallel.pipeline_schedule
        if parallel.pipeline_parallel > 1 and schedule in ZERO_BUBBLE and mode != "none":
            why = (
                "torch cannot run it" if mode == "selective" else "each block would come again for each of its weights"
            )
            raise ValueError(
                f"train.activation_checkpointing={mode} does not go with pipeline_schedule={schedule}, whose backward comes "
                f"in two halves: {why}; set it to none, or use interleaved_1f1b"
            )
        if train.global_batch_size % train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size={train.micro_batch_size}"
            )
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(f"schedule.min_lr={self.schedule.min_lr} is above optimizer.lr={self.optimizer.lr}")
        self._check_lora()
        if train.freeze and self.lora.rank:
            raise ValueError(
                f"train.freeze={','.join(train.freeze)} is for training all weights; with lora.rank={self.lora.rank} all but the "
                "adapters are frozen anyway; leave one of them out"
            )
        frozen(train.freeze, model)
        if train.epochs is not None and self.chat is None:
            raise ValueError(
                f"train.epochs={train.epochs:g} counts passes over conversations, and this recipe trains on token files; set "
                "train.steps, or epochs: of the sources in data.train"
            )
        if self.chat is not None:
            if self.chat.pack and not self.data.document_mask:
                raise ValueError(
                    "chat.pack=true needs data.document_mask=true: packed examples must not see each other"
                )
            if self.data.mask_eod_loss:
                raise ValueError("data.mask_eod_loss is for token files; conversations train the end of each answer")
            if any(source.weight != 1 for source in (*self.data.train, *self.data.validation)):
                raise ValueError("data.train: conversations take no weight, epochs or tokens; name the files alone")
        elif self.validation.accuracy or self.validation.samples:
            key = "accuracy=true" if self.validation.accuracy else f"samples={self.validation.samples}"
            raise ValueError(
                f"validation.{key} is about answers in conversations, and this recipe has no chat:; leave it out"
                + ("" if self.validation.accuracy else ", or give texts to continue as validation.prompts")
            )
        if self.checkpoint.keep_best and not self.validation.interval:
            raise ValueError("checkpoint.keep_best=true needs validations; set validation.interval")
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
