"""cluster.py: which parts it has encoded, and in which order, by workers that only stand for real ones."""

import shutil
import socket
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

from encore.errors import EncoreError
from encore.tokens import cluster, encode, parts
from encore.tokens.parts import PartStore
from tests.raw_text import VAL_FRACTION, stage_params, write_raw

TEXTS = [f"the ünit {number}: {number**3} " * (1 + number % 5) for number in range(240)]
PARTS = 6


class Workers:
    """Stands for a Dask client. When its threads are counted, one of them ends its part, the last that was begun."""

    def __init__(self, store: PartStore, slots: int) -> None:
        self.store, self.slots = store, slots
        self.begun: list[int] = []
        self.waiting: list[tuple[int, Future]] = []
        self.most_waiting = 0

    def get_executor(self) -> "Workers":
        return self

    def nthreads(self) -> dict[str, int]:
        if self.waiting:
            index, future = self.waiting.pop()
            self.end(index, future)
        return dict.fromkeys(map(str, range(self.slots)), 1)

    def submit(self, function: Any, raw: str, values: dict[str, Any], folder: str, index: int) -> Future:
        assert function is cluster.encode_on_worker
        assert (raw, values, folder) == (str(self.store.raw), self.store.params.as_dict(), str(self.store.folder))
        future: Future = Future()
        self.begun.append(index)
        self.waiting.append((index, future))
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        return future

    def end(self, index: int, future: Future) -> None:
        cluster.encode_part(self.store, index, 1)
        future.set_result(("host", None))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PartStore:
    """A store of several parts."""
    monkeypatch.setattr(cluster, "SECONDS_BETWEEN_LOOKS", 0)
    monkeypatch.setattr(encode, "BATCH_BYTES", 500)
    monkeypatch.setattr(parts, "PART_TEXT_BYTES", 2000)
    monkeypatch.setattr("encore.files.os.fsync", lambda _: None)
    write_raw(tmp_path / "raw", TEXTS)
    return cluster.open_store(tmp_path / "raw", stage_params(), tmp_path / "scratch")


def with_cap(store: PartStore, token_cap: int) -> PartStore:
    """The same store where fewer tokens are wanted."""
    params = stage_params(**{**store.params.as_dict(), "token_cap": token_cap})
    return PartStore(store.raw, store.manifest, params, store.folder.parents[1])


@pytest.mark.slow
@pytest.mark.parametrize("slots", [0, 1, 2, 9])
@pytest.mark.parametrize("text_bytes_per_token", [0.1, "right", 1000.0])
def test_parts_are_begun_in_order_and_none_behind_the_cap_but_by_a_wrong_guess(
    store: PartStore, slots: int, text_bytes_per_token: Any
) -> None:
    elsewhere = PartStore(store.raw, store.manifest, store.params, store.raw.with_name("elsewhere"))
    expected = [elsewhere.bring(index, None, 1, lambda _: None).train_tokens for index in range(PARTS)]
    text_bytes = sum(group.text_bytes for group in store.sources[0].groups)
    right = text_bytes * (1 - VAL_FRACTION) / sum(expected)
    store.manifest["text_bytes_per_token"] = right if text_bytes_per_token == "right" else text_bytes_per_token
    for count in range(1, PARTS + 1):
        shutil.rmtree(store.folder, ignore_errors=True)
        capped = with_cap(store, sum(expected[:count]) - 100)
        workers = Workers(capped, slots)
        tokens = cluster.encode_parts(capped, workers)
        assert tokens == {index: expected[index] for index in workers.begun}
        assert workers.begun == list(range(len(workers.begun)))
        assert workers.most_waiting <= max(1, slots)
        if text_bytes_per_token == 1000.0:
            assert count <= len(workers.begun) <= count + max(1, slots) - 1
        else:
            assert len(workers.begun) == count


def test_only_what_is_missing_is_begun(store: PartStore) -> None:
    finished = {index: store.bring(index, None, 1, lambda _: None).train_tokens for index in (3, 1)}
    workers = Workers(store, 2)
    tokens = cluster.encode_parts(store, workers)
    assert workers.begun == [0, 2, 4, 5]
    assert sorted(tokens) == list(range(PARTS))
    assert finished.items() <= tokens.items()
    again = Workers(store, 2)
    assert cluster.encode_parts(store, again) == tokens
    assert again.begun == []


def test_a_part_that_is_not_to_be_seen_here_is_a_sentence(store: PartStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "SECONDS_TO_APPEAR", 0.2)
    monkeypatch.setattr(Workers, "end", lambda self, index, future: future.set_result(("node7", None)))
    with pytest.raises(EncoreError) as error:
        cluster.encode_parts(store, Workers(store, 1))
    assert str(error.value) == (
        f"part 0 was encoded on node7 and is not in {store.folder} here; "
        "set ENCORE_SCRATCH to a folder that all machines share"
    )


def test_a_part_that_dask_loses_is_a_sentence(store: PartStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dies again and again, a scheduler that dies: these are Dask's errors."""
    monkeypatch.setattr(Workers, "end", lambda self, index, future: future.set_exception(MemoryError("four times")))
    with pytest.raises(EncoreError) as error:
        cluster.encode_parts(store, Workers(store, 1))
    assert str(error.value) == (
        "part 0 was lost by Dask (MemoryError: four times); see whether its scheduler and workers "
        "live and have memory, then run the same command to go on"
    )


def on_worker(store: PartStore, folder: Path) -> str | None:
    host, problem = cluster.encode_on_worker(str(store.raw), store.params.as_dict(), str(folder), 0)
    assert host == socket.gethostname()
    return problem


def test_a_worker_with_other_code_or_text_says_so(store: PartStore) -> None:
    problem = on_worker(store, store.folder.with_name("0" * 16))
    assert problem == "its encore/ or data/raw is another one; let all machines share the repository"
    (store.raw / "manifest.json").unlink()
    problem = on_worker(store, store.folder)
    assert problem.startswith(f"{store.raw}/manifest.json is missing; `dvc repro -s -f download` makes data/raw anew")


def test_what_fails_on_a_worker_comes_back_in_words(store: PartStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(store: PartStore, index: int, threads: int) -> None:
        raise OSError(28, f"no room for part {index} and {threads} thread")

    monkeypatch.setattr(cluster, "encode_part", fail)
    assert on_worker(store, store.folder) == "OSError: [Errno 28] no room for part 0 and 1 thread"


def test_ranks_are_learned_from_text_that_is_checked_by_one_process_at_a_time(
    store: PartStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []
    check_raw = cluster.check_raw

    def try_the_lock(*arguments: Any) -> Any:
        with pytest.raises(Timeout), FileLock(store.folder / "ranks.lock", timeout=0):
            pass
        tries.append(arguments)
        return check_raw(*arguments)

    monkeypatch.setattr(cluster, "check_raw", try_the_lock)
    path = store.raw / "00001-text.parquet"
    good = path.read_bytes()
    path.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    with pytest.raises(EncoreError, match=r"00001-text\.parquet has other bytes"):
        cluster.encode_part(store, 0, 1)
    assert not store.ranks_path.exists()
    path.write_bytes(good)
    cluster.encode_part(store, 0, 1)
    assert store.ranks_path.exists()
    path.write_bytes(b"")
    cluster.encode_part(store, 0, 1)
    assert tries == [(store.raw, 1), (store.raw, 1)], "once they are there nothing but the part's own files is read"
