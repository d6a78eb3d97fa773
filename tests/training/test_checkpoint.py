"""Checkpoints: written beside the training, the same bits back, whole or absent."""

import errno
import hashlib
import json
import os
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from encore.code import code_sha256
from encore.errors import EncoreError
from encore.models.gpt2 import GPT2, GPT2Config
from encore.training import checkpoint
from encore.training.checkpoint import (
    MODEL,
    OPTIMIZER,
    OTHER_CODE,
    STATE,
    TRAINING,
    Saver,
    find_newest,
    find_resumable,
    list_checkpoints,
)
from encore.training.optim import make_adamw

ANY = 10**9  # more iterations than any test does


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


ANOTHER = "a" * 64  # no code's hash
SIZES = {"vocab_size": 70, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16, "bias": True}


def make_run(seed, device="cpu", **changes):
    torch.manual_seed(seed)
    model = GPT2(GPT2Config(**{**SIZES, **changes})).to(device)
    return model, [make_adamw(model, 0.01, (0.9, 0.95), 0.1)]


def take_step(model, optimizers, seed):
    tokens = torch.randint(70, (4, 9), generator=torch.Generator().manual_seed(seed))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def trained():
    """Model and optimizer after one step."""
    model, optimizers = make_run(0)
    take_step(model, optimizers, 0)
    return model, optimizers


def save_all(saver, iterations, run, state=None):
    """The same run under several numbers, each on the disk before the next begins."""
    for iteration in iterations:
        saver.save(iteration, *run, state or {})
        saver.finish()


def save_some(folder, iterations, code="today"):
    """Checkpoints with a state that `find_resumable` can judge; returns the run behind them."""
    model, optimizers = make_run(0)
    saver = Saver(folder, kept=2)
    for iteration in iterations:
        take_step(model, optimizers, iteration)
        sha256 = code_sha256(TRAINING) if code == "today" else code
        saver.save(iteration, model, optimizers, {"code": [{"from_iter": 0, "sha256": sha256}]})
    saver.finish()
    return model, optimizers


def numbers(model, optimizers):
    """Weights and moments, by name."""
    moments = {
        f"{name} {key}": tensor
        for name, parameter in model.named_parameters()
        for key, tensor in optimizers[0].state[parameter].items()
    }
    return {name: tensor.clone() for name, tensor in {**model.state_dict(), **moments}.items()}


def restored_numbers(path):
    """What a checkpoint puts into a run that had other numbers."""
    model, optimizers = make_run(99)
    take_step(model, optimizers, 5)
    checkpoint.restore(path, model, optimizers)
    return numbers(model, optimizers)


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def bytes_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_restored_has_the_same_bits_and_goes_on_the_same(tmp_path):
    model, optimizers = save_some(tmp_path, [1, 2, 3])
    found = find_newest(tmp_path, ANY)
    assert (found.path, found.state["iter"]) == (tmp_path / "iter-0000003", 3)

    other, other_optimizers = make_run(99)
    take_step(other, other_optimizers, 5)
    checkpoint.restore(found.path, other, other_optimizers)
    restored = numbers(other, other_optimizers)
    assert len(restored) == 4 * len(list(model.parameters()))  # weight, two moments, step
    assert_same_bits(restored, numbers(model, optimizers))

    for run in ((model, optimizers), (other, other_optimizers)):
        take_step(*run, seed=7)
    assert_same_bits(numbers(other, other_optimizers), numbers(model, optimizers))


def test_the_optimizer_is_restored_on_the_device_of_the_weights(tmp_path):
    """The step counts too: fused AdamW reads them in the memory of the GPU. `meta` stands for a GPU here."""
    save_some(tmp_path, [1])
    model, optimizers = make_run(0, device="meta")
    checkpoint.restore(tmp_path / "iter-0000001", model, optimizers)
    states = [tensor for parameter in model.parameters() for tensor in optimizers[0].state[parameter].values()]
    assert len(states) == 3 * len(list(model.parameters()))
    assert {tensor.device.type for tensor in states} == {"meta"}


@pytest.mark.parametrize("other", [{"n_layer": 1}, {"n_layer": 3}, {"bias": False}, {"block_size": 9}], ids=str)
def test_tensors_of_a_model_that_other_code_has_changed_are_refused(tmp_path, other):
    """Going on under other code is allowed, and what it lacks must not be made up."""
    save_some(tmp_path, [1])
    path = tmp_path / "iter-0000001"
    with pytest.raises(EncoreError, match=f"^{path} holds other tensors than today's code makes; delete {tmp_path} "):
        checkpoint.restore(path, *make_run(0, **other))


