"""stages/tokenize.py: the shards of a small corpus, and of real prose, against a plain loop over the documents."""

import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken

from encore.errors import EncoreError
from encore.files import sha256_of
from encore.tokens import encode, parts
from encore.tokens.documents import is_val
from encore.tokens.ranks import write_ranks
from encore.tokens.token_files import SPLITS
from encore.tokens.tokenizer import END_OF_TEXT, load_tokenizer, train_bpe
from stages import tokenize
from tests.conftest import ROOT
from tests.raw_text import (
    PLENTY,
    SEED,
    VAL_FRACTION,
    VOCAB_SIZE,
    Corpus,
    joined,
    plain_loop,
    prepare_root,
    read_folder,
    small_shards,
    write_params,
    write_raw,
)
from tests.sealed import change_sealed, read_with_seal, write_with_seal

RAW, TOKENS = Path("data/raw"), Path("data/tokens")
TEXTS = [
    ["", f"as text: {END_OF_TEXT}", "long " * 60][number % 10 - 3]
    if 3 <= number % 10 < 6
    else f"the ünit {number}: {number**3} " * (1 + number % 5)
    for number in range(240)
]
ENGLISH = os.environ.get("ENGLISH_TEXT_DIR")  # of parquet files with a column `text`


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run the stage in, which makes several parts, and in them batches, of the corpus."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENCORE_WORKERS", "1")
    monkeypatch.setattr(encode, "BATCH_BYTES", 500)
    monkeypatch.setattr(parts, "PART_TEXT_BYTES", 4000)
    prepare_root(TEXTS)
    return tmp_path


def run() -> dict[str, bytes]:
    """Runs the stage and returns the files of data/tokens."""
    tokenize.main()
    return read_folder(TOKENS)


def expected(token_cap: int = PLENTY) -> Corpus:
    return plain_loop(load_tokenizer(TOKENS / "tokenizer.tiktoken"), TEXTS, token_cap)


@pytest.mark.parametrize("part_text_bytes", [1, 4000, 10**9])
def test_shards_and_manifest_are_those_of_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part_text_bytes: int
) -> None:
    monkeypatch.setattr(parts, "PART_TEXT_BYTES", part_text_bytes)
    folder = run()
    manifest = read_with_seal(folder["manifest.json"])
    corpus = expected(2500)
    assert min(len(corpus.numbers["val"]), *corpus.remarks.values()) > 3, "the corpus has something of everything"
    output = capsys.readouterr().out
    names = ["manifest.json", "tokenizer.tiktoken"]
    splits = {}
    for split in SPLITS:
        shards = manifest["shards"][split]
        assert joined(folder, split) == corpus.as_bytes(split)
        assert [shard["name"] for shard in shards] == [f"{split}_{number:05d}.bin" for number in range(len(shards))]
        assert (len(shards) > 1) == (part_text_bytes < 10**9)
        start = 0
        for shard in shards:
            stop = start + shard["tokens"]
            inside = [
                n for n, end in zip(corpus.numbers[split], corpus.ends[split], strict=True) if start < end <= stop
            ]
            assert shard["tokens"] == len(folder[shard["name"]]) / 2
            assert shard["documents"] == len(inside)
            assert shard["text_bytes"] == sum(len(TEXTS[number].encode()) for number in inside)
            assert shard["sha256"] == sha256(folder[shard["name"]]).hexdigest()
            start = stop
        whats = ("tokens", "documents", "text_bytes")
        splits[split] = {"shards": len(shards), **{what: sum(shard[what] for shard in shards) for what in whats}}
        names += [shard["name"] for shard in shards]
        tokens, documents = len(corpus.ids[split]), len(corpus.numbers[split])
        assert (
            f"{split}: {tokens:,} tokens of {documents:,} documents in {len(shards)} shard{'s'[: len(shards) - 1]}\n"
            in output
        )
    assert list(folder) == sorted(names)
    del manifest["shards"]
    source = {
        "name": None,
        "dataset": "package:made-up",
        "dataset_revision": "1.0",
        "licence": "MIT",
        "whole_source": True,
        "token_cap": 2500,
        "cap_reached": True,
        "empty_documents": corpus.remarks["empty_documents"],
        "documents_with_end_of_text": corpus.remarks["documents_with_end_of_text"],
        "cut_documents": 0,
        "splits": splits,
    }
    assert manifest == {
        "sources": [source],
        "dtype": "uint16",
        "vocab_size": VOCAB_SIZE,
        "tokenizer": "bpe",
        "tokenizer_sha256": sha256(folder["tokenizer.tiktoken"]).hexdigest(),
        "text_bytes_per_token": 6.0,
    }
    training = [text for number, text in enumerate(TEXTS) if not is_val(number, SEED, VAL_FRACTION)]
    assert folder["tokenizer.tiktoken"] == write_ranks(train_bpe(training, VOCAB_SIZE)), "learned from train alone"


