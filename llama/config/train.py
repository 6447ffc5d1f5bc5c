"""Steps, their optimizer and its schedule, and which steps are not taken."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from llama.config.section import Count, NonNegative, Section, names

Precision = Literal["bf16_mixed", "bf16_sr", "fp32"]


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
    warmup_share: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Warm-up as a share of train.steps, such as 0.05; in place of warmup_steps."""
    decay_steps: Count | None = None
    """Steps at which linear and cosine reach min_lr (train.steps when not given); for wsd the length of the decay."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        if self.warmup_share is not None and self.warmup_steps:
            raise ValueError(
                f"warmup_share={self.warmup_share} and warmup_steps={self.warmup_steps} say the same in two ways; set "
                "schedule.warmup_steps=0, or schedule.warmup_share=null"
            )
        return self

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a run of `steps`."""
        return self.warmup_steps if self.warmup_share is None else round(self.warmup_share * steps)


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


class Train(Section):
    """The training run itself."""

    steps: Count
    """Optimizer steps of the whole run, resumed parts included."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Of conversations, in place of steps: how often each is read. The steps are worked out when a run starts, and stand
    in the recipe of its folder."""
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
    freeze: Annotated[tuple[str, ...], BeforeValidator(names)] = ()
    """Weights that are left as they are when all are trained: embed_tokens, lm_head, norm, norms; a linear or a group of
    them as in lora.targets; layers.0-7 or layers.0-7.mlp; or a regular expression that matches whole names such as
    model.layers.0.self_attn.q_proj."""
    garbage_collection_steps: Count = 50
    """Python's collector runs every so many steps on all ranks together, so that none makes the others wait."""
    guard: Guard = Guard()

    def steps_for(self, samples: int) -> int:
        """Steps of the run, where an epoch is so many samples; a part of a step is a whole one."""
        if self.epochs is None:
            return self.steps
        return max(1, math.ceil(self.epochs * samples / self.global_batch_size - 1e-9))

    @model_validator(mode="before")
    @classmethod
    def _epochs(cls, keys: Any) -> Any:
        """With epochs the steps are not known before the conversations are packed: one stands for them."""
        return {"steps": 1, **keys} if isinstance(keys, dict) and keys.get("epochs") is not None else keys
