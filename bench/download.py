"""How fast files come from a Hub: Encore's download against huggingface_hub's, over HTTP and over Xet.

    python -m bench.download [RUNS]

A Hub on loopback serves random bytes, by HTTP and by what Xet's protocol has for reading: nothing is compressed, and no
chunk comes twice. All compute the sha256 of what has come, Encore as it comes, and for huggingface_hub's ways we do so
afterwards. Each run is a process of its own, they take turns, and imports are not in the seconds. MB are 10^6 bytes.
"""

import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUNS = 5
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PLACE = f"/datasets/owner/corpus/resolve/{COMMIT}/"
CHUNK_BYTES, HEADER_BYTES = 65_536, 8  # of the target size that Xet's chunks have
XORB_CHUNKS = 1_000  # a xorb, in which Xet's server keeps chunks, has at most 64 MiB
WAYS = ("encore", "huggingface_hub", "hf_xet")
# (what it is, files, bytes of each, bytes a second of each connection, seconds before each answer)
SETTINGS: list[tuple[str, int, int, float | None, float]] = [
    ("one file of 300 MB, no limit", 1, 300_000_000, None, 0.0),
    ("eight files of 37.5 MB, no limit", 8, 37_500_000, None, 0.0),
    ("one file of 300 MB, 20 MB/s a connection, 50 ms to an answer", 1, 300_000_000, 20e6, 0.05),
    ("eight files of 37.5 MB, 20 MB/s a connection, 50 ms to an answer", 8, 37_500_000, 20e6, 0.05),
]
# A process that fetches the files. It prints the seconds, and the sha256 of each file.
FETCH = """
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import hf_xet
from huggingface_hub import hf_hub_download
from encore.download.transfer import RemoteFile, bring
from encore.files import sha256_of

way, url, folder, listed = sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])

def fetch(name):
    path = hf_hub_download("owner/corpus", name, repo_type="dataset", revision="COMMIT", local_dir=folder, endpoint=url)
    return sha256_of(Path(path))

started = time.perf_counter()
if way == "encore":
    files = [RemoteFile(name, url + "PLACE" + name, folder / name, size, sha256, "") for name, size, sha256 in listed]
    found = bring(files, {}, {})
else:
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(fetch, [name for name, _, _ in listed]))
print(json.dumps([time.perf_counter() - started, found]))
""".replace("PLACE", PLACE).replace("COMMIT", COMMIT)


