"""Three trainings of each page: one, another, and one that is killed and taken up. Are the weights the same bytes?"""

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.gpu.pages import (
    Page,
    gpt2,
    is_gpu,
    make_tokens,
    nanochat_plus,
    print_head,
    print_row,
    read_page,
    write_stage,
)
from encore.files import sha256_of

ITERATIONS, KILLED_FROM = 12, 6


def run(folder: Path, tiny: bool, nanogpt: Path | None) -> None:
    """The pages side by side, which changes no bit; the first training of each compiles, the others find that."""
    tokens = make_tokens(folder / "tokens", tiny)
    common = {"max_iters": ITERATIONS, "checkpoint_interval": KILLED_FROM, "keep_checkpoints": 1}
    pages = {
        "GPT-2 124M, the record's": gpt2(tiny, **common),
        "the same in float32": gpt2(tiny, **common, dtype="float32", batch_size=4),
        "nanochat-plus": nanochat_plus(tiny, **common, batch_size=4),
        "the same, documents masked": nanochat_plus(tiny, **common, batch_size=4, document_masking=True),
        "the default": read_page("quickstart", tiny, **common),
    }
    if tiny:
        pages = {"nanochat-plus": pages["nanochat-plus"]}
    print_head("page", "once", "again", "killed and taken up", "")
    same = []
    with ThreadPoolExecutor(len(pages) if is_gpu() else 2) as pool:
        jobs = {
            name: pool.submit(train_three_times, page, folder / str(i), tokens)
            for i, (name, page) in enumerate(pages.items())
        }
        for name, job in jobs.items():
            hashes = job.result()
            same.append(len(set(hashes)) == 1)
            print_row(name, *(each[:12] for each in hashes), "the same" if same[-1] else "DIFFERENT")
    if not all(same):
        raise SystemExit(f"bench: {same.count(False)} pages do not repeat")


def train_three_times(page: Page, folder: Path, tokens: Path) -> list[str]:
    """The hashes of model.safetensors."""
    return [train(page, folder / name, tokens, killed=name == "killed") for name in ("once", "again", "killed")]


def train(page: Page, folder: Path, tokens: Path, killed: bool) -> str:
    """The hash of the weights that the train stage leaves. killed: by SIGKILL, behind a checkpoint, and run again."""
    write_stage(folder, page, tokens)
    command = [sys.executable, "-m", "stages.train"]
    if killed:
        first = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while first.poll() is None and not list(folder.glob(f".encore/checkpoints/*/iter-{KILLED_FROM:07d}")):
            time.sleep(0.01)
        first.kill()
        first.wait()
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"bench: stages.train failed:\n{done.stdout}")
    if killed and not re.search(rf"^resumed at iteration {KILLED_FROM} of {ITERATIONS}", done.stdout, re.MULTILINE):
        raise SystemExit(f"bench: the killed training was not taken up at iteration {KILLED_FROM}:\n{done.stdout}")
    return sha256_of(folder / "model/model.safetensors")
