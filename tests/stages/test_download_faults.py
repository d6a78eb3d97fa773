"""The download stage as a process, from a Hub of 80 shards like OpenWebText's at 1/5000 of the size: undisturbed, under
every fault at once, and killed. docs/downloads.md tells what is measured here."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT, write_page
from tests.hub import ALWAYS, COMMIT, LISTING, REPOSITORY, Fault, Hub, serving
from tests.text_sources import sha256

pytestmark = pytest.mark.slow

SECRET = "hf_SeCrEtToKeN"
SHARDS = 80
CHOSEN = 37
SHARD_TEXT_BYTES = 39_769_491_688 // SHARDS // 5_000
RANKS = b"IQ== 0\n" * 1_000
RANKS_PATH = "/encodings/r50k_base.tiktoken"
BROKEN_OFF_BYTES = 40_000
PIPELINE = """
stages:
  download:
    cmd: python -m stages.download
    params:
      [dataset, dataset_revision, dataset_share, text_column, shard_order, tokenizer, token_cap, val_fraction,
       split_seed]
"""
# The stage, without time to wait, and with ranks from loopback.
STAGE = """
import os, runpy
from encore.download import retries
from encore.download import sources
from encore.download import transfer
retries.LONGEST_WAIT_SECONDS = 0.01
transfer.TIMEOUT_SECONDS = float(os.environ["TIMEOUT_SECONDS"])
sources.GPT2_RANKS_URL, sources.GPT2_RANKS_SHA256 = os.environ["RANKS_URL"], os.environ["RANKS_SHA256"]
runpy.run_module("stages.download", run_name="__main__", alter_sys=True)
"""


def name_of(number: int) -> str:
    return f"plain_text/train-{number:05d}-of-{SHARDS:05d}.parquet"


def shard(number: int) -> bytes:
    """A parquet file of 25 documents that do not compress, in row groups of 5."""
    text = random.Random(number).randbytes(SHARD_TEXT_BYTES).hex()[:SHARD_TEXT_BYTES]
    texts = [
        text[start : start + SHARD_TEXT_BYTES // 25 + 1] for start in range(0, len(text), SHARD_TEXT_BYTES // 25 + 1)
    ]
    sink = pa.BufferOutputStream()
    table = pa.table({"text": texts})
    pq.write_table(table, sink, row_group_size=5, use_dictionary=False, write_statistics=False, compression="none")
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {name_of(number): shard(number) for number in range(SHARDS)}


@pytest.fixture
def servers(files: dict[str, bytes]) -> Iterator[tuple[Hub, Hub]]:
    """A Hub that lists the files to who has the token, and the storage to which it redirects."""
    with serving(files) as hub, serving(files) as storage:
        hub.token, hub.storage = SECRET, storage.url
        storage.other_files[RANKS_PATH] = RANKS
        yield hub, storage


def prepare(folder: Path) -> Path:
    folder.mkdir()
    (folder / "dvc.yaml").write_text(PIPELINE)
    page = {"tokenizer": "gpt2", "vocab_size": 50257, "token_cap": 4_000_000_000 // 5_000, "val_fraction": 0.0005}
    write_page(folder / "params.yaml", dataset=f"hf:{REPOSITORY}", dataset_revision=COMMIT, **page)
    return folder


def start(folder: Path, hub: Hub, timeout_seconds: float = 0.5) -> subprocess.Popen:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": SECRET,
        "TIKTOKEN_CACHE_DIR": str(folder / "tiktoken"),
        "TIMEOUT_SECONDS": str(timeout_seconds),
        "RANKS_URL": f"{hub.storage}{RANKS_PATH}",
        "RANKS_SHA256": sha256(RANKS),
    }
    command = [sys.executable, "-c", STAGE]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def run(folder: Path, hub: Hub, exit_code: int = 0) -> tuple[str, str]:
    """What the stage printed on standard output and on standard error."""
    with start(folder, hub) as stage:
        out, error = stage.communicate(timeout=120)
    assert stage.returncode == exit_code, error
    assert SECRET not in out + error
    assert "Traceback" not in error
    return out, error


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()) for path in (folder / "data/raw").iterdir()}


def stored(folder: Path) -> Path:
    return folder / ".encore/hub/owner--corpus" / COMMIT


@pytest.fixture
def undisturbed(tmp_path: Path, servers: tuple[Hub, Hub]) -> dict[str, str]:
    """The hashes of data/raw after a run without faults."""
    hub, storage = servers
    folder = prepare(tmp_path / "undisturbed")
    out, error = run(folder, hub)
    assert error == ""
    assert out.startswith(f"hf:{REPOSITORY}: {25 * CHOSEN} documents, ")
    manifest = json.loads((folder / "data/raw/manifest.json").read_bytes())
    [source] = manifest["sources"]
    assert [file["source"] for file in source["files"]] == [name_of(number) for number in range(CHOSEN)]
    assert [file["sha256"] for file in source["files"]] == [
        sha256(storage.files[name_of(number)]) for number in range(CHOSEN)
    ]
    assert (source["source_files"], source["whole_source"]) == (SHARDS, False)
    assert manifest["text_bytes_per_token"] == 4.488
    assert CHOSEN * SHARD_TEXT_BYTES < source["text_bytes"] < CHOSEN * SHARD_TEXT_BYTES * 1.01
    assert storage.bodies_served() == {name_of(number): len(storage.files[name_of(number)]) for number in range(CHOSEN)}
    tails = sum(count for request, count in storage.requests.items() if request.endswith("#tail"))
    assert CHOSEN <= tails < CHOSEN + 8
    for server in servers:
        server.requests.clear()
        server.bytes_served.clear()
    return hashes(folder)


# By the words of docs/downloads.md: what happens to a file, and how much of it is fetched again.
NOTHING, ALL, BROKEN_OFF = "0", "the file", "what had come"
TAILS, SOCKET = "at most 64 KiB a try", "what a socket holds"
BODY_FAULTS = {
    "429, with and without `Retry-After`": (
        NOTHING,
        [Fault("status", status=429, headers={"Retry-After": "9"}), Fault("status", status=429)],
    ),
    "500, 502, 503, 504": (NOTHING, [Fault("status", status=status) for status in (500, 502, 503, 504)]),
    "connection reset before the answer": (NOTHING, [Fault("reset", after_bytes=None)]),
    "connection reset within the file": (NOTHING, [Fault("reset", after_bytes=BROKEN_OFF_BYTES)]),
    "file ends early": (NOTHING, [Fault("end", after_bytes=BROKEN_OFF_BYTES)]),
    "no answer": (NOTHING, [Fault("stall", after_bytes=None)]),
    "nothing more comes": (NOTHING, [Fault("stall", after_bytes=BROKEN_OFF_BYTES)]),
    "wrong bytes, once": (ALL, [Fault("damage")]),
    "`Range` ignored when a file is continued": (
        BROKEN_OFF,
        [Fault("end", after_bytes=BROKEN_OFF_BYTES), Fault("no_range")],
    ),
    "416 when a file is continued": (
        BROKEN_OFF,
        [Fault("end", after_bytes=BROKEN_OFF_BYTES), Fault("status", status=416)],
    ),
}
TAIL_FAULTS = {
    "footer: any of these": (
        TAILS,
        [
            Fault("status", status=429),
            Fault("status", status=500),
            Fault("reset", after_bytes=None),
            Fault("end", after_bytes=1_000),
            Fault("stall", after_bytes=1_000),
        ],
    ),
    "footer: `Range` ignored": (SOCKET, [Fault("no_range", ALWAYS)]),
    "footer: unreadable": (TAILS, [Fault("damage_end", ALWAYS)]),
}
# What lies in the store before the run, made of the file's content; the ending of its name; what is served of the file.
DISK_FAULTS = {
    "on the disk: a partial file": (
        NOTHING,
        lambda content: content[:BROKEN_OFF_BYTES],
        ".partial",
        lambda file_bytes: file_bytes - BROKEN_OFF_BYTES,
    ),
    "on the disk: a partial file, too long": (ALL, lambda content: content + b"x", ".partial", int),
    "on the disk: a partial file, damaged": (
        ALL,
        lambda content: bytes(BROKEN_OFF_BYTES),
        ".partial",
        lambda file_bytes: file_bytes - BROKEN_OFF_BYTES + file_bytes,
    ),
    "on the disk: a whole file": (NOTHING, bytes, "", lambda file_bytes: 0),
    "on the disk: a whole file, damaged": (ALL, lambda content: bytes(len(content)), "", int),
}


def test_every_fault_at_once(tmp_path: Path, servers: tuple[Hub, Hub], undisturbed: dict[str, str]) -> None:
    hub, storage = servers
    folder = prepare(tmp_path / "disturbed")
    hub.faults[LISTING] = [
        Fault("status", status=429, headers={"Retry-After": "9"}),
        Fault("status", status=503),
        Fault("reset", after_bytes=None),
        Fault("end", after_bytes=500),
    ]
    storage.faults[RANKS_PATH] = [Fault("status", status=502), Fault("damage"), Fault("reset", after_bytes=3_000)]
    names = iter([name_of(number) for number in range(1, CHOSEN, 2)])
    expected_bytes, waits = {name_of(number): len(storage.files[name_of(number)]) for number in range(CHOSEN)}, 4 + 2
    for again, faults in BODY_FAULTS.values():
        name = next(names)
        storage.faults[name] = faults
        expected_bytes[name] += {NOTHING: 0, ALL: expected_bytes[name], BROKEN_OFF: BROKEN_OFF_BYTES}[again]
        waits += sum(fault.kind not in ("damage", "no_range") for fault in faults)
    tail_names = [next(names) for _ in TAIL_FAULTS]
    for (_, faults), name in zip(TAIL_FAULTS.values(), tail_names, strict=True):
        storage.faults[f"{name}#tail"] = faults
        waits += sum(fault.kind not in ("damage_end", "no_range") for fault in faults)
    for _, make, suffix, served in DISK_FAULTS.values():
        name = next(names)
        path = stored(folder) / (name + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make(storage.files[name]))
        expected_bytes[name] = served(expected_bytes[name])

    _, error = run(folder, hub)

    assert hashes(folder) == undisturbed
    assert {name: count for name, count in storage.bodies_served().items() if count} == {
        name: count for name, count in expected_bytes.items() if count
    }
    lines = error.splitlines()
    assert all(line.startswith("encore: note: ") for line in lines)
    assert sum(line.endswith("; trying again in 0.01 s") for line in lines) == waits
    assert len(lines) == waits + 3  # wrong bytes: of a file, of a partial file, of the ranks
    for (again, faults), name in zip(TAIL_FAULTS.values(), tail_names, strict=True):
        assert storage.requests[f"GET {name}#tail"] == 1 + sum(fault.times == 0 for fault in faults)
        assert storage.bytes_served[f"{name}#tail"] <= (len(storage.files[name]) if again == SOCKET else 65_536 + 2_000)
    assert not list(folder.rglob("*.partial"))
    assert (hub.authorizations, storage.authorizations) == ({f"Bearer {SECRET}"}, {None})
    assert not any(SECRET.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_the_table_of_faults_is_the_one_tested() -> None:
    rows = [line.split(" | ") for line in (ROOT / "docs/downloads.md").read_text().splitlines() if line[:2] == "| "]
    table = {row[0].removeprefix("| "): row[3] for row in rows if len(row) == 5}
    measured = {fault: again for fault, (again, *_) in {**BODY_FAULTS, **TAIL_FAULTS, **DISK_FAULTS}.items()}
    assert {fault: table.get(fault) for fault in measured} == measured
    assert set(table) - set(measured) == {
        "fault",
        "listing: 429, 503, reset, early end",
        "ranks of GPT-2: 502, wrong bytes, reset",
        "`kill -9`",
        "Ctrl-C, SIGTERM",
    }


FOR_GOOD = {
    "401, 403": (Fault("status", ALWAYS, 403), "refuses it (403), so it is misspelt, private or gated", 1),
    "404": (Fault("status", ALWAYS, 404), "has no such thing (404); check the spelling", 1),
    "5xx, always": (Fault("status", ALWAYS, 503), "answers with an error (503); run again later", 6),
    "no connection, always": (Fault("reset", ALWAYS, after_bytes=None), "connection to the Hub fails (ReadError)", 6),
    "wrong bytes, always": (Fault("damage", ALWAYS), "arrived twice with a sha256 that is not the listed one", 2),
}


@pytest.mark.parametrize("fault", FOR_GOOD)
def test_faults_that_stay_and_then_go(fault: str, tmp_path: Path, servers: tuple[Hub, Hub]) -> None:
    """One sentence, an exit code of 1, nothing in data/raw; the next run fetches what is missing and nothing else."""
    hub, storage = servers
    folder = prepare(tmp_path / "work")
    write_page(folder / "params.yaml", dataset=f"hf:{REPOSITORY}", dataset_revision=COMMIT, token_cap=80_000)
    bad = name_of(3)
    what, sentence, tries = FOR_GOOD[fault]
    storage.faults[bad] = [Fault(**vars(what))]
    out, error = run(folder, hub, exit_code=1)
    assert out == ""
    *notes, last = error.splitlines()
    assert last.startswith(f"encore: hf:{REPOSITORY} at {COMMIT}, file {bad}")
    assert sentence in last
    assert all(line.startswith("encore: note: ") for line in notes)
    assert storage.requests[f"GET {bad}"] == tries
    assert sorted(path.name for path in (folder / "data").iterdir()) == []
    whole = {path.relative_to(stored(folder)).as_posix() for path in stored(folder).rglob("*.parquet")}
    storage.faults.clear()
    storage.requests.clear()
    run(folder, hub)
    assert bad not in whole
    assert all(storage.requests[f"GET {name}"] == 0 for name in whole)
    assert fault in (ROOT / "docs/downloads.md").read_text()


# kill -9, SIGTERM, Ctrl-C


@pytest.fixture
def slow(servers: tuple[Hub, Hub]) -> tuple[Hub, Hub]:
    """The storage sends 16 KiB in 5 ms on each connection: the download takes a quarter of a second."""
    servers[1].seconds_for_piece = 0.005
    return servers


def kill_after(stage: subprocess.Popen, storage: Hub, served_bytes: float) -> bool:
    """Kills the stage once the storage has served so much; False where it was finished before."""
    while sum(storage.bodies_served().values()) < served_bytes:
        if stage.poll() is not None:
            return False
        time.sleep(0.001)
    stage.kill()
    return stage.wait() == -signal.SIGKILL


def test_killed_at_random_moments(tmp_path: Path, slow: tuple[Hub, Hub], undisturbed: dict[str, str]) -> None:
    hub, storage = slow
    folder = prepare(tmp_path / "killed")
    chance = random.Random(1)
    all_bytes = sum(len(storage.files[name_of(number)]) for number in range(CHOSEN))
    fetched_for: dict[str, int] = {}
    for moment in sorted(chance.uniform(0, all_bytes) for _ in range(5)):
        with start(folder, hub) as stage:
            assert kill_after(stage, storage, moment), stage.communicate()
        whole = {path.relative_to(stored(folder)).as_posix() for path in stored(folder).rglob("*.parquet")}
        for name in whole:
            requests = storage.requests[f"GET {name}"]
            assert fetched_for.setdefault(name, requests) == requests, f"{name} was whole and was fetched again"
    assert len(fetched_for) < CHOSEN
    run(folder, hub)
    assert hashes(folder) == undisturbed
    assert all(storage.requests[f"GET {name}"] == requests for name, requests in fetched_for.items())
    assert not list(folder.rglob("*.partial"))


@pytest.mark.parametrize(
    ("number", "exit_code", "sentence"),
    [
        (signal.SIGINT, 130, "stopped by Ctrl-C; run the same command to go on"),
        (signal.SIGTERM, 143, "stopped by SIGTERM; what is downloaded is kept, run the same command to go on"),
        (signal.SIGHUP, 129, "stopped by SIGHUP; what is downloaded is kept, run the same command to go on"),
    ],
)
def test_signals_end_a_stage_that_waits_for_a_server(
    number: signal.Signals, exit_code: int, sentence: str, tmp_path: Path, servers: tuple[Hub, Hub]
) -> None:
    """Its eight reads would go on for ten minutes."""
    hub, storage = servers
    folder = prepare(tmp_path / "stopped")
    for shard_number in range(CHOSEN):
        storage.faults[name_of(shard_number)] = [Fault("stall", after_bytes=BROKEN_OFF_BYTES)]
    with start(folder, hub, timeout_seconds=600) as stage:
        while sum(storage.bodies_served().values()) < 8 * BROKEN_OFF_BYTES:
            assert stage.poll() is None, stage.communicate()
            time.sleep(0.01)
        time.sleep(0.1)  # so that what was served is read
        stage.send_signal(number)
        out, error = stage.communicate(timeout=60)
    assert (stage.returncode, out, error) == (exit_code, "", f"encore: {sentence}\n")
    partials = list(folder.rglob("*.parquet.partial"))
    assert [path.stat().st_size for path in partials] == [BROKEN_OFF_BYTES] * 8
    assert sorted(path.name for path in (folder / "data").iterdir()) == []
