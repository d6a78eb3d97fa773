"""Evaluates the trained model: its loss over the whole val split, standard tasks, and samples of what it writes."""

import math
import re
import time
from pathlib import Path
from typing import Any

import torch

from encore.code import check_code
from encore.devices.device import find_device, find_dtype, naming_what_does_not_repeat, set_up_numerics
from encore.devices.distributed import Ranks, joined
from encore.devices.torchrun import run_under_torchrun, torchrun_arguments
from encore.errors import EncoreError, run_stage
from encore.evaluation.generate import generate
from encore.evaluation.losses import SplitLoss, evaluate_split
from encore.evaluation.tasks import run_tasks
from encore.files import write_json, write_tsv, write_whole
from encore.integrity import Verification
from encore.models.architectures import Model
from encore.notify import notify
from encore.params import StageParams, load_params
from encore.pipeline.stage_history import record_stage
from encore.pretrained.init_from import RECORD
from encore.pretrained.model_folder import load_model
from encore.progress import Progress
from encore.tokens.batches import Windows
from encore.tokens.token_files import RANKS_FILE, WAY_OUT, TokenSplit, token_hashes
from encore.tokens.tokenizer import load_tokenizer
from encore.training.wandb_evaluation import send_evaluation
from stages import STARTED

TOKENS = Path("data/tokens")
TASKS = Path("data/tasks")
MODEL = Path("model")
METRICS = Path("metrics/eval.json")
BY_POSITION = Path("metrics/position.tsv")
SAMPLES = Path("metrics/samples.md")
# How many tokens are evaluated at a time: a GPU is quicker with many, and does not wait for the sums in between.
BATCH_TOKENS = {"cpu": 2**13, "cuda": 2**16, "mps": 2**13}


def main() -> None:
    check_code("evaluate")
    params = load_params("evaluate")
    if arguments := torchrun_arguments("stages.evaluate", one_machine=True):
        run_under_torchrun(arguments, "stages.evaluate")
        return
    with joined(find_device()) as ranks, naming_what_does_not_repeat():
        evaluate(params, ranks)


def evaluate(params: StageParams, ranks: Ranks) -> None:
    """One rank's part of the evaluation, or all of it."""
    device = find_device()
    set_up_numerics(device)
    model = load_model(MODEL).to(device)
    verification = Verification(token_hashes(TOKENS, ["val"]) if ranks.is_first else {}, WAY_OUT)
    val = Windows(TokenSplit(TOKENS, "val"), model.config.block_size, "val")

    started = time.perf_counter()
    batch_size = max(1, BATCH_TOKENS[device.type] // model.config.block_size)
    with Progress("evaluate", val.split.tokens // ranks.count, "tokens", bar=ranks.is_first) as progress:
        dtype = find_dtype(params.dtype, device)
        split_loss = evaluate_split(model, val, batch_size, device, dtype, ranks, progress.add)
    seconds = time.perf_counter() - started
    if not ranks.is_first:
        return
    verification.check()

    if not math.isfinite(split_loss.loss):
        raise EncoreError(
            f"{MODEL} has a loss of {split_loss.loss} over the val split; train again with a lower learning_rate, or "
            "set dtype: float32"
        )

    result = {"eval": {**summarize(split_loss), "tokens_per_second": float(split_loss.tokens.sum()) / seconds}}
    if by_source := {name: summarize(of_source) for name, of_source in split_loss.by_source.items()}:
        result["eval"]["source"] = by_source
    losses = with_precision(split_loss)
    print(f"eval loss {losses} over {result['eval']['tokens']:,} tokens")
    for name, of_source in split_loss.by_source.items():
        print(f"{name}: {with_precision(of_source)} over {by_source[name]['tokens']:,} tokens")
    rows = enumerate(split_loss.loss_by_position, start=1)
    write_tsv(BY_POSITION, [{"position": position, "loss": loss} for position, loss in rows])
    if scores := run_tasks(params.evaluate_tasks, TASKS, MODEL, str(find_device())):
        result["task"] = scores
    write_json(METRICS, result)
    samples = write_samples(params, model)
    write_whole(SAMPLES, as_markdown(params.start, samples).encode())
    record_stage("evaluate", METRICS, STARTED)
    send_evaluation(MODEL, MODEL / RECORD, result, params.start, samples)
    notify(f"eval loss {losses}")


def with_precision(split_loss: SplitLoss) -> str:
    """The loss and its standard error."""
    error = split_loss.standard_error
    return f"{split_loss.loss:.4f}" + (" (one document, so no standard error)" if error is None else f" ± {error:.4f}")


def summarize(split_loss: SplitLoss) -> dict[str, Any]:
    """The numbers of eval.json, of a whole split or of a source's part of it."""
    return {
        "loss": split_loss.loss,
        "loss_standard_error": split_loss.standard_error,
        "perplexity": split_loss.perplexity,
        "bits_per_byte": split_loss.bits_per_byte,
        "tokens": int(split_loss.tokens.sum()),
        "documents": len(split_loss.tokens),
    }


def write_samples(params: StageParams, model: Model) -> list[str]:
    """`num_samples` continuations of the prompt `start`, always the same for the same seed."""
    tokenizer = load_tokenizer(MODEL / RANKS_FILE)
    # An empty prompt begins where every document begins: behind an end-of-text token.
    prompt = tokenizer.encode_ordinary(params.start) or [tokenizer.eot_token]
    how = (params.max_new_tokens, params.temperature, params.top_k, 1.0, tokenizer.eot_token)
    generator = torch.Generator().manual_seed(params.seed)
    return [tokenizer.decode(list(generate(model, prompt, *how, generator))) for _ in range(params.num_samples)]


def as_markdown(start: str, texts: list[str]) -> str:
    """Each sample, prompt included, in a code block that the text itself cannot end: it has no fence so long."""
    longest = max(map(len, re.findall("~+", "\n".join([start, *texts]))), default=0)
    fence = "~" * max(6, longest + 1)
    blocks = [f"## Sample {number}\n\n{fence}text\n{start}{text}\n{fence}\n" for number, text in enumerate(texts, 1)]
    return "\n".join(["# What the model writes\n", *blocks])


if __name__ == "__main__":
    run_stage(main)
