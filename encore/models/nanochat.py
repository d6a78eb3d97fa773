"""nanochat's model (Karpathy 2025), with the names that transformers' NanoChatForCausalLM gives its weights.

It differs from GPT-2 in what has been found since: positions are rotations of queries and keys (Su et al. 2021), which
are normalised (Henry et al. 2020), norms have no weights and no mean (Zhang and Sennrich 2019), the MLP squares a ReLU
(So et al. 2021), the output matrix is not the embedding, its scores are soft-capped (Gemma Team 2024), nothing has a
bias.

nanochat-plus has two things more, of the NanoGPT speedrun, which transformers' has not: each embedding takes some of
the one before it along, a learned share of each number ("smear"), and every second layer adds to its values what it
learns of the token itself (value embeddings; Zhou et al. 2024 take the first layer's values).

Shapes: B sequences in a batch, T tokens in a sequence, C = n_embd, H = n_head, D = C / H, V ids in the vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from encore.models.cross_entropy import cross_entropies, dtype_of_products, mean_cross_entropy, soft_cap
from encore.models.documents import find_visible, make_mask
from encore.models.elementwise import rms_norm, squared_relu
from encore.models.embedding import find_occurrences, look_up
from encore.models.kv_cache import Cache
from encore.models.vocabulary import pad_vocab

ROPE_THETA = 10_000.0
SOFT_CAP = 15.0  # scores stay within plus and minus this
Rotations = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, (T, 1, D / 2) each


@dataclass(frozen=True)
class NanoChatConfig:
    """The shape of a model. `vocab_size` is the tokenizer's; the matrices are padded to the next multiple of 64.

    Rotations take numbers by pairs, so n_embd / n_head must be even. `plus`: with smeared embeddings,
    and with value embeddings in the last layer and every second one before it. document_masking: whether the documents
    of a window are computed each as if it were alone (documents.py); rotations tell how far apart two tokens are, so
    they need not begin anew.
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    plus: bool = False
    document_masking: bool = False


