"""The train stage's own parts, and runs that are made longer or shorter; the loop is in test_trainer.py, whole runs in
test_pipeline.py."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from encore import files, muon_rates
from encore.devices.distributed import Ranks
from encore.errors import EncoreError
from encore.files import sha256_of, whole_folder
from encore.models.flops import Peak
from encore.models.gpt2 import GPT2, GPT2Config
from encore.pretrained.initial_weights import fetch_initial
from encore.pretrained.model_folder import load_model
from encore.training.metrics import Records, Rows
from encore.training.trainer import Trainer
from stages import train
from tests.conftest import MODERN, ROOT, TINY, write_page
from tests.small_runs import NO_STOP, enter, small_machine

METRICS = "metrics/metrics.json"
PARAMETERS = 320 * 32 + 16 * 32 + 2 * (12 * 32 * 32 + 2 * 32) + 32  # of TINY's model; 300 token ids become 5 x 64


@pytest.fixture
def train_in(tmp_path, tokens_folder, monkeypatch):
    """Runs the stage in a folder of that name, on a small page with changes.

    Returns all that must repeat, and the iterations that its steps ended at.
    """
    monkeypatch.setattr(train, "StopRequest", lambda: NO_STOP)
    step, done = Trainer.step, []

    def counted_step(trainer):
        step(trainer)
        done.append(trainer.iter)

    monkeypatch.setattr(Trainer, "step", counted_step)

    def run(name, **changes):
        folder = tmp_path / name
        enter(folder, tokens_folder)
        (folder / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
        write_page(folder / "params.yaml", **{**TINY, "dtype": "float32", **changes})
        done.clear()
        train.main()
        return results(folder), list(done)

    with small_machine():
        yield run


def results(folder):
    """The bytes that must repeat, and where the speed curve has its rows."""
    names = ["model/model.safetensors", "model/encore.json", "metrics/train.tsv", "metrics/eval.tsv"]
    speed = (folder / "metrics/speed.tsv").read_text().splitlines()
    return {
        **{name: (folder / name).read_bytes() for name in names},
        "speed": [row.split("\t")[0] for row in speed],
        "losses": [json.loads((folder / "metrics/metrics.json").read_text())[key] for key in ("iter", "train", "val")],
    }


def iterations(result, curve):
    return [int(row.split("\t")[0]) for row in result[f"metrics/{curve}.tsv"].decode().splitlines()[1:]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("intervals", "logged", "evaluated"),
    [((3, 4), [3, 4], [0, 4]), ((4, 3), [4], [0, 3, 4]), ((3, 3), [3, 4], [0, 3, 4])],
)
def test_a_finished_run_is_extended_and_cut_short(train_in, intervals, logged, evaluated):
    """With the end of the decay fixed. The rows that a run has because it ended are not among those of a longer one."""
    page = {
        "log_interval": intervals[0],
        "eval_interval": intervals[1],
        "lr_decay_iters": 6,
        "checkpoint_interval": 100,
    }
    short, steps = train_in("run", max_iters=4, **page)
    assert (steps, iterations(short, "train"), iterations(short, "eval")) == ([1, 2, 3, 4], logged, evaluated)

    extended, steps = train_in("run", max_iters=9, **page)
    assert steps == [5, 6, 7, 8, 9]
    assert extended == train_in("in one go", max_iters=9, **page)[0]

    back, steps = train_in("run", max_iters=4, **page)
    assert steps == []
    assert back == short

    cut, steps = train_in("run", max_iters=3, **page)
    assert steps == [1, 2, 3]
    assert cut == train_in("cut at once", max_iters=3, **page)[0]


def test_a_run_is_cut_short_from_the_last_checkpoint_before(train_in, tmp_path):
    page = {"lr_decay_iters": 6, "keep_checkpoints": 2}
    train_in("run", max_iters=6, checkpoint_interval=2, **page)
    cut, steps = train_in("run", max_iters=5, checkpoint_interval=2, **page)
    assert steps == [5]
    assert cut == train_in("cut at once", max_iters=5, checkpoint_interval=2, **page)[0]
    left = (tmp_path / "run/.encore/checkpoints").glob("*/iter-*")
    assert sorted(path.name for path in left) == ["iter-0000004", "iter-0000005"]

    # How often a checkpoint is made and how many are kept is nothing to start anew for.
    assert train_in("run", max_iters=5, checkpoint_interval=3, lr_decay_iters=6, keep_checkpoints=7)[1] == []


def test_where_the_decay_follows_max_iters_a_longer_run_starts_anew_and_says_why(train_in, tmp_path, capsys):
    train_in("run", max_iters=4, lr_decay_iters=None)
    first = next((tmp_path / "run/.encore/checkpoints").iterdir())
    assert "note" not in "".join(capsys.readouterr())

    longer, steps = train_in("run", max_iters=9, lr_decay_iters=None)
    assert steps == list(range(1, 10))
    note = f"encore: note: this run starts anew. {first.relative_to(tmp_path / 'run')} holds one like it whose"
    assert "".join(capsys.readouterr()).count(note) == 1
    assert longer == train_in("in one go", max_iters=9, lr_decay_iters=None)[0]

    # What was there before is there again, and is no news.
    assert train_in("run", max_iters=4, lr_decay_iters=None)[1] == []
    assert train_in("run", max_iters=9, lr_decay_iters=None)[1] == []
    assert "note" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("row", ["log_step", "log_eval"])
def test_a_run_killed_in_its_last_rows_has_them_once(train_in, monkeypatch, row):
    page = {"max_iters": 4, "log_interval": 3, "eval_interval": 3, "checkpoint_interval": 100}
    undisturbed, _ = train_in("undisturbed", **page)

    write = getattr(Records, row)

    def die_at_the_end(records, values, *others):
        write(records, values, *others)
        if values["iter"] == 4:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Records, row, die_at_the_end)
        with pytest.raises(MemoryError):
            train_in("killed", **page)
    result, steps = train_in("killed", **page)
    assert steps == []
    assert result == undisturbed


def fill_init(folder, tokens_folder, init_from):
    """data/init of a run's folder, as the download stage leaves it there."""
    enter(folder, tokens_folder)
    with whole_folder(train.INIT) as init:
        fetch_initial(init_from, init, folder)