@pytest.mark.parametrize("difference", [-1, 0, 1])
def test_the_cap_is_met_at_the_first_end_of_a_document_at_or_behind_it(difference: int) -> None:
    run()
    for document in (15, 100, -1):
        ends = expected().ends["train"]
        cap = ends[document] + difference
        write_params(token_cap=cap)
        folder, corpus = run(), expected(cap)
        manifest = json.loads(folder["manifest.json"])
        assert sum(shard["tokens"] for shard in manifest["shards"]["train"]) == corpus.ends["train"][-1]
        assert corpus.ends["train"][-1] == min((end for end in ends if end >= cap), default=ends[-1])
        [source] = manifest["sources"]
        assert (source["token_cap"], source["cap_reached"]) == (cap, cap <= ends[-1])
        assert {rule: source[rule] for rule in corpus.remarks} == corpus.remarks
        for split in SPLITS:
            assert joined(folder, split) == corpus.as_bytes(split)


def test_what_the_raw_text_is_goes_into_the_manifest() -> None:
    [source] = json.loads((RAW / "manifest.json").read_bytes())["sources"]
    change_sealed(RAW / "manifest.json", sources=[{**source, "whole_source": False}], text_bytes_per_token=4.488)
    written = json.loads(run()["manifest.json"])
    assert (written["sources"][0]["whole_source"], written["text_bytes_per_token"]) == (False, 4.488)


@pytest.mark.slow
@pytest.mark.parametrize("token_cap", [2500, PLENTY])
def test_bytes_depend_on_text_and_parameters_alone(monkeypatch: pytest.MonkeyPatch, token_cap: int) -> None:
    """Not on threads and batches. Parts end with row groups and shards with parts; what they join to is the same."""
    write_params(token_cap=token_cap)
    folder = run()
    for workers, batch_bytes, file_size, row_group_size in [
        (1, 1, 130, 25),
        (2, 30, 130, 25),
        (5, 800, 130, 25),
        (2, 10**6, 130, 25),
        (1, 500, 240, 1),
        (5, 500, 60, 7),
        (1, 500, 1000, 1000),
    ]:
        monkeypatch.setenv("ENCORE_WORKERS", str(workers))
        monkeypatch.setattr(encode, "BATCH_BYTES", batch_bytes)
        write_raw(RAW, TEXTS, file_size, row_group_size)
        other = run()
        assert other["tokenizer.tiktoken"] == folder["tokenizer.tiktoken"]
        for split in SPLITS:
            assert joined(other, split) == joined(folder, split)
        assert (other == folder) == ((file_size, row_group_size) == (130, 25))


