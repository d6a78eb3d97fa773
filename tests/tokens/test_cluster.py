"""encore/tokens/cluster.py: parts that worker processes encode, against what one machine makes of the same corpus."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from distributed import Client, LocalCluster

from encore.errors import EncoreError
from encore.tokens import cluster, encode, parts
from encore.tokens.parts import PartStore
from encore.tokens.token_files import SPLITS
from encore.tokens.tokenizer import load_tokenizer
from stages import tokenize
from tests.conftest import ROOT, pipeline_environment, write_page
from tests.raw_text import PLENTY, SEED, VAL_FRACTION, VOCAB_SIZE, plain_loop, stage_params, write_raw

pytestmark = pytest.mark.slow

RAW, TOKENS, BEGUN = Path("data/raw"), Path("data/tokens"), Path("begun.txt")
TEXTS = ["" if number % 9 == 4 else f"the ünit {number}: {number**3} " * (1 + number % 5) for number in range(240)]
PARTS = 6
# What Dask has each worker do first. It moves to another folder, makes parts as small as they are in these tests, and
# notes in begun.txt which it begins. A file named kill-one kills one worker within its part, one named wait holds all.
IN_EACH_WORKER = """
import os, signal, time
from encore.tokens import cluster
from encore.tokens import encode
from encore.tokens import parts

os.chdir("/")
parts.PART_TEXT_BYTES, encode.BATCH_BYTES = 2000, 500

class NotingStore(parts.PartStore):
    def _encode(self, index, *arguments):
        global root
        root = self.folder.parents[2]
        with open(root / "begun.txt", "a") as file:
            print(index, file=file)
        super()._encode(index, *arguments)

def encode_all(*arguments):
    for result in encode.encode_all(*arguments):
        yield result
        while (root / "wait").exists():
            time.sleep(0.01)
        try:
            os.remove(root / "kill-one")
        except FileNotFoundError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)

cluster.PartStore, parts.encode_all = NotingStore, encode_all
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to run in, with a corpus of several parts. In the end nothing else lies there or with the system's
    temporary files."""
    root, temporary = tmp_path / "root", tmp_path / "temporary"
    root.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(root)
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setenv("ENCORE_WORKERS", "1")
    monkeypatch.delenv(cluster.ADDRESS, raising=False)
    monkeypatch.setattr(encode, "BATCH_BYTES", 500)
    monkeypatch.setattr(parts, "PART_TEXT_BYTES", 2000)
    shutil.copy(ROOT / "dvc.yaml", root)
    write_raw(RAW, TEXTS)
    write_params()
    with dask.config.set({"distributed.worker.preload": [IN_EACH_WORKER]}):
        yield root
    assert {path.name for path in root.iterdir()} <= {"dvc.yaml", "params.yaml", "data", ".encore", "begun.txt"}
    assert list(temporary.iterdir()) == []


def start_dask(folder: Path, preload: list[str], **options: Any) -> LocalCluster:
    """A scheduler, and workers that do `preload` first. Their own files lie in `folder`."""
    with dask.config.set({"distributed.worker.preload": preload, "temporary-directory": str(folder)}):
        return LocalCluster(**options, dashboard_address=None, scheduler_kwargs={"dashboard_address": "127.0.0.1:0"})


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a scheduler with two workers."""
    folder = tmp_path_factory.mktemp("dask")
    with start_dask(folder, [IN_EACH_WORKER], n_workers=2, threads_per_worker=1) as workers:
        yield workers.scheduler_address


def write_params(token_cap: int = PLENTY) -> None:
    page = {"vocab_size": VOCAB_SIZE, "split_seed": SEED, "val_fraction": VAL_FRACTION, "token_cap": token_cap}
    write_page(Path("params.yaml"), **page)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["cluster", *arguments])
    cluster.main()


def run_stage(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, bytes], list[int]]:
    """The files of data/tokens, and which parts the stage encoded itself."""
    encoded: list[int] = []

    class NotingStore(PartStore):
        def _encode(self, index: int, *arguments: Any) -> None:
            encoded.append(index)
            super()._encode(index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "PartStore", NotingStore)
        tokenize.main()
    return {path.name: path.read_bytes() for path in TOKENS.iterdir()}, encoded


