"""Trains pages one after another, in a process of its own that learning.py starts: it compiles at once, beside the
others, and waits with the training until its turn has come.

    python -m bench.gpu.recipes PAGES.json      in a folder with data/tokens

Prints `ready`, reads a line, and prints a line of JSON for each page.
"""

import json
import sys
import time
from pathlib import Path

from bench.gpu.step import warm_up
from encore.evaluation import evaluate_split
from encore.flops import synchronize
from encore.params import StageParams
from stages.evaluate import BATCH_TOKENS
from stages.train import prepare


def main() -> None:
    pages = [StageParams("train", page) for page in json.loads(Path(sys.argv[1]).read_text())]
    warm_up(pages[0])
    print("ready", flush=True)
    sys.stdin.readline()
    for number, params in enumerate(pages):
        trainer = prepare(params, Path(f".encore/checkpoints-{number}"))
        started = time.perf_counter()
        for _ in range(params.max_iters):
            trainer.step()
        synchronize(trainer.device)
        seconds = time.perf_counter() - started
        batch_size = max(1, BATCH_TOKENS[trainer.device.type] // params.block_size)
        loss = evaluate_split(trainer.model, trainer.val, batch_size, trainer.device, trainer.dtype).loss
        print(json.dumps({"seconds": seconds, "loss": loss}), flush=True)


if __name__ == "__main__":
    main()
