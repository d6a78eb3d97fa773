"""What the tests of models share: ids for those of 301, a comparison of tensors, and folders of random models for tests
that only need one that runs."""

from pathlib import Path

import torch

from encore.models.gpt2 import GPT2, GPT2Config
from encore.pretrained.model_folder import save_model
from encore.tokens.ranks import write_ranks

RECORD = {"data": {"dataset": "package:made-up", "dataset_revision": "1.0"}}


def make_tokens(batch: int = 3, length: int = 21) -> torch.Tensor:
    """Random ids below 301, the same each time."""
    return torch.randint(301, (batch, length), generator=torch.Generator().manual_seed(1))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, what: str, relative: float = 1e-5) -> None:
    """relative: to the largest number that is expected."""
    difference, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert actual.shape == expected.shape, what
    assert difference <= relative * scale, f"{what}: off by {difference:.3g} where the largest is {scale:.3g}"


def save_small_model(folder: Path, n_layer: int = 2, n_embd: int = 32, block_size: int = 16) -> Path:
    """Fills a folder with a random model of 300 ids: the bytes, 43 words and the end of text."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, block_size=block_size, n_layer=n_layer, n_head=2, n_embd=n_embd, bias=False)
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"%03d?" % number: 256 + number for number in range(43)}
    save_model(folder, GPT2(config), write_ranks(ranks), RECORD)
    return folder
