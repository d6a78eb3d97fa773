"""Encodes the parts of the corpus on many machines, for `dvc repro tokenize` to merge.

    encore cluster [--workers N]   on the workers of a Dask scheduler, or on N processes of this machine
    encore cluster --list          prints how many parts there are
    encore cluster --part INDEX    encodes one of them: for job arrays, which need no Dask

DASK_SCHEDULER_ADDRESS names the scheduler. All machines see the repository and the scratch folder under the same paths.
Each thread of a worker encodes a part by itself; should the worker die, another one encodes it.
"""

import argparse
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from encore.errors import EncoreError
from encore.params import StageParams, load_params
from encore.progress import Progress
from encore.scratch import scratch_folder
from encore.tokens.documents import check_files, check_raw, list_files, read_raw_manifest
from encore.tokens.encode import count_workers
from encore.tokens.parts import PartStore, read_part

if TYPE_CHECKING:
    from distributed import Client

RAW = Path("data/raw")
ADDRESS = "DASK_SCHEDULER_ADDRESS"
SECONDS_TO_JOIN = 60
SECONDS_TO_APPEAR = 60  # a network file system can take so long to show what another machine has made
SECONDS_BETWEEN_LOOKS = 5  # at how many workers there are


def main() -> None:
    arguments = parse_arguments()
    params = load_params("tokenize")
    store = open_store(RAW.absolute(), params, scratch_folder().absolute())
    if arguments.list:
        print(len(store.parts))
    elif arguments.part is not None:
        encode_part(store, arguments.part, count_workers())
    elif find_spec("distributed") is None:
        raise EncoreError("Dask is not installed; `pip install -e '.[cluster]'`, or use --part, which needs none")
    else:
        address = os.environ.get(ADDRESS)
        with join_scheduler(address) if address else start_workers(arguments.workers) as client:
            bring_ranks(store, count_workers())
            tokens = encode_parts(store, client)
        print(f"{sum(tokens.values()):,} train tokens in {len(tokens)} parts; `dvc repro tokenize` merges them")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("encore cluster", description="Encodes the corpus on many machines.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--workers", type=int, default=count_workers(), metavar="N", help=f"processes, without {ADDRESS}")
    what.add_argument("--list", action="store_true", help="print how many parts there are, and end")
    what.add_argument("--part", type=int, metavar="INDEX", help="encode this part alone; they are numbered from 0")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error("--workers: give a whole number from 1 on")
    return arguments


def open_store(raw: Path, params: StageParams, scratch: Path) -> PartStore:
    return PartStore(raw, read_raw_manifest(raw), params, scratch)


def join_scheduler(address: str) -> "Client":
    """A client of the Dask scheduler at `address`. Raises EncoreError where there is none, or no worker to use."""
    from distributed import Client

    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # what it has to say comes as an exception too
    try:
        client = Client(address, timeout=SECONDS_TO_JOIN)
        client.wait_for_workers(1, SECONDS_TO_JOIN)
        client.run(
            import_module, "encore.tokens.cluster"
        )  # a task that it cannot import is lost on a worker without a word
    except Exception as error:  # whatever it is that answers there
        raise EncoreError(
            f"{ADDRESS} is {address}, where no Dask scheduler has workers that can import Encore ({error}); "
            "start `dask scheduler` and `dask worker` in .venv, or unset it to encode on this machine"
        ) from None
    return client


