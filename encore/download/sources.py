"""Where text comes from: `package:NAME`, `files:GLOB` or `hf:OWNER/NAME[/FOLDER]`, each pinned by a revision.

`encore sources DATASET` prints the revision that a source has now, for dataset_revision in params.yaml.
"""

import argparse
import base64
import csv
import hashlib
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from encore.download import hub, transfer
from encore.download.local_files import hash_files, hash_names_and_contents, list_files
from encore.download.raw_folder import Document, RawFolder, gather_row_groups, read_footer
from encore.download.readers import COMPRESSIONS, PARQUET, read_documents, read_text
from encore.download.retries import TransferError
from encore.errors import EncoreError
from encore.files import check_room, link_or_copy, sha256_of, write_whole
from encore.progress import note
from encore.source_params import SOURCE

GPT2_RANKS_FILE = "r50k_base.tiktoken"
GPT2_RANKS_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

ROW_GROUP_DOCUMENTS = 100  # of a package: its modules are small
RECORD_HASHES = ("sha256", "sha384", "sha512")  # what a wheel may hash its files with


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a source: the column or key that holds text, how many bytes of UTF-8 text, and the order of
    the source's files: by_name, or shuffled by split_seed."""

    text_column: str
    text_bytes: int
    shard_order: str
    split_seed: int


def fetch(dataset: str, revision: str, wanted: Wanted, folder: Path, scratch: Path, first_number: int = 0) -> RawFolder:
    """Fills `folder` with parquet files that hold the text column, in the order of their documents, numbered from
    `first_number` on.

    A package is taken as a whole; of local files and the Hub's, what gives the text that is wanted. Downloads are kept
    in `scratch`. Raises EncoreError where the source is not the one that `revision` pins, cannot be reached or cannot
    be read.
    """
    kind, place = dataset.split(":", 1)
    raw = RawFolder(folder, wanted.text_column, wanted.text_bytes, first_number)
    if kind == "package":
        _fetch_package(place, revision, raw)
    elif kind == "files":
        _fetch_files(place, revision, raw, wanted)
    else:
        _fetch_hub(place, revision, raw, wanted, scratch / "hub")
    if not any(file.documents for file in raw.files):
        raise EncoreError(f"dataset: {dataset} at {revision} holds no documents; name a source that has text")
    return raw


def put_in_order(names: Iterable[str], wanted: Wanted) -> list[str]:
    """The names sorted, or shuffled: by a hash of (seed, name), so that a file's place among the others is its own,
    whatever else the source has."""

    def key(name: str) -> bytes:
        return hashlib.blake2b(f"{wanted.split_seed}:".encode() + os.fsencode(name), digest_size=8).digest()

    by_name = sorted(names)
    return sorted(by_name, key=key) if wanted.shard_order == "shuffled" else by_name


def current_revision(dataset: str) -> str:
    """What dataset_revision must be for the source as it is now."""
    kind, place = dataset.split(":", 1)
    if kind == "package":
        return _distribution(place).version
    if kind == "files":
        return hash_names_and_contents(hash_files(list_files(place)))
    return hub.newest_commit(place)


def fetch_gpt2_ranks(folder: Path, scratch: Path) -> Path:
    """Brings the published ranks of GPT-2's tokenizer into `folder`: from tiktoken's cache, `scratch` or the network.

    Raises EncoreError where they cannot be reached or are not the published ones.
    """
    kept = scratch / "gpt2" / GPT2_RANKS_FILE
    found = [path for path in (_tiktoken_cache(), kept) if path.is_file() and sha256_of(path) == GPT2_RANKS_SHA256]
    if not found:
        write_whole(kept, _download_gpt2_ranks())
    target = folder / GPT2_RANKS_FILE
    shutil.copyfile(found[0] if found else kept, target)
    return target


