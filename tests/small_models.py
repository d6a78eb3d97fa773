"""Folders of random models, for tests that only need one that runs."""

from pathlib import Path

import torch

from encore.export import save_model
from encore.models.gpt2 import GPT2, GPT2Config
from encore.ranks import write_ranks

RECORD = {"data": {"dataset": "package:made-up", "dataset_revision": "1.0"}}


def save_small_model(folder: Path, n_layer: int = 2, n_embd: int = 32, block_size: int = 16) -> Path:
    """Fills a folder with a random model of 300 ids: the bytes, 43 words and the end of text."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, block_size=block_size, n_layer=n_layer, n_head=2, n_embd=n_embd, bias=False)
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"%03d?" % number: 256 + number for number in range(43)}
    save_model(folder, GPT2(config), write_ranks(ranks), RECORD)
    return folder
