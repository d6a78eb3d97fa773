"""Trains the model: exactly max_iters steps, taken up again where an earlier attempt at the same run was stopped."""

import os
import sys
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, TypedDict

import torch

from encore.code import check_code, code_sha256
from encore.devices.device import Hardware, find_device, find_hardware, naming_what_does_not_repeat
from encore.devices.distributed import ALONE, SHARD, Ranks, joined
from encore.devices.torchrun import run_under_torchrun, torchrun_arguments
from encore.errors import EncoreError, bring_back, run_stage
from encore.files import check_room, sha256_of, whole_folder, write_json
from encore.integrity import Verification, check_files
from encore.json_files import read_sealed
from encore.models.architectures import Model, make_config, make_model
from encore.models.recompute import recompute_layers, wants_recompute
from encore.muon_rates import AUTO, KEYS, fill_in
from encore.notify import notify
from encore.params import StageParams, load_params
from encore.pipeline.commit import describe_head
from encore.pipeline.stage_history import record_stage
from encore.pretrained.hub_tokenizer import save_hub_tokenizer
from encore.pretrained.init_from import RECORD, SCRATCH
from encore.pretrained.model_card import write_card
from encore.pretrained.model_folder import load_initial, save_model
from encore.schemas import InitManifest
from encore.scratch import scratch_folder
from encore.signals import StopRequest
from encore.tokens.batches import Windows
from encore.tokens.ranks import read_ranks
from encore.tokens.token_files import (
    RANKS_FILE,
    WAY_OUT,
    TokenSplit,
    manifest_sha256,
    read_manifest,
    read_ranks_file,
    token_hashes,
)
from encore.training import run_folder
from encore.training.best_model import existing_parent, find_best_folder, note_what_is_past
from encore.training.checkpoint import TRAINING, find_resumable, list_checkpoints
from encore.training.metrics import Records
from encore.training.optim import describe_groups
from encore.training.samples import make_sampler
from encore.training.tensorboard import open_tensorboard
from encore.training.trainer import Trainer
from encore.training.wandb_run import start_wandb
from stages import STARTED

TOKENS = Path("data/tokens")
INIT = Path("data/init")
MODEL = Path("model")
METRICS = Path("metrics")
LOG = Path("training.log")
INIT_WAY_OUT = bring_back("data/init", "download_weights")


def main() -> None:
    check_code("train")
    params = resolve_rates(load_params("train"))
    find_best_folder()  # which refuses one that cannot serve, before anything is started
    if arguments := torchrun_arguments("stages.train"):
        run_under_torchrun(arguments, "stages.train")
        return
    # What is compiled is kept, for the next process that goes on with this run or has one like it.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(scratch_folder().resolve() / "compiled"))
    with joined(find_device()) as ranks, naming_what_does_not_repeat():
        train(params, ranks)


def train(params: StageParams, ranks: Ranks) -> None:
    """One rank's part of the training, or all of it."""
    check_batch(params, ranks)
    inputs = hash_inputs(params)
    shared = {
        "data/tokens": inputs["data_sha256"],
        "data/init": inputs["init_sha256"],
        "the code": code_sha256(TRAINING),
    }
    ranks.check_same({**params.as_dict(), **shared})
    identity = run_folder.identity(params.as_dict(), **inputs)
    checkpoints = scratch_folder() / "checkpoints" / run_folder.fingerprint(identity)
    if ranks.is_first:
        note_other_schedule(checkpoints, identity)
    with run_folder.locked(checkpoints, identity) if ranks.is_first else nullcontext():
        trainer = prepare(params, checkpoints, ranks)
        if ranks.is_first:
            check_disk(trainer, find_best_folder())
        try:
            trainer.run(StopRequest())
        except BaseException:
            trainer.records.break_off()
            raise
        model = trainer.whole_model()
        if model is not None:
            write_results(trainer, model)
            record_stage("train", MODEL / RECORD, STARTED)


def resolve_rates(params: StageParams) -> StageParams:
    """With numbers where the page says `auto`, so that a run is the same however its page has put it."""
    values = params.as_dict()
    if AUTO not in [values[key] for key in KEYS]:
        return params
    return StageParams("train", {**values, **fill_in(values, read_manifest(TOKENS)["vocab_size"])})


class Inputs(TypedDict):
    """What a run is computed from."""

    data_sha256: str
    init_sha256: str | None


def hash_inputs(params: StageParams) -> Inputs:
    """The hashes of the manifests of data/tokens and, where training does not start from scratch, data/init."""
    init_sha256 = None
    if params.init_from != SCRATCH:
        read_sealed(INIT / "manifest.json", InitManifest, INIT_WAY_OUT)  # which says so where it is missing
        init_sha256 = sha256_of(INIT / "manifest.json")
    return {"data_sha256": manifest_sha256(TOKENS), "init_sha256": init_sha256}


