"""`import encore`: its functions against the stages, and the notebook and the page about it, which are run."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import encore
from encore.errors import EncoreError
from encore.evaluation.losses import evaluate_split
from encore.pretrained.model_folder import save_model
from encore.tokens.batches import Windows
from encore.tokens.token_files import RANKS_FILE, TokenSplit
from tests.conftest import ROOT, pipeline_environment
from tests.models.test_architectures import CONFIGS, random_model

NOTEBOOK = json.loads((ROOT / "docs/library.ipynb").read_text())


def code_cells() -> list[str]:
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_a_model_that_was_trained_on_masked_documents_is_evaluated_so(short_documents: Path, tmp_path: Path) -> None:
    model = random_model(replace(CONFIGS["nanochat-plus"], vocab_size=300, document_masking=True))
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", model, (short_documents / RANKS_FILE).read_bytes(), {})
    loaded = encore.load(tmp_path / "model")
    windows = Windows(TokenSplit(short_documents, "val"), 24, "val")
    losses = []
    for masked in (True, False):
        model.config = replace(model.config, document_masking=masked)
        losses.append(evaluate_split(model, windows, 4, torch.device("cpu"), torch.float32).loss)
    assert encore.evaluate(loaded, short_documents).loss == pytest.approx(losses[0], rel=1e-6)
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize(("wanted", "on"), [("0", False), ("1", True)])
def test_loading_turns_deterministic_algorithms_on_where_they_are_wanted(
    wanted: str, on: bool, short_documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENCORE_DEVICE", "cpu")
    monkeypatch.setenv("ENCORE_REPEATABLE", wanted)
    model = random_model(replace(CONFIGS["gpt2"], vocab_size=300))
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", model, (short_documents / RANKS_FILE).read_bytes(), {})
    encore.load(tmp_path / "model")
    assert torch.are_deterministic_algorithms_enabled() is on


@pytest.mark.slow
def test_importing_it_does_not_load_torch() -> None:
    """Most commands need none, and it takes two seconds."""
    code = "import encore, sys; assert 'torch' not in sys.modules; encore.load; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="module 'encore' has no attribute 'lod'"):
        _ = encore.lod


def test_windows_are_the_tokens_and_those_one_further(tokens_folder: Path) -> None:
    tokens = np.concatenate([np.fromfile(path, "<u2") for path in sorted(tokens_folder.glob("train_*.bin"))])
    windows = encore.TokenWindows(tokens_folder, "train", block_size=16)
    assert len(windows) == (5000 - 1) // 16 == 312
    for index in (0, 1, 311, -1):
        start = index % 312 * 16
        inputs, targets = windows[index]
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.tolist() == tokens[start : start + 16].tolist()
        assert targets.tolist() == tokens[start + 1 : start + 17].tolist()
    for index in (312, -313):
        with pytest.raises(IndexError):
            _ = windows[index]
    assert len(list(windows)) == 312


def test_a_loader_with_workers_reads_each_window_once(tokens_folder: Path) -> None:
    windows = encore.TokenWindows(tokens_folder, "val", block_size=16)
    loader = DataLoader(windows, batch_size=4, num_workers=2)
    loaded = torch.cat([inputs for inputs, _ in loader])
    assert torch.equal(loaded, torch.stack([inputs for inputs, _ in windows]))


def test_a_missing_model_or_split_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(EncoreError, match=r"^there is no folder"):
        encore.load(tmp_path / "none")
    with pytest.raises(EncoreError, match="is missing"):
        encore.TokenWindows(tmp_path / "none")


@pytest.mark.usefixtures("forking")
def test_the_same_as_the_stages_and_commands(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    model = encore.load()
    found = encore.evaluate(model)
    written = json.loads(Path("metrics/eval.json").read_text())["eval"]
    assert found.loss == pytest.approx(written["loss"], abs=1e-9)
    assert found.bits_per_byte == pytest.approx(written["bits_per_byte"], abs=1e-9)
    command = [sys.executable, "-m", "encore", "generate", "--prompt", "def ", "--max-new-tokens", "9", "--seed", "4"]
    printed = subprocess.check_output(command, env=pipeline_environment(), text=True)
    assert "def " + model.generate("def ", max_new_tokens=9, seed=4) + "\n" == printed


@pytest.mark.usefixtures("forking")
def test_the_notebook_and_the_page_run_as_they_stand(finished: Path) -> None:
    page = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.S)
    assert len(page) == 1
    assert len(code_cells()) > 4
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*code_cells(), *page])],
        cwd=finished,
        env=pipeline_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\d\.\d{4} nats a token, \d\.\d{4} bits a byte, over \d+ documents$", done.stdout, re.M)
    assert "windows; a batch is (8, 64)\nTrue\n" in done.stdout


def test_the_notebook_shows_what_each_cell_printed() -> None:
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        printed = "".join(text for output in cell["outputs"] for text in output["text"])
        assert ("print(" in "".join(cell["source"])) == bool(printed)
