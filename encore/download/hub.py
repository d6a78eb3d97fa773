"""What a data set on the Hugging Face Hub has at a pinned commit, and which of its files give the text that is wanted.

What was fetched stays in a store outside DVC's outputs: complete files under their own names, checked before each
use, and partial ones beside them, continued where they ended. huggingface_hub lists the files; transfer.py says why it
does not fetch them.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import pyarrow as pa

from encore.download import transfer
from encore.download.raw_folder import BrokenParquet, Footer, check_footer_size, read_footer
from encore.download.retries import TransferError, Trouble, persist
from encore.download.training_files import choose
from encore.download.transfer import RemoteFile
from encore.errors import EncoreError
from encore.files import can_link, check_room
from encore.progress import Progress
from encore.threads import Threads

FOOTERS_AT_ONCE = 8
LISTING_SECONDS = 300.0
TAIL_BYTES = 65_536  # holds most footers; a longer one is asked for again, as a whole


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub lists it. sha256: of its bytes, None for a small one that is kept in git and not in LFS.
    git_id: the git blob's id."""

    path: PurePosixPath
    sha256: str | None
    git_id: str
    bytes: int


@dataclass(frozen=True)
class Listing:
    """What a repository has at a commit. licence: as its card names it, None where that is silent."""

    commit: str
    files: list[HubFile]
    licence: str | None


def newest_commit(place: str) -> str:
    """The commit, 40 hex digits, that the data set OWNER/NAME[/FOLDER] has now."""
    repository, _ = _split(place)
    return _list(repository, None).commit


def fetch_model(repository: str, commit: str, names: list[str], store: Path) -> list[Path]:
    """Files of a model at a commit, brought into `store`/OWNER--NAME/COMMIT unless they are there, and checked.

    Raises EncoreError where the Hub cannot be reached or lacks one.
    """
    listed = _list(repository, commit, "model").files
    folder = store / repository.replace("/", "--") / commit
    found = {str(file.path): file for file in listed}
    for name in names:
        if name not in found:
            raise EncoreError(f"hf:{repository} at {commit} has no {name}; name other weights")
    files = [_remote(repository, commit, found[name], folder, "model") for name in names]
    folder.mkdir(parents=True, exist_ok=True)
    known = {file: sha256 for file in files if (sha256 := transfer.find_whole(file))}
    missing_bytes = sum(file.bytes - file.partial_bytes for file in files if file not in known)
    check_room([(folder, missing_bytes)], "make room, or set ENCORE_SCRATCH to a folder on a larger disk")
    with _failing_plainly():
        transfer.bring(files, _build_headers(), known)
    return [file.path for file in files]


class DataSet:
    """The training files of OWNER/NAME[/FOLDER] at a commit. files: by their names in the data set, in that order.
    licence: the text's, where the Hub says one.

    They are kept in `store`/OWNER--NAME/COMMIT. Making one asks the Hub for its list; all raise EncoreError where there
    is nothing to choose or to reach.
    """

    def __init__(self, place: str, commit: str, store: Path) -> None:
        repository, folder = _split(place)
        listing = _list(repository, commit)
        self.licence = listing.licence
        self.headers = _build_headers()
        self.store = store / repository.replace("/", "--") / commit
        listed = {file.path: file for file in listing.files}
        self.files = {
            str(path): _remote(repository, commit, listed[path], self.store, "dataset")
            for path in choose(list(listed), repository, folder)
        }
        self.sha256: dict[RemoteFile, str] = {}  # of those that are known to be whole in the store

    def fetch_enough(
        self, names: list[str], text_column: str, wanted_text_bytes: int, target: Path
    ) -> dict[str, Footer]:
        """Brings the first of the files named that together hold `wanted_text_bytes`, or all, into the store.

        Returns their names and footers. target: the folder that will have them as links, or else as copies.
        """
        while True:
            footers = self._choose_enough(names, text_column, wanted_text_bytes)
            self._check_room(list(footers), target)
            self._bring(list(footers))
            arrived = {name: self._read_kept_footer(name, text_column) for name in footers}
            if footers == arrived:
                return footers
            # A footer that was read alone was a damaged one. Those of whole files are checked, so choose by them.

    def bring(self, names: list[str]) -> None:
        """Brings these files into the store, whatever their format."""
        self._check_room(names)
        self._bring(names)

    def _choose_enough(self, names: list[str], text_column: str, wanted_text_bytes: int) -> dict[str, Footer]:
        """The shortest run of the files that holds enough text, known by footers: a few are asked for ahead."""
        footers: dict[str, Footer] = {}
        text_bytes = 0
        with (
            Progress("choose", wanted_text_bytes, "bytes of text") as progress,
            Threads(FOOTERS_AT_ONCE) as threads,
            _failing_plainly(),
        ):
            read = partial(self._read_footer, text_column=text_column, stopping=threads.stopping)
            for name, footer in zip(names, threads.map(read, names), strict=False):
                if footer is None:
                    self._check_room([name])
                    self._bring([name])
                    footer = self._read_kept_footer(name, text_column)
                footers[name] = footer
                text_bytes += footer.text_bytes
                progress.add(footer.text_bytes)
                if text_bytes >= wanted_text_bytes:
                    break
        return footers

    def _read_footer(self, name: str, text_column: str, stopping: threading.Event) -> Footer | None:
        """A file's footer, without its text; None where only the whole file can tell."""
        file = self.files[name]
        if self._is_kept(file):
            return self._read_kept_footer(name, text_column)
        tail = transfer.read_tail(file, min(TAIL_BYTES, file.bytes), self.headers, stopping)
        try:
            footer_bytes = check_footer_size(tail[-8:], file.what) + 8 if tail else 0
            if tail and len(tail) < footer_bytes <= file.bytes:
                tail = transfer.read_tail(file, footer_bytes, self.headers, stopping)
            return read_footer(pa.BufferReader(tail), file.what, text_column) if tail else None
        except BrokenParquet:  # by the way here perhaps: nothing has checked these bytes
            return None

    def _is_kept(self, file: RemoteFile) -> bool:
        """Whether the store has the whole file. It is hashed once for that."""
        if file not in self.sha256 and (sha256 := transfer.find_whole(file)):
            self.sha256[file] = sha256
        return file in self.sha256

    def _read_kept_footer(self, name: str, text_column: str) -> Footer:
        file = self.files[name]
        return read_footer(file.path, file.what, text_column)

    def _check_room(self, names: list[str], target: Path | None = None) -> None:
        """target: the folder that will have the files as links or copies, where there is one."""
        files = [self.files[name] for name in names]
        self.store.mkdir(parents=True, exist_ok=True)
        missing_bytes = sum(file.bytes - file.partial_bytes for file in files if not self._is_kept(file))
        writes = [(self.store, missing_bytes)]
        if target and not can_link(self.store, target):
            writes.append((target, sum(file.bytes for file in files)))
        check_room(writes, "make room, set ENCORE_SCRATCH to a folder on a larger disk, or lower token_cap")

    def _bring(self, names: list[str]) -> None:
        files = [self.files[name] for name in names]
        if any(file not in self.sha256 for file in files):
            with _failing_plainly():
                self.sha256.update(zip(files, transfer.bring(files, self.headers, self.sha256), strict=True))


