"""encore/json_files.py and encore/schemas.py: what is read is checked first."""

import json
import random
from pathlib import Path

import pytest

from encore.errors import EncoreError
from encore.json_files import parse_yaml, read_json, read_sealed, write_sealed
from encore.schemas import InitManifest, Lockfile, RunMetrics
from tests.conftest import ROOT
from tests.sealed import with_seal, write_with_seal

VALUE = {"init_from": "weights/ä", "files": {"config.json": "0" * 64, "model.safetensors": "ab" * 32}}
WAY_OUT = "`dvc repro` makes it"


def problem_of(path: Path) -> str:
    with pytest.raises(EncoreError) as error:
        read_sealed(path, InitManifest, WAY_OUT)
    begin, end = f"{path} ", f"; {WAY_OUT}"
    assert str(error.value).startswith(begin)
    assert str(error.value).endswith(end)
    return str(error.value)[len(begin) : -len(end)]


def test_a_sealed_file_reads_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_sealed(path, VALUE)
    assert read_sealed(path, InitManifest) == json.loads(path.read_text()) == with_seal(VALUE)
    assert path.read_text() == json.dumps(with_seal(VALUE), indent=2) + "\n"


def test_every_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_sealed(path, VALUE)
    whole, refused = path.read_bytes(), 0
    for place in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            assert read_sealed(path, InitManifest) == with_seal(VALUE)
        except EncoreError:
            refused += 1
    # A blank for a tab and the like, between the values.
    assert refused > 0.95 * 8 * len(whole)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b'{"a": 1', "is not valid JSON (Expecting ',' delimiter: line 1 column 8 (char 7))"),
        (b"", "is not valid JSON (Expecting value: line 1 column 1 (char 0))"),
        (b"\xff\xfe", "is not valid JSON ("),
        (b'{"a": NaN}', "is not valid JSON (NaN is no number of JSON)"),
        (b"[" * 100_000, "is not valid JSON ("),
        (b"[1]", "has other bytes than Encore wrote (its own_sha256 differs)"),
        (b"null", "has other bytes than Encore wrote (its own_sha256 differs)"),
        (json.dumps(VALUE).encode(), "has other bytes than Encore wrote (its own_sha256 differs)"),
    ],
)
def test_what_is_not_sealed_is_a_sentence(tmp_path: Path, data: bytes, problem: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    assert problem_of(path).startswith(problem)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"init_from": 3}, "is not what belongs there (init_from: Input should be a valid string)"),
        ({"files": {"a": "0"}}, "is not what belongs there (files.a: String should match pattern '^[0-9a-f]{64}$')"),
        ({"more": 1}, "is not what belongs there (more: Extra inputs are not permitted)"),
    ],
)
def test_a_sealed_file_of_another_kind_is_a_sentence(tmp_path: Path, changes: dict, problem: str) -> None:
    path = tmp_path / "a.json"
    write_with_seal(path, {**VALUE, **changes})
    assert problem_of(path) == problem


def test_a_missing_file_and_a_missing_key(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert problem_of(path) == "is missing"
    path.write_text("{}")
    with pytest.raises(EncoreError) as error:
        read_json(path, RunMetrics)
    assert str(error.value) == f"{path} is not what belongs there (iter: Field required)"


@pytest.mark.parametrize(
    "text", ["schema: '2.0'\nstages: {a: {cmd: [}", "schema: '3.0'", "- 1", "schema: '2.0'\nstages: 3"]
)
def test_yaml_that_is_no_lockfile_is_a_sentence(text: str) -> None:
    with pytest.raises(EncoreError, match=r"^dvc\.lock is not (valid YAML|what belongs there) \(.*\); restore it$"):
        parse_yaml(text.encode(), Lockfile, "dvc.lock", "restore it")


def test_flipped_bits_of_a_lockfile_are_sentences() -> None:
    data = (ROOT / "dvc.lock").read_bytes()
    draw = random.Random(0)
    for _ in range(60):
        flipped = bytearray(data)
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        try:
            parse_yaml(bytes(flipped), Lockfile, "dvc.lock")
        except EncoreError:
            continue
