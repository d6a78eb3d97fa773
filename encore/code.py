"""Which code a result depends on: every module of ours that a module imports, with a hash of what it says to Python.

Comments, docstrings, blank lines and line breaks within brackets are left out of the hash. An edit of these alone makes
no stage run again and stops no training from resuming; any other edit of a module does.

The stage `check` writes the hashes to data/code, and dvc.yaml makes them a dependency of each stage. The kept parts of
the corpus and the checkpoints carry them as well.
"""

import ast
import hashlib
import io
import os
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from encore.errors import EncoreError

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("encore", "stages")
FOLDER = Path("data/code")
# Not followed, since no result is made of them: error messages, progress bars, the history, the scratch folder, wandb,
# TensorBoard, samples, the best model's folder, snapshots of the memory. Nor the schema of params.yaml: dvc.yaml tracks
# each value that a stage gets. So a better message reruns no training.
SILENT = {
    "encore.errors",
    "encore.notify",
    "encore.params",
    "encore.pipeline.stage_history",
    "encore.progress",
    "encore.scratch",
    "encore.source_params",
    "encore.streams",
    "encore.system_errors",
    "encore.training.best_model",
    "encore.training.memory_snapshot",
    "encore.training.samples",
    "encore.training.tensorboard",
    "encore.training.wandb_evaluation",
    "encore.training.wandb_run",
}


def check_code(stage: str) -> None:
    """Raises EncoreError where dvc runs `stage` and its code is no longer what the stage check has seen.

    DVC would record the result as that of the older code.
    """
    path = FOLDER / f"{stage}.txt"
    if os.environ.get("DVC_STAGE") != stage or not path.exists():
        return
    seen, now = (set(text.splitlines()) for text in (path.read_text(), describe_code(f"stages.{stage}")))
    if changed := sorted({line.split()[1] for line in seen ^ now}):
        raise EncoreError(f"{', '.join(changed)}: changed since `dvc repro` looked; run `dvc repro` again")


@cache
def code_sha256(module: str) -> str:
    """One hash for `module` and all that it imports."""
    return hashlib.sha256(describe_code(module).encode()).hexdigest()


def describe_code(module: str) -> str:
    """Lines of `SHA256 PATH`, sorted by path, for `module` and all modules of ours that it imports, or these import."""
    paths = sorted(path_of(name) for name in find_imported(module))
    return "".join(f"{_essence_sha256(path)} {path.relative_to(ROOT).as_posix()}\n" for path in paths)


def find_imported(module: str) -> set[str]:
    """`module` and all modules of ours that it imports, directly or not, also within functions; none of SILENT."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found | SILENT:
            found.add(name)
            waiting += _imports_of(path_of(name))
    return found


def path_of(module: str) -> Path:
    """The file of a module of ours."""
    folder = ROOT / module.replace(".", "/")
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


@cache
def _imports_of(path: Path) -> list[str]:
    names = []
    for node in _statements(_parse(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                names.append(name if _is_ours(name) and path_of(name).exists() else node.module)
    return [name for name in names if _is_ours(name)]


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """All statements below a node. Expressions, of which there are far more, are not entered."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _statements(child)


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in PACKAGES


@cache
def _essence_sha256(path: Path) -> str:
    return hashlib.sha256(essence(path.read_text(encoding="utf-8"), _parse(path)).encode()).hexdigest()


def essence(source: str, tree: ast.Module) -> str:
    """The source without comments, docstrings, blank lines and line breaks within brackets: the same text under every
    Python, which a syntax tree is not."""
    lines = io.StringIO(source).readlines()  # as tokenize counts them; splitlines would also split at a form feed
    docstrings = _docstring_starts(tree)
    kept = [list(line) for line in lines]
    ends_docstring = False
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = token.type == tokenize.STRING and token.start in docstrings
        ends_line = token.type == tokenize.NEWLINE and ends_docstring
        if is_docstring or ends_line or token.type in (tokenize.COMMENT, tokenize.NL):
            _blank(kept, lines, token.start, token.end)
        ends_docstring = is_docstring and not lines[token.start[0] - 1][: token.start[1]].strip()
    return "".join("".join(line) for line in kept)


def _blank(kept: list[list[str]], lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> None:
    """Empties the characters from start to end, (row, column) each, and the blanks before them."""
    first, column = start[0] - 1, start[1]
    column = len(lines[first][:column].rstrip())
    for row in range(first, min(end[0], len(lines))):
        stop = end[1] if row == end[0] - 1 else len(kept[row])
        for place in range(column, min(stop, len(kept[row]))):
            kept[row][place] = ""
        column = 0


def _docstring_starts(tree: ast.Module) -> set[tuple[int, int]]:
    """(row, column) of each docstring."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    firsts = [node.body[0] for node in (tree, *_statements(tree)) if isinstance(node, owners) and node.body]
    return {(first.lineno, first.col_offset) for first in firsts if _is_text(first)}


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
