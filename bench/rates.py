"""The rates that `auto` stands for against a sweep around them: the val loss of each, at given sizes of run.

    python -m bench.rates POINT ... [--together] [--tokens FOLDER] [--results FILE] [--seed N] [--dtype DTYPE]

A POINT is ARCHITECTURE:LAYERSxWIDTH:TOKENSxITERATIONS, as nanochat-plus:2x64:4096x100. Its sweep is nine runs: the
rule's; all three learning rates 1.5 times as high and as low; and each of them alone. --together: all three only, so
three runs. FOLDER is the tokenize stage's, by default data/tokens. FILE keeps the loss of each run, so that a bench
that was stopped goes on.

A run is trained as the train stage trains it, on sequences of 256 tokens with heads of 128 or one head, and evaluated
over the whole val split. With OMP_NUM_THREADS=1 two cores do two benches at a time, each with a FILE of its own.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from bench.gpu.pages import Page, print_head, print_row, read_page
from bench.gpu.step import evaluate
from encore.errors import EncoreError, run_stage
from encore.muon_rates import KEYS, find_rates, measure
from encore.params import StageParams
from encore.tokens.token_files import manifest_sha256, read_manifest
from stages.train import prepare

FACTOR = 1.5
BLOCK_SIZE, BATCH_SIZE = 256, 16
POINT = re.compile(r"(nanochat|nanochat-plus):(\d+)x(\d+):(\d+)x(\d+)")


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.rates", description=__doc__)
    parser.add_argument("points", nargs="+", metavar="POINT")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    pages = {point: make_page(point, seed=arguments.seed, dtype=arguments.dtype) for point in arguments.points}
    vocab_size = read_manifest(arguments.tokens)["vocab_size"]
    results = Results(arguments.tokens.resolve(), arguments.results and arguments.results.resolve())
    print_head("run", "ids", *KEYS, "loss", "best of the sweep", "the best is", "above it")
    for point, page in pages.items():
        rates = find_rates(measure(page, vocab_size))
        losses = {name: results.find({**page, **changed}) for name, changed in sweep(rates, arguments.together)}
        best = min(losses, key=losses.__getitem__)
        cells = [f"{losses['the rule']:.4f}", f"{losses[best]:.4f}", best, f"{losses['the rule'] - losses[best]:.4f}"]
        print_row(point, f"{vocab_size:,}", *rates.values(), *cells)


def make_page(point: str, **changes: Any) -> Page:
    """A page of parameters without rates. Raises EncoreError where the point is none."""
    found = POINT.fullmatch(point)
    if not found:
        raise EncoreError(f"{point} is no point; write one as nanochat-plus:2x64:4096x100")
    n_layer, n_embd, tokens, iters = map(int, found.groups()[1:])
    windows = tokens // BLOCK_SIZE
    batch_size = min(BATCH_SIZE, windows)
    if batch_size == 0 or windows % batch_size or tokens % BLOCK_SIZE:
        raise EncoreError(f"{point}: {tokens} tokens are not a number of batches of {BATCH_SIZE} x {BLOCK_SIZE}")
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": max(1, n_embd // 128), "block_size": BLOCK_SIZE}
    batches = {"batch_size": batch_size, "gradient_accumulation_steps": windows // batch_size, "max_iters": iters}
    return read_page("quickstart", tiny=False, architecture=found[1], compile=False, **sizes, **batches, **changes)


def sweep(rates: dict[str, float], together: bool = False) -> Iterator[tuple[str, dict[str, float]]]:
    """Names of runs, with their rates."""
    yield "the rule", rates
    learning_rates = KEYS[:3]
    alone = [] if together else [(key, [key]) for key in learning_rates]
    for factor in (1 / FACTOR, FACTOR):
        for name, keys in (("all three", list(learning_rates)), *alone):
            yield f"{name} x {factor:.2g}", {**rates, **{key: rates[key] * factor for key in keys}}


class Results:
    """The losses of runs, of this bench or of one before, on any tokens. file: lines of JSON, or None."""

    def __init__(self, tokens: Path, file: Path | None) -> None:
        self.tokens, self.file = tokens, file
        self.tokens_sha256 = manifest_sha256(tokens)
        lines = file.read_text().splitlines() if file and file.exists() else []
        self.losses = {json.dumps([sha256, page]): loss for sha256, page, loss in map(json.loads, lines)}

    def find(self, page: Page) -> float:
        """Nats a token, over the val split of the tokens."""
        key = json.dumps([self.tokens_sha256, page])
        if key not in self.losses:
            self.losses[key] = train(page, self.tokens)
            if self.file:
                with self.file.open("a") as file:
                    file.write(json.dumps([self.tokens_sha256, page, self.losses[key]]) + "\n")
        return self.losses[key]


def train(page: Page, tokens: Path) -> float:
    """The loss of the whole val split behind a run's last step; infinite where it diverged."""
    home = Path.cwd()
    # The trainer's own lines would break the table.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        os.chdir(folder)
        try:
            Path("data").mkdir()
            Path("data/tokens").symlink_to(tokens)
            trainer = prepare(StageParams("train", page), Path("checkpoints"))
            try:
                for _ in range(page["max_iters"]):
                    trainer.step()
            except EncoreError as error:  # a loss that is not finite
                print(error, file=sys.stderr)
                return float("inf")
            return evaluate(trainer)
        finally:
            os.chdir(home)


if __name__ == "__main__":
    run_stage(main)
