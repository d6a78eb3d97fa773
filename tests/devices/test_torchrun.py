"""torchrun as the stage starts it: what it is given, how its failures are told, and runs that are stopped and killed.

Whatever happens on the way, two ranks end in the weights and curves of two that nothing has disturbed.
"""

import logging
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.elastic.metrics import api
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from encore.devices.torchrun import _is_no_goodbye, run_under_torchrun, torchrun_arguments
from encore.errors import EncoreError, Interrupted
from encore.params import load_params
from encore.tokens.token_files import manifest_sha256
from encore.training import run_folder
from tests.conftest import TINY, copy_repository, run_dvc, write_page
from tests.ranks import (
    C10D,
    STATIC,
    at_checkpoint,
    end,
    find_port,
    launch_settings,
    launched,
    ranks_of,
    start_two_ranks,
    two_machines,
    wait_for_end,
    write_run,
    write_walk,
)

pytestmark = pytest.mark.slow

TWO = "--standalone --nproc-per-node=2"
ALL_GPUS = ["--standalone", "--nproc-per-node=gpu"]
# Long enough to be stopped several times on the way.
LONG = {
    **TINY,
    "dtype": "float32",
    "dropout": 0.1,
    "max_iters": 240,
    "log_interval": 5,
    "eval_interval": 60,
    "checkpoint_interval": 10,
}


@pytest.mark.parametrize(
    ("environment", "gpus", "expected"),
    [
        ({}, 0, []),
        ({}, 1, []),
        ({}, 2, ALL_GPUS),
        ({}, 8, ALL_GPUS),
        ({"ENCORE_DEVICE": "cuda"}, 8, ALL_GPUS),
        ({"ENCORE_DEVICE": "cuda"}, 1, []),
        ({"ENCORE_DEVICE": "cuda:1"}, 8, []),
        ({"ENCORE_DEVICE": "cpu"}, 8, []),
        ({"ENCORE_TORCHRUN": "--nproc-per-node=3"}, 8, ["--nproc-per-node=3"]),
        ({"ENCORE_TORCHRUN": "--nproc-per-node=3", "ENCORE_DEVICE": "cpu"}, 0, ["--nproc-per-node=3"]),
        ({"ENCORE_TORCHRUN": "--rdzv-id 'a run' --role=\"x y\""}, 0, ["--rdzv-id", "a run", "--role=x y"]),
        ({"ENCORE_TORCHRUN": ""}, 8, []),
        ({"ENCORE_TORCHRUN": "--nproc-per-node=3", "RANK": "0"}, 8, []),
        ({"ENCORE_TORCHRUN": "--nproc-per-node=3", "TORCHELASTIC_RUN_ID": "none"}, 8, []),
        ({"RANK": "1"}, 8, []),
    ],
)
def test_the_environment_says_whether_and_how_to_start_processes(monkeypatch, environment, gpus, expected):
    for name in ("RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert torchrun_arguments("stages.train") == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--nnodes=2 --nproc-per-node=8 --node-rank=0 --master-addr=10.0.0.1", ["--standalone", "--nproc-per-node=8"]),
        ("--nnodes=1:4 --nproc-per-node=gpu --rdzv-backend=c10d", ["--standalone", "--nproc-per-node=gpu"]),
        ("--standalone --nproc-per-node=2", ["--standalone", "--nproc-per-node=2"]),
        ("", []),
    ],
)
def test_a_stage_for_one_machine_does_not_wait_for_others(monkeypatch, arguments, expected):
    for name in ("RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ENCORE_TORCHRUN", arguments)
    assert torchrun_arguments("stages.evaluate", one_machine=True) == expected