def test_the_state_comes_back(tmp_path, trained):
    save_all(Saver(tmp_path, 2), [20], trained, {"rows": [0.1 + 0.2, 20], "none": None})
    state = find_newest(tmp_path, ANY).state
    assert (state["iter"], state["rows"], state["none"]) == (20, [0.1 + 0.2, 20], None)
    assert names_in(tmp_path / "iter-0000020") == [MODEL, OPTIMIZER, STATE]


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_the_newest_stay_and_as_many_as_are_wanted(tmp_path, trained, kept):
    save_all(Saver(tmp_path, kept), [5, 10, 15, 20], trained)
    assert names_in(tmp_path) == ["iter-0000005", "iter-0000010", "iter-0000015", "iter-0000020"][-kept:]


def test_later_ones_go_once_an_earlier_one_is_written_and_more_where_fewer_are_wanted(tmp_path, trained):
    save_all(Saver(tmp_path, 3), [2, 8, 10], trained)
    save_all(Saver(tmp_path, 3), [5], trained)
    assert names_in(tmp_path) == ["iter-0000002", "iter-0000005"]
    save_all(Saver(tmp_path, 1), [6], trained)
    assert names_in(tmp_path) == ["iter-0000006"]


def test_the_order_is_that_of_the_numbers_and_other_names_are_none_of_ours(tmp_path, trained):
    """Names have seven digits, and more where the number has."""
    others = ["iter-", "iter-12x", ".iter-0000003.partial"]
    for name in others:
        (tmp_path / name).mkdir()
    saver = Saver(tmp_path, 2)
    save_all(saver, [9_999_999, 10_000_000], trained)
    assert list_checkpoints(tmp_path) == [tmp_path / "iter-10000000", tmp_path / "iter-9999999"]
    assert find_newest(tmp_path, ANY).state["iter"] == 10_000_000
    assert find_newest(tmp_path, 9_999_999).state["iter"] == 9_999_999
    save_all(saver, [10_000_001], trained)
    assert names_in(tmp_path) == sorted(["iter-10000000", "iter-10000001", *others])


class Gate:
    """Holds the writer before its first file until it is let through."""

    def __init__(self, monkeypatch):
        self.reached, self.opened = threading.Event(), threading.Event()
        write = checkpoint.save_tensors

        def wait_and_write(path, tensors):
            self.reached.set()
            if not self.opened.wait(timeout=20):
                raise TimeoutError("nobody let the writer through")
            write(path, tensors)

        monkeypatch.setattr(checkpoint, "save_tensors", wait_and_write)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, trained, monkeypatch):
    """What reaches the disk is what was there when save() was called."""
    gate = Gate(monkeypatch)
    rows = [{"loss": 5.25}]
    expected = numbers(*trained)
    saver = Saver(tmp_path, 2)
    saver.save(1, *trained, {"rows": rows})
    assert gate.reached.wait(timeout=20)
    assert find_newest(tmp_path, ANY) is None
    take_step(*trained, seed=1)
    rows[0]["loss"] = 4.5
    rows.append({"loss": 4.0})
    assert not torch.equal(trained[0].wpe.weight, expected["wpe.weight"])
    gate.opened.set()
    saver.finish()
    found = find_newest(tmp_path, ANY)
    assert found.state["rows"] == [{"loss": 5.25}]
    assert_same_bits(restored_numbers(found.path), expected)


def test_a_second_checkpoint_waits_for_the_first(tmp_path, trained, monkeypatch):
    gate = Gate(monkeypatch)
    saver = Saver(tmp_path, 2)
    saver.finish()  # of nothing, as of what is finished
    saver.save(1, *trained, {})
    opener = threading.Timer(0.1, gate.opened.set)
    opener.start()
    saver.save(2, *trained, {})
    assert gate.opened.is_set()
    assert (tmp_path / "iter-0000001" / STATE).exists()
    saver.finish()
    saver.finish()
    opener.join()
    assert names_in(tmp_path) == ["iter-0000001", "iter-0000002"]