def run_on_one_machine(monkeypatch: pytest.MonkeyPatch, token_cap: int) -> tuple[dict[str, bytes], int]:
    """What the stage makes without help, compared with a plain loop, and of how many parts. Leaves nothing behind."""
    write_params(token_cap)
    folder, encoded = run_stage(monkeypatch)
    corpus = plain_loop(load_tokenizer(TOKENS / "tokenizer.tiktoken"), TEXTS, token_cap)
    for split in SPLITS:
        names = sorted(name for name in folder if name.startswith(split))
        assert b"".join(folder[name] for name in names) == corpus.as_bytes(split)
    shutil.rmtree(TOKENS)
    shutil.rmtree(".encore")
    return folder, len(encoded)


def begun() -> list[int]:
    """The parts that workers have begun, in order of their numbers."""
    return sorted(map(int, BEGUN.read_text().split()))


def test_workers_here_make_what_one_machine_makes_though_one_is_killed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, count = run_on_one_machine(monkeypatch, PLENTY)
    assert count == PARTS
    encode_parts = cluster.encode_parts

    def look_first(store: PartStore, client: Client) -> dict[int, int]:
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        connections = [connection for process in processes for connection in process.net_connections()]
        listening = {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}
        assert list(client.nthreads().values()) == [1, 1]
        return encode_parts(store, client)

    monkeypatch.setattr(cluster, "encode_parts", look_first)
    Path("kill-one").touch()
    capsys.readouterr()
    run(monkeypatch, "--workers", "2")
    assert len(begun()) == PARTS + 1
    assert set(begun()) == set(range(PARTS))
    train_tokens = sum(len(data) for name, data in expected.items() if name.startswith("train")) // 2
    output = capsys.readouterr()
    learning, summary = output.out.splitlines()
    assert learning.startswith("learning 300 tokens from ")
    assert summary == f"{train_tokens:,} train tokens in {PARTS} parts; `dvc repro tokenize` merges them"
    assert output.err == ""
    assert run_stage(monkeypatch) == (expected, [])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_workers_elsewhere_stop_behind_the_cap(monkeypatch: pytest.MonkeyPatch, scheduler: str) -> None:
    """The manifest's guess of six bytes a token is far too high for these tokens, so that they go on for a while."""
    expected, count = run_on_one_machine(monkeypatch, 1500)
    assert count == 2
    monkeypatch.setenv(cluster.ADDRESS, scheduler)
    run(monkeypatch)
    assert begun() == list(range(max(begun()) + 1))
    assert count <= len(begun()) <= count + 1
    assert run_stage(monkeypatch) == (expected, [count - 1]), "the stage only cuts the part in which the cap lies"