def test_an_open_quote_is_told(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("ENCORE_TORCHRUN", "--nproc-per-node='2")
    with pytest.raises(EncoreError) as error:
        torchrun_arguments("stages.train")
    assert str(error.value) == (
        'ENCORE_TORCHRUN="--nproc-per-node=\'2" is not what torchrun takes (No closing quotation); see '
        "`torchrun --help`"
    )


def test_torchruns_missed_goodbye_is_not_told():
    logger = logging.getLogger("torch.distributed.elastic.agent.server.api")
    records = [
        logger.makeRecord(logger.name, logging.ERROR, "", 0, text, (), None)
        for text in ("Error waiting on exit barrier. Elapsed: 0.01 seconds", "failed (exitcode: 1) local_rank: 0")
    ]
    assert [_is_no_goodbye(record) for record in records] == [False, True]


@pytest.fixture
def agent(monkeypatch):
    """Lets this process be torchrun's: what that sets in the environment and in logging is put back afterwards."""
    for name in ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "OMP_NUM_THREADS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield lambda arguments: run_under_torchrun(arguments.split(), "stages.train")
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--nproc-per-node=x", "Unsupported nproc_per_node value: x"),
        ("--nproc-per-node", "argument --nproc-per-node/--nproc_per_node: expected one argument"),
        ("--nproc-per-node=0", "AssertionError"),
        ("--nnodes=0", "min_nodes must be > 0 and <= max_nodes, got min_nodes=0, max_nodes=0"),
        ("--nnodes=1:2:3", 'nnodes=1:2:3 is not in "MIN:MAX" format'),
        ("--rdzv-backend=x", "The rendezvous backend 'x' is not registered. Did you forget to call `register`?"),
        ("--gpus=2", "unrecognized arguments: --gpus=2"),
        ("2", "2 is no option"),
    ],
)
def test_arguments_that_torchrun_does_not_take_are_told_in_a_sentence(agent, capfd, arguments, reason):
    with pytest.raises(EncoreError) as error:
        agent(arguments)
    assert str(error.value) == (
        f"ENCORE_TORCHRUN={arguments!r} is not what torchrun takes ({reason}); see `torchrun --help`"
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (STATIC + " --rdzv-conf=timeout=1", "Timed out after 2 seconds waiting for clients. 1/2 clients joined."),
        (C10D + " --rdzv-conf=join_timeout=1", "they waited in vain"),
    ],
)
def test_a_machine_that_does_not_come_is_missed(agent, capfd, arguments, reason):
    with pytest.raises(EncoreError) as error:
        agent(arguments.format(node=0, port=find_port()))
    assert str(error.value) == (
        f"the ranks did not find each other ({reason}); check that each machine runs the same command, and the address "
        "and port in ENCORE_TORCHRUN"
    )
    assert capfd.readouterr() == ("", "")


def test_a_port_that_something_else_listens_at_is_told(agent):
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(EncoreError) as error:
        agent(STATIC.format(node=0, port=other.getsockname()[1]))
    assert str(error.value).startswith("the ranks did not find each other (The server socket has failed to listen on")
    assert "EADDRINUSE" in str(error.value)


@pytest.mark.parametrize(
    ("raised", "kind", "told"),
    [
        (SignalException("", signal.SIGTERM), Interrupted, "all ranks have stopped; run the same command to go on"),
        (SignalException("", signal.SIGINT), Interrupted, "all ranks have stopped; run the same command to go on"),
        (1, EncoreError, "rank 3 ended with exit code 1; its message is above"),
        (128, EncoreError, "rank 3 ended with exit code 128; its message is above"),
        (-9, EncoreError, "rank 3 was killed by SIGKILL; the same command goes on from the last checkpoint"),
        (-11, EncoreError, "rank 3 was killed by SIGSEGV; the same command goes on from the last checkpoint"),
        (143, Interrupted, "all ranks have stopped; run the same command to go on"),
        (130, Interrupted, "all ranks have stopped; run the same command to go on"),
    ],
)
def test_how_the_ranks_ended_is_told_in_a_sentence(agent, monkeypatch, raised, kind, told):
    def end(arguments):
        if isinstance(raised, SignalException):
            raise raised
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=raised, error_file="<N/A>")
        raise ChildFailedError("stages.train", {3: failure})

    monkeypatch.setattr("torch.distributed.run.run", end)
    with pytest.raises(kind, match=f"^{told}$") as error:
        agent(TWO)
    if kind is Interrupted:
        assert error.value.exit_code == (raised if isinstance(raised, int) else 128 + raised.sigval)


