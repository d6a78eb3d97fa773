"""What Encore does on the GPU that is here, as tables for docs/performance.md: is it right, does it repeat, is it fast.

    python -m bench.gpu [--nanogpt DIR] [--part correctness|repeat|attention|speed|learning|text] [--tiny]

correctness  loss and every gradient, compiled and as written, against float64
repeat       three trainings of each page, one of them killed and taken up: the hashes of the weights
attention    each kernel of attention: time, and whether its gradients repeat
speed        steps of each recipe, of nanoGPT where DIR is a checkout of it (model.py, train.py and configurator.py are
             enough), evaluation, memory, the first step of a process, and where the time of a step goes
learning     loss at steps and minutes, of GPT-2 at three rates and of nanochat's models in fewer steps
text         tokens a second that GPT-2 124M writes, beside transformers where that is installed

Without --part all of them, each in a process of its own with four minutes, whatever becomes of the others. The learning
part takes its text from ENGLISH_TEXT_DIR, a folder of parquet files with a column `text`, or else from data/tokens.
--tiny tries everything with models of nothing, also on a CPU; its figures mean nothing.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import torch

from bench.train import ROOT
from encore.devices.device import find_device

PARTS = ("correctness", "repeat", "attention", "speed", "learning", "text")
SECONDS = 240


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--nanogpt", type=Path, metavar="DIR")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    # The children start elsewhere.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if arguments.part is None:
        print(f"{describe_machine()}\n", flush=True)
        failed = [part for part in PARTS if not run_part(part)]
        raise SystemExit(f"bench: failed: {', '.join(failed)}" if failed else 0)
    nanogpt = arguments.nanogpt.resolve() if arguments.nanogpt else None
    # Short names of files: the compiler's are long.
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{name}/compiled")
        import_module(f"bench.gpu.{arguments.part}").run(Path(name), arguments.tiny, nanogpt)


def describe_machine() -> str:
    """The device and the versions that figures depend on."""
    device = find_device()
    if device.type != "cuda":
        return f"{device.type}, torch {torch.__version__}"
    gigabytes = torch.cuda.get_device_properties(device).total_memory / 1e9
    return (
        f"{torch.cuda.get_device_name(device)}, {gigabytes:.0f} GB, torch {torch.__version__}, {os.cpu_count()} cores"
    )


def run_part(part: str) -> bool:
    """Runs a part in a process of its own, with its output where ours is. Whether it came to its end. Nothing that it
    started goes on after it, and none of its files stay."""
    print(f"## {part}\n", flush=True)
    command = [sys.executable, "-m", "bench.gpu", *sys.argv[1:], "--part", part]
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        process = subprocess.Popen(command, env={**os.environ, "TMPDIR": name}, start_new_session=True)
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            print(f"\nbench: {part} was not through after {SECONDS} s", flush=True)
            return False
        finally:
            with suppress(ProcessLookupError):  # where none is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        print(f"\nbench: {part} ended with exit code {code}", flush=True)
    print(flush=True)
    return code == 0


if __name__ == "__main__":
    main()
