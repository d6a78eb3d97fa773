"""Training on two ranks against training on one: the same steps, in whichever way ranks and micro-batches share them.

All runs are done by two processes that are started once. Signals, crashes and torchrun are in test_torchrun.py.
"""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from encore.devices import distributed
from encore.devices.distributed import ALONE, Ranks, joined
from encore.errors import EncoreError
from encore.evaluation.losses import evaluate_split
from encore.pretrained.model_folder import load_model
from encore.tokens.batches import Windows
from encore.tokens.token_files import TokenSplit
from encore.training.checkpoint import MODEL, OPTIMIZER, find_newest
from encore.training.metrics import Records
from encore.training.trainer import Trainer
from tests.conftest import MODERN
from tests.ranks import start_two_ranks, write_run, write_walk
from tests.small_runs import read_curve

pytestmark = pytest.mark.slow

STEPS = 10
# 12 windows a step, and so 6 for each of two ranks. 9 windows of each split in an evaluation, where batch_size is 3.
PAGE = {
    "max_iters": STEPS,
    "lr_decay_iters": STEPS,
    "grad_clip": 0.9,
    "eval_interval": 5,
    "eval_iters": 3,
    "checkpoint_interval": 100,
}
AT_ONCE = {**PAGE, "batch_size": 12, "gradient_accumulation_steps": 1}
IN_FOUR = {**PAGE, "batch_size": 3, "gradient_accumulation_steps": 4}
UNEVEN = {**PAGE, "batch_size": 4, "gradient_accumulation_steps": 3}  # each of two ranks has 4 windows and then 2
RUNS = {
    "one": ("alone", AT_ONCE),
    "one in four": ("alone", IN_FOUR),
    "two": ("two", AT_ONCE),
    "two in four": ("two", IN_FOUR),
    "two uneven": ("two", UNEVEN),
    "sharded": ("sharded", AT_ONCE),
    "sharded in four": ("sharded", IN_FOUR),
    "sharded uneven": ("sharded", UNEVEN),
    "dropout": ("two", {**IN_FOUR, "dropout": 0.2}),
    "dropout again": ("two", {**IN_FOUR, "dropout": 0.2}),
    "dropout alone": ("alone", {**IN_FOUR, "dropout": 0.2}),
    "modern": ("alone", {**IN_FOUR, **MODERN}),
    "modern two": ("two", {**IN_FOUR, **MODERN}),
    "modern sharded": ("sharded", {**IN_FOUR, **MODERN}),
    "plus": ("alone", {**IN_FOUR, "architecture": "nanochat-plus"}),
    "plus two": ("two", {**IN_FOUR, "architecture": "nanochat-plus"}),
    "plus sharded": ("sharded", {**IN_FOUR, "architecture": "nanochat-plus"}),
    "unshared": ("two", {**PAGE, "batch_size": 3, "gradient_accumulation_steps": 1}),
    "diverging": ("two", {**AT_ONCE, "checkpoint_interval": 1}),
}
UNCHECKED = {"diverging": {"learning_rate": 1e30}}  # the stage check would refuse it
RELAY = [("alone", 3), ("two", 5), ("sharded", 8), ("alone", STEPS)]  # who goes on, and how far


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder with a folder for each run, and what the two ranks said at the end."""
    base = tmp_path_factory.mktemp("ranks")
    tokens = write_walk(base / "tokens")
    runs = []
    for name, (how, page) in RUNS.items():
        folder = str(write_run(base / name, tokens, **page))
        runs.append({"how": how, "folder": folder, "unchecked": UNCHECKED.get(name, {})})
    for how, max_iters in RELAY:
        folder = write_run(base / f"relay to {max_iters}", tokens, **{**AT_ONCE, "max_iters": max_iters})
        runs.append({"how": how, "folder": str(folder), "scratch": str(base / "relay")})
    strangers = [
        write_run(base / "rank 0's", tokens, **AT_ONCE),
        write_run(base / "rank 1's", write_walk(base / "other tokens", seed=1), **{**AT_ONCE, "log_interval": 2}),
    ]
    runs.append({"how": "two", "folders": list(map(str, strangers))})
    return SimpleNamespace(folder=base, ended=start_two_ranks(runs, ENCORE_SHARD="1"))


def report(done, name, rank=0):
    return json.loads((done.folder / name / f"rank-{rank}.json").read_text())


def read_run(done, name):
    """Losses and norms of every step, losses of the evaluations, weights."""
    folder = done.folder / name
    assert "said" not in report(done, name)
    train, evaluated = ((folder / "metrics" / f"{curve}.tsv").read_bytes() for curve in ("train", "eval"))
    assert read_curve(train, "iter") == list(range(1, STEPS + 1))
    assert read_curve(evaluated, "iter") == [0, 5, 10]
    return SimpleNamespace(
        losses=read_curve(train, "loss"),
        norms=read_curve(train, "grad_norm"),
        evaluated=read_curve(evaluated, "train_loss") + read_curve(evaluated, "val_loss"),
        weights=load_file(folder / "model" / "model.safetensors"),
        curves=(train, evaluated),
    )


def assert_close(actual, expected, tolerance=1e-6):
    assert actual.losses == pytest.approx(expected.losses, rel=tolerance)
    assert actual.norms == pytest.approx(expected.norms, rel=tolerance)
    assert actual.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        assert (actual.weights[name] - tensor).abs().max() < 10 * tolerance, name


@pytest.mark.parametrize("name", ["one in four", "two", "two in four", "two uneven"])
def test_steps_are_the_same_however_they_are_shared(done, name):
    one = read_run(done, "one")
    assert min(one.norms) < PAGE["grad_clip"] < max(one.norms)
    assert one.losses[-1] < one.losses[0] - 0.05
    assert_close(read_run(done, name), one)


@pytest.mark.parametrize("name", ["plus two", "plus sharded"])
def test_what_nanochat_plus_adds_is_shared_too(done, name):
    one = read_run(done, "plus")
    assert one.weights["model.smear"].abs().max() > 1e-3  # it began as zeros
    assert one.weights["model.value_embeds.1.weight"].abs().max() > 1e-3
    assert_close(read_run(done, name), one)


@pytest.mark.parametrize("name", ["two in four"])
def test_evaluations_are_the_same(done, name):
    assert read_run(done, name).evaluated == pytest.approx(read_run(done, "one in four").evaluated, rel=1e-6)


@pytest.mark.parametrize("name", ["sharded", "sharded in four", "sharded uneven"])
def test_shards_do_the_steps_of_whole_copies(done, name):
    whole = read_run(done, name.replace("sharded", "two"))
    sharded = read_run(done, name)
    assert_close(sharded, whole)
    assert sharded.evaluated == pytest.approx(whole.evaluated, rel=1e-6)


@pytest.mark.parametrize("name", ["modern two", "modern sharded"])
def test_muon_takes_the_steps_of_one_rank(done, name):
    """It makes steps orthogonal in bfloat16, whose last bit is 0.4 %; a half alone would have quite other steps."""
    one, ranks = read_run(done, "modern"), read_run(done, name)
    assert one.losses[-1] < one.losses[0] - 0.5
    assert ranks.losses == pytest.approx(one.losses, rel=3e-3)
    assert ranks.evaluated == pytest.approx(one.evaluated, rel=3e-3)
    for weight, tensor in one.weights.items():
        assert (ranks.weights[weight] - tensor).norm() < 0.03 * tensor.norm(), weight


def test_each_rank_holds_half_in_shards_and_all_without(done):
    whole = {report(done, "two", rank)["numbers"] for rank in range(2)} | {report(done, "one")["numbers"]}
    first, second = (report(done, "sharded", rank)["numbers"] for rank in range(2))
    assert first == second
    assert whole == {first + second}


def test_two_runs_of_two_ranks_are_bitwise_equal_and_each_rank_drops_out_in_its_own_way(done):
    first, second = read_run(done, "dropout"), read_run(done, "dropout again")
    assert first.curves == second.curves
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    assert first.losses != read_run(done, "two in four").losses
    seeds = [report(done, "dropout", rank)["seed"] for rank in range(2)]
    assert seeds[0] != seeds[1]
    alone = read_run(done, "dropout alone")
    assert alone.losses[0] != first.losses[0]
    assert alone.losses == pytest.approx(first.losses, rel=0.05)


def test_ranks_share_a_step_in_rows(tmp_path):
    """What they have is what one rank has, whatever their number: nothing twice and nothing left out."""
    windows = Windows(TokenSplit(write_walk(tmp_path / "tokens"), "train"), 16, "train")
    for step in range(3):
        whole = windows.for_step(step, 24, seed=5)
        assert len(set(whole)) == 24
        for count in (1, 2, 4):
            trainers = [
                SimpleNamespace(
                    ranks=Ranks(rank, count), train=windows, windows_per_step=24, params=SimpleNamespace(seed=5)
                )
                for rank in range(count)
            ]
            shares = [Trainer.my_windows(trainer, step) for trainer in trainers]
            assert [len(share) for share in shares] == [24 // count] * count
            assert np.array_equal(np.concatenate(shares), whole)


def test_a_run_is_handed_on_between_one_rank_two_and_shards(done):
    undisturbed = read_run(done, "one")
    for (_, before), (_, until) in pairwise(RELAY):
        log = (done.folder / f"relay to {until}" / "training.log").read_text()
        assert log.count(f"resumed at iteration {before} of {until} from ") == 1
    assert_close(read_run(done, f"relay to {STEPS}"), undisturbed)
    record = json.loads((done.folder / f"relay to {STEPS}" / "model" / "encore.json").read_text())
    assert len(record["code"]) == 1


def test_a_checkpoint_of_shards_is_whole_and_plain(done):
    def newest(name):
        return find_newest(next((done.folder / name / ".encore" / "checkpoints").iterdir()), STEPS)

    for file in (MODEL, OPTIMIZER):
        expected, tensors = load_file(newest("one").path / file), load_file(newest("sharded").path / file)
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == {
            name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()
        }
        for name, tensor in expected.items():
            assert torch.allclose(tensors[name], tensor, rtol=0, atol=1e-5), name


def test_the_model_of_shards_is_read_by_everybody(done, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    val = Windows(TokenSplit(done.folder / "tokens", "val"), 16, "val")
    models = [load_model(done.folder / name / "model") for name in ("two", "sharded")]
    whole, sharded = (evaluate_split(model, val, 8, torch.device("cpu"), torch.float32).loss for model in models)
    assert sharded == pytest.approx(whole, rel=1e-6)
    hub = transformers.AutoModelForCausalLM.from_pretrained(done.folder / "sharded" / "model", local_files_only=True)
    idx, _ = val.batch(np.arange(4))
    assert torch.allclose(hub.eval()(idx).logits, models[1].logits(idx)[..., :300], rtol=0, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_both_ranks(done):
    messages = [report(done, "diverging", rank)["said"] for rank in range(2)]
    windows = Windows(TokenSplit(done.folder / "tokens", "train"), 16, "train")
    for rank, message in enumerate(messages):
        assert message.startswith("iteration 2: the loss is nan and the gradient's norm nan at learning rate ")
        named = windows.for_step(1, 12, seed=1337)[rank * 6 : rank * 6 + 6]
        assert (
            f"in windows {', '.join(map(str, named))}, ... of the train split; the last checkpoint is whole" in message
        )
    folder = next((done.folder / "diverging" / ".encore" / "checkpoints").iterdir())
    assert find_newest(folder, STEPS).state["iter"] == 1
    assert not (done.folder / "diverging" / "model").exists()


def test_a_batch_that_ranks_cannot_share_is_refused_by_each(done):
    sentence = (
        "batch_size x gradient_accumulation_steps is 3, which 2 processes cannot share evenly; make it a multiple"
    )
    assert all(report(done, "unshared", rank)["said"].startswith(sentence) for rank in range(2))


def test_a_rank_with_other_values_is_refused_and_the_other_says_that_it_is_lost(done):
    (code, said), (other_code, _) = done.ended
    assert (code, other_code) == (1, 0)  # here the stranger goes its way
    assert report(done, "rank 1's", 1)["said"].endswith(
        "differs from rank 0 in log_interval, data/tokens; give every machine the same code, params.yaml and "
        "data/tokens"
    )
    assert said.splitlines()[-1] == (
        "encore: a rank is lost, and its own message or torchrun's says why; the last checkpoint is whole, and the "
        "same command goes on from it"
    )
    assert "Traceback" not in said


def test_the_environment_says_whether_to_shard(done):
    assert report(done, "two")["shards by default"] is True


def test_records_of_a_rank_that_only_goes_along_are_kept_and_not_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    both = [Records(Path(f"metrics {writes}"), Path(f"{writes}.log"), None, writes=writes) for writes in (True, False)]
    for records in both:
        records.say("hello")
        records.log_step(
            {"iter": 1, "loss": 2.5, "lr": 0.1, "grad_norm": 1.0},
            {"iter": 1, "ms_per_iter": 1.0, "tokens_per_second": 2.0, "tflops": 3.0, "mfu": 0.5},
            1,
            None,
            None,
        )
        records.log_eval({"iter": 1, "train_loss": 2.5, "val_loss": 3.5})
        records.restore(records.state())
        records.finish({"iter": 1}, "ab" * 32)
    writing, silent = both
    assert vars(silent.rows) == vars(writing.rows)
    assert [len(rows) for rows in vars(silent.rows).values()] == [1, 1, 1]
    assert silent.lines == writing.lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["True.log", "metrics True"]
    assert capsys.readouterr().out.splitlines() == writing.lines


def test_alone_there_is_nothing_to_share_and_nobody_to_ask(monkeypatch):
    assert ALONE.is_first
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.largest(15) == 15
    assert ALONE.from_first({"a": 1}) == {"a": 1}
    assert ALONE.sum(torch.tensor([2.5])).tolist() == [2.5]
    ALONE.check_same({"a": 1})
    model = torch.nn.Linear(1, 1)
    assert ALONE.wrap(model) is model
    for count in (None, "1"):
        if count:
            monkeypatch.setenv("WORLD_SIZE", count)
        with joined(torch.device("cpu")) as ranks:
            assert ranks is ALONE
        assert not dist.is_initialized()


def test_variables_that_torchrun_would_set_are_missed_in_a_sentence(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    sentence = r"^WORLD_SIZE is 2, but .* RANK expected, but not set; let torchrun set them$"
    with pytest.raises(EncoreError, match=sentence), joined(torch.device("cpu")):
        pass


@pytest.fixture
def meeting(monkeypatch):
    """Two ranks' way to each other without the other: what is given to torch, in order."""
    given = []
    store = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda url, timeout: iter([(store, 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **others: given.append((backend, others)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", given.append)
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    return given


@pytest.mark.parametrize(
    ("device", "local_rank", "gpu"), [("cuda", "1", 1), ("cuda:0", "1", 0), ("cuda:1", "1", 1), ("cuda", None, 0)]
)
def test_a_rank_takes_its_gpu_and_sums_on_the_cpu_too(meeting, monkeypatch, device, local_rank, gpu):
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with joined(torch.device(device)) as ranks:
        assert ranks == Ranks(1, 2, int(local_rank or 0))
    taken, (backend, others) = meeting
    assert taken == gpu
    assert backend == "cpu:gloo,cuda:nccl"
    assert (others["rank"], others["world_size"], others["timeout"]) == (1, 2, distributed.TIMEOUT)


def test_on_a_cpu_no_gpu_is_asked_for(meeting):
    with joined(torch.device("cpu")):
        pass
    assert [backend for backend, _ in meeting] == ["gloo"]


def test_more_ranks_than_gpus_are_refused(meeting, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    sentence = "^rank 1 has no GPU: this machine has 2; start as many processes$"
    with pytest.raises(EncoreError, match=sentence), joined(torch.device("cuda")):
        pass


def test_what_several_ranks_of_a_machine_say_is_said_once(meeting, monkeypatch):
    def fail(message, kind=EncoreError):
        with joined(torch.device("cpu")):
            raise kind(message)

    with pytest.raises(EncoreError, match=r"^this$"):
        fail("this")
    with pytest.raises(SystemExit) as silence:
        fail("this")
    assert silence.value.code == 1
    with pytest.raises(EncoreError, match=r"^that$"):
        fail("that")
    with pytest.raises(EncoreError, match=r"^a rank is lost"):
        fail("[gloo/transport/tcp/pair.cc:538] Connection closed by peer", RuntimeError)
    with pytest.raises(SystemExit):
        fail("broken pipe", dist.DistNetworkError)
    monkeypatch.setenv("GROUP_RANK", "1")
    with pytest.raises(EncoreError, match=r"^this$"):
        fail("this")
    with pytest.raises(RuntimeError, match=r"^a bug of ours$"):
        fail("a bug of ours", RuntimeError)


def test_who_cannot_reach_the_others_any_more_speaks(meeting, monkeypatch):
    def fail(self, key, value):
        raise dist.DistNetworkError("broken pipe")

    monkeypatch.setattr(dist.HashStore, "add", fail)
    for _ in range(2):
        with pytest.raises(EncoreError, match=r"^this$"), joined(torch.device("cpu")):
            raise EncoreError("this")
