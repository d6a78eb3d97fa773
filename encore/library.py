"""Encore in a program of your own: `import encore` gives `load`, `evaluate` and `TokenWindows` (docs/library.md).

model = encore.load("model")
print(model.generate("def "))
print(encore.evaluate(model, "data/tokens").loss)
"""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from encore.evaluation.generate import encode_prompt, generate, open_model
from encore.evaluation.losses import SplitLoss, evaluate_split
from encore.tokens.batches import Windows
from encore.tokens.token_files import TokenSplit

BATCH_TOKENS = 2**13  # evaluated at a time


class LanguageModel:
    """A trained model and its tokenizer, on the best device that there is (ENCORE_DEVICE chooses another). Turns on
    torch's deterministic algorithms for the whole program, unless ENCORE_REPEATABLE=0.

    network: the torch module; `network.logits(idx)` takes ids (B, T) int64 and gives scores (B, T, V). tokenizer:
    tiktoken's Encoding. Raises EncoreError where a part of the folder is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.network, self.tokenizer = open_model(Path(folder))
        self.device = next(self.network.parameters()).device

    def generate(
        self,
        prompt: str = "",
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 1337,
    ) -> str:
        """The text that continues the prompt, as `encore generate` prints it; the same seed gives the same text."""
        ids = generate(
            self.network,
            encode_prompt(self.tokenizer, prompt),
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            self.tokenizer.eot_token,
            torch.Generator().manual_seed(seed),
        )
        return self.tokenizer.decode(list(ids))


class TokenWindows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A split of data/tokens as windows of block_size tokens, for torch's DataLoader: inputs and the targets that are
    one token further, each (block_size,) int64. Nothing is read before it is asked for.

    Raises EncoreError where the folder holds no tokens, or too few for one window.
    """

    def __init__(self, folder: str | Path = "data/tokens", split: str = "train", block_size: int = 1024) -> None:
        self.windows = Windows(TokenSplit(Path(folder), split), block_size, split)

    def __len__(self) -> int:
        return self.windows.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        inputs, targets = self.windows.batch(np.array([index % len(self)]))
        return inputs[0], targets[0]


def load(folder: str | Path = "model") -> LanguageModel:
    """The model of a folder: one of Encore's, or Hugging Face's GPT-2 with its ranks beside it."""
    return LanguageModel(folder)


def evaluate(model: LanguageModel, folder: str | Path = "data/tokens", split: str = "val") -> SplitLoss:
    """The model's loss over a whole split, in float32: loss, standard_error, perplexity, bits_per_byte,
    loss_by_position. On val it is what the stage evaluate finds."""
    block_size = model.network.config.block_size
    windows = Windows(TokenSplit(Path(folder), split), block_size, split)
    batch_size = max(1, BATCH_TOKENS // block_size)
    return evaluate_split(model.network, windows, batch_size, model.device, torch.float32)
