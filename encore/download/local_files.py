"""The files of `files:GLOB`: which they are, and the hash that pins them."""

import glob
import hashlib
import os
from pathlib import Path

from encore.download.patterns import find, fixed_folder
from encore.download.readers import COMPRESSIBLE, PARQUET, ending_of
from encore.errors import EncoreError
from encore.files import sha256_of
from encore.progress import note
from encore.threads import Threads

HASHES_AT_ONCE = 8


def list_files(pattern: str) -> dict[str, Path]:
    """The files that a pattern means, in the order of their names: their paths from its first wildcard's folder on.

    So that names, order and hash are the same wherever the folder lies. A file to which links lead is there once, with
    a note. Raises EncoreError where there are none, and for one that holds no text that we know to read.
    """
    base = fixed_folder(pattern)
    found, skipped = find(pattern)
    if "[" in pattern and os.path.exists(pattern) and Path(pattern) not in found:
        raise EncoreError(
            f"dataset: files:{pattern} is there, and as a pattern means other names, since [ begins a choice of signs; "
            f"write files:{glob.escape(pattern)}"
        )
    if not found:
        brackets = "; for a [ in a name write [[]" if "[" in pattern else ""
        raise EncoreError(
            f"dataset: files:{pattern} finds no files in {base}; correct the pattern (** goes into folders){brackets}"
        )
    if skipped:
        links = "1 link leads" if len(skipped) == 1 else f"{len(skipped)} links lead"
        note(f"files:{pattern}: {links} to what is found already and is taken once, as {skipped[0]}")
    paths = dict(sorted((path.relative_to(base).as_posix(), path) for path in found))
    for path in paths.values():
        if not path.name.endswith(PARQUET) and not ending_of(path.name):
            raise EncoreError(
                f"dataset: files:{pattern} finds {path}, which is none of {', '.join(COMPRESSIBLE)} (or .gz, .zst of "
                "them), .arrow and .parquet; narrow the pattern"
            )
        if not path.is_file():
            raise EncoreError(f"dataset: files:{pattern} finds {path}, which is a link to nothing; mend or remove it")
    return paths


def hash_files(paths: dict[str, Path]) -> dict[str, str]:
    """The sha256 of each file, by its name."""
    with Threads(HASHES_AT_ONCE) as threads:
        return dict(zip(paths, threads.map(sha256_of, paths.values()), strict=True))


def hash_names_and_contents(hashes: dict[str, str]) -> str:
    """sha256 over the lines of `sha256sum NAME...` run in the pattern's folder: names and contents, in order."""
    digest = hashlib.sha256()
    for name, sha256 in hashes.items():
        digest.update(sha256.encode() + b"  " + os.fsencode(name) + b"\n")
    return digest.hexdigest()