@pytest.mark.parametrize("asks", ["save", "finish"])
def test_a_full_disk_is_told_once_to_who_asks_next(tmp_path, trained, monkeypatch, asks):
    saver = Saver(tmp_path, 2)
    save_all(saver, [1], trained)
    before = bytes_in(tmp_path)

    def fail(path, tensors):
        path.write_bytes(b"half of i")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", fail)
        saver.save(2, *trained, {})
        with pytest.raises(OSError, match="No space left") as error:
            saver.finish() if asks == "finish" else saver.save(3, *trained, {})
    assert error.value.errno == errno.ENOSPC
    saver.finish()
    assert bytes_in(tmp_path) == before
    save_all(saver, [4], trained)
    assert names_in(tmp_path) == ["iter-0000001", "iter-0000004"]


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path):
    assert find_newest(tmp_path, ANY) is None
    assert find_newest(tmp_path / "missing", ANY) is None
    assert find_resumable(tmp_path / "missing", ANY) is None


def test_what_is_newest_depends_on_where_the_run_is_to_end(tmp_path, capsys):
    save_some(tmp_path, [4, 8])
    newest = {most: find_newest(tmp_path, most) for most in (3, 4, 7, 8, 9)}
    assert {most: found and found.state["iter"] for most, found in newest.items()} == {3: None, 4: 4, 7: 4, 8: 8, 9: 8}
    resumable = {most: find_resumable(tmp_path, most) for most in newest}
    assert resumable == newest
    # One that is passed over anyway is not read.
    (tmp_path / "iter-0000008" / STATE).unlink()
    assert find_newest(tmp_path, 7).state["iter"] == 4
    assert capsys.readouterr().err == ""


def damage(path, how):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"truncated": data[:-7], "flipped": data, "emptied": b""}[how])


def assert_passed_over(folder, capsys, name):
    """The second of two checkpoints is not taken, and a note of one line names it and the file in it."""
    assert find_newest(folder, ANY).path == folder / "iter-0000001"
    note = capsys.readouterr().err
    assert note.startswith(f"encore: note: {folder / 'iter-0000002'} is damaged (")
    assert name in note.removeprefix(f"encore: note: {folder / 'iter-0000002'}")
    assert note.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, how) for name in (MODEL, OPTIMIZER) for how in ("truncated", "flipped", "emptied", "removed")),
        *((STATE, how) for how in ("truncated", "emptied", "removed")),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, capsys, name, how):
    save_some(tmp_path, [1, 2])
    path = tmp_path / "iter-0000002" / name
    if how == "removed":
        path.unlink()
    else:
        damage(path, how)
    assert_passed_over(tmp_path, capsys, name)


def test_one_other_digit_in_the_state_is_damage(tmp_path, trained, capsys):
    save_all(Saver(tmp_path, 2), [1, 2], trained, {"rows": [{"iter": 2, "loss": 5.25}]})
    path = tmp_path / "iter-0000002" / STATE
    text = path.read_text()
    assert text.count("5.25") == 1
    path.write_text(text.replace("5.25", "5.35"))
    assert_passed_over(tmp_path, capsys, f"{STATE} has other bytes")


def test_the_weights_of_another_checkpoint_are_damage_though_the_state_has_their_hash(tmp_path, capsys):
    save_some(tmp_path, [1, 2])
    first, second = tmp_path / "iter-0000001", tmp_path / "iter-0000002"
    shutil.copy(first / MODEL, second / MODEL)
    states = [(folder / STATE).read_text() for folder in (first, second)]
    hashes = [json.loads(state)["sha256"][MODEL] for state in states]
    (second / STATE).write_text(states[1].replace(hashes[1], hashes[0]))
    assert_passed_over(tmp_path, capsys, f"{STATE} has other bytes")


def without(state, key):
    """A state that lacks a key, with the hash that it would have."""
    rest = {name: value for name, value in state.items() if name not in (key, "own_sha256")}
    hashed = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return rest if key == "own_sha256" else {**rest, "own_sha256": hashed}


@pytest.mark.parametrize("other", [[], [1], 3, "text", None, {}, "no own_sha256", "no sha256"], ids=str)
def test_a_state_that_is_something_else_is_damage(tmp_path, capsys, other):
    save_some(tmp_path, [1, 2])
    path = tmp_path / "iter-0000002" / STATE
    if str(other).startswith("no "):
        other = without(json.loads(path.read_text()), other.removeprefix("no "))
    path.write_text(json.dumps(other))
    assert_passed_over(tmp_path, capsys, STATE)


