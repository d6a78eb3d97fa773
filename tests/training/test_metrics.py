"""Curves, log lines and what wandb is given; rows come back from a checkpoint as they were."""

import json
from itertools import pairwise

import pytest

from encore.training.metrics import MOST_ROWS, Records, thin


class FakeRun:
    """Stands in for WandbRun."""

    def __init__(self):
        self.history, self.summaries, self.exit_codes = [], [], []

    def log(self, values):
        self.history.append(values)

    def finish(self, summary, model_sha256):
        self.summaries.append((summary, model_sha256))

    def end(self, exit_code):
        self.exit_codes.append(exit_code)


def make_records(folder, wandb_run=None):
    folder.mkdir(exist_ok=True)
    return Records(folder / "metrics", folder / "training.log", wandb_run)


def log_steps(records, first, last):
    for i in range(first, last + 1):
        records.log_step(
            {"iter": i, "loss": 4 / i, "lr": i / 1000, "grad_norm": 0.1 * i},
            {"iter": i, "ms_per_iter": 12.34, "tokens_per_second": 56789.4, "tflops": 0.5, "mfu": 0.13698},
            max_iters=6,
            seconds_left=4321.0 * (6 - i),
            gpu_bytes=17_480_000_000,
        )
        if i % 2 == 0:
            records.log_eval({"iter": i, "train_loss": 4 / i, "val_loss": 5 / i})


def read_tsv(path):
    header, *rows = (line.split("\t") for line in path.read_text().splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 9, 10, 11, 15, 16, 17, 18, 100, 1000])
def test_thinning_keeps_the_order_the_ends_and_even_gaps(count):
    rows = [{"iter": i} for i in range(1, count + 1)]
    kept = [row["iter"] for row in thin(rows, most=10)]
    assert len(kept) <= 10
    assert kept == sorted(set(kept))
    if count:
        assert (kept[0], kept[-1]) == (1, count)
    if count < 10:
        assert len(kept) == count
    elif count > 10:
        assert len(kept) >= 5
    gaps = {later - earlier for earlier, later in pairwise(kept[:-1])}
    assert len(gaps) <= 1


def test_thinning_is_done_when_curves_are_published_and_not_to_what_is_kept(tmp_path, capsys):
    records = make_records(tmp_path)
    records.rows.train = [{"iter": i, "loss": 1.0} for i in range(1, 2 * MOST_ROWS + 2)]
    records.publish()
    rows = read_tsv(tmp_path / "metrics" / "train.tsv")
    assert len(rows) <= MOST_ROWS
    assert rows[-1]["iter"] == str(2 * MOST_ROWS + 1)
    assert len(records.rows.train) == 2 * MOST_ROWS + 1


def test_the_log_says_what_was_done_and_so_does_the_screen(tmp_path, capsys):
    records = make_records(tmp_path)
    records.say("hello")
    log_steps(records, 2, 2)
    expected = (
        "hello\n"
        "iter 2/6: loss 2.0000, lr 2.00e-03, 12.3 ms, 56,789 tokens/s, mfu 13.70%, 17.5 GB, 4 h 48 min left\n"
        "iter 2: train loss 2.0000, val loss 2.5000\n"
    )
    assert (tmp_path / "training.log").read_text() == expected
    assert capsys.readouterr().out == expected


def test_a_line_leaves_out_what_there_is_not(tmp_path, capsys):
    """On a CPU, at the end of a run."""
    train = {"iter": 6, "loss": 1.5, "lr": 6e-5, "grad_norm": 0.1}
    speed = {"iter": 6, "ms_per_iter": 12.34, "tokens_per_second": 56789.4, "tflops": 0.5}
    run = FakeRun()
    make_records(tmp_path, run).log_step(train, speed, 6, 0.0, None)
    assert capsys.readouterr().out == "iter 6/6: loss 1.5000, lr 6.00e-05, 12.3 ms, 56,789 tokens/s\n"
    assert "mfu" not in run.history[0]


