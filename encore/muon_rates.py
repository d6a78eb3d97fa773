"""What `auto` stands for in a page whose optimizer is Muon: learning rates and weight decay, from the size of a run.

Four power laws. Their forms follow from how the optimizers move weights, their constants are fitted to sweeps of small
models; docs/learning-rates.md has both, and how well the rule foretold sweeps that it was not fitted to.
"""

from typing import Any, NamedTuple

from encore.errors import EncoreError

AUTO = "auto"
KEYS = ("learning_rate", "embedding_lr", "head_lr", "weight_decay")
# What each key must be, since other values were not tried.
FITTED: dict[str, tuple[list[Any], str]] = {
    "optimizer": (["muon"], "Muon"),
    "architecture": (["nanochat", "nanochat-plus"], "nanochat and nanochat-plus"),
    "init_from": (["scratch"], "training from scratch"),
    "lr_schedule": (["trapezoid"], "a trapezoid"),
    "min_lr": ([0.0], "a decay to 0.0"),
}


class RunSize(NamedTuple):
    """What the rule depends on. iters: until the learning rate has decayed."""

    n_layer: int
    n_embd: int
    vocab_size: int
    tokens_per_iter: int
    iters: int


# The least and the most that was tried.
TESTED = {
    "n_layer": (2, 12),
    "n_embd": (64, 256),
    "vocab_size": (2_048, 50_257),
    "tokens_per_iter": (2_048, 65_536),
    "iters": (50, 1_600),
}
NAMES = {"tokens_per_iter": "batch_size x gradient_accumulation_steps x block_size", "iters": "max_iters"}


def find_rates(size: RunSize, learning_rate: float | None = None) -> dict[str, float]:
    """A number for each of KEYS, rounded to three digits. learning_rate: the page's, where it has a number."""
    iters, tokens, ids = size.iters / 100, size.tokens_per_iter / 4_096, size.vocab_size / 2_048
    layers, width = size.n_layer / 2, size.n_embd / 128
    learning_rate = learning_rate or 0.036 * iters**-0.4 * tokens**0.2 * layers**-0.1
    rates = {
        "learning_rate": learning_rate,
        "embedding_lr": 0.53 * iters**-0.15 * tokens**0.2,
        "head_lr": 0.026 * iters**-0.3 * tokens**0.2 * ids**-0.1 * layers**0.2 / width,
        "weight_decay": 7 / (learning_rate * size.iters),
    }
    return {key: float(f"{rate:.3g}") for key, rate in rates.items()}


def fill_in(params: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """The numbers in place of `auto`, for the keys of `params` that say so. vocab_size: the tokenizer's.

    Raises EncoreError where nobody has tried the rule.
    """
    wanted = [key for key in KEYS if params[key] == AUTO]
    if not wanted:
        return {}
    if problems := find_untested(params, vocab_size):
        raise EncoreError("; ".join(problems))
    given = None if params["learning_rate"] == AUTO else params["learning_rate"]
    rates = find_rates(measure(params, vocab_size), given)
    return {key: rates[key] for key in wanted}


def measure(params: dict[str, Any], vocab_size: int) -> RunSize:
    """The size of a page's run."""
    windows = params["batch_size"] * params["gradient_accumulation_steps"]
    iters = params["lr_decay_iters"] or params["max_iters"]
    return RunSize(params["n_layer"], params["n_embd"], vocab_size, windows * params["block_size"], iters)


def find_untested(params: dict[str, Any], vocab_size: int) -> list[str]:
    """A sentence for each thing in which a page with `auto` differs from the runs with which the rule was tried."""
    keys = ", ".join(key for key in KEYS if params[key] == AUTO)
    if not keys:
        return []
    problems = [
        f"{keys}: auto will not do with {key} {params[key]}; the rule is for {what}, give numbers"
        for key, (fitting, what) in FITTED.items()
        if params[key] not in fitting
    ]
    size = measure(params, vocab_size)._asdict()
    outside = [
        f"{NAMES.get(key, key)} from {least:,} to {most:,}, not {size[key]:,}"
        for key, (least, most) in TESTED.items()
        if not least <= size[key] <= most
    ]
    if outside and not problems:
        problems.append(
            f"{keys}: auto was tried with {', '.join(outside)}; give numbers, docs/learning-rates.md says which"
        )
    return problems
