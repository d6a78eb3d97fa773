"""Which files of a data set on the Hub hold the text to train on, known by their names alone."""

import re
from collections import defaultdict
from pathlib import PurePosixPath

from encore.download.readers import ARROW, PARQUET, SEPARATORS, ending_of
from encore.errors import EncoreError

# As `datasets` knows the splits of a data set, and the files that hold none.
TRAIN = {"train", "training"}
OTHER_SPLITS = {"validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}
NO_TEXT = {"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
NO_TEXT |= {"LICENSE.txt", "requirements.txt"}
KINDS = {".txt": "text", **dict.fromkeys(SEPARATORS, "CSV"), ARROW: "Arrow"}  # all other endings are JSON's
FOLDERS_NAMED = 10


def choose(paths: list[PurePosixPath], repository: str, folder: PurePosixPath) -> list[PurePosixPath]:
    """The training files under `folder` in the order of their names: of parquet or, where there is none, of one of the
    formats that local files may have.

    Of parquet, those that are named train or lie in a folder named train; all, if none do. Of the others, those whose
    names have the word train as well; all but those of other splits, if none do. Raises EncoreError where there are
    none, and where they are of several kinds or lie in several folders, as several configurations do: to mix them must
    be a choice.
    """
    within = [path for path in paths if path.is_relative_to(folder)]
    parquet = [path for path in within if path.suffix == PARQUET]
    others = [path for path in within if _may_hold_text(path)]
    where = "" if folder == PurePosixPath() else f" under {folder}"
    if not parquet + others:
        raise EncoreError(
            f"dataset: hf:{repository} has no files of text (parquet, JSON, CSV, Arrow or .txt){where}; correct the "
            "folder, or set dataset_revision to the commit of the branch refs/convert/parquet, where the Hub keeps "
            "parquet copies of most data sets"
        )
    if parquet:
        chosen = [path for path in parquet if _is_named_train(path)] or parquet
    else:
        chosen = _choose_others(others, folder)
    if not chosen:
        raise EncoreError(
            f"dataset: hf:{repository} has only files of other splits{where}, such as {min(others)}; name another data "
            "set or folder, or copy the files that you mean and name them as files:"
        )
    if not parquet:
        _check_kinds(chosen, repository)
        _check_once(chosen, repository)
    _check_folders(chosen, repository)
    return sorted(chosen, key=str)


def _may_hold_text(path: PurePosixPath) -> bool:
    """Whether a file that is no parquet can be read, and its name or folder is none that `datasets` passes by."""
    hidden = any(part.startswith((".", "__")) for part in path.parts)
    return ending_of(path.name) is not None and path.name not in NO_TEXT and not hidden


def _is_named_train(path: PurePosixPath) -> bool:
    return path.name.startswith("train") or "train" in path.parent.parts


def _choose_others(paths: list[PurePosixPath], folder: PurePosixPath) -> list[PurePosixPath]:
    train = [path for path in paths if _is_named_train(path) or _words(path.name) & TRAIN]
    return train or [path for path in paths if not _words(str(path.relative_to(folder))) & OTHER_SPLITS]


def _words(name: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]+", name.lower()))


def _check_kinds(chosen: list[PurePosixPath], repository: str) -> None:
    folders: dict[str, set[str]] = defaultdict(set)
    for path in chosen:
        folders[_kind_of(path)].add(str(path.parent))
    if len(folders) > 1:
        found = ", ".join(f"{kind} in {min(folders[kind])}" for kind in sorted(folders))
        raise EncoreError(
            f"dataset: hf:{repository} has training files of several kinds ({found}); name the folder that you mean, "
            f"as in hf:{repository}/FOLDER, or copy the files that you mean and name them as files:"
        )


def _kind_of(path: PurePosixPath) -> str:
    return KINDS.get(str(ending_of(path.name)), "JSON")


def _check_once(chosen: list[PurePosixPath], repository: str) -> None:
    """Raises EncoreError where a file is there in two forms: a document could be in both splits then."""
    by_stem: dict[str, str] = {}
    for path in map(str, chosen):
        stem = path.rpartition(str(ending_of(path)))[0]
        if stem in by_stem:
            raise EncoreError(
                f"dataset: hf:{repository} has {by_stem[stem]} and {path}, which may be the same text; copy the files "
                "that you mean and name them as files:"
            )
        by_stem[stem] = path


def _check_folders(chosen: list[PurePosixPath], repository: str) -> None:
    folders = sorted({str(path.parent) for path in chosen})
    if len(folders) > 1:
        more = f" and {len(folders) - FOLDERS_NAMED} more" if len(folders) > FOLDERS_NAMED else ""
        raise EncoreError(
            f"dataset: hf:{repository} has training files in {', '.join(folders[:FOLDERS_NAMED])}{more}; name the one "
            f"that you mean, for instance hf:{repository}/{folders[-1]}"
        )
