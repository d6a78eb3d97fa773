"""bench/download.py: each way brings the bytes that are served, over the protocol that it is measured by."""

import os
import subprocess

import pytest

from bench.download import CHUNK_BYTES, HEADER_BYTES, WAYS, XORB_CHUNKS, fetch, make_file, serving

pytestmark = pytest.mark.slow
SIZE = CHUNK_BYTES * XORB_CHUNKS + 100_001  # two xorbs, and a chunk that is not full


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_brings_what_is_served(tmp_path, way):
    listed = [make_file(tmp_path, "0.parquet", SIZE), make_file(tmp_path, "1.parquet", 7)]
    for name, size, _ in listed:  # the other protocol would bring zeros
        other = tmp_path / (name if way == "hf_xet" else f"{name}.xorbs")
        os.truncate(other, 0)
        os.truncate(other, size)
    with serving(tmp_path, None, 0.0) as url:
        assert fetch(way, url, listed) > 0


def test_only_encore_notices_a_wrong_byte(tmp_path):
    listed = [make_file(tmp_path, "0.parquet", SIZE)]
    flip(tmp_path / "0.parquet", CHUNK_BYTES)
    flip(tmp_path / "0.parquet.xorbs", CHUNK_BYTES + 2 * HEADER_BYTES)
    with serving(tmp_path, None, 0.0) as url:
        for way in ("huggingface_hub", "hf_xet"):  # they return a path, and the hash that the bench takes is another
            with pytest.raises(SystemExit, match=f"^bench: {way} brought other bytes than were served$"):
                fetch(way, url, listed)
        with pytest.raises(subprocess.CalledProcessError):
            fetch("encore", url, listed)