@contextmanager
def start_workers(processes: int) -> Iterator["Client"]:
    """A client of a scheduler in this process, and of worker processes on this machine, which end with the block."""
    import dask
    from distributed import Client, LocalCluster

    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it, and leave Ctrl-C to this process
    with (
        TemporaryDirectory() as folder,
        dask.config.set({"temporary-directory": folder}),
        LocalCluster(
            n_workers=processes,
            threads_per_worker=1,
            memory_limit=None,
            dashboard_address=None,
            scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},  # else it wants port 8787
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        signal.signal(signal.SIGINT, on_interrupt)
        yield client


def encode_parts(store: PartStore, client: "Client") -> dict[int, int]:
    """Has those parts encoded that are not there, in order, until those of each source hold its cap of train tokens.

    Returns the train tokens of each part that is there. Raises EncoreError for the first part that fails.
    """
    finished = filter(store.is_finished, range(len(store.parts)))
    tokens = {index: read_part(store.part_folder(index)).train_tokens for index in finished}
    if tokens:
        print(f"encore: note: {len(tokens)} of {len(store.parts)} parts are in {store.folder} already")
    arguments = str(store.raw), store.params.as_dict(), str(store.folder)
    executor = client.get_executor()
    running: dict[Future, int] = {}
    with Progress("tokenize", store.params.token_cap, "tokens", sum(tokens.values())) as progress:
        while (missing := list_missing(store, tokens)) or running:
            waiting = [index for index in missing if index not in running.values()]
            slots = max(1, sum(client.nthreads().values()))  # new workers may have come
            for index in waiting[: max(0, slots - len(running))]:
                running[executor.submit(encode_on_worker, *arguments, index)] = index
            for future in wait(running, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED).done:
                index = running.pop(future)
                tokens[index] = take(store, index, future)
                progress.add(tokens[index])
    return tokens


def list_missing(store: PartStore, tokens: dict[int, int]) -> list[int]:
    """Of the first parts of each source, those that hold its cap of train tokens, the ones that are not in `tokens`.

    What such a part will hold is reckoned from its text, as the download stage does.
    """
    tokens_per_byte = (1 - store.params.val_fraction) / store.manifest["text_bytes_per_token"]
    missing = []
    for source in store.sources:
        total_tokens = 0.0
        for index in source.parts:
            if total_tokens >= source.token_cap:
                break
            if index not in tokens:
                missing.append(index)
            text_bytes = sum(group.text_bytes for group in store.parts[index])
            total_tokens += tokens.get(index, tokens_per_byte * text_bytes)
    return missing


def take(store: PartStore, index: int, future: Future) -> int:
    """The train tokens of a part that a worker has encoded. Raises EncoreError where it failed or is not to be seen."""
    try:
        host, problem = future.result()
    except Exception as error:  # Dask's own
        raise EncoreError(
            f"part {index} was lost by Dask ({type(error).__name__}: {error}); see whether its scheduler and workers "
            "live and have memory, then run the same command to go on"
        ) from None
    if problem:
        raise EncoreError(f"part {index} failed on {host}: {problem}")
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not store.is_finished(index):
        if time.monotonic() > deadline:
            raise EncoreError(
                f"part {index} was encoded on {host} and is not in {store.folder} here; "
                "set ENCORE_SCRATCH to a folder that all machines share"
            )
        time.sleep(0.1)
    return read_part(store.part_folder(index)).train_tokens


def encode_on_worker(raw: str, values: dict[str, Any], folder: str, index: int) -> tuple[str, str | None]:
    """Encodes a part with one thread. Returns the name of this host, and in words what went wrong, if anything did."""
    problem = None
    try:
        store = open_store(Path(raw), StageParams("tokenize", values), Path(folder).parents[1])
        if str(store.folder) != folder:
            raise EncoreError("its encore/ or data/raw is another one; let all machines share the repository")
        encode_part(store, index, threads=1)
    except EncoreError as error:
        problem = str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    return socket.gethostname(), problem


def encode_part(store: PartStore, index: int, threads: int) -> None:
    """Encodes all of a part, from files that are the manifest's, unless it is there."""
    if not 0 <= index < len(store.parts):
        raise EncoreError(f"there is no part {index}; they are numbered from 0 to {len(store.parts) - 1}")
    names = {group.path.name for group in store.parts[index]}
    check_files(store.raw, [file for file in list_files(store.manifest) if file["name"] in names], threads)
    bring_ranks(store, threads)
    store.bring(index, None, threads, lambda _: None)


def bring_ranks(store: PartStore, threads: int) -> dict[bytes, int]:
    """The ranks, which one process at a time lays beside the parts, the first after it has checked all files."""
    store.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(store.folder / "ranks.lock"):
        if not store.ranks_path.exists():
            check_raw(store.raw, threads)
        return store.ranks
