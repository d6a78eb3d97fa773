"""Reads all that lies here and has a hash: data, tokens, model, metrics, checkpoints and DVC's cache.

Prints what is whole and what is broken, and how it comes back. The exit code is 1 where anything is broken.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from encore.errors import EncoreError
from encore.json_files import parse_json, parse_yaml, read_sealed
from encore.pretrained.init_from import RECORD, read_record
from encore.progress import Progress
from encore.schemas import CacheEntry, CheckpointState, InitManifest, LockedFile, Lockfile, TasksManifest
from encore.scratch import scratch_folder
from encore.threads import Threads
from encore.tokens.documents import list_files, read_raw_manifest
from encore.tokens.token_files import token_hashes

MANIFEST = "manifest.json"
COMMITTED = (".json", ".tsv")  # metrics and curves, which git has and DVC's cache has not


@dataclass(frozen=True)
class Expected:
    """A file and the hash that it must have, by the algorithm of that name. output: the path of the stage's output that
    it belongs to, None for what is none."""

    path: Path
    algorithm: str
    digest: str
    output: str | None = None


@dataclass
class Group:
    """Files that belong together. problem: why nothing can be said of them, "" where that is not so; then output: as in
    Expected. broken: those that are missing or have other bytes."""

    name: str
    files: list[Expected]
    problem: str = ""
    output: str | None = None
    broken: list[Expected] = field(default_factory=list)


def main() -> None:
    lock = read_lock()
    stages = {out["path"]: name for name, outs in lock.items() for out in outs}
    groups = [group for group in list_groups(lock) if group.files or group.problem]
    cache = list_cache(lock)
    read_all([*groups, cache])
    for name, state in [row for group in [*groups, cache] for row in describe(group)]:
        print(f"{name:<{max(len(group.name) for group in [*groups, cache])}}  {state}")
    if ways_out := list_ways_out(groups, cache, stages):
        raise EncoreError("\n  ".join(["not all is as it was written. The way out:", *ways_out]))


def list_groups(lock: dict[str, list[LockedFile]]) -> Iterator[Group]:
    """Everything but the cache."""
    folders: dict[str, Callable[[Path], dict[str, str]]] = {
        "data/raw": list_raw,
        "data/init": lambda folder: read_sealed(folder / MANIFEST, InitManifest)["files"],
        "data/tasks": lambda folder: read_sealed(folder / MANIFEST, TasksManifest)["files"],
        "data/tokens": lambda folder: {path.name: sha256 for path, sha256 in token_hashes(folder).items()},
        "model": list_model,
    }
    for name, list_hashes in folders.items():
        yield group_of(Path(name), list_hashes, output=name)
    found = [(out["path"], str(out.get("md5") or "")) for outs in lock.values() for out in outs]
    single = [Expected(Path(path), "md5", md5, path) for path, md5 in found if md5 and Path(path).is_file()]
    yield Group("metrics and log", single)
    for path in sorted(scratch_folder().glob("checkpoints/*/iter-*")):
        yield group_of(path, lambda folder: read_sealed(folder / "state.json", CheckpointState)["sha256"], output=None)


def group_of(folder: Path, list_hashes: Callable[[Path], dict[str, str]], output: str | None) -> Group:
    """The files of a folder, none where it is not here. list_hashes: their sha256 by their names."""
    if not folder.is_dir():
        return Group(str(folder), [], output=output)
    try:
        hashes = list_hashes(folder)
    except EncoreError as error:
        return Group(str(folder), [], str(error).split("; ")[0], output)
    return Group(str(folder), [Expected(folder / name, "sha256", sha256, output) for name, sha256 in hashes.items()])


def list_raw(folder: Path) -> dict[str, str]:
    return {file["name"]: file["sha256"] for file in list_files(read_raw_manifest(folder))}


def list_model(folder: Path) -> dict[str, str]:
    record = read_record(folder)
    if record is None:
        raise EncoreError(f"{folder / RECORD} is missing")
    return record.get("files_sha256", {})


def list_cache(lock: dict[str, list[LockedFile]]) -> Group:
    """The objects of DVC's cache, each of which is named by its md5."""
    done = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], capture_output=True, text=True)
    folder = Path(os.path.relpath(done.stdout.strip() or ".dvc/cache"), "files", "md5")
    objects = {path.parent.name + path.name: path for path in sorted(folder.glob("??/*")) if path.is_file()}
    users = {}
    for out in (out for outs in lock.values() for out in outs):
        md5 = str(out.get("md5") or "")
        users[md5] = out["path"]
        if md5.endswith(".dir") and md5 in objects:
            with suppress(EncoreError):  # it is found to be broken itself
                entries = parse_json(objects[md5].read_bytes(), list[CacheEntry], str(objects[md5]))
                users |= {entry["md5"]: out["path"] for entry in entries}
    files = [Expected(path, "md5", digest, users.get(digest)) for digest, path in objects.items()]
    return Group(str(folder.parent.parent), files)


