"""What a pattern of file names finds. As Python's glob, but that `**` enters each folder once, however many links lead
to it: to follow all would find a file many times, or never end.
"""

import glob
import os
from collections.abc import Iterable
from pathlib import Path


def find(pattern: str) -> tuple[list[Path], list[Path]]:
    """The files that a pattern means, each once, by their names; and the links to files or folders that it means
    already by another name. A name without a link in it is taken before one with, else the first.

    Raises OSError for a folder that cannot be read.
    """
    *parts, last = Path(pattern).parts or ("",)
    if last == "**":
        parts, last = [*parts, last], "*"
    folders = [Path()]
    skipped: list[Path] = []
    for part in parts:
        if part == "**":
            folders = _walk(folders, skipped)
        else:
            folders = [folder / name for folder in folders for name in glob.glob(part, root_dir=folder)]
    paths = [folder / name for folder in folders for name in glob.glob(last, root_dir=folder)]
    by_real_path: dict[str, Path] = {}
    for path in sorted(set(paths), key=lambda path: (_has_link(path, pattern), path)):
        if not os.path.isdir(path) and by_real_path.setdefault(os.path.realpath(path), path) != path:
            skipped.append(path)
    return sorted(by_real_path.values()), sorted(skipped)


def fixed_folder(pattern: str) -> Path:
    """The folder of a pattern's first wildcard, or of the file that it names."""
    folders = Path(pattern).parts[:-1]
    wild = [number for number, part in enumerate(folders) if glob.has_magic(part)]
    return Path(*folders[: wild[0]] if wild else folders)


def _has_link(path: Path, pattern: str) -> bool:
    """Whether a link lies between the pattern's fixed folder and the end of the path."""
    base = fixed_folder(pattern)
    return Path(os.path.realpath(base), path.relative_to(base)) != Path(os.path.realpath(path))


def _walk(tops: Iterable[Path], skipped: list[Path]) -> list[Path]:
    """These folders and all below them whose names do not begin with a dot. Links wait until the rest is known."""
    seen: set[str] = set()
    found: list[Path] = []
    waiting, links = [*tops][::-1], list[Path]()
    while waiting or links:
        folder = (waiting or links).pop()
        real = os.path.realpath(folder)
        if real in seen:
            skipped.append(folder)
            continue
        seen.add(real)
        found.append(folder)
        with os.scandir(folder) as entries:
            below = sorted((Path(folder, entry.name) for entry in entries), reverse=True)
        inner = [path for path in below if path.is_dir() and not path.name.startswith(".")]
        waiting += [path for path in inner if not path.is_symlink()]
        links += [path for path in inner if path.is_symlink()]
    return found
