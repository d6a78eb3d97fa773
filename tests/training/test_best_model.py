"""ENCORE_BEST_MODEL: the model with the lowest val loss, the same however the run was interrupted, and the same run."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import encore
from encore.errors import EncoreError
from encore.evaluation.losses import sum_losses
from encore.pretrained.upload import find_files
from encore.tokens.batches import Windows
from encore.tokens.token_files import TokenSplit
from encore.training.best_model import find_best_folder, is_best
from encore.training.trainer import Trainer
from stages import train
from tests.conftest import ROOT, TINY, pipeline_environment, write_page
from tests.ranks import start_two_ranks, write_run, write_walk
from tests.small_models import save_small_model
from tests.small_runs import NO_STOP, enter, small_machine

# At this learning rate the val loss rises twice: 5.63, 5.62, 5.57, 5.64, 5.80, 5.54, 5.45, 5.38, 5.31, 5.34.
PAGE = {
    **TINY,
    "dtype": "float32",
    "learning_rate": 0.03,
    "min_lr": 0.03,
    "max_iters": 9,
    "lr_decay_iters": 9,
    "eval_interval": 1,
    "log_interval": 4,
    "checkpoint_interval": 4,
}
NEW_BEST = [1, 2, 5, 6, 7, 8]


@pytest.fixture
def train_in(tmp_path, tokens_folder, monkeypatch):
    """Runs the stage in a folder of that name; goes on with what was begun there."""
    monkeypatch.setattr(train, "StopRequest", lambda: NO_STOP)

    def run(name, **changes):
        prepare_folder(tmp_path / name, tokens_folder, **changes)
        train.main()
        return tmp_path / name

    with small_machine():
        yield run


def prepare_folder(folder, tokens_folder, **changes):
    enter(folder, tokens_folder)
    (folder / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    write_page(folder / "params.yaml", **{**PAGE, **changes})


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def results(folder):
    """What the stage leaves and must repeat."""
    curves = {name: (folder / f"metrics/{name}.tsv").read_bytes() for name in ("train", "eval")}
    return {**curves, **files_in(folder / "model")}


def kept_lines(folder):
    """The iterations whose lines in the log say that a model was kept."""
    lines = (folder / "training.log").read_text().splitlines()
    return [
        int(line.split()[1].rstrip(":"))
        for line in lines
        if line.endswith(": the lowest val loss so far; best has this model")
    ]


def test_the_model_of_the_lowest_val_loss_is_kept_and_the_run_is_the_same(train_in, monkeypatch):
    plain = train_in("plain")
    monkeypatch.setenv("ENCORE_BEST_MODEL", "best")
    folder = train_in("run")
    assert results(folder) == results(plain)
    assert not (plain / "best").exists()
    assert kept_lines(folder) == NEW_BEST

    record = json.loads((folder / "best/encore.json").read_text())
    last = json.loads((folder / "model/encore.json").read_text())
    assert (record["iter"], last["iter"]) == (8, 9)
    differing = {"iter", "files_sha256", "own_sha256"}
    assert {key: record[key] for key in record.keys() - differing} == {
        key: last[key] for key in last.keys() - differing
    }
    assert sorted(files_in(folder / "best")) == sorted(files_in(folder / "model"))
    assert find_files(folder / "best")  # which `encore upload` asks
    card = (folder / "best/README.md").read_text()
    assert "| iterations | 8 |" in card
    assert "ENCORE_BEST_MODEL kept the model with the lowest val loss of the run, at the" in card
    assert "dvc.lock" not in card
    assert "dvc.lock" in (folder / "model/README.md").read_text()


def test_encore_and_transformers_read_it_and_it_has_the_loss_of_its_row(train_in, tokens_folder, monkeypatch):
    monkeypatch.setenv("ENCORE_BEST_MODEL", "best")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = train_in("run")
    model = encore.load(folder / "best")
    assert len(model.generate("ab", max_new_tokens=5)) > 0
    val = Windows(TokenSplit(tokens_folder, "val"), TINY["block_size"], "val")
    batches = val.in_batches(val.spread(TINY["eval_iters"] * TINY["batch_size"]), TINY["batch_size"])
    found = sum_losses(model.network, batches, torch.device("cpu"), torch.float32)
    row = (folder / "metrics/eval.tsv").read_text().splitlines()[1 + 8].split("\t")
    assert (row[0], float(row[2])) == ("8", pytest.approx(found.mean, rel=1e-6))

    transformers = pytest.importorskip("transformers")
    hub = transformers.AutoModelForCausalLM.from_pretrained(folder / "best", local_files_only=True)
    idx, _ = val.batch(np.arange(4))
    assert torch.allclose(hub.eval()(idx).logits, model.network.logits(idx), rtol=0, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "best", local_files_only=True)
    assert tokenizer("ab 7")["input_ids"] == model.tokenizer.encode_ordinary("ab 7")


def test_where_nothing_is_better_than_the_start_there_is_no_folder(train_in, monkeypatch):
    monkeypatch.setenv("ENCORE_BEST_MODEL", "best")
    folder = train_in("run", learning_rate=0.3, min_lr=0.3)
    assert not (folder / "best").exists()
    assert kept_lines(folder) == []


def test_rows_decide():
    def last_is_best(*val_losses):
        return is_best([{"iter": 3 * i, "val_loss": loss} for i, loss in enumerate(val_losses)])

    assert not last_is_best(5.0)
    assert last_is_best(5.0, 4.9)
    assert not last_is_best(5.0, 5.0)
    assert not last_is_best(5.0, 4.0, 4.5)
    assert last_is_best(5.0, 4.0, 4.5, 3.9)


# Is killed at iteration 6, whose model is the best so far: in the middle of writing it, between the two renames that
# put it in the place of the one before, and behind that. The last checkpoint is of iteration 4.
KILLED = """
import os, signal, sys
from pathlib import Path
from encore import files
from encore.training.trainer import Trainer
from stages import train

