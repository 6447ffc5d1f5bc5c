"""The Llama network (Touvron et al. 2023; Grattafiori et al. 2024): embedding, blocks, norm, output.

Shapes: B batch, S sequence, D hidden_size, V vocabulary. A model may hold only some layers: a pipeline stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from llama.config import Model
from llama.model.attention import Attention, Context, KeyValueCache, document_context
from llama.model.loss import Vocabulary, linear_cross_entropy
from llama.model.rope import inverse_frequencies, rotation


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020), (B, S, D) to (B, S, D)."""

    def __init__(self, config: Model):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and feed-forward, each behind an RMSNorm and a residual."""

    def __init__(self, config: Model):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: torch.Tensor, context: Context, cache: KeyValueCache | None = None) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), context, cache)
        return x + self.mlp(self.mlp_norm(x))


class Embedding(nn.Module):
    """Token ids (B, S) to hidden states (B, S, D)."""

    def __init__(self, config: Model):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.padded_vocab_size, config.hidden_size))
        self.vocabulary = Vocabulary()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.vocabulary.embed(tokens, self.weight)


class Head(nn.Module):
    """Hidden states (B, S, D) to logits (B, S, V), or with labels (B, S) to the summed loss, shape (1,)."""

    def __init__(self, config: Model):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.padded_vocab_size, config.hidden_size))
        self.vocabulary = Vocabulary()
        self.vocab_size = config.vocab_size
        self.loss_chunk = 1024
        self.skip_untrained = False
        """Make logits of trained positions alone, where shapes may differ from batch to batch."""

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        hidden, weight = self.vocabulary.enter(hidden, self.weight)
        if labels is None:
            return self.vocabulary.gather(F.linear(hidden, weight))[..., : self.vocab_size]
        return linear_cross_entropy(
            hidden.flatten(0, 1), weight, labels.flatten(), self.vocab_size, self.loss_chunk, self.vocabulary,
            skip_untrained=self.skip_untrained,
        )  # fmt: skip


class Llama(nn.Module):
    """The whole network, or the stage of it that holds `layers`.

    Args:
        config: shape of the whole network.
        layers: indices of the blocks held here; all when None.
    The stage with block 0 also holds the embedding, the one with the last block the final norm and the output.
    """

    def __init__(self, config: Model, layers: Sequence[int] | None = None):
        super().__init__()
        self.config = config
        held = range(config.num_layers) if layers is None else layers
        first, last = 0 in held, config.num_layers - 1 in held
        self.embed = Embedding(config) if first else None
        self.layers = nn.ModuleDict({str(i): Block(config) for i in held})
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps) if last else None
        self.head = Head(config) if last else None
        self.tie()

    def tie(self) -> None:
        """Let the output share the embedding's weights, where the config says so and both are here."""
        if self.config.tie_embeddings and self.embed is not None and self.head is not None:
            self.head.weight = self.embed.weight

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
    ) -> torch.Tensor:
        """Token ids (B, S), or on a later stage hidden states, to hidden states, logits (B, S, V) or the summed loss (1,).

        positions (B, S) count from 0 in each document; arange when None. documents (B, S) number the packed documents:
        attention stays inside each; None is plain causal attention. labels (B, S), already shifted, -100 where not trained.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], dtype=torch.int32, device=x.device).expand(x.shape[:2])
        config = self.config
        frequencies = inverse_frequencies(config.head_size, config.rope_theta, config.rope_scaling, positions.device)
        cos, sin = rotation(positions, frequencies)
        context = document_context(cos, sin, documents)
        if self.embed is not None:
            x = self.embed(x)
        for i, block in enumerate(self.layers.values()):
            x = block(x, context) if caches is None else block(x, context, caches[i])
        if self.head is None or self.norm is None:
            return x
        return self.head(self.norm(x), labels)


def count_parameters(config: Model) -> tuple[int, int]:
    """Trainable weights in all, and those outside the embedding and output (the N of 6·N FLOPs), padding left out."""
    attention = 2 * config.hidden_size * config.head_size * (config.num_heads + config.kv_heads)
    block = attention + 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
    inner = config.num_layers * block + config.hidden_size
    tables = config.vocab_size * config.hidden_size
    return inner + tables * (1 if config.tie_embeddings else 2), inner


def flops_per_token(config: Model, seq_length: int, causal: bool) -> float:
    """Floating-point operations of forward and backward for one token: 6·N plus attention (PaLM paper, appendix B).

    N counts the output projection, which is a matrix product, and not the embedding, which is a look-up. With `causal`
    only the half of the attention matrix that is needed counts.
    """
    matrices = count_parameters(config)[1] + config.vocab_size * config.hidden_size
    attention = 12 * config.num_layers * config.num_heads * config.head_size * seq_length
    return 6 * matrices + attention * (0.5 if causal else 1.0)
