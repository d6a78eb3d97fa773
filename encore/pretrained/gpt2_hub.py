"""GPT-2's weights as transformers' GPT2LMHeadModel has them, and the way back.

It keeps linear weights as (in, out), the transpose of torch's, always has biases, and has no padding of the vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch

from encore.models.gpt2 import GPT2, GPT2Config
from encore.models.vocabulary import pad_rows

PREFIX = "transformer."


def to_hub_config(config: GPT2Config) -> dict[str, Any]:
    """transformers' GPT2Config of a model; the end-of-text token begins and ends a text."""
    end_of_text = config.vocab_size - 1
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # the published GPT-2's other name for it, which llama.cpp's converter asks for
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "activation_function": "gelu_new",
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def to_hub(model: GPT2) -> dict[str, torch.Tensor]:
    """The weights under transformers' names and in its shapes, with zeros for biases that the model lacks."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu()
        if name == "wte.weight":
            tensor = tensor[: model.config.vocab_size]
        tensors[PREFIX + name] = (tensor.T if _is_linear(name) else tensor).contiguous()
        if name.endswith("weight") and not name.startswith("w") and not model.config.bias:
            tensors[PREFIX + name.replace("weight", "bias")] = torch.zeros(len(tensor))
    return tensors


def from_hub_config(config: Mapping[str, Any], bias: bool) -> GPT2Config:
    """The shape that transformers' configuration gives; it does not say whether there are biases. Raises KeyError."""
    return GPT2Config(
        vocab_size=config["vocab_size"],
        block_size=config["n_positions"],
        n_layer=config["n_layer"],
        n_head=config["n_head"],
        n_embd=config["n_embd"],
        bias=bias,
    )


def from_hub(tensors: dict[str, torch.Tensor], model: GPT2) -> dict[str, torch.Tensor]:
    """A state dict for `model` from transformers' weights; the padding of the vocabulary is zero.

    Raises KeyError and RuntimeError where they do not belong together.
    """
    state = {}
    for name, mine in model.state_dict().items():
        tensor = tensors[PREFIX + name] if PREFIX + name in tensors else tensors[name]
        if name == "wte.weight":
            tensor = pad_rows(tensor, model.config.vocab_size, len(mine))
        state[name] = tensor.T if _is_linear(name) else tensor
    return state


def _is_linear(name: str) -> bool:
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
