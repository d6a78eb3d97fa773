"""model/: the trained weights in Hugging Face's format for their architecture, and the way back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from encore.errors import EncoreError
from encore.files import sha256_of, write_json, write_whole
from encore.json_files import read_json, write_sealed
from encore.models.architectures import Config, Model, make_model
from encore.models.gpt2 import GPT2, GPT2Config
from encore.models.nanochat import NanoChat
from encore.pretrained import gpt2_hub, nanochat_hub
from encore.pretrained.init_from import CONFIG, RECORD, WEIGHTS, check_hashes, read_record
from encore.pretrained.initial_vocabulary import is_other_vocabulary
from encore.pretrained.tensor_files import check_finite, save_tensors
from encore.schemas import HubConfig
from encore.tokens.token_files import RANKS_FILE

READ = (CONFIG, WEIGHTS, RANKS_FILE)  # of a model's files; the others are for other programs


def save_model(folder: Path, model: Model, ranks: bytes, record: dict[str, Any]) -> None:
    """Fills `folder`: config.json, model.safetensors, the tokenizer's ranks, the code that nanochat-plus needs in
    transformers, and encore.json with `record` and the sha256 of these files and of all that lies there already.

    Raises EncoreError where a weight is not finite.
    """
    if isinstance(model, GPT2):
        config, tensors = gpt2_hub.to_hub_config(model.config), gpt2_hub.to_hub(model)
        record = {"bias": model.config.bias, **record}
    else:
        config, tensors = nanochat_hub.to_hub_config(model.config), nanochat_hub.to_hub(model)
    record = {"document_masking": model.config.document_masking, **record}
    check_finite(tensors, "the trained model", "lower learning_rate, or set dtype: float32, and train again")
    write_json(folder / CONFIG, config)
    save_tensors(folder / WEIGHTS, tensors)
    write_whole(folder / RANKS_FILE, ranks)
    if config["model_type"] == nanochat_hub.PLUS:
        write_whole(folder / nanochat_hub.MODELING.name, nanochat_hub.MODELING.read_bytes())
    hashes = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != RECORD}
    write_sealed(folder / RECORD, {**record, "files_sha256": hashes})


def load_model(folder: Path) -> Model:
    """Reads a folder of `save_model`, or of Hugging Face's GPT-2 (which always has biases) or NanoChat, float32 on the
    CPU. It masks documents from each other if it was trained so.

    Raises EncoreError where a file is missing or is not the one that encore.json has the hash of, where the weights do
    not have the shapes that config.json says, or one is not finite.
    """
    record = read_record(folder)
    if record:
        check_hashes(folder, record, READ)
    masked = bool(record and record.get("document_masking"))
    hub_config = read_json(folder / CONFIG, HubConfig, "`dvc repro train` makes it, and --model names another folder")
    try:
        tensors = load_file(folder / WEIGHTS)
        check_finite(tensors, str(folder / WEIGHTS), "take other weights, or train these again")
        if hub_config["model_type"] in (nanochat_hub.PLAIN, nanochat_hub.PLUS):
            nanochat = NanoChat(replace(nanochat_hub.from_hub_config(hub_config), document_masking=masked))
            nanochat.load_state_dict(nanochat_hub.from_hub(tensors, nanochat))
            return nanochat.eval()
        bias = True if record is None else record["bias"]
        gpt2 = GPT2(replace(gpt2_hub.from_hub_config(hub_config, bias), document_masking=masked))
        gpt2.load_state_dict(gpt2_hub.from_hub(tensors, gpt2))
        return gpt2.eval()
    except FileNotFoundError:
        raise EncoreError(f"{folder / WEIGHTS} is missing; `dvc repro train` makes it") from None
    except (AttributeError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise EncoreError(f"{folder} holds no model that fits its {CONFIG} ({error}); `dvc repro -f train`") from None


def load_initial(folder: Path, config: Config, ranks: bytes) -> Model:
    """A model of this configuration with the weights of a folder as `load_model` reads it, on the CPU.

    Positions beyond the configuration's block_size are cut off. Raises EncoreError where the weights are for another
    vocabulary than the data's, whose ranks are given, or of another shape.
    """
    start = load_model(folder)
    if start.config.vocab_size != config.vocab_size or is_other_vocabulary(folder, ranks):
        raise EncoreError(
            f"{folder} holds weights for another vocabulary ({start.config.vocab_size} ids) than that of data/tokens "
            f"({config.vocab_size}); set init_from: scratch, or weights of this tokenizer"
        )
    masked = config.document_masking
    alike: Config = replace(start.config, block_size=config.block_size, document_masking=masked)
    if isinstance(alike, GPT2Config) and isinstance(config, GPT2Config):
        alike = replace(alike, dropout=config.dropout)
    if alike != config or config.block_size > start.config.block_size:
        raise EncoreError(
            f"{folder} holds another model than params.yaml describes: {start.config}; set its keys to these values, "
            "or init_from: scratch"
        )
    model = make_model(config)
    state = start.state_dict()
    if "wpe.weight" in state:
        state["wpe.weight"] = state["wpe.weight"][: config.block_size]
    model.load_state_dict(state)
    return model