def read_lock() -> dict[str, list[LockedFile]]:
    """The outputs of each stage in dvc.lock; none where there is no such file."""
    path = Path("dvc.lock")
    if not path.exists():
        return {}
    stages = parse_yaml(path.read_bytes(), Lockfile, "dvc.lock", "`encore mend` mends it").get("stages", {})
    return {name: stage.get("outs", []) for name, stage in stages.items()}


def read_all(groups: list[Group]) -> None:
    """Hashes every file, and notes in its group what is broken."""
    files = [file for group in groups for file in group.files]
    sizes = [file.path.stat().st_size if file.path.is_file() else 0 for file in files]
    with Progress("verify", sum(sizes), "bytes") as progress, Threads(os.cpu_count() or 1) as threads:
        whole = {}
        for file, size_bytes, right in zip(files, sizes, threads.map(is_whole, files), strict=True):
            whole[file] = right
            progress.add(size_bytes)
    for group in groups:
        group.broken = [file for file in group.files if not whole[file]]


def is_whole(file: Expected) -> bool:
    """Whether the file is there and has its hash."""
    if not file.path.is_file():
        return False
    with file.path.open("rb") as opened:
        return hashlib.file_digest(opened, file.algorithm).hexdigest() == file.digest.removesuffix(".dir")


def describe(group: Group) -> list[tuple[str, str]]:
    """A line about a whole group, or one for each file that is broken."""
    if group.problem:
        return [(group.name, f"BROKEN: {group.problem}")]
    if not group.broken:
        size_bytes = sum(file.path.stat().st_size for file in group.files)
        count = "1 file" if len(group.files) == 1 else f"{len(group.files):,} files"
        return [(group.name, f"whole: {count}, {size_bytes:,} bytes")]
    lines = []
    for file in group.broken:
        of_output = f", of {file.output}," if file.output and not file.path.is_relative_to(file.output) else ""
        what = "has other bytes" if file.path.is_file() else "is missing"
        lines.append((group.name, f"BROKEN: {file.path}{of_output} {what}"))
    return lines


def list_ways_out(groups: list[Group], cache: Group, stages: dict[str, str]) -> list[str]:
    """What to do about each output that is broken, here or in the cache, and about the rest. A broken object must go
    first: DVC takes it for whole."""
    objects: dict[str | None, list[str]] = {}
    for file in cache.broken:
        objects.setdefault(file.output, []).append(str(file.path))
    broken = [group for group in groups if group.broken or group.problem]
    outputs = [output for group in broken for output in [group.output, *(file.output for file in group.broken)]]
    lines = []
    for output in dict.fromkeys(output for output in [*outputs, *objects] if output):
        again = f"dvc repro -s -f {stages.get(output, '')}"
        if output in objects:
            lines.append(
                f"{output}: rm -f {' '.join(objects[output])}; then {again}, or dvc pull where a remote has it"
            )
        elif output.endswith(COMMITTED):
            lines.append(f"{output}: git restore {output}, or {again}")
        else:
            lines.append(f"{output}: dvc checkout --force {output}, or {again}")
    if None in objects:
        lines.append(f"of other runs: rm -f {' '.join(objects[None])}; what needs them makes them anew")
    scratch = [group.name for group in broken if not any([group.output, *(file.output for file in group.broken)])]
    return [*lines, *(f"{name}: rm -r {name}; a run goes on from the checkpoint before" for name in scratch)]
