"""nanochat-plus for transformers 5: transformers' own NanoChat, and the two things that nanochat-plus has more.

This file lies in the folder of each nanochat-plus model, whose config.json names it in `auto_map`. transformers runs it
where `trust_remote_code=True` allows that. It needs torch and transformers, and no Encore.

The additions: each normalised embedding takes a learned share of the one before it along ("smear"), and the last layer
and every second one before it add a learned vector of the token itself to their values ("value embeddings").

Shapes: B sequences in a batch, T tokens in a sequence, C = hidden_size, H = num_attention_heads, D = C / H.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, NanoChatConfig, NanoChatForCausalLM, NanoChatModel
from transformers import initialization as init
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.nanochat.modeling_nanochat import (
    NanoChatAttention,
    NanoChatDecoderLayer,
    NanoChatRMSNorm,
    NanoChatRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

NONE = -1  # stands for an id where no token of the same text comes before


class NanoChatPlusConfig(NanoChatConfig):
    """The keys are NanoChat's."""

    model_type = "nanochat-plus"


class NanoChatPlusAttention(NanoChatAttention):
    """NanoChat's, with something added to the values."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        values: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """values: what is added, (B, T, C); None adds nothing."""
        B, T, _ = hidden_states.shape
        v = self.v_proj(hidden_states)
        if values is not None:
            v = v + values
        q, k = self.q_proj(hidden_states), self.k_proj(hidden_states)
        q, k, v = (part.view(B, T, -1, self.head_dim).transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        q, k = self.q_norm(q), self.k_norm(k)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        y, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(y.reshape(B, T, -1)), weights


class NanoChatPlusDecoderLayer(NanoChatDecoderLayer):
    """NanoChat's, which finds its own additions among those of all layers."""

    def __init__(self, config: NanoChatPlusConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.layer_idx = layer_idx
        self.self_attn = NanoChatPlusAttention(config, layer_idx)

    def forward(
        self, hidden_states: torch.Tensor, *, smear: torch.Tensor, values: dict[int, torch.Tensor], **kwargs: Any
    ) -> torch.Tensor:
        """smear: what the first layer adds to its input, (B, T, C). values: what layers add to their values."""
        if self.layer_idx == 0:
            hidden_states = hidden_states + smear
        return super().forward(hidden_states, values=values.get(self.layer_idx), **kwargs)


class NanoChatPlusModel(NanoChatModel):
    """The layers, without the output matrix."""

    config: NanoChatPlusConfig
    _no_split_modules = ("NanoChatPlusDecoderLayer",)

    def __init__(self, config: NanoChatPlusConfig) -> None:
        super(NanoChatModel, self).__init__(config)  # NanoChat's own would make its layers first
        vocab_size, C, n_layer = config.vocab_size, config.hidden_size, config.num_hidden_layers
        self.embed_tokens = nn.Embedding(vocab_size, C)
        self.smear = nn.Parameter(torch.zeros(C))
        with_values = range((n_layer - 1) % 2, n_layer, 2)
        self.value_embeds = nn.ModuleDict({str(layer): nn.Embedding(vocab_size, C) for layer in with_values})
        self.layers = nn.ModuleList(NanoChatPlusDecoderLayer(config, layer) for layer in range(n_layer))
        self.norm = NanoChatRMSNorm(eps=config.rms_norm_eps)
        self.rotary_emb = NanoChatRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """As NanoChat's; an untrained model adds nothing."""
        super()._init_weights(module)
        if module is self:
            init.zeros_(self.smear)
            for embedding in self.value_embeds.parameters():
                init.zeros_(embedding)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As NanoChat's, for ids (B, T) and a mask (B, all tokens so far) that is 0 at padding.

        Raises ValueError for embeddings in place of ids, since the layers look the tokens up too; for a cache of a
        fixed size, since the ids that it is to keep grow; and for a mask of another form, which does not tell where a
        text begins.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("nanochat-plus computes with the ids of the tokens; pass input_ids, not inputs_embeds")
        if past_key_values is not None and past_key_values.is_compileable:
            raise ValueError("nanochat-plus wants a cache that grows; leave cache_implementation out, or set dynamic")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"nanochat-plus wants an attention_mask of 2 dimensions, (batch, tokens), not {attention_mask.ndim}"
            )
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        before = self._find_ids_before(input_ids, attention_mask, position_ids, past_key_values)
        embedded = self.norm(self.embed_tokens(before.clamp(min=0))) * (before != NONE).unsqueeze(-1)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            smear=self.smear * embedded,
            values={int(layer): embedding(input_ids) for layer, embedding in self.value_embeds.items()},
            **kwargs,
        )

    def _find_ids_before(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Any,
    ) -> torch.Tensor:
        """The id before each, (B, T); NONE behind padding and where a text begins, which is at position 0 as well.

        The cache keeps ids like the keys of one layer more, so that whatever reorders or crops it does so with them.
        """
        T = input_ids.shape[1]
        ids = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask[:, -T:] == 0, NONE)
        if cache is not None:
            while len(cache.layers) <= len(self.layers):
                cache.layers.append(DynamicLayer())
            kept = ids[:, None, :, None]
            ids = cache.layers[len(self.layers)].update(kept, kept)[0][:, 0, :, 0]
        before = F.pad(ids, (1, 0), value=NONE)[:, -T - 1 : -1]
        return before if position_ids is None else before.masked_fill(position_ids == 0, NONE)


class NanoChatPlusForCausalLM(NanoChatForCausalLM):
    """The language model."""

    config: NanoChatPlusConfig
    _no_split_modules = NanoChatPlusModel._no_split_modules

    def __init__(self, config: NanoChatPlusConfig) -> None:
        super(NanoChatForCausalLM, self).__init__(config)
        self.model = NanoChatPlusModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