def _tiktoken_cache() -> Path:
    """Where tiktoken keeps the ranks, once it has fetched them."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or Path(tempfile.gettempdir(), "data-gym-cache")
    return Path(folder, hashlib.sha1(GPT2_RANKS_URL.encode()).hexdigest())


def _download_gpt2_ranks() -> bytes:
    for _ in range(2):
        try:
            ranks = transfer.read(GPT2_RANKS_URL, GPT2_RANKS_FILE)
        except TransferError as error:
            raise EncoreError(
                f"{GPT2_RANKS_FILE}, the gpt2 tokenizer, cannot be downloaded ({error.trouble.reason}); check the "
                "network and run again, or set TIKTOKEN_CACHE_DIR to a folder where tiktoken has kept it"
            ) from None
        if hashlib.sha256(ranks).hexdigest() == GPT2_RANKS_SHA256:
            return ranks
        note(f"{GPT2_RANKS_FILE} arrived with a sha256 that is not the published one")
    raise EncoreError(
        f"{GPT2_RANKS_FILE}: what arrives is not the published file (sha256 differs); run again, or on another network"
    )


# package:NAME


def _fetch_package(name: str, version: str, raw: RawFolder) -> None:
    installed = _distribution(name)
    if installed.version != version:
        raise EncoreError(
            f"dataset_revision: {name} {version} is wanted and {installed.version} is installed; "
            f"`pip install {name}=={version}`, or set dataset_revision to {installed.version}"
        )
    modules = [module for module in _read_modules(installed) if module.text]
    groups = (modules[start : start + ROW_GROUP_DOCUMENTS] for start in range(0, len(modules), ROW_GROUP_DOCUMENTS))
    raw.write(groups, name)
    raw.licence = _read_licence(installed)


def _read_licence(installed: metadata.Distribution) -> str | None:
    """The package's own word on it: an SPDX expression or, from before there were these, the first line of a text."""
    about = installed.metadata
    named = next((about[key] for key in ("License-Expression", "License") if key in about), "")
    return next((line.strip()[:100] for line in named.splitlines() if line.strip()), None)