def find_rotations(length: int, head_size: int) -> Rotations:
    """The angles by which the pairs of a query or key turn at the positions below `length`, in float32."""
    speeds = ROPE_THETA ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), speeds)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys x (B, T, H, D), whose pairs lie D / 2 apart, turned backwards by angles (T, 1, D / 2)."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos + right * sin, right * cos - left * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention over all heads at once."""

    def __init__(self, config: NanoChatConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        # Separate, since Muon makes each matrix orthogonal by itself.
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.v_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        rotations: Rotations,
        values: torch.Tensor | None,
        mask: torch.Tensor | None,
        cache: Cache | None,
        layer: int,
    ) -> torch.Tensor:
        """values: what is added to the values, (B, T, C). mask: to the scores, (B, 1, T, T); None: causal alone."""
        B, T, C = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if values is not None:
            v = v + values.to(v.dtype)
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head) for part in (q, k, v))
        q, k = rms_norm(rotate(q, *rotations)), rms_norm(rotate(k, *rotations))
        # Heads first, (B, H, T, D), as views: what attention writes then lies as the next product reads it.
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        k, v, mask = cache.extend(layer, k, v) if cache else (k, v, mask)
        # A single token behind others sees them all.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and k.shape[2] == T)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Four times wider inside."""

    def __init__(self, config: NanoChatConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.fc2 = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(squared_relu(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual path."""

    def __init__(self, config: NanoChatConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: torch.Tensor,
        rotations: Rotations,
        values: torch.Tensor | None,
        mask: torch.Tensor | None,
        cache: Cache | None,
        layer: int,
    ) -> torch.Tensor:
        x = x + self.self_attn(rms_norm(x), rotations, values, mask, cache, layer)
        return x + self.mlp(rms_norm(x))


def _predecessors(x: torch.Tensor, begins: torch.Tensor | None, cache: Cache | None) -> torch.Tensor:
    """The embedding before each, (B, T, C): at first `cache`'s newest, which becomes the last one here, or zeros; zeros
    too where a document begins, (B, T) bool."""
    first = torch.zeros_like(x[:, :1]) if cache is None or cache.newest is None else cache.newest
    before = torch.cat([first, x[:, :-1]], dim=1)
    if cache is not None:
        cache.keep_newest(x[:, -1:])
    return before if begins is None else before.masked_fill(begins[..., None], 0.0)


class NanoChat(nn.Module):
    """The language model."""

    cos: torch.Tensor  # (block_size, D / 2)
    sin: torch.Tensor

    def __init__(self, config: NanoChatConfig) -> None:
        super().__init__()
        self.config = config
        padded = pad_vocab(config.vocab_size)
        self.embed_tokens = nn.Embedding(padded, config.n_embd)
        self.smear = nn.Parameter(torch.zeros(config.n_embd)) if config.plus else None
        with_values = range((config.n_layer - 1) % 2, config.n_layer, 2) if config.plus else ()
        self.value_embeds = nn.ModuleDict({str(layer): nn.Embedding(padded, config.n_embd) for layer in with_values})
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, padded, bias=False)
        for name, table in zip(
            ("cos", "sin"), find_rotations(config.block_size, config.n_embd // config.n_head), strict=True
        ):
            self.register_buffer(name, table, persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        """A normal embedding of deviation 1, uniform matrices of deviation 1 / sqrt(C), and zeros in the head, in what
        is added to the residual path, and to values, so that the untrained model gives each id the same score."""
        bound = (3 / self.config.n_embd) ** 0.5
        nn.init.normal_(self.embed_tokens.weight)
        nn.init.zeros_(self.lm_head.weight)
        for embedding in self.value_embeds.parameters():
            nn.init.zeros_(embedding)
        for name, parameter in self.layers.named_parameters():
            if name.endswith(("o_proj.weight", "fc2.weight")):
                nn.init.zeros_(parameter)
            else:
                nn.init.uniform_(parameter, -bound, bound)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's layers."""
        return self.layers

    def count_parameters(self) -> int:
        """Parameters without the padding of the vocabulary, which embeddings and head have."""
        padding = (pad_vocab(self.config.vocab_size) - self.config.vocab_size) * self.config.n_embd
        return sum(parameter.numel() for parameter in self.parameters()) - (2 + len(self.value_embeds)) * padding

    def count_factors(self) -> int:
        """Parameters that each token is multiplied with: all but the embeddings, which are looked up."""
        return sum(parameter.numel() for part in (self.layers, self.lm_head) for parameter in part.parameters())

    def logits(self, idx: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Scores of the next token, (B, T, V), for ids `idx` (B, T) with T at most block_size.

        Where `cache` holds earlier tokens, T is 1; it takes these up. Tokens of a cache count as one document.
        """
        scores = F.linear(self._hidden(idx, cache), self.lm_head.weight[: self.config.vocab_size])
        return soft_cap(scores, SOFT_CAP)

    def token_losses(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats of each target, (B, T) float32, without gradients."""
        x = self._hidden(idx).flatten(0, 1)
        losses = cross_entropies(x, self.lm_head.weight, targets.flatten(), self.config.vocab_size, SOFT_CAP)
        return losses.view(targets.shape)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats over all targets (B, T)."""
        x = self._hidden(idx).flatten(0, 1)
        return mean_cross_entropy(x, self.lm_head.weight, targets.flatten(), self.config.vocab_size, SOFT_CAP)

    def _hidden(self, idx: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """What the output matrix is applied to, (B, T, C)."""
        T = idx.shape[1]
        places = cache.places(T) if cache else slice(0, T)
        rotations = self.cos[places, None], self.sin[places, None]
        occurrences = find_occurrences(idx, pad_vocab(self.config.vocab_size))
        x = rms_norm(look_up(self.embed_tokens.weight, idx, occurrences))
        begins = mask = None
        if self.config.document_masking and cache is None:
            begins = idx == self.config.vocab_size - 1  # end-of-text
            mask = make_mask(find_visible(begins), dtype_of_products(x))
        if self.smear is not None:
            x = x + self.smear * _predecessors(x, begins, cache)
        for layer, block in enumerate(self.layers):
            values = None
            if str(layer) in self.value_embeds:
                values = look_up(self.value_embeds.get_parameter(f"{layer}.weight"), idx, occurrences)
            x = block(x, rotations, values, mask, cache, layer)
        if cache:
            cache.advance(T)
        return rms_norm(x)