def first_losses(result):
    """The losses before the first step, train and val."""
    row = result["metrics/eval.tsv"].decode().splitlines()[1].split("\t")
    assert row[0] == "0"
    return [float(value) for value in row[1:]]


def test_auto_is_the_same_run_as_the_numbers_that_it_stands_for(train_in, tmp_path, monkeypatch):
    monkeypatch.setattr(muon_rates, "TESTED", {})  # of so small a model nobody has tried it
    page = {**MODERN, "warmup_iters": 0}
    auto, _ = train_in("auto", **{**page, **dict.fromkeys(muon_rates.KEYS, "auto")})
    record, metrics = (json.loads((tmp_path / "auto" / name).read_text()) for name in ("model/encore.json", METRICS))
    rates = muon_rates.find_rates(muon_rates.RunSize(2, 32, 300, 4 * 2 * 16, 6))
    assert rates == metrics["rates"] == {key: record["params"][key] for key in muon_rates.KEYS}
    numbers, _ = train_in("numbers", **{**page, **rates})
    assert auto == numbers
    assert f"by Muon at {rates['learning_rate']} with weight decay {rates['weight_decay']}" in Path(
        tmp_path / "auto/training.log"
    ).read_text(encoding="utf-8")


def test_training_starts_from_the_weights_of_a_folder(train_in, tmp_path, tokens_folder):
    """They have at iteration 0 the losses that they were left with, and go on from there."""
    start, _ = train_in("start")
    iteration, *losses = start["losses"]
    assert iteration == 6
    fill_init(tmp_path / "run", tokens_folder, "../start/model/")
    result, steps = train_in("run", init_from="../start/model/")
    assert steps == [1, 2, 3, 4, 5, 6]
    assert first_losses(result) == pytest.approx([each["loss"] for each in losses], abs=1e-5)
    assert first_losses(start)[1] > first_losses(result)[1] + 0.05
    assert result["model/model.safetensors"] != start["model/model.safetensors"]

    assert json.loads(start["model/encore.json"])["init_sha256"] is None
    sha256 = sha256_of(tmp_path / "run/data/init/manifest.json")
    assert json.loads(result["model/encore.json"])["init_sha256"] == sha256
    (folder,) = (tmp_path / "run/.encore/checkpoints").iterdir()
    assert json.loads((folder / "run.json").read_bytes())["init_sha256"] == sha256