def test_a_part_that_fails_is_named_and_the_next_run_goes_on_behind_the_others(
    monkeypatch: pytest.MonkeyPatch, scheduler: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, _ = run_on_one_machine(monkeypatch, PLENTY)
    path = RAW / "00001-text.parquet"
    good = path.read_bytes()
    bring_ranks = cluster.bring_ranks

    def damage_then(store: PartStore, threads: int) -> dict[bytes, int]:
        ranks = bring_ranks(store, threads)
        path.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
        return ranks

    monkeypatch.setenv(cluster.ADDRESS, scheduler)
    monkeypatch.setattr(cluster, "bring_ranks", damage_then)
    with pytest.raises(EncoreError) as error:
        run(monkeypatch)
    monkeypatch.setattr(cluster, "bring_ranks", bring_ranks)
    store = cluster.open_store(RAW, stage_params(), Path(".encore"))
    first_bad = min(index for index, groups in enumerate(store.parts) if groups[-1].path.name == path.name)
    failed = re.match(r"part (\d+) ", str(error.value))
    assert int(failed[1]) >= first_bad  # several are encoded at a time
    assert str(error.value) == (
        f"part {failed[1]} failed on {socket.gethostname()}: {root}/data/raw/00001-text.parquet has other bytes than "
        f"{root}/data/raw/manifest.json says; `dvc repro -s -f download` makes data/raw anew, and "
        "`encore verify` tells whether "
        "`dvc checkout --force data/raw` is enough"
    )
    assert first_bad == 3
    assert not any(map(store.is_finished, range(first_bad, PARTS)))
    path.write_bytes(good)
    run(monkeypatch)
    assert begun() == list(range(PARTS)), "what was begun before is awaited or taken as it is"
    capsys.readouterr()
    run(monkeypatch)
    assert begun() == list(range(PARTS))
    note = f"encore: note: {PARTS} of {PARTS} parts are in {root / store.folder} already\n"
    assert capsys.readouterr().out.startswith(note)
    assert run_stage(monkeypatch) == (expected, [])


def test_ctrl_c_is_a_sentence_and_leaves_no_process(root: Path) -> None:
    Path("wait").touch()
    process = subprocess.Popen(
        [sys.executable, "-m", "encore", "cluster", "--workers", "2"],
        env=pipeline_environment(DASK_DISTRIBUTED__WORKER__PRELOAD=IN_EACH_WORKER, PYTHONPATH=str(ROOT)),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not BEGUN.exists():
        assert process.poll() is None
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    Path("wait").unlink()
    assert process.communicate()[1] == "encore: stopped by Ctrl-C; run the same command to go on\n"
    assert process.returncode == 130
    assert psutil.wait_procs(started, timeout=30)[1] == []


def test_a_job_array_encodes_the_parts_without_dask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, _ = run_on_one_machine(monkeypatch, PLENTY)
    monkeypatch.setitem(sys.modules, "distributed", None)
    capsys.readouterr()
    run(monkeypatch, "--list")
    assert capsys.readouterr().out == f"{PARTS}\n"
    for index in (3, 0, 4, 2, 5, 1):
        run(monkeypatch, "--part", str(index))
    for index in (-1, PARTS):
        with pytest.raises(EncoreError, match=rf"^there is no part {index}; they are numbered from 0 to {PARTS - 1}$"):
            run(monkeypatch, "--part", str(index))
    assert run_stage(monkeypatch) == (expected, [])


def test_without_dask_it_says_what_to_install_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(EncoreError, match=r"^Dask is not installed; `pip install -e '\.\[cluster\]'`, or use --part,"):
        run(monkeypatch)
    assert not Path(".encore").exists()


def test_no_worker_at_all_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "--workers", "0")
    assert capsys.readouterr().err.endswith("error: --workers: give a whole number from 1 on\n")


def refuse_to_join(monkeypatch: pytest.MonkeyPatch, address: str, problem: str, seconds: float = 0.2) -> None:
    monkeypatch.setattr(cluster, "SECONDS_TO_JOIN", seconds)
    monkeypatch.setenv(cluster.ADDRESS, address)
    with pytest.raises(EncoreError) as error:
        run(monkeypatch)
    start = (
        f"DASK_SCHEDULER_ADDRESS is {address}, where no Dask scheduler has workers that can import Encore ({problem}"
    )
    end = "); start `dask scheduler` and `dask worker` in .venv, or unset it to encode on this machine"
    assert str(error.value).startswith(start)
    assert str(error.value).endswith(end)
    assert not Path(".encore").exists()


def test_an_address_where_nobody_listens_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    refuse_to_join(monkeypatch, f"tcp://127.0.0.1:{port}", "Timed out trying to connect")
    refuse_to_join(monkeypatch, "somewhere", "missing port number")


def test_a_scheduler_without_workers_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with start_dask(tmp_path, [], n_workers=0) as workers:
        refuse_to_join(monkeypatch, workers.scheduler_address, "Only 0/1 workers arrived", seconds=2.0)


def test_workers_without_encore_are_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hide = "import sys; sys.modules['encore.tokens.cluster'] = None"
    with start_dask(tmp_path, [hide], n_workers=1) as workers:
        refuse_to_join(monkeypatch, workers.scheduler_address, "import of encore.tokens.cluster halted", seconds=30.0)
