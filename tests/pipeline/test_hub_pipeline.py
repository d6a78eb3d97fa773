"""The whole pipeline through the Hub source, against a Hub on loopback."""

import hashlib
import io
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import SMALL, commit, copy_repository, run_dvc, write_page
from tests.hub import COMMIT, REPOSITORY, serving

pytestmark = pytest.mark.usefixtures("forking")

SHARDS = 6
SHARD_DOCUMENTS = 40


def shard(number: int) -> bytes:
    """A parquet file of made-up prose, about 100 kB of text, in row groups of 10 documents."""
    choose = random.Random(number)
    words = ["".join(choose.choices("etaoinshrdlu", k=choose.randint(1, 9))) for _ in range(300)]
    texts = [" ".join(choose.choices(words, k=400)) + "." for _ in range(SHARD_DOCUMENTS)]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer, row_group_size=10)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {f"plain_text/train-{i:05d}-of-{SHARDS:05d}.parquet": shard(i) for i in range(SHARDS)}


def test_the_hub_end_to_end(tmp_path, files):
    repository = copy_repository(tmp_path / "repository")
    page = {
        **SMALL,
        "dataset": f"hf:{REPOSITORY}",
        "dataset_revision": COMMIT,
        "vocab_size": 400,
        "token_cap": 20_000,
        "val_fraction": 0.1,
    }
    write_page(repository / "params.yaml", **page)
    commit(repository, "from the Hub")
    token = "hf_" + COMMIT[::-1]
    with serving(files) as hub:
        hub.token = token
        output = run_dvc(repository, "repro", HF_ENDPOINT=hub.url, HF_TOKEN=token)
        tokens = json.loads((repository / "metrics/tokens.json").read_text())
        assert 20_000 <= tokens["train_tokens"] < 20_000 + 2_000
        fetched = set(hub.bodies_served())
        assert fetched == set(sorted(files)[: len(fetched)]), "shards are taken in the order of their names"
        assert len(fetched) < SHARDS, "no more shards than token_cap needs"
        assert token not in output
        assert not any(token.encode() in path.read_bytes() for path in repository.rglob("*") if path.is_file())

        # One inode with three names: what was downloaded, data/raw, and DVC's cache.
        manifest = json.loads((repository / "data/raw/manifest.json").read_text())
        assert [file["source"] for file in manifest["sources"][0]["files"]] == sorted(fetched)
        for file in manifest["sources"][0]["files"]:
            raw = repository / "data/raw" / file["name"]
            assert raw.samefile(repository / ".encore/hub/owner--corpus" / COMMIT / file["source"])
            md5 = hashlib.md5(raw.read_bytes()).hexdigest()
            assert raw.samefile(repository / ".dvc/cache/files/md5" / md5[:2] / md5[2:])
            assert raw.stat().st_nlink == 3

        # A larger cap brings more shards, and none of the first again.
        served_bytes = hub.bodies_served()
        page["token_cap"] = 60_000
        write_page(repository / "params.yaml", **page)
        run_dvc(repository, "repro", "count_tokens", HF_ENDPOINT=hub.url, HF_TOKEN=token)
        assert json.loads((repository / "metrics/tokens.json").read_text())["train_tokens"] >= 60_000
        again = set(hub.bodies_served())
        assert len(again) > len(fetched)
        assert {path: hub.bytes_served[path] for path in fetched} == served_bytes
        assert all(hub.bytes_served[path] == len(files[path]) for path in again)
        listings = hub.requests["list COMMIT"]

    # Without a Hub: the later stages, and the earlier cap, need no network.
    page["token_cap"] = 20_000
    write_page(repository / "params.yaml", **page)
    output = run_dvc(repository, "repro", HF_ENDPOINT="http://127.0.0.1:9")
    assert "Running stage" not in output, output
    assert listings == 2


def test_a_revision_that_the_hub_does_not_have(tmp_path, files):
    repository = copy_repository(tmp_path / "repository")
    write_page(repository / "params.yaml", dataset=f"hf:{REPOSITORY}", dataset_revision="f" * 40)
    with serving(files) as hub:
        output = run_dvc(repository, "repro", exit_code=255, HF_ENDPOINT=hub.url)
    assert "Traceback" not in output
    assert f"hf:{REPOSITORY}" in output
    assert not (repository / "data/raw").exists()
