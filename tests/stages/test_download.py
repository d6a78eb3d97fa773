"""The download stage, run as DVC runs it: from a folder with dvc.yaml and params.yaml, twice, and with errors."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from encore.download.raw_folder import RawFile, RawFolder
from encore.download.sources import Wanted
from encore.errors import EncoreError
from stages import download, download_tasks, download_weights
from tests.conftest import ROOT
from tests.sealed import read_with_seal, without_seal

pytestmark = pytest.mark.slow

PIPELINE = """
stages:
  download:
    cmd: python -m stages.download
    params:
      [dataset, dataset_revision, dataset_share, text_column, shard_order, tokenizer, token_cap, val_fraction,
       split_seed]
  download_weights:
    cmd: python -m stages.download_weights
    params: [init_from]
  download_tasks:
    cmd: python -m stages.download_tasks
    params: [evaluate_tasks]
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a pipeline of the download stages and a corpus of two files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ENCORE_SCRATCH", raising=False)
    Path("dvc.yaml").write_text(PIPELINE)
    Path("corpus").mkdir()
    Path("corpus/a.jsonl.gz").write_bytes(gzip.compress(b'{"body": "one"}\n{"body": "two"}\n'))
    pq.write_table(pa.table({"body": ["three"]}), "corpus/b.parquet")
    set_params(dataset="files:corpus/*", dataset_revision=corpus_hash(), text_column="body")
    return tmp_path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def corpus_hash() -> str:
    lines = [f"{sha256(path.read_bytes())}  {path.name}\n" for path in sorted(Path("corpus").iterdir())]
    return sha256("".join(lines).encode())


def set_params(**changes: object) -> None:
    yaml = YAML()
    page = Path("params.yaml")
    values = yaml.load(page if page.exists() else ROOT / "presets/quickstart.yaml")
    values.update(changes)
    yaml.dump(values, page)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()) for path in folder.iterdir()}


