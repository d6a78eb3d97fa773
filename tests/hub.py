"""A Hugging Face Hub on loopback: one data set, or one model, at one commit, the faults it is told to have, and a count
of what was asked for and served."""

import hashlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

from encore.download import retries

# Runs a module as `python -m` does, without time to wait: `python -c IMPATIENT MODULE ...`.
IMPATIENT = """
import runpy, sys
from encore.download import retries
retries.LONGEST_WAIT_SECONDS = 0.01
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
REPOSITORY = "owner/corpus"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LISTING = "list"  # what a fault of the listing is filed under
ALWAYS = 10**9
PIECE_BYTES = 16_384


@dataclass
class Fault:
    """What goes wrong with the next `times` requests.

    kind: `status` answers with that status, `reset` breaks the connection off with a reset and `end` in order, `stall`
    stops sending until the Hub's `go_on`, each after so many bytes of the body (after_bytes None: before the header);
    `damage` and `damage_end` change the first and the last byte; `no_range` sends all whatever part is wanted;
    `flood` goes on after the body with 64 MB of zeros.
    """

    kind: str
    times: int = 1
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    after_bytes: int | None = 0


class Hub(ThreadingHTTPServer):
    """files: what the data set holds. The other attributes say how it misbehaves and tell what it was asked.

    A file's tail, which is asked for to read its footer, is not counted as the file: it is `NAME#tail`, in the faults
    and in the counts.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.kind = "datasets"  # or models: what the repository is
        self.other_files: dict[str, bytes] = {}  # by path: files that are no data set's
        self.in_git: set[str] = set()  # small files that are not in LFS: the Hub has no sha256 for them
        self.commit = COMMIT  # what it says that a listing is of
        self.card: dict[str, object] | None = None  # the head of its README
        self.token: str | None = None  # refuses every request without it
        self.failure: tuple[int, str] | None = None  # status and X-Error-Code of every answer
        self.page: bytes | None = None  # answers everything with this, as a hotel's network does
        self.storage: str | None = None  # address of the Hub that holds the bytes, to which it redirects
        self.faults: dict[str, list[Fault]] = {}  # by path in the data set, LISTING or path of another file
        self.seconds_for_piece = 0.0  # slows bodies down
        self.go_on = threading.Event()
        self.lock = threading.Lock()
        self.requests: Counter[str] = Counter()  # by "METHOD path in the data set", "list COMMIT", "list newest"
        self.bytes_served: Counter[str] = Counter()  # by path in the data set
        self.authorizations: set[str | None] = set()
        self.encodings: set[str | None] = set()  # that were accepted for a file

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def take_fault(self, name: str, parts: bool = False) -> Fault | None:
        """The fault that the next request for `name` meets. parts: whether it is for a part of the file."""
        with self.lock:
            for fault in self.faults.get(name, []):
                if fault.times and (parts or fault.kind != "no_range"):
                    fault.times -= 1
                    return fault
        return None

    def bodies_served(self) -> dict[str, int]:
        """Bytes served of each file, those of tails not among them."""
        return {name: count for name, count in self.bytes_served.items() if name in self.files}

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        """Closes without saying goodbye first, so that a reset is one."""
        self.close_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is no error of the Hub's."""


