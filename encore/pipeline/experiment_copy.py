"""The copy of the repository in which `dvc exp run --temp` and `--queue` work: it has what git tracks, and no more."""

import glob
from pathlib import Path

from encore.download.patterns import find
from encore.errors import EncoreError
from encore.pretrained.init_from import CONFIG, WEIGHTS

PLACE = (".dvc", "tmp", "exps")


def check_copied(dataset: str = "", init_from: str = "") -> None:
    """Raises EncoreError where a local file that the two keys name is in the repository and not in its copy."""
    original = _find_original(Path.cwd())
    if original is None:
        return
    kind, _, files = dataset.partition(":")
    if kind == "files":
        _check(original, [files], f"dataset=files:{original / files}")
    if "/" in init_from:
        _check(
            original,
            [f"{glob.escape(init_from)}/{name}" for name in (CONFIG, WEIGHTS)],
            f"init_from={original / init_from}",
        )


def _find_original(folder: Path) -> Path | None:
    parts = folder.parts
    places = [i for i in range(len(parts)) if parts[i : i + len(PLACE)] == PLACE]
    return Path(*parts[: places[-1]]) if places else None


def _check(original: Path, patterns: list[str], setting: str) -> None:
    inside = [Path(glob.escape(str(original)), pattern) for pattern in patterns if not Path(pattern).is_absolute()]
    names = [path.relative_to(original) for pattern in inside for path in find(str(pattern))[0]]
    if missing := sorted(name for name in names if not name.exists()):
        raise EncoreError(
            f"{missing[0]} is not in this copy of the repository, in which `dvc exp run` with --temp or --queue works: "
            f"git does not track it; `git add` it, or name it where it is: -S '{setting}'"
        )