def check_batch(params: StageParams, ranks: Ranks) -> None:
    """Raises EncoreError where the ranks cannot share a step evenly."""
    windows = params.batch_size * params.gradient_accumulation_steps
    if windows % ranks.count:
        raise EncoreError(
            f"batch_size x gradient_accumulation_steps is {windows}, which {ranks.count} processes cannot share "
            f"evenly; make it a multiple of {ranks.count}, or start another number of processes"
        )
    if ranks.shards and params.dtype == "float16":
        raise EncoreError(f"dtype: float16 does not go with {SHARD}=1; set bfloat16 or float32")


def check_dtype(params: StageParams, hardware: Hardware) -> None:
    """Raises EncoreError where a step that overflows would not be skipped as a whole."""
    if params.optimizer == "muon" and hardware.dtype == torch.float16:
        raise EncoreError("dtype: float16 does not go with optimizer: muon; set bfloat16 or float32")


def note_other_schedule(checkpoints: Path, identity: dict[str, Any]) -> None:
    """Says why a run that was meant to be extended starts anew."""
    other = None if list_checkpoints(checkpoints) else run_folder.find_other_schedule(checkpoints, identity)
    if other:
        print(
            f"encore: note: this run starts anew. {other} holds one like it whose learning rate decays to another "
            "iteration; to go on with a finished run, keep its lr_decay_iters as a number and raise max_iters alone",
            file=sys.stderr,
        )


def prepare(params: StageParams, checkpoints: Path, ranks: Ranks = ALONE) -> Trainer:
    """Data, model and optimizer, new or as the newest checkpoint has them."""
    sampler = make_sampler(TOKENS / RANKS_FILE, params.seed, ranks)
    tokens = TokenSplit(TOKENS, "train")
    train = Windows(tokens, params.block_size, "train")
    val = Windows(TokenSplit(TOKENS, "val"), params.block_size, "val")

    hardware = find_hardware(params.dtype, params.compile)
    check_dtype(params, hardware)
    torch.manual_seed(params.seed)
    config = make_config(params, tokens.manifest["vocab_size"])
    if params.init_from == SCRATCH:
        model = make_model(config)
    else:
        check_files(INIT, read_sealed(INIT / "manifest.json", InitManifest, INIT_WAY_OUT)["files"], INIT_WAY_OUT)
        model = load_initial(INIT, config, read_ranks_file(TOKENS))
    model.to(hardware.device)
    if wants_recompute():
        recompute_layers(model)

    found = find_resumable(checkpoints, params.max_iters) if ranks.is_first else None
    wandb_run = tensorboard = None
    if ranks.is_first:
        about = {
            "commit": describe_head(),
            "device": str(hardware),
            "devices": ranks.count,
            "versions": find_versions(),
        }
        described = {**params.as_dict(), **hash_inputs(params), **about}
        wandb_run = start_wandb(described, checkpoints, resumed=found is not None)
        tensorboard = open_tensorboard(checkpoints.name)
    records = Records(METRICS, LOG, wandb_run, tensorboard, writes=ranks.is_first)
    # Once on each machine; the ranks there read the same files.
    hashes = token_hashes(TOKENS) if ranks.local_rank == 0 else {}
    verification = Verification(hashes, WAY_OUT)
    trainer = Trainer(params, model, train, val, hardware, records, checkpoints, verification, ranks)
    trainer.sampler = sampler
    trainer.check_compiled()
    if ranks.from_first(found is not None):
        trainer.resume(found)
        records.say(f"resumed at iteration {trainer.iter} of {params.max_iters} from {found.path if found else ''}")
    else:
        devices = f"{ranks.count} x {hardware}" if ranks.count > 1 else str(hardware)
        records.say(f"{devices}, torch {torch.__version__}, commit {describe_head()}")
        records.say(f"{model.count_parameters():,} parameters; {describe_groups(trainer.optimizers)}")
        epochs = params.max_iters * trainer.windows_per_step / train.count
        records.say(f"{trainer.tokens_per_step:,} tokens an iteration, {epochs:.2f} epochs of {tokens.tokens:,} tokens")
    set_up_best(trainer)
    return trainer


def set_up_best(trainer: Trainer) -> None:
    """Has the best model kept, where rank 0's environment asks for it."""
    params, is_first = trainer.params, trainer.ranks.is_first
    folder = trainer.ranks.from_first(find_best_folder() if is_first else None)
    if folder is None:
        return
    trainer.keep_best = partial(keep_best, trainer, folder)
    if is_first and (rows := trainer.records.rows.eval):  # a resumed run
        identity = run_folder.identity(params.as_dict(), **hash_inputs(params))
        note_what_is_past(folder, rows, identity, params.max_iters)


