"""The loop against one written out here. That it repeats, and goes on after any end, is in test_resuming.py."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from encore.errors import EncoreError
from encore.training.step_numbers import StepNumbers
from tests.conftest import MODERN
from tests.small_runs import NO_STOP, read_curve, run, small_machine, trainer_in, weights_of


@pytest.fixture
def make_trainer(tmp_path, tokens_folder, tiny_params):
    """Makes a trainer as the stage does, in a working directory for each run; the same name goes on with a run."""
    with small_machine():
        yield lambda run, **changes: trainer_in(
            tmp_path / run, tokens_folder, tiny_params(**{"dtype": "float32", **changes})
        )


def reference_loop(trainer, steps):
    """Plain training: whole batches, no fused optimizer, formulas written out. Returns (weights, losses, norms)."""
    params, model = trainer.params, copy.deepcopy(trainer.model)
    vectors = [p for p in model.parameters() if p.dim() < 2]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(params.beta1, params.beta2), weight_decay=params.weight_decay)
    losses, norms = [], []
    for step in range(steps):
        if step < params.warmup_iters:
            lr = params.learning_rate * (step + 1) / (params.warmup_iters + 1)
        else:
            share = (step - params.warmup_iters) / (params.max_iters - params.warmup_iters)
            lr = params.min_lr + (params.learning_rate - params.min_lr) * (1 + math.cos(math.pi * share)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
        count = params.batch_size * params.gradient_accumulation_steps
        idx, targets = trainer.train.batch(trainer.train.for_step(step, count, params.seed))
        loss = F.cross_entropy(model.logits(idx).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(parameter.grad.double().square().sum().item() for parameter in model.parameters()))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, params.grad_clip / (norm + 1e-6))  # torch clips so, lest it divide by 0
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
    return model.state_dict(), losses, norms


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4)])
def test_ten_steps_are_those_of_a_plain_loop(make_trainer, batch_size, accumulation):
    """In float64: AdamW divides a gradient by its size, so in float32 the last bits of a weight whose gradient is next
    to nothing depend on the order in which a processor adds, and differ by 3e-6 on some."""
    settings = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "learning_rate": 3e-3}
    trainer = make_trainer("run", max_iters=10, grad_clip=0.9, checkpoint_interval=100, **settings)
    trainer.model.double()
    expected, losses, norms = reference_loop(trainer, 10)
    assert min(norms) < 0.9 < max(norms)  # some steps are clipped and some are not
    before = weights_of(trainer)
    weights, curves = run(trainer)
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float64
        assert (tensor - expected[name]).abs().max() < 1e-10, name
        assert (tensor - before[name]).abs().max() > 1e-3, name
    assert read_curve(curves["train"], "loss") == pytest.approx(losses, rel=1e-6)
    assert read_curve(curves["train"], "grad_norm") == pytest.approx(norms, rel=1e-10)
    assert losses[-1] < losses[0] - 0.05


def test_the_learning_rates_of_all_groups_rise_and_fall_alike(make_trainer):
    trainer, rates = make_trainer("run", **MODERN, max_iters=10, warmup_iters=1, lr_decay_iters=10), []
    step = trainer.optimizers[0].step
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    trainer.optimizers[0].step = lambda: (rates.append([group["lr"] for group in groups]), step())
    _, curves = run(trainer)
    course = [0.5, 1, 1, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]  # of step 0 to 9, falling from 4 on
    assert [matrices for matrices, _, _ in rates] == pytest.approx([0.02 * part for part in course])
    assert [embedding for _, embedding, _ in rates] == pytest.approx([0.3 * part for part in course])
    assert [head for _, _, head in rates] == pytest.approx([0.1 * part for part in course])
    assert read_curve(curves["train"], "lr") == pytest.approx([0.02 * part for part in course])


def test_the_modern_recipe_learns(make_trainer):
    """From equal scores for all ids, in few steps."""
    _, curves = run(make_trainer("run", **MODERN, max_iters=20, warmup_iters=0))
    assert read_curve(curves["eval"], "val_loss")[0] == pytest.approx(math.log(300), rel=1e-6)
    assert read_curve(curves["eval"], "val_loss")[-1] < 4.0


def test_muon_under_float16_is_refused(make_trainer):
    with pytest.raises(
        EncoreError, match=r"^dtype: float16 does not go with optimizer: muon; set bfloat16 or float32$"
    ):
        make_trainer("run", **{**MODERN, "dtype": "float16"})


def test_there_are_exactly_max_iters_steps_and_every_record_is_where_it_should_be(make_trainer):
    trainer = make_trainer("run", max_iters=7, log_interval=2, eval_interval=3, checkpoint_interval=4)
    _, curves = run(trainer)
    assert trainer.iter == 7
    assert {int(state["step"]) for state in trainer.optimizers[0].state.values()} == {7}
    assert read_curve(curves["train"], "iter") == [2, 4, 6, 7]
    assert read_curve(curves["eval"], "iter") == [0, 3, 6, 7]
    assert sorted(path.name for path in trainer.checkpoints.glob("iter-*")) == ["iter-0000004", "iter-0000007"]
    assert read_curve(curves["eval"], "val_loss")[0] == pytest.approx(math.log(300), abs=0.1)  # all equally likely


def test_without_clipping_the_gradient_is_taken_as_it_is(make_trainer):
    clipped, plain = (make_trainer(f"run {clip}", max_iters=1, grad_clip=clip) for clip in (1e-3, 0))
    moment = {}
    for trainer in (clipped, plain):
        run(trainer)
        moments = torch.cat([state["exp_avg"].flatten() for state in trainer.optimizers[0].state.values()])
        moment[trainer.params.grad_clip] = moments.norm().item() / (1 - trainer.params.beta1)
    norm = plain.records.rows.train[0]["grad_norm"]
    assert norm == clipped.records.rows.train[0]["grad_norm"] > 0.1
    assert moment[0] == pytest.approx(norm, rel=1e-5)
    assert moment[1e-3] == pytest.approx(1e-3, rel=1e-3)


def test_evaluations_do_not_change_the_training(make_trainer):
    often, seldom = (run(make_trainer(f"{i}", dropout=0.2, eval_interval=i, eval_iters=i)) for i in (1, 50))
    assert read_curve(often[1]["train"], "loss") == read_curve(seldom[1]["train"], "loss")
    assert all(torch.equal(tensor, seldom[0][name]) for name, tensor in often[0].items())


def test_dropout_and_the_seed_make_a_difference(make_trainer):
    changes = {"plain": {}, "dropout": {"dropout": 0.2}, "seed": {"seed": 1}}
    assert len({run(make_trainer(name, **change))[1]["train"] for name, change in changes.items()}) == 3


@pytest.mark.parametrize("interval", [1, 3, 100])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_and_reaches_no_checkpoint(make_trainer, what, interval):
    intervals = {"log_interval": 100, "eval_interval": 100, "checkpoint_interval": interval}
    trainer = make_trainer("run", learning_rate=2e-3, warmup_iters=0, min_lr=2e-3, **intervals)
    trainer.evaluate()
    for _ in range(2):
        trainer.step()
    if what == "loss":
        with torch.no_grad():
            trainer.model.wpe.weight[3, 3] = float("inf")
    else:
        trainer.model.ln_f.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(EncoreError, match=r"^iteration 3: .* at learning rate 0\.002, in windows (\d+, ){8}") as error:
        trainer.run(NO_STOP)
    assert ("the loss is nan" in str(error.value)) == (what == "loss")
    assert trainer.iter == (3 if interval < 100 else 4)
    assert not list(trainer.checkpoints.glob("iter-*"))
    assert not trainer.records.rows.train


def test_a_step_is_launched_before_the_numbers_of_the_one_before_are_read(make_trainer, monkeypatch):
    """A GPU then computes without a pause. They are waited for where something is recorded or saved."""
    trainer, reads = make_trainer("run", log_interval=4, eval_interval=6, checkpoint_interval=7, max_iters=9), []
    read = StepNumbers.read
    monkeypatch.setattr(StepNumbers, "read", lambda self, of: reads.append((self.iter, trainer.iter)) or read(self, of))
    run(trainer)
    assert reads == [(1, 1), (2, 3), (3, 4), (4, 4), (5, 6), (6, 6), (7, 7), (8, 8), (9, 9)]


def test_what_a_record_waits_for_counts_among_the_steps(make_trainer, monkeypatch):
    """Each step is launched in 1 s, and whoever reads its numbers has waited for 10 s."""
    trainer = make_trainer("run", max_iters=10)
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("encore.training.trainer.time", SimpleNamespace(perf_counter=lambda: clock.now))

    def tick(seconds, work):
        clock.now += seconds
        return work

    read, take = StepNumbers.read, trainer.batches.take
    monkeypatch.setattr(StepNumbers, "read", lambda self, of: tick(10.0, read(self, of)))
    trainer.batches.take = lambda step: tick(1.0, take(step))
    for _ in range(4):
        trainer.step()
    trainer.log()
    assert trainer.records.rows.speed[-1]["ms_per_iter"] == pytest.approx(1e3 * (1 + 11 + 11 + 10) / 3)
    trainer.step()
    trainer.evaluate()
    trainer.log()
    assert trainer.records.rows.speed[-1]["ms_per_iter"] == pytest.approx(1e3 * 11)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_learn_like_float32_with_weights_in_float32(make_trainer, dtype):
    trainer = make_trainer("half", dtype=dtype)
    half, whole = (run(each)[1]["train"] for each in (trainer, make_trainer("whole")))
    assert read_curve(half, "loss") != read_curve(whole, "loss")
    assert read_curve(half, "loss") == pytest.approx(read_curve(whole, "loss"), abs=0.03)
    assert read_curve(half, "grad_norm") == pytest.approx(read_curve(whole, "grad_norm"), rel=0.05)
    assert {tensor.dtype for tensor in weights_of(trainer).values()} == {torch.float32}


@pytest.mark.slow
def test_compiled_training_agrees_with_the_plain_one(make_trainer, traced):
    sizes = {"n_layer": 1, "max_iters": 10, "gradient_accumulation_steps": 1, "block_size": 8}
    plain = run(make_trainer("plain", **sizes))
    trainer = make_trainer("compiled", compile=True, **sizes)
    assert trainer.hardware.compiles
    assert trainer.forward is not trainer.model
    compiled = run(trainer)
    assert compiled[0].keys() == plain[0].keys()
    for name, tensor in compiled[0].items():
        assert (tensor - plain[0][name]).abs().max() < 1e-5, name
    losses = [read_curve(curves["train"], "loss") for _, curves in (compiled, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_speed_follows_from_the_clock_and_the_peak(make_trainer):
    trainer = make_trainer("run", max_iters=3)
    run(trainer)
    assert all(row["tokens_per_second"] > 0 for row in trainer.records.rows.speed)
    row = trainer.records.rows.speed[-1]
    assert row["tokens_per_second"] == pytest.approx(4 * 2 * 16 / row["ms_per_iter"] * 1e3)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters()) - 16 * 32
    flops = (6 * parameters + 12 * 2 * 32 * 16) * row["tokens_per_second"]
    assert (row["tflops"], row["mfu"]) == pytest.approx((flops / 1e12, flops / 1e12))


def test_the_time_left_is_that_of_the_steps_behind_the_first(make_trainer, monkeypatch):
    """The first step takes 100 s, the next two 10 s each with what lies between them: seven more take 70 s."""
    trainer = make_trainer("run", max_iters=10)
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("encore.training.trainer.time", SimpleNamespace(perf_counter=lambda: clock.now))
    clock.now = 100.0
    trainer.step()
    assert trainer.seconds_left() is None
    clock.now = 110.0
    trainer.step()
    clock.now = 120.0
    trainer.step()
    assert trainer.seconds_left() == 70.0


def test_an_evaluation_that_is_not_finite_ends_the_run(make_trainer):
    trainer = make_trainer("run")
    with torch.no_grad():
        trainer.model.ln_f.weight[0] = float("nan")
    with pytest.raises(EncoreError, match=r"^iteration 0: an evaluation finds train loss nan and val loss nan; lower"):
        trainer.run(NO_STOP)
    assert not list(trainer.checkpoints.glob("iter-*"))


def test_a_rate_without_measure_ends_in_a_sentence(make_trainer):
    with pytest.raises(EncoreError, match=r"not finite|the loss is|finds train loss"):
        make_trainer("run", learning_rate=1e30, min_lr=1e30, warmup_iters=0).run(NO_STOP)