moment, made, iteration = sys.argv[1], [], lambda: made[-1].iter
initialize, step, replace, card = Trainer.__init__, Trainer.step, os.replace, train.write_card

def die_at(*where):
    if where == (moment, 6):
        os.kill(os.getpid(), signal.SIGKILL)

def noting(trainer, *arguments):
    made.append(trainer)
    initialize(trainer, *arguments)

def dying_step(trainer):
    die_at("kept", trainer.iter)
    step(trainer)

def dying_replace(source, target):
    if Path(source).name == ".best.partial":
        die_at("renaming", iteration())
    replace(source, target)

def dying_card(*arguments):
    die_at("writing", iteration())
    card(*arguments)

Trainer.__init__, Trainer.step, files.os.replace, train.write_card = noting, dying_step, dying_replace, dying_card
train.run_stage(train.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["writing", "renaming", "kept"])
def test_a_run_killed_around_a_new_best_ends_with_the_same(
    train_in, tmp_path, tokens_folder, monkeypatch, capfd, moment
):
    monkeypatch.setenv("ENCORE_BEST_MODEL", "best")
    undisturbed = train_in("undisturbed")
    folder = tmp_path / "killed"
    prepare_folder(folder, tokens_folder)
    environment = pipeline_environment(ENCORE_DEVICE="cpu", ENCORE_BEST_MODEL="best", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", KILLED, moment]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    expected = {"writing": 5, "renaming": None, "kept": 6}[moment]
    there = json.loads((folder / "best/encore.json").read_text())["iter"] if (folder / "best").exists() else None
    assert there == expected

    capfd.readouterr()
    train_in("killed")
    assert files_in(folder / "best") == files_in(undisturbed / "best")
    assert results(folder) == results(undisturbed)
    assert kept_lines(folder) == NEW_BEST
    assert {path.name for path in folder.glob(".best*")} == set()
    # While there is no folder, the run cannot know that it is going to be written again.
    assert ("was not kept" in capfd.readouterr().err) == (moment == "renaming")


def die_in_step(monkeypatch, after):
    step = Trainer.step

    def dying_step(trainer):
        if trainer.iter == after:
            raise MemoryError
        step(trainer)

    monkeypatch.setattr(Trainer, "step", dying_step)


@pytest.mark.parametrize(
    ("after", "lowest", "kept"), [(5, "5.5737 at iteration 2", 8), (8, "5.3050 at iteration 8", None)]
)
@pytest.mark.parametrize("other", [False, True])
def test_a_setting_that_comes_too_late_says_so(train_in, tmp_path, monkeypatch, capfd, after, lowest, kept, other):
    """From iteration 4 on there are better ones to come, from 8 on there are none. The folder may hold a stranger's."""
    with monkeypatch.context() as patch:
        die_in_step(patch, after)
        with pytest.raises(MemoryError):
            train_in("run")
    if other:
        (tmp_path / "run/best").mkdir()
        save_small_model(tmp_path / "run/best")
    monkeypatch.setenv("ENCORE_BEST_MODEL", "best")
    capfd.readouterr()
    folder = train_in("run")
    said = f"the model with the lowest val loss so far, {lowest}, was not kept; best gets the first one that is better"
    assert capfd.readouterr().err.count(f"encore: note: ENCORE_BEST_MODEL: {said}\n") == 1
    record = json.loads((folder / "best/encore.json").read_text()) if (folder / "best").exists() else {}
    assert record.get("iter") == kept
    assert (folder / "best").exists() == (other or kept is not None)


def test_a_finished_run_that_is_cut_short_says_that_the_folder_has_a_later_model(train_in, monkeypatch, capfd):
    monkeypatch.setenv("ENCORE_BEST_MODEL", "best")
    folder = train_in("run", keep_checkpoints=9)
    capfd.readouterr()
    train_in("run", keep_checkpoints=9)
    assert "was not kept" not in capfd.readouterr().err
    train_in("run", keep_checkpoints=9, max_iters=4)
    assert "the lowest val loss so far, 5.5737 at iteration 2, was not kept; best gets" in capfd.readouterr().err
    assert json.loads((folder / "best/encore.json").read_text())["iter"] == 8


def make_places(folder):
    for name in ("data/tokens", "model", "full", "extended", "real"):
        (folder / name).mkdir(parents=True)
    (folder / "file").write_text("text")
    (folder / "full/thesis.tex").write_text("text")
    save_small_model(folder / "extended")
    (folder / "extended/notes.txt").write_text("text")
    (folder / "link").symlink_to("real")
    (folder / "to-data").symlink_to("data")


ELSEWHERE = "an output of the pipeline; name a folder elsewhere"
NO_PLACE = "name one in a folder that you may write to"
LOST = "which belongs to no model of Encore's and would be lost; name another folder, which need not be there"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("model", f"model lies in model, {ELSEWHERE}"),
        ("data/best", f"data/best lies in data, {ELSEWHERE}"),
        ("to-data/best", f"to-data/best lies in data, {ELSEWHERE}"),
        ("metrics/../model/best", f"metrics/../model/best lies in model, {ELSEWHERE}"),
        ("file", f"there can be no folder file; {NO_PLACE}"),
        ("file/best", f"there can be no folder file/best; {NO_PLACE}"),
        ("full", f"full holds thesis.tex, {LOST}"),
        ("extended", f"extended holds notes.txt, {LOST}"),
        (".", f". holds data, {LOST}"),
    ],
)
def test_a_folder_that_cannot_serve_is_refused_before_anything_is_read(tmp_path, monkeypatch, name, sentence):
    monkeypatch.chdir(tmp_path)
    make_places(tmp_path)
    write_page(tmp_path / "params.yaml", **TINY)
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    monkeypatch.setenv("ENCORE_BEST_MODEL", name)
    with pytest.raises(EncoreError) as error:
        train.main()
    assert str(error.value) == f"ENCORE_BEST_MODEL: {sentence}"