def keep_best(trainer: Trainer, folder: Path) -> None:
    """Writes the model as it is now. All ranks must come."""
    model = trainer.whole_model()
    if model is not None:
        write_model(folder, trainer, model, summarize_evaluation(trainer), is_best=True)
    trainer.records.say(f"iter {trainer.iter}: the lowest val loss so far; {folder} has this model")


def check_disk(trainer: Trainer, best_folder: Path | None = None) -> None:
    """Raises EncoreError where the disk lacks the room for the checkpoints to come, for the model, and for the best
    one, beside which a better one is written."""
    weight_bytes = 4 * sum(parameter.numel() for parameter in trainer.model.parameters())
    saver = trainer.saver
    # Weights and two moments each; the one being written comes beside those that are kept.
    checkpoint_bytes = (saver.kept + 1) * 3 * weight_bytes
    there_bytes = sum(file.stat().st_size for path in list_checkpoints(saver.folder) for file in path.iterdir())
    best = [(existing_parent(best_folder), 2 * weight_bytes)] if best_folder else []
    check_room(
        [(saver.folder, max(0, checkpoint_bytes - there_bytes)), (Path(), weight_bytes), *best],
        "make room, lower keep_checkpoints, or set ENCORE_SCRATCH to a folder on a larger disk",
    )


def write_results(trainer: Trainer, model: Model) -> None:
    """model/, the metrics and the last state of the curves."""
    summary = summarize(trainer)
    write_model(MODEL, trainer, model, summary)
    write_json(METRICS / "metrics.json", summary)
    trainer.records.finish(summary, sha256_of(MODEL / RECORD))
    losses = f"train loss {summary['train']['loss']:.4f}, val loss {summary['val']['loss']:.4f}"
    notify(f"ended at iteration {trainer.iter:,}, {losses}")


def write_model(place: Path, trainer: Trainer, model: Model, summary: dict[str, Any], is_best: bool = False) -> None:
    """A folder in Hugging Face's format. summary: for the card."""
    tokens = trainer.train.split
    record = {
        "params": trainer.params.as_dict(),
        "data": describe_data(tokens),
        **hash_inputs(trainer.params),
        "iter": trainer.iter,
        "code": trainer.code,
        "versions": find_versions(),
    }
    with whole_folder(place) as folder:
        save_hub_tokenizer(folder, read_ranks(TOKENS / RANKS_FILE), model.config.block_size)
        save_model(folder, model, read_ranks_file(TOKENS), record)
        write_card(folder, record, summary, is_best)


def describe_data(tokens: TokenSplit) -> dict[str, Any]:
    """What the model learned from. tokens: the train split."""
    manifest = tokens.manifest
    keys = ("name", "dataset", "dataset_revision", "licence")
    return {
        "sources": [
            {**{key: source[key] for key in keys}, "train_tokens": source["splits"]["train"]["tokens"]}  # type: ignore
            for source in manifest["sources"]
        ],
        "tokenizer": manifest["tokenizer"],
        "vocab_size": manifest["vocab_size"],
        "train_tokens": tokens.tokens,
    }


def summarize(trainer: Trainer) -> dict[str, Any]:
    """The run in a few numbers; speeds are medians over the logged steps."""
    rows, peak = trainer.records.rows, trainer.hardware.peak
    of_peak = {}

    def median_speed(key: str) -> float:
        return median(row[key] for row in rows.speed if key in row)  # a CPU's rows have no mfu

    if peak and any("mfu" in row for row in rows.speed):
        of_peak = {"peak_tflops": peak.flops_per_second / 1e12, "mfu": median_speed("mfu"), "mfu_basis": peak.basis}
    return {
        **summarize_evaluation(trainer),
        "lr": rows.train[-1]["lr"],
        "rates": {key: value for key, value in trainer.params.as_dict().items() if key in KEYS and value is not None},
        "tokens_per_second": median_speed("tokens_per_second"),
        "tflops": median_speed("tflops"),
        **of_peak,
    }


def summarize_evaluation(trainer: Trainer) -> dict[str, Any]:
    """What is known behind any evaluation, before a step was logged too."""
    evaluation = trainer.records.rows.eval[-1]
    return {
        "val": {"loss": evaluation["val_loss"]},
        "train": {"loss": evaluation["train_loss"]},
        "iter": trainer.iter,
        "tokens_seen": trainer.iter * trainer.tokens_per_step,
        "parameters": trainer.model.count_parameters(),
        "device": str(trainer.hardware),
        "devices": trainer.ranks.count,
    }


def find_versions() -> dict[str, str]:
    """Of the packages on which the weights' bits depend."""
    return {name: version(name) for name in ("numpy", "safetensors", "torch")}


if __name__ == "__main__":
    run_stage(main)
