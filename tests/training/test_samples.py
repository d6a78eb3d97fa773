"""ENCORE_SAMPLE_INTERVAL: what the model writes on its way, once for each iteration, and the same run."""

import ast

import pytest
import torch

import encore
from encore.devices.distributed import ALONE
from encore.errors import EncoreError
from encore.training.samples import make_sampler
from tests.conftest import MODERN
from tests.small_runs import assert_same, run, small_machine, trainer_in
from tests.training.test_metrics import FakeRun


@pytest.fixture
def make_trainer(tmp_path, tokens_folder, tiny_params):
    with small_machine():
        yield lambda run, **changes: trainer_in(
            tmp_path / run, tokens_folder, tiny_params(**{"dtype": "float32", **changes})
        )


@pytest.fixture
def every_second(monkeypatch):
    monkeypatch.setenv("ENCORE_SAMPLE_INTERVAL", "2")


def logged(trainer):
    """(iteration, text) of each sample in training.log."""
    lines = (trainer.checkpoints.parent / "training.log").read_text().splitlines()
    parts = [line.split(": sample: ") for line in lines if ": sample: " in line]
    return [(int(start.removeprefix("iter ")), ast.literal_eval(text)) for start, text in parts]


@pytest.mark.parametrize("changes", [{"dropout": 0.2}, MODERN], ids=["gpt2 with dropout", "nanochat"])
def test_samples_are_logged_and_change_no_number(make_trainer, monkeypatch, changes):
    plain = run(make_trainer("plain", **changes))
    monkeypatch.setenv("ENCORE_SAMPLE_INTERVAL", "2")
    first, again = (make_trainer(name, **changes) for name in ("first", "again"))
    assert_same(run(first), plain)
    assert_same(run(again), plain)
    assert [iteration for iteration, _ in logged(first)] == [2, 4, 6]
    assert logged(first) == logged(again)
    assert len({text for _, text in logged(first)}) == 3


def test_a_sample_is_what_generate_writes_with_the_documented_seed(make_trainer, every_second, monkeypatch):
    """Of the model that ENCORE_BEST_MODEL has kept: here that of the last iteration."""
    monkeypatch.setenv("ENCORE_SAMPLE_PROMPT", "a 'b'\n")
    monkeypatch.setenv("ENCORE_BEST_MODEL", "best")
    trainer = make_trainer("run", learning_rate=0.01, min_lr=0.01)
    run(trainer)
    model = encore.load(trainer.checkpoints.parent / "best")
    text = model.generate("a 'b'\n", max_new_tokens=64, temperature=0.8, seed=1337 * 2**31 + 6)
    assert logged(trainer)[-1] == (6, "a 'b'\n" + text)


def test_generators_and_mode_are_left_as_they_were(make_trainer, every_second):
    trainer = make_trainer("run", dropout=0.2)
    trainer.step()
    state = torch.get_rng_state()
    for mode in (True, False):
        trainer.model.train(mode)
        trainer.sample(trainer.sampler)
        assert all(module.training is mode for module in trainer.model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    first, second = trainer.records.samples
    assert first == second


def test_a_killed_and_resumed_run_has_each_once(make_trainer, every_second, monkeypatch):
    """Killed at iteration 5: the sample of 4 came before the checkpoint of 4, and behind that of 3 there is none."""
    changes = {"dropout": 0.2, "max_iters": 6, "checkpoint_interval": 3}
    undisturbed = make_trainer("undisturbed", **changes)
    expected = run(undisturbed)
    killed = make_trainer("killed", **changes)
    step = killed.step

    def dying_step():
        if killed.iter == 5:
            raise MemoryError
        step()

    monkeypatch.setattr(killed, "step", dying_step)
    with pytest.raises(MemoryError):
        run(killed)
    assert [iteration for iteration, _ in logged(killed)] == [2, 4]
    resumed = make_trainer("killed", **changes)
    assert resumed.iter == 3
    assert_same(run(resumed), expected)
    assert [iteration for iteration, _ in logged(resumed)] == [2, 4, 6]
    assert logged(resumed) == logged(undisturbed)


def test_wandb_is_given_them_in_the_row_of_their_iteration(make_trainer, every_second):
    trainer = make_trainer("run")
    trainer.records._wandb = FakeRun()
    run(trainer)
    given = [(row["iter"], row["sample"]) for row in trainer.records._wandb.history if "sample" in row]
    assert given == logged(trainer)
    assert [row["iter"] for row in trainer.records._wandb.history] == [0, 1, 2, 2, 3, 3, 4, 4, 5, 6, 6, 6]


def test_tensorboard_has_each_iteration_once_in_a_resumed_run(make_trainer, every_second, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("ENCORE_TENSORBOARD", str(tmp_path / "runs"))
    stopped = make_trainer("run", max_iters=4, lr_decay_iters=6)
    run(stopped)
    stopped.records.break_off()
    resumed = make_trainer("run", max_iters=6, lr_decay_iters=6)
    run(resumed)
    resumed.records.break_off()
    events = EventAccumulator(str(tmp_path / "runs" / resumed.checkpoints.name))
    events.Reload()
    points = [
        (point.step, point.tensor_proto.string_val[0].decode()) for point in events.Tensors("sample/text_summary")
    ]
    shown = [(iteration, "".join(f"    {line}\n" for line in text.split("\n"))) for iteration, text in logged(resumed)]
    assert points == shown
    assert [iteration for iteration, _ in points] == [2, 4, 6]


def test_with_recomputed_layers_they_are_the_same(make_trainer, every_second, monkeypatch):
    plain = make_trainer("plain")
    run(plain)
    monkeypatch.setenv("ENCORE_RECOMPUTE", "1")
    recomputed = make_trainer("recomputed")
    run(recomputed)
    assert logged(recomputed) == logged(plain)


@pytest.mark.slow
def test_compiled_training_is_the_same_with_them(make_trainer, traced, monkeypatch):
    from torch._dynamo.utils import counters

    changes = {"compile": True, "n_layer": 1, "dropout": 0.2}
    counters.clear()  # of what tests before this one have compiled
    plain = run(make_trainer("plain", **changes))
    graphs = counters["stats"]["unique_graphs"]
    monkeypatch.setenv("ENCORE_SAMPLE_INTERVAL", "2")
    torch.compiler.reset()
    counters.clear()
    trainer = make_trainer("run", **changes)
    assert_same(run(trainer), plain)
    assert counters["stats"]["unique_graphs"] == graphs
    assert [iteration for iteration, _ in logged(trainer)] == [2, 4, 6]


@pytest.mark.parametrize("wish", ["0", "-1", "1.5", "often", "²"])
def test_another_interval_is_refused(tmp_path, monkeypatch, wish):
    monkeypatch.setenv("ENCORE_SAMPLE_INTERVAL", wish)
    with pytest.raises(EncoreError) as error:
        make_sampler(tmp_path, 1, ALONE)
    assert str(error.value) == (
        f"ENCORE_SAMPLE_INTERVAL is {wish!r}; set a number of iterations, from 1 on, or unset it"
    )


def test_without_an_interval_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("ENCORE_SAMPLE_PROMPT", "ab")
    assert make_sampler(tmp_path, 1, ALONE) is None