def test_a_run_from_other_weights_is_another_run(train_in, tmp_path, tokens_folder):
    """Although params.yaml is the same: its folder is found again with the weights, and not before."""
    for seed in (1, 2):
        train_in(f"start {seed}", seed=seed, max_iters=2)

    def run_from(seed):
        weights = tmp_path / "weights"
        shutil.rmtree(weights, ignore_errors=True)
        shutil.copytree(tmp_path / f"start {seed}/model", weights)
        fill_init(tmp_path / "run", tokens_folder, "../weights/")
        return train_in("run", init_from="../weights/", max_iters=2)

    first, steps = run_from(1)
    assert steps == [1, 2]
    other, steps = run_from(2)
    assert steps == [1, 2]
    assert other["model/model.safetensors"] != first["model/model.safetensors"]
    assert run_from(1) == (first, [])
    assert len(list((tmp_path / "run/.encore/checkpoints").iterdir())) == 2


def test_fewer_positions_than_the_weights_have_are_trained(train_in, tmp_path, tokens_folder):
    train_in("start", max_iters=2)
    fill_init(tmp_path / "run", tokens_folder, "../start/model/")
    train_in("run", init_from="../start/model/", block_size=7, max_iters=2)
    assert json.loads((tmp_path / "run/model/config.json").read_bytes())["n_positions"] == 7
    assert load_model(tmp_path / "run/model").wpe.weight.shape == (7, 32)


def test_weights_of_another_model_than_the_page_describes_are_refused(train_in, tmp_path, tokens_folder):
    train_in("start", max_iters=2)
    fill_init(tmp_path / "run", tokens_folder, "../start/model/")
    with pytest.raises(EncoreError, match=r"^data/init holds another model than params\.yaml describes: GPT2Config\("):
        train_in("run", init_from="../start/model/", n_head=4)
    assert not (tmp_path / "run/model").exists()


Usage = namedtuple("Usage", "total used free")


def with_free(monkeypatch, free_bytes):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: Usage(0, 0, free_bytes))


def test_a_disk_without_the_room_is_refused_before_the_first_step(train_in, monkeypatch):
    """Three checkpoints of weights and two moments, four bytes a number, two of them kept; and the model."""
    needed_bytes = (3 * 3 + 1) * 4 * PARAMETERS
    monkeypatch.setattr(Trainer, "run", None)
    for free_bytes, told in ((needed_bytes - 1, "1.4"), (300_000, "0.3")):
        with_free(monkeypatch, free_bytes)
        with pytest.raises(EncoreError) as error:
            train_in("run", keep_checkpoints=2)
        assert str(error.value).endswith(
            f": 1.4 MB are going to be written and {told} MB are free on its disk; make room, lower keep_checkpoints, "
            "or set ENCORE_SCRATCH to a folder on a larger disk"
        )
        assert str(error.value).startswith(".encore/checkpoints/")


def test_the_room_that_the_disk_has_just_so_is_enough(train_in, monkeypatch):
    with_free(monkeypatch, (3 * 3 + 1) * 4 * PARAMETERS)
    assert train_in("run", keep_checkpoints=2)[1] == [1, 2, 3, 4, 5, 6]


def test_checkpoints_that_are_there_need_no_room_again(train_in, monkeypatch, tmp_path):
    train_in("run", max_iters=4, lr_decay_iters=6, keep_checkpoints=2)
    folders = list((tmp_path / "run/.encore/checkpoints").glob("*/iter-*"))
    there_bytes = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    assert len(folders) == 2
    needed_bytes = (3 * 3 + 1) * 4 * PARAMETERS - there_bytes
    with_free(monkeypatch, needed_bytes - 1)
    with pytest.raises(EncoreError, match="are free on its disk"):
        train_in("run", max_iters=5, lr_decay_iters=6, keep_checkpoints=2)
    with_free(monkeypatch, needed_bytes)
    assert train_in("run", max_iters=5, lr_decay_iters=6, keep_checkpoints=2)[1] == [5]


def test_where_fewer_are_kept_than_are_there_the_model_alone_needs_room(train_in, monkeypatch):
    train_in("run", max_iters=5, lr_decay_iters=6, checkpoint_interval=1, keep_checkpoints=4)
    with_free(monkeypatch, 4 * PARAMETERS - 1)
    with pytest.raises(EncoreError, match=r"0\.1 MB are going to be written"):
        train_in("run", max_iters=6, lr_decay_iters=6, keep_checkpoints=1)
    with_free(monkeypatch, 4 * PARAMETERS)
    assert train_in("run", max_iters=6, lr_decay_iters=6, keep_checkpoints=1)[1] == [6]


