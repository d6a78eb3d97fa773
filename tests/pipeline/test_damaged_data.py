"""A stage that reads other bytes than the manifest says ends in a sentence; no result or checkpoint comes of them."""

import shutil
import socket
import sys
from pathlib import Path

import pytest

from encore import integrity
from encore.download.task_data import fetch_tasks
from encore.errors import EncoreError, bring_back
from encore.models.gpt2 import GPT2, GPT2Config
from encore.pretrained.initial_weights import fetch_initial
from encore.pretrained.model_folder import save_model
from encore.tokens.token_files import RANKS_FILE
from stages import evaluate, train
from tests.conftest import ROOT, TINY, write_page
from tests.ranks import C10D, end, launched, two_machines, write_run, write_walk
from tests.small_runs import NO_STOP, enter, small_machine

WAY_OUT = bring_back("data/tokens", "tokenize")
linux = pytest.mark.skipif(sys.platform != "linux", reason="the death of a parent is noticed on Linux only")


def flip(path: Path, place: int = 1000) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.fixture
def folder(tmp_path: Path, tokens_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The working directory, where both stages find all that they read."""
    monkeypatch.setattr(train, "StopRequest", lambda: NO_STOP)
    monkeypatch.setattr(integrity, "SETTLED_SECONDS", -1.0)
    with small_machine():
        enter(tmp_path / "run", tokens_folder)
        shutil.copy(ROOT / "dvc.yaml", ".")
        fetch_tasks([], tokens_folder.parent / "tasks")
        (tmp_path / "run/data/tasks").symlink_to(tokens_folder.parent / "tasks")
        write_page(Path("params.yaml"), **{**TINY, "dtype": "float32"})
        yield tmp_path / "run"


def checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob(".encore/checkpoints/*/iter-*"))


@pytest.mark.parametrize("name", ["train_00000.bin", "val_00000.bin", RANKS_FILE])
def test_train_makes_nothing_of_other_tokens(folder: Path, name: str) -> None:
    flip(Path("data/tokens", name))
    with pytest.raises(EncoreError) as error:
        train.main()
    assert str(error.value) == f"data/tokens/{name} has other bytes than its manifest says; {WAY_OUT}"
    assert checkpoints(folder) == []
    assert not Path("model").exists()


def test_a_run_that_has_only_its_results_left_to_write_verifies_too(folder: Path) -> None:
    train.main()
    assert len(checkpoints(folder)) > 0
    shutil.rmtree("model")
    flip(Path("data/tokens/train_00000.bin"))
    with pytest.raises(EncoreError, match=r"^data/tokens/train_00000\.bin has other bytes"):
        train.main()
    assert not Path("model").exists()
    flip(Path("data/tokens/train_00000.bin"))
    train.main()
    assert Path("model/model.safetensors").exists()


def test_train_takes_no_other_weights_to_start_from(folder: Path) -> None:
    train.main()
    Path("data/init").mkdir()
    fetch_initial("./model/", Path("data/init"), Path("scratch"))
    write_page(Path("params.yaml"), **{**TINY, "dtype": "float32", "init_from": "./model/"})
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        flip(Path("data/init", name), 60)
        with pytest.raises(EncoreError) as error:
            train.main()
        problem = f"data/init/{name} has other bytes than its manifest says"
        assert str(error.value) == f"{problem}; {bring_back('data/init', 'download_weights')}"
        flip(Path("data/init", name), 60)
    train.main()


@pytest.mark.parametrize("name", ["val_00000.bin", RANKS_FILE])
def test_evaluate_makes_nothing_of_other_tokens(folder: Path, name: str) -> None:
    Path("model").mkdir()
    model = GPT2(GPT2Config(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=32, bias=False))
    save_model(Path("model"), model, Path("data/tokens", RANKS_FILE).read_bytes(), {})
    flip(Path("data/tokens", name))
    with pytest.raises(EncoreError) as error:
        evaluate.main()
    assert str(error.value) == f"data/tokens/{name} has other bytes than its manifest says; {WAY_OUT}"
    assert not Path("metrics/eval.json").exists()


@linux
def test_two_machines_with_other_tokens_under_the_same_manifest_are_refused(tmp_path: Path) -> None:
    tokens = [write_walk(tmp_path / "tokens-a"), tmp_path / "tokens-b"]
    shutil.copytree(tokens[0], tokens[1])
    flip(tokens[1] / "train_00000.bin")
    folders = [write_run(tmp_path / name, place) for name, place in zip("ab", tokens, strict=True)]
    with two_machines(folders, C10D) as agents:
        said = [end(agent, exit_code=1) for agent in agents]
    sentence = f"encore: on {socket.gethostname()}: data/tokens/train_00000.bin has other bytes than its manifest says"
    assert [[line for line in lines if line.startswith(sentence)] != [] for lines in said] == [True, True]
    assert checkpoints(folders[0]) == checkpoints(folders[1]) == []


@linux
def test_several_ranks_of_a_machine_read_it_once_and_say_it_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", write_walk(tmp_path / "tokens"))
    flip(tmp_path / "tokens/val_00000.bin")
    with launched(folder, "--standalone --nproc-per-node=2") as agent:
        said = end(agent, exit_code=1)
    assert sum("val_00000.bin has other bytes" in line for line in said) == 1
    assert checkpoints(folder) == []