def test_joined_shards_can_be_mapped_as_nanogpt_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full shards, and a shorter one at the end of each part."""
    monkeypatch.setattr(parts, "ShardWriter", small_shards(300))
    folder = run()
    shards = json.loads(folder["manifest.json"])["shards"]["train"]
    assert [shard["name"] for shard in shards] == [f"train_{number:05d}.bin" for number in range(len(shards))]
    assert {shard["tokens"] for shard in shards[:-1]} > {300}
    subprocess.run("cat data/tokens/train_*.bin > train.bin", shell=True, check=True)
    corpus = expected(2500)
    assert np.memmap("train.bin", dtype=np.uint16, mode="r").tolist() == corpus.ids["train"]
    assert sum(shard["documents"] for shard in shards) == len(corpus.numbers["train"])


def test_published_ranks_are_taken_from_the_download_as_they_are() -> None:
    ranks = write_ranks({bytes([byte]): byte for byte in range(256)} | {b"the": 256})
    write_raw(RAW, TEXTS, ranks=ranks)
    write_params(tokenizer="gpt2", vocab_size=50257)
    folder = run()
    manifest = json.loads(folder["manifest.json"])
    assert folder["tokenizer.tiktoken"] == ranks
    assert (manifest["tokenizer"], manifest["vocab_size"]) == ("gpt2", 258)
    assert joined(folder, "train") == expected(2500).as_bytes("train")


def test_more_than_65536_ids_take_four_bytes() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"%07d" % number: 256 + number for number in range(65_281)}
    write_raw(RAW, TEXTS[:60], ranks=write_ranks({**ranks, b"the": 65_537}))
    write_params(tokenizer="gpt2", vocab_size=50257)
    folder = run()
    manifest = json.loads(folder["manifest.json"])
    assert (manifest["dtype"], manifest["vocab_size"]) == ("uint32", 65_539)
    ids = plain_loop(load_tokenizer(TOKENS / "tokenizer.tiktoken"), TEXTS[:60], 2500).ids
    assert 65_537 in ids["train"]
    for split in SPLITS:
        assert np.frombuffer(joined(folder, split), "<u4").tolist() == ids[split]


def test_an_empty_split_is_a_sentence_and_leaves_nothing() -> None:
    write_params(val_fraction=1e-9)
    with pytest.raises(EncoreError) as error:
        tokenize.main()
    assert str(error.value) == (
        "no document fell into the val split; change val_fraction (1e-09) or split_seed (2357), or give more documents"
    )
    assert sorted(path.name for path in Path("data").iterdir()) == ["raw"]


def test_a_single_document_is_a_sentence_that_no_parameter_is_to_blame_in() -> None:
    shutil.rmtree(RAW)
    write_raw(RAW, TEXTS[:1])
    write_params(val_fraction=0.5)
    with pytest.raises(EncoreError, match=r"^dataset: the corpus is a single document, .* split it into several files"):
        tokenize.main()
    assert sorted(path.name for path in Path("data").iterdir()) == ["raw"]


def test_text_that_is_not_utf8_is_a_sentence_and_leaves_nothing() -> None:
    column = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"caf\xe9"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": column}), "latin.parquet")
    manifest = write_raw(RAW, TEXTS)
    path = RAW / "00001-text.parquet"
    shutil.copy("latin.parquet", path)
    manifest["sources"][0]["files"][1].update(bytes=path.stat().st_size, sha256=sha256(path.read_bytes()).hexdigest())
    write_with_seal(RAW / "manifest.json", manifest)
    write_params(token_cap=PLENTY)
    problem = r"^data/raw/00001-text\.parquet, row 1 is not UTF-8 \(byte 3\); mend the file where it comes from$"
    with pytest.raises(EncoreError, match=problem):
        tokenize.main()
    assert sorted(path.name for path in Path("data").iterdir()) == ["raw"]


def test_scratch_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ENCORE_SCRATCH", str(tmp_path / "elsewhere"))
    write_params(val_fraction=1e-9)
    with pytest.raises(EncoreError, match="no document fell"):
        tokenize.main()
    assert len(list((tmp_path / "elsewhere/tokens").glob("*/part-*/part.json"))) > 1
    assert not Path(".encore").exists()


def test_a_missing_download_is_a_sentence() -> None:
    shutil.rmtree(RAW)
    sentence = r"^data/raw/manifest\.json is missing; `dvc repro -s -f download` makes data/raw "
    with pytest.raises(EncoreError, match=sentence):
        tokenize.main()


@pytest.mark.parametrize("damage", ["flipped", "shorter", "missing"])
def test_text_that_is_not_what_was_downloaded_is_refused(damage: str) -> None:
    path = RAW / "00001-text.parquet"
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[:-1] if damage == "shorter" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(EncoreError, match=r"^data/raw/00001-text\.parquet (is missing|has other bytes [^;]*); `dvc"):
        tokenize.main()
    assert not TOKENS.exists()


def test_run_as_a_script_it_refuses_before_it_can_shadow_the_standard_library() -> None:
    done = subprocess.run([sys.executable, ROOT / "stages" / "tokenize.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "encore: run this stage from the repository's root: python -m stages.tokenize\n"
    assert done.stdout == ""


@pytest.mark.skipif(ENGLISH is None, reason="ENGLISH_TEXT_DIR is unset: no real prose")
@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR is unset: no published ranks")
def test_real_prose_is_encoded_as_tiktoken_does_document_by_document(monkeypatch: pytest.MonkeyPatch) -> None:
    published = tiktoken.get_encoding("r50k_base")
    files = sorted(Path(ENGLISH).glob("*.parquet"))
    shutil.rmtree(RAW)
    RAW.mkdir()
    listed = []
    for file in files:
        (RAW / file.name).symlink_to(file.absolute())
        entry = {"name": file.name, "source": file.name, "bytes": file.stat().st_size, "sha256": sha256_of(file)}
        listed.append({**entry, "documents": 0})
    (RAW / "ranks").write_bytes(write_ranks(published._mergeable_ranks))
    tokenizer = {"name": "ranks", "sha256": sha256_of(RAW / "ranks")}
    source = {"name": None, "dataset": "files:english", "dataset_revision": "0" * 64, "licence": None}
    source |= {"whole_source": True, "files": listed, "text_column": "text"}
    source |= {"source_files": len(listed), "text_bytes": 0, "repaired_documents": 0}
    manifest = {"sources": [source], "text_bytes_per_token": 4.5, "tokenizer": tokenizer}
    write_with_seal(RAW / "manifest.json", manifest)
    monkeypatch.setattr(encode, "BATCH_BYTES", 20_000)
    monkeypatch.setattr(parts, "PART_TEXT_BYTES", 10**7)
    monkeypatch.delenv("ENCORE_WORKERS")
    write_params(tokenizer="gpt2", vocab_size=50257, token_cap=PLENTY)
    folder = run()
    left = {split: memoryview(joined(folder, split)).cast("H") for split in SPLITS}
    texts = (text for file in files for text in pq.read_table(file)["text"].to_pylist())
    for number, text in enumerate(texts):
        split = "val" if is_val(number, SEED, VAL_FRACTION) else "train"
        ids = [*published.encode_ordinary(text), published.eot_token] if text else []
        assert left[split][: len(ids)].tolist() == ids, f"document {number}"
        left[split] = left[split][len(ids) :]
    assert not any(map(len, left.values()))