def _distribution(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise EncoreError(
            f"dataset: package:{name} is not installed; `pip install {name}`, or name one that is"
        ) from None


def _read_modules(installed: metadata.Distribution) -> Iterator[Document]:
    """The .py files in the order of their paths. Raises EncoreError for one that is not as it was installed.

    Scripts, which lie outside the packages' folder, are left out: their first line names this machine's Python.
    """
    # Distribution.files leaves out what is missing, from Python 3.12 on.
    rows = csv.reader((installed.read_text("RECORD") or "").splitlines())
    recorded = {row[0]: row[1] for row in rows if len(row) > 1 and row[0].endswith(".py")}
    way_out = f"`pip install --force-reinstall {installed.name}=={installed.version}`"
    for path in sorted(recorded):
        if ".." in path.split("/"):
            continue
        where = f"package:{installed.name}, {path}"
        try:
            content = Path(str(installed.locate_file(path))).read_bytes()
        except FileNotFoundError:
            raise EncoreError(f"{where} is missing; {way_out}") from None
        algorithm, _, expected = recorded[path].partition("=")
        if algorithm not in RECORD_HASHES:
            raise EncoreError(f"{where} has no hash in the package's RECORD, so it may be anything; {way_out}")
        digest = hashlib.new(algorithm, content).digest()
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != expected:
            raise EncoreError(
                f"{where} is not the file that was installed ({algorithm} differs from RECORD); {way_out}"
            )
        yield read_text(content, installed.name, where)


# files:GLOB


def _fetch_files(pattern: str, revision: str, raw: RawFolder, wanted: Wanted) -> None:
    paths = list_files(pattern)
    hashes = hash_files(paths)
    found = hash_names_and_contents(hashes)
    if found != revision:
        raise EncoreError(
            f"dataset_revision: files:{pattern} is not what was pinned; bring the files back, "
            f"or set dataset_revision to {found}"
        )
    waiting = deque(put_in_order(paths, wanted))
    check_room([(raw.folder, _most_bytes(waiting, paths, raw))], "make room or lower token_cap")
    documents: Iterator[Document] = iter(())
    while waiting and not raw.is_full:
        name = waiting[0]
        if name.endswith(PARQUET):
            waiting.popleft()
            footer = read_footer(paths[name], str(paths[name]), raw.text_column)
            # A copy: DVC would make a hard link, and the user's file with it, read-only.
            raw.take(paths[name], name, footer, hashes[name], shutil.copyfile)
        else:
            documents = _read_texts(waiting, paths, raw.text_column)
            raw.write(raw.until_full(gather_row_groups(documents)), paths[name].name.split(".")[0])
    raw.source_files = len(paths)
    raw.whole_source = not waiting and next(documents, None) is None


def _read_texts(waiting: deque[str], paths: dict[str, Path], key: str) -> Iterator[Document]:
    """The documents of the text files at the head of `waiting`; each leaves it as its turn comes."""
    while waiting and not waiting[0].endswith(PARQUET):
        name = waiting.popleft()
        yield from read_documents(paths[name], name, key, str(paths[name]))


def _most_bytes(names: Iterable[str], paths: dict[str, Path], raw: RawFolder) -> int:
    """What data/raw can take at most: parquet files are copied as they are, and text becomes no larger than it is.

    Compressed text is not counted, since nothing says how large it is.
    """
    copied_bytes = plain_bytes = text_bytes = 0
    for name in names:
        if text_bytes >= raw.wanted_text_bytes:
            break
        file_bytes = paths[name].stat().st_size
        if name.endswith(PARQUET):
            copied_bytes += file_bytes
            text_bytes += read_footer(paths[name], str(paths[name]), raw.text_column).text_bytes
        elif not name.endswith(COMPRESSIONS):
            plain_bytes += file_bytes
            text_bytes += file_bytes if name.endswith(".txt") else 0  # how much of the others is text is not known
    return copied_bytes + min(plain_bytes, raw.wanted_text_bytes)


# hf:OWNER/NAME[/FOLDER]


def _fetch_hub(place: str, commit: str, raw: RawFolder, wanted: Wanted, store: Path) -> None:
    data_set = hub.DataSet(place, commit, store)
    names = put_in_order(data_set.files, wanted)
    raw.licence = data_set.licence
    raw.source_files = len(names)
    if not names[0].endswith(PARQUET):
        _write_hub_texts(data_set, names, raw)
        return
    footers = data_set.fetch_enough(names, raw.text_column, raw.wanted_text_bytes, raw.folder)
    for name, footer in footers.items():
        file = data_set.files[name]
        raw.take(file.path, name, footer, data_set.sha256[file], link_or_copy)
    raw.whole_source = len(footers) == len(names)


def _write_hub_texts(data_set: hub.DataSet, names: list[str], raw: RawFolder) -> None:
    waiting = deque(names)
    documents = _read_hub_texts(data_set, waiting, raw.text_column, raw.wanted_text_bytes)
    raw.write(raw.until_full(gather_row_groups(documents)), PurePosixPath(names[0]).name.split(".")[0])
    raw.whole_source = not waiting and next(documents, None) is None


def _read_hub_texts(data_set: hub.DataSet, waiting: deque[str], key: str, wanted_text_bytes: int) -> Iterator[Document]:
    """The documents of the files at the head of `waiting`; each leaves it as its turn comes. No file is begun behind
    the one that completes the text that is wanted.

    The first file is brought alone. By the text for its size, so many more are brought together as seem to be needed.
    """
    text_bytes = read_bytes = 0
    while waiting and text_bytes < wanted_text_bytes:
        most_bytes = (wanted_text_bytes - text_bytes) * read_bytes / max(text_bytes, 1)
        names = _take_while_within(waiting, data_set, most_bytes)
        data_set.bring(names)
        for name in names:
            if text_bytes >= wanted_text_bytes:
                return
            waiting.popleft()
            file = data_set.files[name]
            for document in read_documents(file.path, name, key, file.what):
                text_bytes += len(document.text)
                yield document
            read_bytes += file.bytes


def _take_while_within(names: Iterable[str], data_set: hub.DataSet, most_bytes: float) -> list[str]:
    """The first of the files that together have at most so many bytes; one at least, FILES_AT_ONCE at most."""
    taken: list[str] = []
    for name in names:
        most_bytes -= data_set.files[name].bytes
        if taken and (most_bytes < 0 or len(taken) == transfer.FILES_AT_ONCE):
            break
        taken.append(name)
    return taken


def main() -> None:
    what = "the revision that a data set has now, for dataset_revision in params.yaml"
    parser = argparse.ArgumentParser("encore sources", description=f"Prints {what}.")
    parser.add_argument("dataset", metavar="DATASET", help="hf:OWNER/NAME, 'files:GLOB' (in quotes) or package:NAME")
    dataset = parser.parse_args().dataset
    if not SOURCE.fullmatch(dataset):
        raise EncoreError(f"{dataset} is no data set; name hf:OWNER/NAME, 'files:GLOB' (in quotes) or package:NAME")
    print(current_revision(dataset))
