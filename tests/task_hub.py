"""The Hub on loopback as `datasets` sees it: one data set of HellaSwag's shape, with rows made up here."""

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from tests.hub import COMMIT, answering

REPOSITORY = "Rowan/hellaswag"
ENDINGS = (
    "heats some oil.",
    "goes to sleep in the oven.",
    "is the oil.",
    "then, slowly, eats every single pan he has.",
)


def make_rows(count: int) -> list[dict]:
    """Beginnings with four endings, the right one going round."""
    return [
        {
            "ind": number,
            "activity_label": "Cooking",
            "ctx_a": f"Man number {number} takes a pan.",
            "ctx_b": "he",
            "ctx": f"Man number {number} takes a pan. he",
            "endings": [*ENDINGS[number % 4 :], *ENDINGS[: number % 4]],
            "source_id": "made up",
            "split": "val",
            "split_type": "indomain",
            "label": str(number % 3),
        }
        for number in range(count)
    ]


@contextmanager
def serving_tasks(rows: list[dict]) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the paths that were asked for, until the block ends."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    files = {f"data/{split}-00000-of-00001.parquet": buffer.getvalue() for split in ("train", "validation")}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(path)
            api, place = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/{COMMIT}/"
            if path in (api, f"{api}/revision/{COMMIT}"):
                self.send_json({"id": REPOSITORY, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
            elif path == f"{api}/tree/{COMMIT}":
                self.send_json([{"type": "directory", "path": "data", "oid": "0", "size": 0}])
            elif path == f"{api}/tree/{COMMIT}/data":
                self.send_json([describe(name, content) for name, content in files.items()])
            elif path.removeprefix(place) in files:
                content = files[path.removeprefix(place)]
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                self.send(200, content, {"X-Repo-Commit": COMMIT, "ETag": etag})
            else:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"})

        def send_json(self, value: object) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    with answering(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as address:
        yield address, asked


def describe(name: str, content: bytes) -> dict:
    """A file's entry in a listing of the Hub's."""
    lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return {"type": "file", "path": name, "size": len(content), "oid": "1" * 40, "lfs": lfs}
