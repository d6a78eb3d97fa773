"""encore/pipeline/experiment_copy.py: what git does not track is missing in a copy of DVC's, and is told of."""

import re
from pathlib import Path

import pytest

from encore.errors import EncoreError
from encore.pipeline.experiment_copy import check_copied


@pytest.fixture
def original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with two texts and weights; the working directory is its copy, which has one of the texts."""
    for name in ("texts/a.txt", "texts/more/b.txt", "w[1]/config.json", "w[1]/model.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    copy = tmp_path / ".dvc/tmp/exps/tmp1234"
    (copy / "texts").mkdir(parents=True)
    (copy / "texts/a.txt").touch()
    monkeypatch.chdir(copy)
    return tmp_path


def refused(dataset: str, init_from: str) -> str:
    with pytest.raises(EncoreError) as error:
        check_copied(dataset, init_from)
    return str(error.value)


def test_a_text_that_is_not_in_the_copy(original: Path) -> None:
    assert refused("files:texts/**/*.txt", "scratch") == (
        "texts/more/b.txt is not in this copy of the repository, in which `dvc exp run` with --temp or --queue works: "
        f"git does not track it; `git add` it, or name it where it is: -S 'dataset=files:{original}/texts/**/*.txt'"
    )


def test_links_in_a_loop_have_an_end(original: Path) -> None:
    (original / "texts/all").symlink_to(".")
    (original / "texts/more/up").symlink_to("..")
    assert refused("files:texts/**/*.txt", "scratch").startswith("texts/more/b.txt is not in this copy")


def test_weights_that_are_not_in_the_copy(original: Path) -> None:
    sentence = refused("package:sympy", "./w[1]/")
    assert re.match(r"w\[1\]/config\.json is not in this copy", sentence)
    assert sentence.endswith(f": -S 'init_from={original}/w[1]'")


@pytest.mark.parametrize(
    "dataset", ["files:texts/*.txt", "files:nowhere/*.txt", "hf:owner/corpus", "files:{}/texts/**/*"]
)
@pytest.mark.parametrize("init_from", ["scratch", "gpt2", "./nowhere/", "{}/w[1]/"])
def test_all_is_there_or_missing_in_both(original: Path, dataset: str, init_from: str) -> None:
    check_copied(dataset.format(original), init_from.format(original))


def test_the_repository_itself_is_no_copy(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(original / "texts")
    check_copied("files:texts/**/*.txt", "./w[1]/")
