"""The models that params.yaml's `architecture` names. Each has its own file, and all have the same methods."""

from encore.models.gpt2 import GPT2, GPT2Config
from encore.models.nanochat import NanoChat, NanoChatConfig
from encore.params import StageParams

Model = GPT2 | NanoChat
Config = GPT2Config | NanoChatConfig


def make_config(params: StageParams, vocab_size: int) -> Config:
    """The shape that params.yaml describes, for a tokenizer of `vocab_size` ids."""
    shape = {key: getattr(params, key) for key in ("block_size", "n_layer", "n_head", "n_embd", "document_masking")}
    if params.architecture != "gpt2":
        plus = params.architecture == "nanochat-plus"
        return NanoChatConfig(vocab_size=vocab_size, plus=plus, **shape)
    return GPT2Config(vocab_size=vocab_size, bias=params.bias, dropout=params.dropout, **shape)


def make_model(config: Config) -> Model:
    """A model with new weights, drawn from torch's generator."""
    return NanoChat(config) if isinstance(config, NanoChatConfig) else GPT2(config)