def _split(place: str) -> tuple[str, PurePosixPath]:
    owner, name, *folder = place.split("/")
    return f"{owner}/{name}", PurePosixPath(*folder)


def _build_headers() -> dict[str, str]:
    """What every request to the Hub carries, the token too. Raises EncoreError where no header can carry that."""
    from huggingface_hub.utils import build_hf_headers

    headers: dict[str, str] = build_hf_headers()
    if not all(value.isascii() and value.isprintable() for value in headers.values()):
        raise EncoreError("HF_TOKEN, or the token of `hf auth login`, holds signs that no token has; copy it anew")
    return headers


def _remote(repository: str, commit: str, file: HubFile, store: Path, kind: str) -> RemoteFile:
    from huggingface_hub import hf_hub_url

    return RemoteFile(
        f"hf:{repository} at {commit}, file {file.path}",
        hf_hub_url(repository, str(file.path), repo_type=kind, revision=commit),
        store / file.path,
        file.bytes,
        file.sha256,
        file.git_id,
    )


def _list(repository: str, commit: str | None, kind: str = "dataset") -> Listing:
    """What a data set or model has at a commit, the newest one for None. kind: dataset or model."""
    from huggingface_hub import HfApi

    def ask() -> Listing:
        info = HfApi().model_info if kind == "model" else HfApi().dataset_info
        listing = info(repository, revision=commit, files_metadata=True, timeout=transfer.TIMEOUT_SECONDS)
        files = [
            HubFile(
                PurePosixPath(file.rfilename), file.lfs.sha256 if file.lfs else None, file.blob_id or "", file.size or 0
            )
            for file in listing.siblings or []
        ]
        licence = listing.card_data.get("license") if listing.card_data else None
        return Listing(listing.sha or "", files, ", ".join(licence) if isinstance(licence, list) else licence)

    _build_headers()  # a token that no header can carry would show in the error of the request
    what = f"hf:{repository}" + (f" at {commit}" if commit else "")
    with _failing_plainly():
        try:
            found = persist(what, partial(_in_time, ask), threading.Event())
        except (KeyError, TypeError, ValueError) as error:
            raise EncoreError(
                f"hf:{repository}: what answers is no Hub ({type(error).__name__}); check the spelling, HF_ENDPOINT "
                "and whether this network wants a log-in"
            ) from None
    if not found.commit or commit not in (None, found.commit):
        raise EncoreError(
            f"{what}: the Hub answers with another commit ({found.commit[:40] or 'none'}); check HF_ENDPOINT and run "
            "again, and where that does not help, pin the commit that it has"
        )
    if any(file.path.is_absolute() or ".." in file.path.parts for file in found.files):
        raise EncoreError(f"hf:{repository} lists a file outside its own folder; do not use it")
    return found


def _in_time(ask: Callable[[], Listing]) -> Listing | Trouble:
    """huggingface_hub waits for as long as a byte comes now and then."""
    with Threads(1) as threads:
        try:
            return threads.call(ask, LISTING_SECONDS)
        except TimeoutError:
            return Trouble(f"its list of files has not arrived within {LISTING_SECONDS:.0f} seconds", again=False)


@contextmanager
def _failing_plainly() -> Iterator[None]:
    """Turns what can go wrong on the way to the Hub into a sentence."""
    try:
        yield
    except TransferError as error:
        raise EncoreError(_sentence(error.what, error.trouble)) from None


def _sentence(what: str, trouble: Trouble) -> str:
    status = trouble.status
    if status in (401, 403):
        return (
            f"{what}: the Hub refuses it ({status}), so it is misspelt, private or gated; check the spelling, accept "
            "the terms on its page, and set HF_TOKEN or run `hf auth login`"
        )
    if status == 404:
        return f"{what}: the Hub has no such thing (404); check the spelling of dataset, dataset_revision or init_from"
    if status:
        return f"{what}: the Hub answers with an error ({status}); run again later; what is on the disk already is kept"
    return (
        f"{what}: the connection to the Hub fails ({trouble.reason}); check the network, proxies and HF_ENDPOINT and "
        "run again; what is on the disk already is kept"
    )