class Hub(ThreadingHTTPServer):
    """Serves FOLDER/NAME, and from FOLDER/NAME.xorbs the same bytes as chunks with their headers."""

    daemon_threads = True
    request_queue_size = 64
    folder: Path
    bytes_a_second: float | None
    answer_seconds: float


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        """hf_xet's report of how it went."""
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.send(200, {}, b"{}")

    def do_GET(self) -> None:
        time.sleep(self.server.answer_seconds)
        path = self.path.partition("?")[0]
        url = f"http://127.0.0.1:{self.server.server_port}"
        if path.startswith(PLACE):
            name = path.removeprefix(PLACE)
            sha256 = (self.server.folder / f"{name}.sha256").read_text()
            xet = {"X-Xet-Hash": sha256, "X-Xet-Refresh-Route": f"{url}/token"}
            self.send_part(self.server.folder / name, {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256}"', **xet})
        elif path == "/token":
            expiration = {"X-Xet-Token-Expiration": str(int(time.time()) + 3600)}
            self.send(200, {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "token", **expiration}, b"{}")
        elif path.startswith("/v2/reconstructions/"):
            self.send_reconstruction(url, path.rpartition("/")[2])
        elif path.startswith("/xorbs/"):
            self.send_part(self.server.folder / path.rpartition("/")[2], {})
        else:
            self.send(404, {}, b"")

    def range_of(self, size: int) -> tuple[int, int]:
        """The first byte that is wanted and the one behind the last."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "bytes=0-")
        assert wanted is not None
        return int(wanted[1]), min(size, int(wanted[2]) + 1) if wanted[2] else size

    def send_reconstruction(self, url: str, sha256: str) -> None:
        """Where the chunks of a file lie; for the test, a file's id is its sha256, and a xorb's is made up."""
        name = (self.server.folder / sha256).read_text()
        size = (self.server.folder / name).stat().st_size
        start, stop = self.range_of(size)
        if start >= size:
            self.send(416, {}, b"")
            return
        first, last = start // CHUNK_BYTES, (stop - 1) // CHUNK_BYTES
        terms, places = [], {}
        for xorb in range(first // XORB_CHUNKS, last // XORB_CHUNKS + 1):
            begin = max(first, xorb * XORB_CHUNKS)
            end = min(last + 1, (xorb + 1) * XORB_CHUNKS)
            identity = hashlib.sha256(f"{sha256} {xorb}".encode()).hexdigest()
            chunks = {"start": begin % XORB_CHUNKS, "end": end - xorb * XORB_CHUNKS}
            unpacked_bytes = min(end * CHUNK_BYTES, size) - begin * CHUNK_BYTES
            terms.append({"hash": identity, "unpacked_length": unpacked_bytes, "range": chunks})
            first_byte = begin * (CHUNK_BYTES + HEADER_BYTES)
            last_byte = first_byte + unpacked_bytes + (end - begin) * HEADER_BYTES - 1
            part = {"chunks": chunks, "bytes": {"start": first_byte, "end": last_byte}}
            places[identity] = [{"url": f"{url}/xorbs/{name}.xorbs", "ranges": [part]}]
        answer = {"offset_into_first_range": start - first * CHUNK_BYTES, "terms": terms, "xorbs": places}
        self.send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def send_part(self, path: Path, headers: dict[str, str]) -> None:
        size = path.stat().st_size
        start, stop = self.range_of(size)
        part = {"Content-Range": f"bytes {start}-{stop - 1}/{size}"} if self.headers["Range"] else {}
        self.send(206 if part else 200, {**headers, **part, "Accept-Ranges": "bytes"}, None, stop - start)
        if self.command == "HEAD":
            return
        with path.open("rb") as file:
            limit = self.server.bytes_a_second
            if limit is None:
                self.connection.sendfile(file, start, stop - start)
                return
            begun = time.perf_counter()
            for place in range(start, stop, CHUNK_BYTES):
                self.connection.sendfile(file, place, min(CHUNK_BYTES, stop - place))
                time.sleep(max(0.0, begun + (place - start) / limit - time.perf_counter()))

    def send(self, status: int, headers: dict[str, str], body: bytes | None, body_bytes: int = 0) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(body_bytes if body is None else len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(body)


def make_file(folder: Path, name: str, size: int) -> tuple[str, int, str]:
    """Writes the file both ways. Its name, size and sha256."""
    digest = hashlib.sha256()
    with (folder / name).open("wb") as plain, (folder / f"{name}.xorbs").open("wb") as xorbs:
        for start in range(0, size, CHUNK_BYTES):
            chunk = os.urandom(min(CHUNK_BYTES, size - start))
            digest.update(chunk)
            plain.write(chunk)
            length = len(chunk).to_bytes(3, "little")
            xorbs.write(b"\0" + length + b"\0" + length + chunk)  # version, length as sent, no compression, length
    sha256 = digest.hexdigest()
    (folder / f"{name}.sha256").write_text(sha256)
    (folder / sha256).write_text(name)
    return name, size, sha256


def serve(folder: Path, bytes_a_second: float | None, answer_seconds: float, pipe: Connection) -> None:
    """Runs in a process of its own until it is ended."""
    hub = Hub(("127.0.0.1", 0), Handler)
    hub.folder, hub.bytes_a_second, hub.answer_seconds = folder, bytes_a_second, answer_seconds
    pipe.send(f"http://127.0.0.1:{hub.server_port}")
    hub.serve_forever()


@contextmanager
def serving(folder: Path, bytes_a_second: float | None, answer_seconds: float) -> Iterator[str]:
    """The address at which a process serves the folder."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(folder, bytes_a_second, answer_seconds, there), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        process.terminate()
        process.join()


def fetch(way: str, url: str, listed: list[tuple[str, int, str]]) -> float:
    """Seconds of a process that fetches the files into an empty folder. Raises SystemExit for wrong bytes."""
    with tempfile.TemporaryDirectory() as home:
        environment = {
            **os.environ,
            "HF_HOME": home,
            "HF_HUB_DISABLE_XET": "0" if way == "hf_xet" else "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "*",
        }
        command = [sys.executable, "-c", FETCH, way, url, f"{home}/files", json.dumps(listed)]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        seconds, found = json.loads(done.stdout.splitlines()[-1])
    if found != [sha256 for _, _, sha256 in listed]:
        raise SystemExit(f"bench: {way} brought other bytes than were served")
    return float(seconds)


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else RUNS
    for what, files, size, bytes_a_second, answer_seconds in SETTINGS:
        folder = Path(tempfile.mkdtemp())
        try:
            listed = [make_file(folder, f"{number}.parquet", size) for number in range(files)]
            with serving(folder, bytes_a_second, answer_seconds) as url:
                rows = [[fetch(way, url, listed) for way in WAYS] for _ in range(runs + 1)][1:]
        finally:
            shutil.rmtree(folder)
        figures = [
            f"{way} {statistics.median(row[index] for row in rows):.2f} s "
            f"(ratio {statistics.median(row[index] / row[0] for row in rows):.2f})"
            for index, way in enumerate(WAYS)
        ]
        print(f"{what}, medians of {runs}: {', '.join(figures)}", flush=True)


if __name__ == "__main__":
    main()