def test_files_and_manifest(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    download.main()
    manifest = json.loads(Path("data/raw/manifest.json").read_bytes())
    assert list(manifest) == ["sources", "text_bytes_per_token", "tokenizer", "own_sha256"]
    assert (manifest["text_bytes_per_token"], manifest["tokenizer"]) == (6.0, None)
    [source] = manifest["sources"]
    about = {key: source[key] for key in ("name", "dataset", "dataset_revision", "licence", "text_column")}
    assert about == {
        "name": None,
        "dataset": "files:corpus/*",
        "dataset_revision": corpus_hash(),
        "licence": None,
        "text_column": "body",
    }
    told = ["source_files", "whole_source", "text_bytes", "repaired_documents"]
    assert list(source) == [*about, *told, "files"]
    column = pq.read_metadata("corpus/b.parquet").row_group(0).column(0)
    text_bytes = len("onetwo") + column.total_uncompressed_size
    assert [source[key] for key in told] == [2, True, text_bytes, 0]
    names = ["00000-a.parquet", "00001-b.parquet"]
    texts = [pq.read_table(f"data/raw/{name}")["body"].to_pylist() for name in names]
    assert texts == [["one", "two"], ["three"]]
    contents = [Path("data/raw", name).read_bytes() for name in names]
    assert source["files"] == [
        {
            "name": name,
            "source": source,
            "bytes": len(content),
            "sha256": sha256(content),
            "documents": documents,
        }
        for name, source, content, documents in zip(names, ("a.jsonl.gz", "b.parquet"), contents, (2, 1), strict=True)
    ]
    assert {path.name for path in Path("data/raw").iterdir()} == {*names, "manifest.json"}
    said = f"files:corpus/*: 3 documents, {text_bytes} bytes of text in data/raw, all of it\n"
    assert capsys.readouterr().out == said


def test_same_bytes_elsewhere_and_later(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download.main()
    shutil.copytree(repository, repository / "else/where", ignore=shutil.ignore_patterns("data"))
    for path in Path("else/where/corpus").iterdir():
        os.utime(path, (1, 1))
    monkeypatch.chdir(repository / "else/where")
    download.main()
    assert hashes(Path("data/raw")) == hashes(repository / "data/raw")
    assert str(repository).encode() not in Path("data/raw/manifest.json").read_bytes()


def test_a_failure_leaves_what_was_there(repository: Path) -> None:
    download.main()
    before = hashes(Path("data/raw"))
    Path("corpus/c.txt").write_text("new")
    with pytest.raises(EncoreError, match=f"set dataset_revision to {corpus_hash()}"):
        download.main()
    assert hashes(Path("data/raw")) == before
    assert sorted(path.name for path in Path("data").iterdir()) == ["raw"]


@pytest.mark.parametrize(("tokenizer", "vocab_size", "bytes_per_token"), [("bpe", 2048, 6.0), ("gpt2", 50257, 4.488)])
def test_wanted_text_follows_the_cap(
    tokenizer: str, vocab_size: int, bytes_per_token: float, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple] = []

    def fake_fetch(
        dataset: str, revision: str, wanted: Wanted, folder: Path, scratch: Path, first_number: int
    ) -> RawFolder:
        asked.append((dataset, revision, wanted, folder, scratch, first_number))
        raw = RawFolder(folder, wanted.text_column, wanted.text_bytes)
        raw.files = [RawFile("00000-a.parquet", "a.parquet", 1_234_567, "0" * 64, 1_000)]
        return raw

    def fake_ranks(folder: Path, scratch: Path) -> Path:
        path = folder / "r50k_base.tiktoken"
        path.write_bytes(b"ranks")
        return path

    monkeypatch.setattr(download, "fetch", fake_fetch)
    monkeypatch.setattr(download, "fetch_gpt2_ranks", fake_ranks)
    monkeypatch.setenv("ENCORE_SCRATCH", "elsewhere")
    order = {"shard_order": "shuffled", "split_seed": 7}
    set_params(tokenizer=tokenizer, vocab_size=vocab_size, token_cap=4_000_000, val_fraction=0.2, **order)
    download.main()
    ((dataset, revision, wanted, folder, scratch, first_number),) = asked
    assert (dataset, revision, first_number) == ("files:corpus/*", corpus_hash(), 0)
    assert (wanted.text_column, wanted.shard_order, wanted.split_seed) == ("body", "shuffled", 7)
    assert wanted.text_bytes == pytest.approx(5_000_000 * bytes_per_token, abs=1)
    assert folder != Path("data/raw")  # it takes that place when it is whole
    assert scratch == Path("elsewhere")
    manifest = json.loads(Path("data/raw/manifest.json").read_bytes())
    expected = {"name": "r50k_base.tiktoken", "sha256": sha256(b"ranks")} if tokenizer == "gpt2" else None
    assert manifest["tokenizer"] == expected
    assert manifest["text_bytes_per_token"] == bytes_per_token
    assert Path("data/raw/r50k_base.tiktoken").exists() == (tokenizer == "gpt2")


def test_weights_come_to_data_init(repository: Path) -> None:
    Path("weights").mkdir()
    Path("weights/config.json").write_text(
        '{"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 2, "n_positions": 4}'
    )
    Path("weights/model.safetensors").write_bytes(b"weights")
    set_params(init_from="./weights/")
    download_weights.main()
    manifest = json.loads(Path("data/init/manifest.json").read_bytes())
    files = hashes(Path("weights"))
    assert without_seal(manifest) == {"init_from": "./weights/", "files": files}
    assert hashes(Path("data/init")) == {**files, "manifest.json": sha256(Path("data/init/manifest.json").read_bytes())}

    set_params(init_from="scratch")
    download_weights.main()
    assert [path.name for path in Path("data/init").iterdir()] == ["manifest.json"]
    assert read_with_seal(Path("data/init/manifest.json").read_bytes()) == {"init_from": "scratch", "files": {}}


def test_no_tasks_are_a_manifest(repository: Path) -> None:
    download_tasks.main()
    assert {path.name: read_with_seal(path.read_text()) for path in Path("data/tasks").iterdir()} == {
        "manifest.json": {"tasks": [], "lm_eval": None, "files": {}}
    }


def run_stage(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stages.download"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_as_dvc_runs_it(repository: Path) -> None:
    good = run_stage()
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("files:corpus/*: 3 documents, ")
    set_params(dataset="files:nothing/*.txt")
    bad = run_stage()
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr.startswith("encore: dataset: files:nothing/*.txt finds no files")
    assert bad.stderr.count("\n") == 1


def test_quickstart(repository: Path) -> None:
    """The default page as it stands, without a network."""
    shutil.copy(ROOT / "presets/quickstart.yaml", "params.yaml")
    result = run_stage(HTTPS_PROXY="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9")
    assert (result.returncode, result.stderr) == (0, "")
    manifest = json.loads(Path("data/raw/manifest.json").read_bytes())
    [source] = manifest["sources"]
    assert [file["name"] for file in source["files"]] == ["00000-sympy.parquet"]
    assert source["files"][0]["documents"] > 1_000
    assert sorted(path.name for path in Path("data/raw").iterdir()) == ["00000-sympy.parquet", "manifest.json"]
    assert [path.name for path in Path(".encore").iterdir()] == ["history.jsonl"]  # a package needs no download


def test_real_gpt2_ranks(repository: Path) -> None:
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR names no folder with the published GPT-2 ranks")
    set_params(tokenizer="gpt2", vocab_size=50257)
    download.main()
    tokenizer = json.loads(Path("data/raw/manifest.json").read_bytes())["tokenizer"]
    assert tokenizer == {
        "name": "r50k_base.tiktoken",
        "sha256": "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    }
    assert sha256(Path("data/raw/r50k_base.tiktoken").read_bytes()) == tokenizer["sha256"]
