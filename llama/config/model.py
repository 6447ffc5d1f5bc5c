"""The network's shape."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llama.config.section import Count, Section


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
