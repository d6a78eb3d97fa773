"""A data set like C4, of .json.gz: the download stage is killed and goes on, and its text becomes the tokens that
tiktoken makes of what `datasets` reads."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest

from encore.tokens.token_files import SPLITS
from encore.tokens.tokenizer import load_tokenizer
from stages import tokenize
from tests.conftest import ROOT, write_page
from tests.hub import COMMIT, REPOSITORY, Hub, serving
from tests.raw_text import SEED, VAL_FRACTION, joined, plain_loop, read_folder
from tests.text_sources import sha256

pytestmark = pytest.mark.slow

SHARDS, SHARD_TEXT_BYTES = 10, 110_000
TOKEN_CAP = 80_000  # 600,000 bytes of text are fetched for that, which six shards have
NEEDED = 6


def name_of(number: int) -> str:
    return f"en/c4-train.{number:05d}-of-{SHARDS:05d}.json.gz"


def shard(number: int) -> bytes:
    choose = random.Random(number)
    words = ["".join(choose.choices("etaoinshrdlué", k=choose.randint(1, 9))) for _ in range(3_000)]
    lines, text_bytes = [], 0
    while text_bytes < SHARD_TEXT_BYTES:
        text = " ".join(choose.choices(words, k=choose.randint(1, 300))) + ".\n"
        lines.append(json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://a.b/"}) + "\n")
        text_bytes += len(text.encode())
    return gzip.compress("".join(lines).encode())


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving({name_of(number): shard(number) for number in range(SHARDS)}) as server:
        server.files["en/c4-validation.00000-of-00001.json.gz"] = b"not asked for"
        server.seconds_for_piece = 0.005
        yield server


def prepare(folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(ROOT / "dvc.yaml", folder)
    page = {"token_cap": TOKEN_CAP, "vocab_size": 400, "val_fraction": VAL_FRACTION, "split_seed": SEED}
    write_page(folder / "params.yaml", dataset=f"hf:{REPOSITORY}", dataset_revision=COMMIT, **page)
    return folder


def start(folder: Path, hub: Hub) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "NO_PROXY": "*"}
    command = [sys.executable, "-m", "stages.download"]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def run(folder: Path, hub: Hub) -> None:
    with start(folder, hub) as stage:
        _, error = stage.communicate(timeout=60)
    assert (stage.returncode, error) == (0, "")


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()) for path in (folder / "data/raw").iterdir()}


def test_killed_and_gone_on(tmp_path: Path, hub: Hub) -> None:
    run(undisturbed := prepare(tmp_path / "undisturbed"), hub)
    sizes = {name_of(number): len(hub.files[name_of(number)]) for number in range(NEEDED)}
    assert hub.bodies_served() == sizes
    hub.bytes_served.clear()

    folder = prepare(tmp_path / "killed")
    store = folder / ".encore/hub/owner--corpus" / COMMIT
    whole: dict[str, int] = {}  # what was served of each file when it was seen whole first
    for share in (0.1, 0.4, 0.8):
        with start(folder, hub) as stage:
            while sum(hub.bodies_served().values()) < share * sum(sizes.values()):
                assert stage.poll() is None, stage.communicate()
                time.sleep(0.001)
            stage.kill()
            assert stage.wait() == -signal.SIGKILL
        for path in store.rglob("*.json.gz"):
            name = path.relative_to(store).as_posix()
            assert hub.bytes_served[name] == whole.setdefault(name, hub.bytes_served[name])
        assert not (folder / "data/raw").exists()
    assert 1 <= len(whole) < NEEDED
    run(folder, hub)
    assert hashes(folder) == hashes(undisturbed)
    assert len(hashes(folder)) == 2
    served = hub.bodies_served()
    assert {name: served[name] for name in whole} == whole
    assert list(sizes) == sorted(served)
    assert all(sizes[name] <= served[name] < sizes[name] + 3 * sizes[name] for name in sizes)  # and what was in transit
    assert not list(folder.rglob("*.partial"))


def test_the_tokens_are_those_of_datasets_and_tiktoken(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENCORE_WORKERS", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    hub.seconds_for_piece = 0
    run(folder := prepare(tmp_path / "work"), hub)
    monkeypatch.chdir(folder)
    tokenize.main()
    names = [str(path) for path in sorted(Path.cwd().glob(".encore/hub/**/*.json.gz"))]
    assert len(names) == NEEDED
    rows = datasets.load_dataset("json", data_files=names, split="train", streaming=True)
    corpus = plain_loop(
        load_tokenizer(Path("data/tokens/tokenizer.tiktoken")), [row["text"] for row in rows], TOKEN_CAP
    )
    tokens = read_folder(Path("data/tokens"))
    for split in SPLITS:
        assert np.frombuffer(joined(tokens, split), "<u2").tolist() == corpus.ids[split]
    assert len(corpus.ids["train"]) >= TOKEN_CAP
    assert len(corpus.ids["val"]) > 10_000