def test_processes_that_cannot_share_a_step_are_refused(tiny_params):
    params = tiny_params(batch_size=4, gradient_accumulation_steps=3)
    for count in (1, 2, 3, 4, 6, 12):
        train.check_batch(params, Ranks(count=count))
    sentence = (
        "^batch_size x gradient_accumulation_steps is 12, which 5 processes cannot share evenly; make it a multiple"
    )
    with pytest.raises(EncoreError, match=sentence):
        train.check_batch(params, Ranks(count=5))


def test_float16_in_shards_is_refused(tiny_params):
    train.check_batch(tiny_params(dtype="float16"), Ranks(count=2))
    train.check_batch(tiny_params(dtype="bfloat16"), Ranks(count=2, shards=True))
    with pytest.raises(EncoreError, match=r"^dtype: float16 does not go with ENCORE_SHARD=1"):
        train.check_batch(tiny_params(dtype="float16"), Ranks(count=2, shards=True))


def test_the_summary_has_the_last_losses_the_median_speeds_and_the_rates(tiny_params):
    speeds = [
        {"iter": i, "ms_per_iter": 1.0, "tokens_per_second": s, "tflops": s / 10, "mfu": s / 100}
        for i, s in enumerate([1.0, 9.0, 2.0], 1)
    ]
    rows = Rows(
        train=[
            {"iter": 2, "loss": 5.0, "lr": 0.1, "grad_norm": 1.0},
            {"iter": 3, "loss": 4.0, "lr": 0.2, "grad_norm": 1.0},
        ],
        eval=[{"iter": 0, "train_loss": 7.0, "val_loss": 8.0}, {"iter": 3, "train_loss": 4.5, "val_loss": 4.75}],
        speed=speeds,
    )
    config = GPT2Config(vocab_size=257, block_size=4, n_layer=1, n_head=1, n_embd=2, bias=False)
    trainer = SimpleNamespace(
        records=SimpleNamespace(rows=rows),
        hardware=SimpleNamespace(peak=Peak(3e12, "measured")),
        iter=3,
        tokens_per_step=64,
        model=GPT2(config),
        ranks=Ranks(count=4),
        params=tiny_params(),
    )
    summary = train.summarize(trainer)
    assert summary.pop("rates") == {"learning_rate": 4e-3, "weight_decay": 0.1}
    assert summary.pop("device").startswith("namespace(")
    assert summary == {
        "iter": 3,
        "lr": 0.2,
        "mfu": 0.02,
        "tokens_per_second": 2.0,
        "train": {"loss": 4.5},
        "val": {"loss": 4.75},
        "tokens_seen": 192,
        "parameters": 257 * 2 + 4 * 2 + 12 * 2 * 2 + 3 * 2,
        "tflops": 0.2,
        "peak_tflops": 3.0,
        "mfu_basis": "measured",
        "devices": 4,
    }


def test_a_run_that_went_from_a_cpu_to_a_gpu_has_the_mfu_of_the_gpu_s_rows(tiny_params):
    speed = {"ms_per_iter": 1.0, "tokens_per_second": 2.0, "tflops": 0.5}
    rows = Rows(
        train=[{"iter": 2, "loss": 4.0, "lr": 0.2, "grad_norm": 1.0}],
        eval=[{"iter": 2, "train_loss": 4.5, "val_loss": 4.75}],
        speed=[{"iter": 1, **speed}, {"iter": 2, **speed, "mfu": 0.25}],
    )
    trainer = SimpleNamespace(
        records=SimpleNamespace(rows=rows),
        hardware=SimpleNamespace(peak=Peak(3e12, "measured")),
        iter=2,
        tokens_per_step=64,
        model=GPT2(GPT2Config(vocab_size=257, block_size=4, n_layer=1, n_head=1, n_embd=2, bias=False)),
        ranks=Ranks(),
        params=tiny_params(),
    )
    assert train.summarize(trainer)["mfu"] == 0.25
    del rows.speed[1]["mfu"]
    assert "mfu" not in train.summarize(trainer)
