"""The pages of parameters that are tried: the presets', with what a bench of minutes changes."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from bench.train import ROOT, VOCAB_SIZE, write_tokens
from encore.devices.device import find_device

Page = dict[str, Any]
NEVER = 10**9
TINY = {"n_layer": 1, "n_head": 1, "n_embd": 32, "block_size": 16, "batch_size": 2}
TINY_VOCAB_SIZE = 300


def read_page(preset: str, tiny: bool, **changes: Any) -> Page:
    """A preset with these changes, without evaluations or checkpoints, and logging each step."""
    page = YAML(typ="safe", pure=True).load((ROOT / f"presets/{preset}.yaml").read_text())
    quiet = {"log_interval": 1, "eval_interval": NEVER, "eval_iters": 1, "checkpoint_interval": NEVER}
    return {**page, **quiet, "max_iters": 1000, "lr_decay_iters": None, **changes, **(TINY if tiny else {})}


def gpt2(tiny: bool, **changes: Any) -> Page:
    """The record's page."""
    return read_page("gpt2-owt-4b", tiny, **{"gradient_accumulation_steps": 4, "warmup_iters": 5, **changes})


def nanochat(tiny: bool, **changes: Any) -> Page:
    """nanochat by Muon, of the same size."""
    return nanochat_plus(tiny, architecture="nanochat", **changes)


def nanochat_plus(tiny: bool, **changes: Any) -> Page:
    """nanochat-plus by Muon, of the same size."""
    return read_page("modern-owt-1b", tiny, **{"gradient_accumulation_steps": 4, **changes})


def make_tokens(folder: Path, tiny: bool) -> Path:
    """Tokens drawn at random, as the tokenize stage leaves them."""
    write_tokens(folder, TINY_VOCAB_SIZE if tiny else VOCAB_SIZE)
    return folder


def write_stage(folder: Path, page: Page, tokens: Path) -> None:
    """What `python -m stages.train` needs in its working directory."""
    (folder / "data").mkdir(parents=True)
    (folder / "data/tokens").symlink_to(tokens)
    (folder / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(page, file)


def print_row(*cells: Any) -> None:
    """A row of a Markdown table, at once."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def print_head(*names: str) -> None:
    """The head of a Markdown table."""
    print_row(*names)
    print("|" + "---|" * len(names), flush=True)


def is_gpu() -> bool:
    """Whether the figures are a GPU's."""
    return find_device().type == "cuda"
