"""What training starts from: `init_from` is scratch, the name of published weights, or a folder of weights.

A folder is one that model_folder.py or transformers has written: config.json and model.safetensors. The stage
download_weights brings the weights to data/init, where the train stage finds them without a network.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from encore.errors import EncoreError, bring_back
from encore.files import sha256_of
from encore.json_files import parse_old_too
from encore.schemas import ModelRecord

SCRATCH = "scratch"
CONFIG, WEIGHTS, RECORD = "config.json", "model.safetensors", "encore.json"
RANKS, HUB_TOKENIZER, HUB_VOCABULARY = TOKENIZERS = ("tokenizer.tiktoken", "tokenizer.json", "vocab.json")
# What transformers can be told to do otherwise, with weights of the same shapes.
NANOCHAT = {
    "hidden_act": "relu2",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "final_logit_softcapping": 15.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
COMPUTED = {
    "gpt2": {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    },
    "nanochat": NANOCHAT,
    "nanochat-plus": NANOCHAT,
}
NAMES = "gpt2, nanochat or nanochat-plus"


class Shape(NamedTuple):
    """What params.yaml must say of the model, but for block_size, which may be lower."""

    architecture: str
    n_layer: int
    n_head: int
    n_embd: int
    bias: bool
    block_size: int


class Published(NamedTuple):
    """Weights on the Hugging Face Hub, pinned by a commit."""

    repository: str
    commit: str
    shape: Shape


PUBLISHED = {
    "gpt2": Published(
        "openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e", Shape("gpt2", 12, 12, 768, True, 1024)
    ),
    "gpt2-medium": Published(
        "openai-community/gpt2-medium",
        "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
        Shape("gpt2", 24, 16, 1024, True, 1024),
    ),
    "gpt2-large": Published(
        "openai-community/gpt2-large",
        "32b71b12589c2f8d625668d2335a01cac3249519",
        Shape("gpt2", 36, 20, 1280, True, 1024),
    ),
    "gpt2-xl": Published(
        "openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2", Shape("gpt2", 48, 25, 1600, True, 1024)
    ),
}


def find_files(folder: Path) -> list[Path]:
    """What of a folder of weights is used: regular files of known names.

    A link may lead to a file within the folder, or to the blobs of the Hub's cache where the folder is a snapshot of
    it. Raises EncoreError where one leads elsewhere, since what is found there would be shared by `dvc push`.
    """
    paths = [folder / name for name in (CONFIG, WEIGHTS, RECORD, *TOKENIZERS)]
    home = Path(os.path.realpath(folder))
    places = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in filter(Path.is_symlink, paths):
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(place) for place in places):
            raise EncoreError(
                f"init_from: {path} is a link to {target}, outside of its folder; "
                "put a copy in its place (`cp -L`), or name the folder of the files themselves"
            )
    return [path for path in paths if path.is_file()]


def read_record(folder: Path) -> ModelRecord | None:
    """What Encore wrote of a model; None for a folder of another program. Raises EncoreError where it is damaged."""
    path = folder / RECORD
    if not path.exists():
        return None
    return parse_record(path.read_bytes(), str(path), bring_model_back(folder))


def bring_model_back(folder: Path) -> str:
    """The way out where a file of a model is damaged, as the end of a sentence."""
    if folder == Path("model"):
        return bring_back("model", "train")
    return f"bring {folder} back from where it came"


def parse_record(data: bytes, what: str, way_out: str) -> ModelRecord:
    """As `read_record`, of bytes that messages call `what`."""
    return parse_old_too(data, ModelRecord, what, way_out)


def check_hashes(folder: Path, record: ModelRecord, names: Iterable[str]) -> None:
    """Raises EncoreError where one of these files of a model has other bytes than when `record` was written. Folders
    of Encore before it wrote hashes have none."""
    hashes = record.get("files_sha256", {})
    there = [name for name in names if name in hashes and (folder / name).exists()]
    if other := [name for name in there if sha256_of(folder / name) != hashes[name]]:
        spelt = " and ".join(str(folder / name) for name in other)
        raise EncoreError(f"{spelt}: other bytes than {folder / RECORD} has the hash of; {bring_model_back(folder)}")


def read_shape(folder: Path) -> Shape:
    """The shape of the weights in a folder. Raises EncoreError where it holds none that Encore can compute with."""
    files = find_files(folder)
    for name in (CONFIG, WEIGHTS):
        if folder / name not in files:
            raise EncoreError(f"init_from: {folder / name} is missing; name a folder that holds {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        architecture = config["model_type"]
        if architecture not in COMPUTED:
            raise EncoreError(f"init_from: {folder} holds a {architecture}; name the folder of a {NAMES}")
        for key, value in COMPUTED[architecture].items():
            if config.get(key, value) != value:
                raise EncoreError(
                    f"init_from: {folder / CONFIG} has {key}: {config[key]}, where Encore computes with {value} only; "
                    "name other weights"
                )
        if architecture != "gpt2":
            return _nanochat_shape(config)
        # Only Encore has models without biases, and says so in its record.
        record = read_record(folder) if folder / RECORD in files else None
        bias = True if record is None else record["bias"]
        return Shape("gpt2", config["n_layer"], config["n_head"], config["n_embd"], bias, config["n_positions"])
    except (KeyError, TypeError, ValueError) as error:
        raise EncoreError(
            f"init_from: {folder} does not say which {NAMES} it holds ({error!r}); name one that "
            "Encore or transformers has written"
        ) from None


def _nanochat_shape(config: dict[str, Any]) -> Shape:
    n_head, n_embd = config["num_attention_heads"], config["hidden_size"]
    if (config["num_key_value_heads"], config["intermediate_size"]) != (n_head, 4 * n_embd):
        raise ValueError(
            "as many heads for keys and values as for queries, and an MLP four times wider, are all it has"
        )
    return Shape(
        config["model_type"], config["num_hidden_layers"], n_head, n_embd, False, config["max_position_embeddings"]
    )


def find_misfits(values: dict[str, Any]) -> list[str]:
    """Where params.yaml describes another model than `init_from` has; one sentence for each key.

    values: the page's. Raises EncoreError where there are no such weights.
    """
    start = values["init_from"]
    if start == SCRATCH:
        return []
    shape = PUBLISHED[start].shape if start in PUBLISHED else read_shape(Path(start))
    misfits = [
        f"{key}: {values[key]} is not what the weights of init_from, {start}, have: {wanted}"
        for key, wanted in shape._asdict().items()
        if key != "block_size" and values[key] != wanted
    ]
    if values["block_size"] > shape.block_size:
        misfits.append(
            f"block_size: {values['block_size']} is above {shape.block_size}, what the weights of init_from, {start}, "
            "have positions for; it may be lower"
        )
    if start in PUBLISHED and values["tokenizer"] != "gpt2":
        misfits.append(f"tokenizer: {values['tokenizer']} is not that of init_from, {start}; set gpt2")
    return misfits
