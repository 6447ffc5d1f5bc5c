"""Adapters on a frozen base."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from llama.config.section import NonNegative, Section, names


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
    targets: Annotated[tuple[str, ...], BeforeValidator(names), Field(min_length=1)] = ("q", "v")
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
