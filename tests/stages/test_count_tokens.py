"""stages/count_tokens.py: the numbers in metrics/tokens.json, no numbers beside an error, and notes with a way out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from encore.errors import EncoreError
from stages import count_tokens
from tests.conftest import ROOT, write_page
from tests.token_folders import make_documents, make_ranks, write_token_folder

VOCAB_SIZE = 300
TRAIN = make_documents([*range(1, 120), 400], VOCAB_SIZE, 1)
VAL = [[7, 8, 7, 299], *make_documents([300, 8], VOCAB_SIZE, 2)]  # id 7 is in no other document
TOKENS = 119 * 120 // 2 + 400
TOKENS_FOLDER = Path("data/tokens")
METRICS = Path("metrics/tokens.json")


@pytest.fixture(autouse=True)
def _page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)


def write_data(token_cap: int, **changes: Any) -> None:
    """The page and the tokens made with this cap."""
    write_page(Path("params.yaml"), token_cap=token_cap)
    changes = {"token_cap": token_cap, "cap_reached": token_cap <= TOKENS, **changes}
    write_token_folder(TOKENS_FOLDER, TRAIN, VAL, VOCAB_SIZE, shard_tokens=1000, **changes)


def text_bytes_of(documents: list[list[int]]) -> int:
    byte_lengths = {rank: len(token) for token, rank in make_ranks(VOCAB_SIZE).items()}
    return sum(byte_lengths[number] for document in documents for number in document[:-1])


def test_the_numbers_of_a_folder_that_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    write_data(token_cap=7500)
    count_tokens.main()
    used = {number for document in [*TRAIN, *VAL] for number in document}
    assert TOKENS == 7540
    assert json.loads(METRICS.read_text()) == {
        "train_tokens": 7540,
        "train_documents": 120,
        "train_tokens_per_document": 7540 / 120,
        "train_tokens_per_document_p50": 60,  # of 1, 2, ..., 119, 400 the 60th
        "train_tokens_per_document_p99": 119,  # and the 119th, the first that is not below 99 % of 120
        "val_tokens": 312,
        "val_documents": 3,
        "val_tokens_per_document": 104.0,
        "val_tokens_per_document_p50": 8,
        "val_tokens_per_document_p99": 300,
        "bytes_per_token": text_bytes_of(TRAIN) / 7540,
        "val_bytes_per_token": text_bytes_of(VAL) / 312,
        "vocab_used": len(used) / 300,
        "largest_id": 299,
        "cap_reached": True,
        "cap_coverage": 7540 / 7500,
    }
    assert capsys.readouterr().out == "train: 7,540 tokens of 7,500 wanted, val: 312\n"


def test_a_cap_that_is_met_to_the_token_gets_no_note(capsys: pytest.CaptureFixture[str]) -> None:
    write_data(token_cap=TOKENS)
    count_tokens.main()
    assert json.loads(METRICS.read_text())["cap_reached"] is True
    assert "note" not in capsys.readouterr().out


def note(capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed beside numbers that say that the cap, of 10,000, was not reached."""
    count_tokens.main()
    numbers = json.loads(METRICS.read_text())
    assert numbers["cap_reached"] is False
    assert numbers["cap_coverage"] == 0.754
    first, second = capsys.readouterr().out.splitlines()
    assert first == "train: 7,540 tokens of 10,000 wanted, val: 312"
    return second


def test_a_source_that_ended_before_the_cap(capsys: pytest.CaptureFixture[str]) -> None:
    write_data(token_cap=10_000, whole_source=True)
    assert note(capsys) == (
        "encore: note: the source ended 2,460 tokens (24.6%) before token_cap; set token_cap: 7540 to say so, or name "
        "a larger source. Training goes over the data more than once where max_iters asks for more"
    )


def test_a_download_that_reckoned_with_fewer_bytes_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    measured = text_bytes_of(TRAIN) / TOKENS
    write_data(token_cap=10_000, text_bytes_per_token=measured / 1.4321)
    assert note(capsys) == (
        f"encore: note: the downloaded text ended 2,460 tokens (24.6%) before token_cap; it has {measured:.2f} bytes a "
        f"token and download reckoned with {measured / 1.4321:.2f}; set token_cap: 14400 to have enough for 10,000 "
        "downloaded. Training goes over the data more than once where max_iters asks for more"
    )


def test_a_download_that_held_out_more_than_its_share(capsys: pytest.CaptureFixture[str]) -> None:
    """The bytes a token were as reckoned, so only the tokens themselves tell how much is missing."""
    write_data(token_cap=10_000, text_bytes_per_token=text_bytes_of(TRAIN) / TOKENS)
    assert "set token_cap: 13300 to have enough for 10,000 downloaded" in note(capsys)  # 10,000 / 0.754 = 13,263


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1),
        (99.5, 100),
        (999, 999),
        (999.1, 1000),
        (1001, 1010),
        (1_010_000, 1_010_000),
        (1_010_000.5, 1_020_000),
        (9_990_001, 10_000_000),
        (4_552_727_272.7, 4_560_000_000),
    ],
)
def test_rounding_up_to_three_digits(value: float, expected: int) -> None:
    assert count_tokens.round_up(value) == expected


def test_there_are_no_numbers_beside_an_error() -> None:
    write_data(token_cap=7500)
    (TOKENS_FOLDER / "train_00003.bin").unlink()
    write_page(Path("params.yaml"), token_cap=7000)
    with pytest.raises(EncoreError) as error:
        count_tokens.main()
    assert str(error.value) == (
        "data/tokens/manifest.json: it was made for token_cap 7500, which is 7000 in params.yaml; "
        "data/tokens/train_00003.bin is missing. `dvc repro -f tokenize` writes them anew"
    )
    assert not METRICS.exists()
