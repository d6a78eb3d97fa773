"""GPT-2 (Radford et al. 2019), with the names that its published weights have.

Shapes: B sequences in a batch, T tokens in a sequence, C = n_embd, H = n_head, D = C / H, V ids in the vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from encore.models.cross_entropy import cross_entropies, dtype_of_products, mean_cross_entropy
from encore.models.documents import find_positions, find_visible, make_mask
from encore.models.embedding import find_occurrences, look_up
from encore.models.kv_cache import Cache
from encore.models.vocabulary import pad_vocab


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a model. `vocab_size` is the tokenizer's; the embedding is padded to the next multiple of 64.

    document_masking: whether the documents of a window are computed each as if it were alone (documents.py).
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    bias: bool
    dropout: float = 0.0
    document_masking: bool = False


class Attention(nn.Module):
    """Causal self-attention over all heads at once."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, cache: Cache | None = None, layer: int = 0
    ) -> torch.Tensor:
        """mask: what is added to the scores, (B, 1, T, T); None: causal alone."""
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
            for part in self.c_attn(x).split(C, dim=2)
        )
        k, v, mask = cache.extend(layer, k, v) if cache else (k, v, mask)
        dropout = self.dropout if self.training else 0.0
        # A single token behind others sees them all.
        is_causal = mask is None and k.shape[2] == T
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Four times wider inside, GELU in its tanh form, as the published weights were trained."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm and beside a residual path."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None, cache: Cache | None = None, layer: int = 0
    ) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache, layer)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """The language model. The embedding of the tokens is also the output matrix."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(pad_vocab(config.vocab_size), config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self._init_weights()

    def _init_weights(self) -> None:
        """Normal weights of deviation 0.02, zero biases; what is added to the residual path, twice a layer, is scaled
        by 1 / sqrt(2 n_layer) (section 2.3 of the paper)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's layers."""
        return self.h

    def count_parameters(self) -> int:
        """Parameters without the padding of the vocabulary; the shared embedding counts once."""
        padding = (pad_vocab(self.config.vocab_size) - self.config.vocab_size) * self.config.n_embd
        return sum(parameter.numel() for parameter in self.parameters()) - padding

    def count_factors(self) -> int:
        """Parameters that each token is multiplied with: all but the embedding of the positions, which is looked up."""
        return sum(parameter.numel() for parameter in self.parameters()) - self.wpe.weight.numel()

    def logits(self, idx: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Scores of the next token, (B, T, V), for ids `idx` (B, T) with T at most block_size.

        Where `cache` holds earlier tokens, T is 1; it takes these up. Tokens of a cache count as one document.
        """
        return F.linear(self._hidden(idx, cache), self.wte.weight[: self.config.vocab_size])

    def token_losses(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats of each target, (B, T) float32, without gradients."""
        x = self._hidden(idx).flatten(0, 1)
        return cross_entropies(x, self.wte.weight, targets.flatten(), self.config.vocab_size).view(targets.shape)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats over all targets (B, T)."""
        x = self._hidden(idx).flatten(0, 1)
        return mean_cross_entropy(x, self.wte.weight, targets.flatten(), self.config.vocab_size)

    def _hidden(self, idx: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """What the output matrix is applied to, (B, T, C)."""
        T = idx.shape[1]
        occurrences = find_occurrences(idx, pad_vocab(self.config.vocab_size))
        x = look_up(self.wte.weight, idx, occurrences)
        mask = None
        if self.config.document_masking and cache is None:
            visible = find_visible(begins=idx == self.config.vocab_size - 1)  # end-of-text
            mask = make_mask(visible, dtype_of_products(x))
            positions = find_positions(visible)
            x = x + look_up(self.wpe.weight, positions, find_occurrences(positions, self.config.block_size))
        else:
            x = x + self.wpe.weight[cache.places(T) if cache else slice(0, T)]
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.h):
            x = block(x, mask, cache, layer)
        if cache:
            cache.advance(T)
        return self.ln_f(x)
