"""The loss of the whole val split beside nanoGPT's estimate of it, on the model and the tokens that are here.

    python -m bench.estimate_loss [--draws N] [--eval-iters N] [--batch-size N]

nanoGPT's `estimate_loss` is the mean of `eval_iters` batches of windows drawn at random, so each call gives another
number. Prints how far its calls spread, and how far their mean lies from the whole split's loss.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from encore.devices.device import find_device, find_dtype, set_up_numerics
from encore.evaluation.losses import evaluate_split, sum_losses
from encore.pretrained.model_folder import load_model
from encore.tokens.batches import Windows
from encore.tokens.token_files import TokenSplit


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.estimate_loss")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--eval-iters", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=12)
    arguments = parser.parse_args()
    device = find_device()
    set_up_numerics(device)
    dtype = find_dtype("auto", device)
    model = load_model(Path("model")).to(device)
    windows = Windows(TokenSplit(Path("data/tokens"), "val"), model.config.block_size, "val")
    whole = evaluate_split(model, windows, arguments.batch_size, device, dtype)
    print(f"whole split   {whole.loss:.4f}, standard error over documents {whole.standard_error:.4f}")

    random = np.random.default_rng(1337)
    last_start = windows.split.tokens - model.config.block_size - 1

    def draw() -> float:
        starts = random.integers(0, last_start + 1, (arguments.eval_iters, arguments.batch_size))
        return sum_losses(model, (windows.at(row, model.config.block_size) for row in starts), device, dtype).mean

    estimates = [draw() for _ in range(arguments.draws)]
    tokens = arguments.eval_iters * arguments.batch_size * model.config.block_size
    print(f"estimate_loss {mean(estimates):.4f}, mean of {len(estimates)} calls of {tokens:,} tokens")
    spread, difference = stdev(estimates), whole.loss - mean(estimates)
    print(f"one call      {spread:.4f} from call to call, {min(estimates):.4f} to {max(estimates):.4f}")
    print(f"difference    {difference:+.4f}, {difference / spread:+.2f} of that")


if __name__ == "__main__":
    main()