def test_folders_that_can_serve(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_places(tmp_path)
    (tmp_path / "extended/notes.txt").unlink()
    assert find_best_folder() is None
    for name in ("new", "deep/er/new", "real", "extended", str(tmp_path / "new"), "models"):
        monkeypatch.setenv("ENCORE_BEST_MODEL", name)
        assert str(find_best_folder()) == name
    monkeypatch.setenv("ENCORE_BEST_MODEL", "link")
    assert find_best_folder() == (tmp_path / "real").resolve()
    assert not (tmp_path / "new").exists()


def test_the_disk_needs_room_for_two_of_them(train_in, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "check_room", lambda writes, way_out: asked.append(writes))
    train_in("plain", max_iters=1)
    monkeypatch.setenv("ENCORE_BEST_MODEL", "new/best")
    train_in("run", max_iters=1)
    plain, run = asked
    weight_bytes = plain[1][1]
    assert [count for _, count in run] == [*[count for _, count in plain], 2 * weight_bytes]
    assert run[-1][0] == tmp_path / "run"


@pytest.mark.slow
def test_ranks_keep_the_same_model_and_only_the_first_writes(tmp_path):
    """Whole copies and shards; the environment of rank 0 decides. Samples are taken in the same runs, once each."""
    tokens = write_walk(tmp_path / "tokens")
    page = {
        **PAGE,
        "learning_rate": 1e-3,
        "min_lr": 1e-3,
        "max_iters": 4,
        "lr_decay_iters": 4,
        "checkpoint_interval": 2,
    }
    asked = {"ENCORE_BEST_MODEL": "best", "ENCORE_SAMPLE_INTERVAL": "3"}
    runs = [
        {"how": how, "folder": str(write_run(tmp_path / how, tokens, **page)), "first_environment": asked}
        for how in ("alone", "two", "sharded")
    ]
    done = start_two_ranks(runs, ENCORE_SHARD="1")
    assert [code for code, _ in done] == [0, 0], done
    models = {}
    for run in runs:
        folder = tmp_path / run["how"]
        assert kept_lines(folder) == [1, 2, 3, 4]
        assert (folder / "training.log").read_text().count("iter 3: sample: ") == 1
        assert files_in(folder / "best")["model.safetensors"] == files_in(folder / "model")["model.safetensors"]
        models[run["how"]] = encore.load(folder / "best").network.state_dict()
    for name, tensor in models["alone"].items():
        for how in ("two", "sharded"):
            assert torch.allclose(models[how][name], tensor, rtol=0, atol=1e-5), (how, name)