@pytest.mark.parametrize("crash_at", [MODEL, OPTIMIZER, STATE])
def test_a_crash_while_saving_leaves_the_earlier_ones_and_nothing_new(tmp_path, monkeypatch, crash_at):
    run = save_some(tmp_path, [1, 2])
    before = bytes_in(tmp_path)

    def crash(write):
        def maybe(path, content):
            if path.name == crash_at:
                path.write_bytes(b"half of i")
                raise OSError("disk on fire")
            return write(path, content)

        return maybe

    monkeypatch.setattr(checkpoint, "save_tensors", crash(checkpoint.save_tensors))
    monkeypatch.setattr(checkpoint, "write_sealed", crash(checkpoint.write_sealed))
    with pytest.raises(OSError, match="disk on fire"):
        save_all(Saver(tmp_path, 2), [3], run)
    assert bytes_in(tmp_path) == before
    assert find_newest(tmp_path, ANY).state["iter"] == 2


def test_what_a_killed_process_left_half_written_is_not_seen_and_goes_with_the_next_save(tmp_path):
    run = save_some(tmp_path, [1, 2])
    (tmp_path / ".iter-0000003.partial").mkdir()
    (tmp_path / ".iter-0000003.partial" / MODEL).write_bytes(b"half")
    assert find_newest(tmp_path, ANY).state["iter"] == 2
    save_all(Saver(tmp_path, 2), [3], run)
    assert names_in(tmp_path) == ["iter-0000002", "iter-0000003"]
    assert find_newest(tmp_path, ANY).state["iter"] == 3


def test_going_on_under_other_code_takes_a_word_from_the_environment(tmp_path, monkeypatch):
    save_some(tmp_path, [1, 2], code=ANOTHER)
    sentence = f"^{tmp_path} holds iteration 2 of 10, made by other code than today's; set {OTHER_CODE}=1 to go on"
    for word in (None, "0", ""):
        if word is not None:
            monkeypatch.setenv(OTHER_CODE, word)
        with pytest.raises(EncoreError, match=sentence):
            find_resumable(tmp_path, 10)
    monkeypatch.setenv(OTHER_CODE, "1")
    assert find_resumable(tmp_path, 10).state["iter"] == 2


def test_the_code_that_counts_is_the_last_that_a_run_went_on_under(tmp_path, trained):
    history = [{"from_iter": 0, "sha256": ANOTHER}, {"from_iter": 1, "sha256": code_sha256(TRAINING)}]
    save_all(Saver(tmp_path, 2), [2], trained, {"code": history})
    assert find_resumable(tmp_path, 10).state["iter"] == 2
    save_all(Saver(tmp_path, 2), [3], trained, {"code": history[::-1]})
    with pytest.raises(EncoreError, match="made by other code"):
        find_resumable(tmp_path, 10)


def test_a_run_that_other_code_finished_starts_anew_and_its_new_checkpoints_stay(tmp_path):
    save_some(tmp_path, [5, 10], code=ANOTHER)
    assert find_resumable(tmp_path, 10) is None
    save_some(tmp_path, [2, 4])
    assert find_resumable(tmp_path, 10).state["iter"] == 4
    assert names_in(tmp_path) == ["iter-0000002", "iter-0000004"]


def test_a_run_that_is_not_finite_is_not_saved(tmp_path, trained):
    saver = Saver(tmp_path, 2)
    save_all(saver, [1], trained)
    with torch.no_grad():
        trained[0].wte.weight[3, 3] = float("nan")
    with pytest.raises(EncoreError, match=r"^iteration 2: wte\.weight holds numbers that are not finite; it is"):
        save_all(saver, [2], trained)
    assert [path.name for path in tmp_path.iterdir()] == ["iter-0000001"]


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path, trained, name):
    save_all(Saver(tmp_path, 2), [1], trained)
    tensors = load_file(tmp_path / "iter-0000001" / name)
    next(tensor for key, tensor in tensors.items() if "wpe.weight" in key).fill_(float("inf"))
    save_file(tensors, tmp_path / "iter-0000001" / name)
    with pytest.raises(EncoreError, match=r"iter-0000001: wpe\.weight\S* holds numbers .* delete this folder"):
        checkpoint.restore(tmp_path / "iter-0000001", *trained)