@contextmanager
def connected(monkeypatch: pytest.MonkeyPatch, url: str, token: str) -> Iterator[None]:
    """Makes this the address of the Hub, and this the user's token, and leaves no time to wait."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template)
    monkeypatch.setattr(retries, "LONGEST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("NO_PROXY", "*")
    try:
        yield
    finally:
        huggingface_hub.close_session()


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Hub]:
    """A Hub that answers until the block ends."""
    hub = Hub(files)
    with answering(hub):
        try:
            yield hub
        finally:
            hub.go_on.set()


@contextmanager
def answering(server: HTTPServer) -> Iterator[str]:
    """Its address, at which a thread answers until the block ends."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        if REPOSITORY in path:  # huggingface_hub has questions of its own beside
            hub.authorizations.add(self.headers["Authorization"])
        api = f"/api/{hub.kind}/{REPOSITORY}"
        listings = {api: "list newest", f"{api}/revision/{COMMIT}": "list COMMIT"}
        place = f"/{REPOSITORY}/" if hub.kind == "models" else f"/datasets/{REPOSITORY}/"
        prefix = f"{place}resolve/{COMMIT}/"
        if path in hub.other_files:
            hub.authorizations.add(self.headers["Authorization"])
            self.send_faulty(path, hub.other_files[path], {}, 200, hub.take_fault(path))
        elif hub.failure:
            self.refuse(*hub.failure)
        elif hub.token and self.headers["Authorization"] != f"Bearer {hub.token}":
            self.refuse(401, "RepoNotFound")
        elif hub.page is not None:
            self.send(200, hub.page, {"Content-Type": "text/html"})
        elif path in listings:
            with hub.lock:
                hub.requests[listings[path]] += 1
            page, headers = json.dumps(self.listing()).encode(), {"Content-Type": "application/json"}
            self.send_faulty("", page, headers, 200, hub.take_fault(LISTING))
        elif path.startswith(f"{api}/"):
            self.refuse(404, "RevisionNotFound")
        elif path.startswith(prefix) and path.removeprefix(prefix) in hub.files:
            self.send_file(path.removeprefix(prefix))
        elif path.startswith(place):
            self.refuse(404, "EntryNotFound")
        else:
            self.refuse(404, "RepoNotFound")

    def listing(self) -> dict:
        siblings = []
        for name, content in self.server.files.items():
            sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            sibling = {"rfilename": name, "size": len(content), "blobId": sha1}
            if name not in self.server.in_git:
                sha256 = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 134}
            siblings.append(sibling)
        card = {"cardData": self.server.card} if self.server.card else {}
        return {"id": REPOSITORY, "sha": self.server.commit, "siblings": siblings, **card}

    def send_file(self, name: str) -> None:
        hub, content = self.server, self.server.files[name]
        wanted = self.headers["Range"]
        asked_for = name if not wanted or wanted.endswith("-") else f"{name}#tail"
        with hub.lock:
            hub.requests[f"{self.command} {asked_for}"] += 1
        hub.encodings.add(self.headers["Accept-Encoding"])
        sha256 = hashlib.sha256(content).hexdigest()
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{sha256}"',
            "X-Linked-Etag": f'"{sha256}"',
            "X-Linked-Size": str(len(content)),
            "Accept-Ranges": "bytes",
        }
        if hub.storage:
            self.send(302, b"", {**headers, "Location": hub.storage + self.path})
            return
        fault = hub.take_fault(asked_for, bool(wanted))
        start, stop, status = 0, len(content), 200
        if wanted and not (fault and fault.kind == "no_range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop, status = int(first), int(last) + 1 if last else stop, 206
            if start >= len(content):
                self.send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self.send_faulty(asked_for, content[start:stop], headers, status, fault)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"", {"X-Error-Code": code} if code else {})

    def send_faulty(self, name: str, body: bytes, headers: dict[str, str], status: int, fault: Fault | None) -> None:
        """Sends an answer, or what a fault makes of it."""
        if fault is None or fault.kind == "no_range":
            self.send(status, body, headers, name)
        elif fault.kind == "status":
            self.send(fault.status, b"", fault.headers)
        elif fault.kind == "flood":
            self.send(status, body + bytes(64_000_000), headers, name)
        elif fault.kind == "damage":
            self.send(status, bytes([body[0] ^ 1]) + body[1:], headers, name)
        elif fault.kind == "damage_end":
            self.send(status, body[:-1] + bytes([body[-1] ^ 1]), headers, name)
        else:
            if fault.after_bytes is not None:
                self.send(status, body, headers, name, stop=fault.after_bytes)
            if fault.kind == "stall":
                self.server.go_on.wait()
                self.write(body[fault.after_bytes or 0 :], name)
            elif fault.kind == "reset":
                time.sleep(0.05)  # so that what was sent is read: a reset throws away what is on its way
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    def send(self, status: int, body: bytes, headers: dict[str, str], name: str = "", stop: int | None = None) -> None:
        """stop: how much of the body is sent; its length is told as it would be whole."""
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        with suppress(BrokenPipeError, ConnectionResetError):
            self.end_headers()
        if self.command != "HEAD":
            self.write(body[:stop], name)

    def write(self, body: bytes, name: str) -> None:
        for start in range(0, len(body), PIECE_BYTES):
            piece = body[start : start + PIECE_BYTES]
            with self.server.lock:  # counted first: the client may look as soon as it has them
                self.server.bytes_served[name] += len(piece)
            try:
                self.wfile.write(piece)
            except (BrokenPipeError, ConnectionResetError):
                return
            time.sleep(self.server.seconds_for_piece)
