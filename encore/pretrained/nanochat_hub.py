"""nanochat's weights as transformers' NanoChatForCausalLM has them, and the way back: the same names but for a prefix,
and no padding of the vocabulary.

nanochat-plus is no model of transformers'. It has the same files under a `model_type` of its own, and one more: a copy
of modeling_nanochat_plus.py, from which transformers computes it where it may run a model's own code. Encore runs no
code of a folder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from encore.models.elementwise import EPS
from encore.models.nanochat import ROPE_THETA, SOFT_CAP, NanoChat, NanoChatConfig
from encore.models.vocabulary import pad_rows

HEAD = "lm_head.weight"
PLAIN, PLUS = "nanochat", "nanochat-plus"
MODELING = Path(__file__).with_name("modeling_nanochat_plus.py")  # only copied: importing it loads transformers
AUTO_MAP = {
    "AutoConfig": f"{MODELING.stem}.NanoChatPlusConfig",
    "AutoModelForCausalLM": f"{MODELING.stem}.NanoChatPlusForCausalLM",
}


def to_hub_config(config: NanoChatConfig) -> dict[str, Any]:
    """transformers' NanoChatConfig of a model; the end-of-text token begins and ends a text."""
    end_of_text = config.vocab_size - 1
    return {
        "architectures": ["NanoChatPlusForCausalLM" if config.plus else "NanoChatForCausalLM"],
        "model_type": PLUS if config.plus else PLAIN,
        **({"auto_map": AUTO_MAP} if config.plus else {}),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head,
        "hidden_act": "relu2",
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "final_logit_softcapping": SOFT_CAP,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }


def to_hub(model: NanoChat) -> dict[str, torch.Tensor]:
    """The weights under transformers' names and in its shapes."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if _is_padded(name):
            tensor = tensor[: model.config.vocab_size]
        tensors[_hub_name(name)] = tensor.detach().cpu().contiguous()
    return tensors


def from_hub_config(config: Mapping[str, Any]) -> NanoChatConfig:
    """The shape that transformers' configuration gives. Raises KeyError."""
    return NanoChatConfig(
        vocab_size=config["vocab_size"],
        block_size=config["max_position_embeddings"],
        n_layer=config["num_hidden_layers"],
        n_head=config["num_attention_heads"],
        n_embd=config["hidden_size"],
        plus=config["model_type"] == PLUS,
    )


def from_hub(tensors: dict[str, torch.Tensor], model: NanoChat) -> dict[str, torch.Tensor]:
    """A state dict for `model` from transformers' weights; the padding of the vocabulary is zero.

    Raises KeyError and RuntimeError where they do not belong together.
    """
    state = {}
    for name, mine in model.state_dict().items():
        tensor = tensors[_hub_name(name)]
        state[name] = pad_rows(tensor, model.config.vocab_size, len(mine)) if _is_padded(name) else tensor
    return state


def _is_padded(name: str) -> bool:
    return name == HEAD or "embed" in name


def _hub_name(name: str) -> str:
    return name if name == HEAD else f"model.{name}"
