"""code.py: which edits of a module count, which modules a stage imports, and what happens where they have changed."""

import ast
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import grimp
import pytest

from encore import code
from encore.code import SILENT, check_code, code_sha256, describe_code, essence, find_imported, path_of
from encore.errors import EncoreError
from stages.check import STAGES

SOURCE = '''"""A module."""

import os


class Scale:
    """Of a picture."""

    factor: float = 2.0


def double(x: float) -> float:
    """Twice x.

    Any number will do.
    """
    text = f"{x:.{1 + 1}f} is # no comment"
    return max(x * 2, os.getpid())
'''
# What Python 3.11, 3.12 and 3.13 all make of it.
ESSENCE = """import os
class Scale:
    factor: float = 2.0
def double(x: float) -> float:
    text = f"{x:.{1 + 1}f} is # no comment"
    return max(x * 2, os.getpid())
"""


def essence_of(source: str) -> str:
    return essence(source, ast.parse(source))


def test_the_essence_is_what_is_left_without_words() -> None:
    assert essence_of(SOURCE) == ESSENCE


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A module."""', '"""Another text.\n\nOf two paragraphs.\n"""'),
        ('    """Of a picture."""\n\n', ""),
        ("import os\n", "import os  # why\n# and more\n\n\n\n"),
        ("max(x * 2, os", "max(x * 2,  # the larger\n os"),
        ("    Any number will do.\n", "    Not 3.\n"),
    ],
)
def test_an_edit_of_words_does_not_count(old: str, new: str) -> None:
    assert SOURCE.count(old) == 1
    assert essence_of(SOURCE.replace(old, new)) == ESSENCE


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x * 2", "x * 3"),
        ("is # no", "is no"),
        ("2.0\n", '2.0\n    """\n\n    no docstring"""\n'),
        ("    return", "return"),
        ("import os", "import os, sys"),
        ('"""Twice x.', 'x += 1; """Twice x.'),
    ],
)
def test_any_other_edit_counts(old: str, new: str) -> None:
    assert SOURCE.count(old) == 1
    assert essence_of(SOURCE.replace(old, new)) != ESSENCE


def test_blank_lines_and_comments_within_a_string_count() -> None:
    texts = ['X = """a\n\nb"""\n', 'X = """a\nb"""\n', 'X = """a\n# c\nb"""\n', 'X = """a\n \nb"""\n']
    assert [essence_of(text) for text in texts] == texts


def test_a_line_ends_where_python_ends_it() -> None:
    """str.splitlines would split at these as well, and blank the wrong rows."""
    source = 'X = "a\x0cb\u2028c\x85"\n\x0c\n# a comment\nY = 1\n'
    assert essence_of(source) == 'X = "a\x0cb\u2028c\x85"\nY = 1\n'


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """The imports between all our modules, as import-linter's library finds them."""
    return grimp.build_graph("encore", "stages", cache_dir=None)


@pytest.mark.parametrize("stage", STAGES)
def test_all_that_a_stage_imports_is_found(graph: grimp.ImportGraph, stage: str) -> None:
    expected, waiting = set[str](), [f"stages.{stage}"]
    while waiting:
        name = waiting.pop()
        if name not in expected | SILENT:
            expected.add(name)
            waiting += graph.find_modules_directly_imported_by(name)
    assert find_imported(f"stages.{stage}") == expected


# What writes samples during training: imported where they are asked for, and in no result of training.
FOR_SAMPLES = {"encore.evaluation.generate", "encore.tokens.tokenizer"}


@pytest.mark.parametrize("stage", STAGES)
def test_what_silent_modules_import_the_stage_has_itself(graph: grimp.ImportGraph, stage: str) -> None:
    assert all(path_of(name).exists() for name in SILENT)
    followed = find_imported(f"stages.{stage}")
    used = set.union(*(graph.find_modules_directly_imported_by(name) for name in followed)) & SILENT
    assert len(used) > 2
    imported = set.union(*(graph.find_modules_directly_imported_by(name) for name in used))
    assert imported - SILENT - FOR_SAMPLES <= followed


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """stages.train, which imports a module of encore in a function, and that one the stage again."""
    files = {
        "stages/__init__.py": "",
        "stages/train.py": "import os\n\n\ndef main():\n    from encore import model\n",
        "encore/__init__.py": "",
        "encore/model.py": "import encore.errors\nimport stages.train\n",
        "encore/other.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(code, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    """A process reads its code once."""
    for function in (code._imports_of, code._parse, code._essence_sha256, code_sha256):
        function.cache_clear()


def test_code_is_described_by_a_line_for_each_module(tree: Path) -> None:
    paths = ["encore/model.py", "stages/train.py"]
    texts = [(tree / path).read_text().replace("\n\n\n", "\n") for path in paths]
    lines = [f"{sha256(text.encode()).hexdigest()} {path}\n" for text, path in zip(texts, paths, strict=True)]
    assert describe_code("stages.train") == "".join(lines)
    assert code_sha256("stages.train") == sha256("".join(lines).encode()).hexdigest()


def test_a_stage_that_dvc_runs_notices_that_its_code_has_changed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_code("train")  # nothing is known
    (tree / "data/code").mkdir(parents=True)
    (tree / "data/code/train.txt").write_text(describe_code("stages.train"))
    monkeypatch.setenv("DVC_STAGE", "train")
    check_code("train")

    (tree / "encore/model.py").write_text("import encore.other\n")
    forget()
    message = r"^encore/model\.py, encore/other\.py: changed since `dvc repro` looked; run `dvc repro` again$"
    with pytest.raises(EncoreError, match=message):
        check_code("train")
    monkeypatch.delenv("DVC_STAGE")
    check_code("train")  # run by hand, it records nothing
