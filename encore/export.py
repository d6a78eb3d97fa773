"""model/: the trained weights in Hugging Face's GPT-2 format, and the way back.

Hugging Face keeps linear weights as (in, out), the transpose of torch's, always has biases, and has no padding of the
vocabulary: `to_hub` writes zeros for biases that the model lacks, and leaves the padding out.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from encore.errors import EncoreError
from encore.files import read_json, write_json, write_whole
from encore.init_from import CONFIG, RECORD, WEIGHTS
from encore.models.gpt2 import GPT2, GPT2Config
from encore.tensor_files import save_tensors
from encore.token_files import RANKS_FILE

PREFIX = "transformer."


def save_model(folder: Path, model: GPT2, ranks: bytes, record: dict[str, Any]) -> None:
    """Fills `folder`: config.json, model.safetensors, the tokenizer's ranks, and encore.json with `record`."""
    write_json(folder / CONFIG, to_hub_config(model.config))
    save_tensors(folder / WEIGHTS, to_hub(model))
    write_whole(folder / RANKS_FILE, ranks)
    write_json(folder / RECORD, {"bias": model.config.bias, **record})


def load_model(folder: Path) -> GPT2:
    """Reads a folder of `save_model`, or of Hugging Face's GPT-2 (which always has biases), float32 on the CPU.

    Raises EncoreError where a file is missing or the weights do not have the shapes that config.json says.
    """
    hub_config = read_json(folder / CONFIG)
    try:
        bias = read_json(folder / RECORD)["bias"] if (folder / RECORD).exists() else True
        config = GPT2Config(
            vocab_size=hub_config["vocab_size"],
            block_size=hub_config["n_positions"],
            n_layer=hub_config["n_layer"],
            n_head=hub_config["n_head"],
            n_embd=hub_config["n_embd"],
            bias=bias,
        )
        model = GPT2(config)
        model.load_state_dict(from_hub(load_file(folder / WEIGHTS), model))
    except FileNotFoundError:
        raise EncoreError(f"{folder / WEIGHTS} is missing; `dvc repro train` makes it") from None
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise EncoreError(f"{folder} is no GPT-2 that fits its {CONFIG} ({error}); `dvc repro -f train`") from None
    return model.eval()


def load_initial(folder: Path, config: GPT2Config, ranks: bytes) -> GPT2:
    """A model of this configuration with the weights of a folder as `load_model` reads it, on the CPU.

    Positions beyond the configuration's block_size are cut off. Raises EncoreError where the weights are for another
    vocabulary than the data's, whose ranks are given, or of another shape.
    """
    start = load_model(folder)
    if start.config.vocab_size != config.vocab_size or _other_ranks(folder / RANKS_FILE, ranks):
        raise EncoreError(
            f"{folder} holds weights for another vocabulary ({start.config.vocab_size} ids) than that of data/tokens "
            f"({config.vocab_size}); set init_from: scratch, or weights of this tokenizer"
        )
    alike = replace(start.config, block_size=config.block_size, dropout=config.dropout)
    if alike != config or config.block_size > start.config.block_size:
        raise EncoreError(
            f"{folder} holds another model than params.yaml describes: {start.config}; set its keys to these values, "
            "or init_from: scratch"
        )
    model = GPT2(config)
    state = start.state_dict()
    state["wpe.weight"] = state["wpe.weight"][: config.block_size]
    model.load_state_dict(state)
    return model


def _other_ranks(path: Path, ranks: bytes) -> bool:
    return path.exists() and path.read_bytes() != ranks


def to_hub_config(config: GPT2Config) -> dict[str, Any]:
    """transformers' GPT2Config of a model; the end-of-text token begins and ends a text."""
    end_of_text = config.vocab_size - 1
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
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
    """The weights under transformers' names and in its shapes."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu()
        if name == "wte.weight":
            tensor = tensor[: model.config.vocab_size]
        tensors[PREFIX + name] = (tensor.T if _is_linear(name) else tensor).contiguous()
        if name.endswith("weight") and not name.startswith("w") and not model.config.bias:
            tensors[PREFIX + name.replace("weight", "bias")] = torch.zeros(len(tensor))
    return tensors


def from_hub(tensors: dict[str, torch.Tensor], model: GPT2) -> dict[str, torch.Tensor]:
    """A state dict for `model` from transformers' weights; the padding of the vocabulary is zero."""
    state = {}
    for name, mine in model.state_dict().items():
        tensor = tensors[PREFIX + name] if PREFIX + name in tensors else tensors[name]
        if name == "wte.weight":
            if len(tensor) != model.config.vocab_size:
                raise RuntimeError(f"{name} has {len(tensor)} rows")
            tensor = torch.cat([tensor, torch.zeros(len(mine) - len(tensor), tensor.shape[1])])
        state[name] = tensor.T if _is_linear(name) else tensor
    return state


def _is_linear(name: str) -> bool:
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
