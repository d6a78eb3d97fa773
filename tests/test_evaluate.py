"""The evaluate stage against sums written out here."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from encore.export import save_model
from encore.models.gpt2 import GPT2, GPT2Config
from encore.token_files import RANKS_FILE
from stages import evaluate
from tests.conftest import ROOT, TINY, write_page


@pytest.fixture
def model(tmp_path, tokens_folder, monkeypatch):
    """A random model in model/, beside the tokens, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENCORE_DEVICE", "cpu")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=32, bias=False))
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", model, (tokens_folder / RANKS_FILE).read_bytes(), {})
    return model.eval()


def run(tmp_path, **changes):
    write_page(tmp_path / "params.yaml", **{**TINY, "start": "ab", **changes})
    evaluate.main()
    return json.loads((tmp_path / "metrics/eval.json").read_text())["eval"]


def test_every_token_of_the_val_split_counts_once(model, tmp_path, tokens_folder):
    val = torch.from_numpy(np.fromfile(tokens_folder / "val_00000.bin", "<u2").astype(np.int64))
    assert len(val) == 700
    nats = 0.0
    with torch.no_grad():
        for start in range(0, 699, 16):  # 43 windows of 16 and one of 11
            idx, targets = val[start : min(start + 16, 699)], val[start + 1 : start + 17]
            nats += F.cross_entropy(model.logits(idx[None])[0].double(), targets, reduction="sum").item()
    result = run(tmp_path)
    assert result["tokens"] == 699
    assert result["loss"] == pytest.approx(nats / 699, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(nats / 699), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / (3 * 700), rel=1e-6)


def test_the_number_of_tokens_at_a_time_changes_nothing(model, tmp_path, monkeypatch):
    whole = run(tmp_path)
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 16)
    assert run(tmp_path)["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_samples_are_the_same_for_the_same_seed(model, tmp_path):
    run(tmp_path, num_samples=2)
    first = (tmp_path / "metrics/samples.md").read_text()
    run(tmp_path, num_samples=2)
    assert (tmp_path / "metrics/samples.md").read_text() == first
    assert first.startswith("# What the model writes\n\n## Sample 1\n\n~~~~~~text\nab")
    assert first.count("~~~~~~text\nab") == 2
    run(tmp_path, num_samples=2, seed=1)
    assert (tmp_path / "metrics/samples.md").read_text() != first


@pytest.mark.parametrize(("start", "prompt"), [("", [299]), ("ab", [97, 98])])
def test_an_empty_prompt_begins_where_documents_begin(model, tmp_path, monkeypatch, start, prompt):
    asked = []
    monkeypatch.setattr(evaluate, "generate", lambda model, ids, *rest: asked.append(ids) or [99])
    run(tmp_path, start=start, num_samples=1)
    assert asked == [prompt]
    assert f"~~~~~~text\n{start}c\n~~~~~~" in (tmp_path / "metrics/samples.md").read_text()