def test_a_signal_amid_torchs_own_clock_is_a_stop_too(agent, monkeypatch):
    """Its wrapper then fails over the time that it has not read yet."""

    def stopped():
        raise SignalException("", signal.SIGTERM)

    monkeypatch.setattr(api, "time", SimpleNamespace(time=stopped))
    monkeypatch.setattr("torch.distributed.run.run", api.prof(lambda parsed: None))
    with pytest.raises(Interrupted, match=r"^all ranks have stopped") as error:
        agent(TWO)
    assert error.value.exit_code == 143


@pytest.mark.parametrize(
    ("arguments", "quiet", "store"),
    [
        (TWO, logging.ERROR, None),
        (TWO + " --max-restarts=1", logging.WARNING, None),
        ("--nnodes=1:1", logging.ERROR, None),
        ("--nnodes=2", logging.ERROR, "1"),
        ("--nnodes=1:4 --max-restarts=3", logging.WARNING, "1"),
    ],
)
def test_torchrun_is_given_the_module_and_time_to_save(agent, monkeypatch, arguments, quiet, store):
    """Several machines meet in a new store at each attempt. torch's own lines tell of failures before a restart."""
    given = []
    monkeypatch.setattr("torch.distributed.run.run", given.append)
    agent(arguments)
    (parsed,) = given
    assert (parsed.module, parsed.training_script, parsed.training_script_args) == (True, "stages.train", [])
    assert logging.root.manager.disable == quiet
    assert os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == store
    assert os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "110"
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_what_the_environment_sets_itself_is_left(agent, monkeypatch):
    monkeypatch.setattr("torch.distributed.run.run", lambda parsed: None)
    mine = {"OMP_NUM_THREADS": "3", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "9", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    agent("--nnodes=2")
    assert {name: os.environ[name] for name in mine} == mine


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Tokens, and what two ranks make of them on the long page."""
    base = tmp_path_factory.mktemp("undisturbed")
    tokens = write_walk(base / "tokens")
    folder = write_run(base / "run", tokens, **LONG)
    start_two_ranks([{"how": "two", "folder": str(folder)}], PYTHONHASHSEED="1")  # as in test_interruptions.py
    return SimpleNamespace(tokens=tokens, results=results(folder))


def results(folder):
    names = ["model/model.safetensors", "metrics/train.tsv", "metrics/eval.tsv"]
    return {name: (folder / name).read_bytes() for name in names}


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and asks for the parent's death signal")


@linux
def test_a_rank_that_is_killed_is_started_again(undisturbed, tmp_path):
    """More than once: the second attempt must not find the addresses of the first."""
    folder = write_run(tmp_path / "run", undisturbed.tokens, **LONG)
    with launched(folder, f"{TWO} --max-restarts=2") as agent:
        for rank in (1, 0):
            with at_checkpoint(agent, folder):
                os.kill(ranks_of(agent)[rank], signal.SIGKILL)
        end(agent, exit_code=0)
    assert results(folder) == undisturbed.results


@linux
def test_two_machines_do_what_two_ranks_of_one_do(undisturbed, tmp_path):
    """In two folders. One rank is killed, and the machines, which count that each in its own way, start theirs again.

    The first rank's folder has the results, the other nothing new.
    """
    folders = [write_run(tmp_path / name, undisturbed.tokens, **LONG) for name in ("a", "b")]
    before = {path.name for path in folders[0].iterdir()}
    with two_machines(folders, f"{C10D} --max-restarts=2") as agents:
        with at_checkpoint(agents[0], folders[0]):
            os.kill(ranks_of(*agents)[1], signal.SIGKILL)
        for agent in agents:
            end(agent, exit_code=0)
    first, other = sorted(folders, key=lambda folder: not (folder / "model").exists())
    assert results(first) == undisturbed.results
    # The second machine has verified what it read, and leaves a mark of that; torch makes `compiled`.
    assert {path.name for path in other.iterdir()} - {".encore"} == before
    assert {path.name for path in (other / ".encore").iterdir()} - {"compiled"} == {"verified"}


@linux
def test_a_machine_that_is_told_to_stop_tells_the_other(undisturbed, tmp_path):
    """In one folder, as on a shared file system. Then they go on, and the first rank is killed on the way."""
    folder = write_run(tmp_path / "shared", undisturbed.tokens, **LONG)
    with two_machines([folder, folder], STATIC) as agents:
        with at_checkpoint(agents[0], folder):
            agents[1].terminate()
            time.sleep(1)  # for torchrun to tell its rank, whose handler cannot run before the first one goes on
        said = [end(agent, exit_code=143) for agent in agents]
    assert "SIGTERM: saved at iteration" in said[0][0]
    stopped = ["encore: all ranks have stopped; run the same command to go on"]
    assert [said[0][1:], said[1]] == [stopped, stopped]

    with two_machines([folder, folder], f"{STATIC} --max-restarts=1") as agents:
        with at_checkpoint(agents[0], folder):
            os.kill(ranks_of(*agents)[0], signal.SIGKILL)
        for agent in agents:
            end(agent, exit_code=0)
    assert results(folder) == undisturbed.results


@linux
def test_signals_stop_all_ranks_and_dvc_goes_on_from_there(undisturbed, tmp_path):
    folder = copy_repository(tmp_path / "repository")
    write_page(folder / "params.yaml", **LONG)
    write_walk(folder / "data" / "tokens")
    (folder / "data" / "init").mkdir()

    for number, stop in ((signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)):
        with launched(folder, TWO) as agent, at_checkpoint(agent, folder):
            stop(agent.pid, number)
            from_rank_0, from_torchrun = end(agent, exit_code=128 + number)
        assert re.fullmatch(
            rf"encore: {number.name}: saved at iteration \d+ of 240; run the same command to go on from there",
            from_rank_0,
        )
        assert from_torchrun == "encore: all ranks have stopped; run the same command to go on"
    assert not list(folder.parent.glob("*torchrun*"))
    assert not list(folder.parent.glob("torchelastic*"))

    with launched(folder, TWO) as agent, at_checkpoint(agent, folder):
        ranks = ranks_of(agent)
        agent.kill()
        # Linux may tell a rank twice, for each thread that its parent had, and the second time ends it at once.
        for line in end(agent, exit_code=-signal.SIGKILL):
            assert line.startswith(("encore: SIGTERM: saved at iteration", "encore: a rank is lost"))
        assert sorted(ranks) == [0, 1]
        for process_id in ranks.values():
            wait_for_end(process_id)

    run_dvc(folder, "repro", "check")
    run_dvc(folder, "repro", "--single-item", "train", **launch_settings(folder, TWO))
    assert results(folder) == undisturbed.results
    assert "resumed at iteration" in (folder / "training.log").read_text()


@linux
def test_a_second_run_beside_the_first_is_refused(undisturbed, tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", undisturbed.tokens, **LONG)
    monkeypatch.chdir(folder)
    identity = run_folder.identity(load_params("train").as_dict(), manifest_sha256(Path("data/tokens")))
    checkpoints = Path(".encore/checkpoints") / run_folder.fingerprint(identity)
    with run_folder.locked(checkpoints, identity), launched(folder, TWO) as agent:
        said = end(agent, exit_code=1)
    assert (
        f"encore: {checkpoints}: another trainer (process {os.getpid()}) is at work on this run; wait for it, or end it"
    ) in said
    # Both do; which of them is the first is chance.
    assert re.fullmatch(r"encore: rank [01] ended with exit code 1; its message is above", said[-1])


@linux
def test_what_all_ranks_have_to_say_is_said_once(undisturbed, tmp_path):
    folder = write_run(
        tmp_path / "run", undisturbed.tokens, **{**LONG, "batch_size": 5, "gradient_accumulation_steps": 1}
    )
    with launched(folder, TWO) as agent:
        said, from_torchrun = end(agent, exit_code=1)
    assert said == (
        "encore: batch_size x gradient_accumulation_steps is 5, which 2 processes cannot share evenly; make it a "
        "multiple of 2, or start another number of processes"
    )
    assert re.fullmatch("encore: rank [01] ended with exit code 1; its message is above", from_torchrun)