def test_the_three_curves_hold_their_columns_and_clock_times_stay_apart(tmp_path, capsys):
    records = make_records(tmp_path)
    log_steps(records, 1, 4)
    records.publish()
    metrics = tmp_path / "metrics"
    assert sorted(path.name for path in metrics.iterdir()) == ["eval.tsv", "speed.tsv", "train.tsv"]
    train, evaluations, speed = (read_tsv(metrics / f"{name}.tsv") for name in ("train", "eval", "speed"))
    assert [row["iter"] for row in train] == ["1", "2", "3", "4"]
    assert list(train[0]) == ["iter", "loss", "lr", "grad_norm"]
    assert evaluations[1] == {"iter": "4", "train_loss": "1.0", "val_loss": "1.25"}
    assert list(speed[0]) == ["iter", "ms_per_iter", "tokens_per_second", "tflops", "mfu"]


def test_a_curve_without_rows_is_not_written(tmp_path, capsys):
    records = make_records(tmp_path)
    records.log_eval({"iter": 0, "train_loss": 1.0, "val_loss": 1.0})
    records.publish()
    assert [path.name for path in (tmp_path / "metrics").iterdir()] == ["eval.tsv"]


def test_what_came_after_the_checkpoint_is_dropped_and_the_rest_is_as_if_undisturbed(tmp_path, capsys):
    whole = make_records(tmp_path / "whole")
    log_steps(whole, 1, 6)
    whole.publish()

    killed = make_records(tmp_path / "resumed")
    log_steps(killed, 1, 3)
    state = json.loads(json.dumps(killed.state()))
    log_steps(killed, 4, 5)
    killed.publish()

    resumed = make_records(tmp_path / "resumed")
    resumed.restore(state)
    assert (tmp_path / "resumed" / "training.log").read_text().count("\n") == 4
    log_steps(resumed, 4, 6)
    resumed.publish()
    assert files_in(tmp_path / "resumed") == files_in(tmp_path / "whole")


def test_wandb_is_given_the_same_numbers_and_a_flat_summary(tmp_path, capsys):
    run = FakeRun()
    records = make_records(tmp_path, run)
    log_steps(records, 2, 2)
    assert run.history == [
        {
            "iter": 2,
            "lr": 0.002,
            "mfu": 0.13698,
            "train/step_loss": 2.0,
            "train/grad_norm": 0.2,
            "tokens_per_second": 56789.4,
        },
        {"iter": 2, "train/loss": 2.0, "val/loss": 2.5},
    ]
    assert run.summaries == []
    records.finish({"iter": 2, "train": {"loss": 2.0}, "val": {"loss": 2.5, "deep": {"er": 1}}}, "ab" * 32)
    assert run.summaries == [({"iter": 2, "train/loss": 2.0, "val/loss": 2.5, "val/deep/er": 1}, "ab" * 32)]
    assert (tmp_path / "metrics" / "train.tsv").exists()


def test_a_resumed_run_offers_wandb_the_rows_of_the_checkpoint_in_their_order(tmp_path, capsys):
    whole, resumed = FakeRun(), FakeRun()
    records = make_records(tmp_path, whole)
    log_steps(records, 1, 4)
    make_records(tmp_path, resumed).restore(json.loads(json.dumps(records.state())))
    assert resumed.history == whole.history
    assert [row["iter"] for row in resumed.history] == [1, 2, 2, 3, 4, 4]


def test_a_run_that_is_broken_off_has_failed_at_wandb(tmp_path):
    run = FakeRun()
    make_records(tmp_path, run).break_off()
    assert (run.exit_codes, run.summaries) == ([1], [])
    make_records(tmp_path).break_off()  # nor does it need wandb


def test_the_state_of_a_checkpoint_from_before_there_were_samples_is_taken_up(tmp_path, capsys):
    records = make_records(tmp_path)
    log_steps(records, 1, 2)
    state = json.loads(json.dumps(records.state()))
    assert state.pop("samples") == []
    resumed = make_records(tmp_path)
    resumed.restore(state)
    assert resumed.state() == records.state()
