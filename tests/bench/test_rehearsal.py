"""The data path of the experiment of record at a hundredth of its size, on real prose: 80 shards of 5 MB of text, from
a Hub on loopback to counted tokens. ENGLISH_TEXT_DIR names a folder of parquet files with a column `text`, and
TIKTOKEN_CACHE_DIR one in which tiktoken has the published ranks.
"""

import json
import os
from itertools import cycle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT, commit, copy_repository, read_page, run_dvc, write_page
from tests.hub import COMMIT, REPOSITORY, serving

ENGLISH = os.environ.get("ENGLISH_TEXT_DIR")
RANKS = os.environ.get("TIKTOKEN_CACHE_DIR")
SHARDS = 80
SHARD_TEXT_BYTES = 39_769_491_688 // SHARDS // 100  # OpenWebText has 39.8 GB of text


def make_shards(folder: Path) -> dict[str, bytes]:
    """Shards of the folder's documents, which come again and again."""
    documents = cycle([text for path in sorted(folder.glob("*.parquet")) for text in read_texts(path)])
    shards = {}
    for number in range(SHARDS):
        texts: list[str] = []
        text_bytes = 0
        while text_bytes < SHARD_TEXT_BYTES:
            texts.append(next(documents))
            text_bytes += len(texts[-1].encode())
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": texts}), sink, row_group_size=100)
        shards[f"plain_text/train-{number:05d}-of-{SHARDS:05d}.parquet"] = sink.getvalue().to_pybytes()
    return shards


def read_texts(path: Path) -> list[str]:
    return pq.read_table(path, columns=["text"])["text"].to_pylist()


@pytest.mark.skipif(not ENGLISH or not RANKS, reason="ENGLISH_TEXT_DIR or TIKTOKEN_CACHE_DIR is unset: no real prose")
def test_a_hundredth_of_the_experiment_of_record(tmp_path: Path) -> None:
    assert ENGLISH
    repository = copy_repository(tmp_path / "repository")
    record = read_page(ROOT / "presets/gpt2-owt-4b.yaml")
    token_cap = record["token_cap"] // 100
    place = {"dataset": f"hf:{REPOSITORY}", "dataset_revision": COMMIT, "evaluate_tasks": []}
    write_page(repository / "params.yaml", **{**record, **place, "token_cap": token_cap})
    commit(repository, "a hundredth")
    shards = make_shards(Path(ENGLISH))
    with serving(shards) as hub:
        run_dvc(repository, "repro", "count_tokens", HF_ENDPOINT=hub.url)
        fetched = set(hub.bodies_served())
    assert len(fetched) in (36, 37), "of 80, as of OpenWebText's"
    assert fetched == set(sorted(shards)[: len(fetched)])
    tokens = json.loads((repository / "metrics/tokens.json").read_text())
    most_document_tokens = max(
        len(text.encode()) for path in Path(ENGLISH).glob("*.parquet") for text in read_texts(path)
    )
    assert tokens["cap_reached"]
    assert token_cap <= tokens["train_tokens"] < token_cap + most_document_tokens
