"""Which files of a data set on the Hub are chosen, by their names."""

from pathlib import PurePosixPath

import pytest

from encore.download.training_files import choose
from encore.errors import EncoreError


def names_chosen(names: list[str], folder: str = "") -> list[str]:
    paths = [PurePosixPath(name) for name in names]
    return [str(path) for path in choose(paths, "o/n", PurePosixPath(folder))]


def test_choice_of_files() -> None:
    plain = ["README.md", "test-0.parquet", "train-1.parquet", "train-0.parquet", "train.csv"]
    assert names_chosen(plain) == ["train-0.parquet", "train-1.parquet"]
    assert names_chosen(["b.parquet", "a.parquet", "a.txt"]) == ["a.parquet", "b.parquet"]
    assert names_chosen(["c/train/0.parquet", "c/test/0.parquet"]) == ["c/train/0.parquet"]
    several = ["de/train-0.parquet", "en/train-0.parquet", "en/test-0.parquet", "english/train-0.parquet"]
    assert names_chosen(several, "en") == ["en/train-0.parquet"]
    with pytest.raises(EncoreError, match=r"training files in de, en, english; name .*hf:o/n/english$"):
        names_chosen(several)
    with pytest.raises(EncoreError, match=r"no files of text \(parquet, JSON, .*\); .*refs/convert/parquet"):
        names_chosen(["train.zip", "README.md", "dataset_infos.json", ".gitattributes", "data/state.json"])
    with pytest.raises(EncoreError, match=r"no files of text \(.*\) under fr; correct the folder"):
        names_chosen(several, "fr")
    with pytest.raises(EncoreError, match=r"in c00, c01,.* c09 and 2 more; "):
        names_chosen([f"c{number:02d}/train.parquet" for number in range(12)])


@pytest.mark.parametrize(
    ("chosen", "others"),
    [
        ("en/c4-train.00000-of-2.json.gz en/c4-train.00001-of-2.json.gz", "en/c4-validation.0-of-1.json.gz"),
        ("train.jsonl", "dev.jsonl data.jsonl LICENSE.txt requirements.txt"),
        ("data/a_training_set.csv", "data/b.csv"),
        ("c/train/x.arrow", "c/train/dataset_info.json c/train/state.json c/dataset_dict.json c/a.arrow"),
        ("a.txt b.txt", "a-valid.txt test_a.txt val.txt my.eval.txt dev/a.txt testing.txt README.md"),
        ("contest.txt devices.txt evaluate.txt", ""),  # no word of these is a split's
        ("a.tsv b.csv constrained.tsv.zst", ""),
        ("x/a.ndjson x/b.json x/c.jsonl.zst", ""),
        ("train.parquet", "train.jsonl data.csv"),
        ("x.parquet", "train/train.jsonl"),
        ("a.json-0.json a.json-1.json", ""),
        ("a.parquet-0.parquet a.parquet-1.parquet", "a.jsonl"),
        ("a.jsonl", ".cache/a.jsonl __pycache__/b.jsonl .a.jsonl"),
    ],
)
def test_choice_among_formats(chosen: str, others: str) -> None:
    names = [*others.split(), *reversed(chosen.split())]
    assert names_chosen(names) == chosen.split()


def test_a_folder_that_is_named_is_meant() -> None:
    assert names_chosen(["test/x/a.jsonl", "test/x/test.jsonl", "b.csv"], "test") == ["test/x/a.jsonl"]
    assert names_chosen(["de/a.csv", "en/b.csv", "en/c.csv"], "en") == ["en/b.csv", "en/c.csv"]


def test_choices_that_the_user_must_make() -> None:
    with pytest.raises(EncoreError, match=r"has a/x\.jsonl and a/x\.json\.gz, which may be the same text; copy"):
        names_chosen(["a/x.jsonl", "a/x.json.gz", "a/y.jsonl"])
    assert names_chosen(["a.b.jsonl", "a.c.jsonl"]) == ["a.b.jsonl", "a.c.jsonl"]
    several = (
        r"of several kinds \(Arrow in \., CSV in c, JSON in a, text in b\); name .* hf:o/n/FOLDER, or copy .* files:"
    )
    with pytest.raises(EncoreError, match=several):
        names_chosen(["a/x.jsonl", "b/x.txt", "c/y.csv", "x.arrow"])
    with pytest.raises(EncoreError, match=r"training files in en, en\.noblocklist; name .* hf:o/n/en\.noblocklist$"):
        names_chosen(["en/c4-train.0.json.gz", "en.noblocklist/c4-train.0.json.gz", "multilingual/c4-af.0.json.gz"])
    with pytest.raises(EncoreError, match=r"only files of other splits, such as dev\.jsonl; name another .* files:$"):
        names_chosen(["test.jsonl", "dev.jsonl"])
