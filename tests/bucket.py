"""An S3 server on loopback (moto's): one bucket that knows one user, and a record of what went over the wire."""

import secrets
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.test import Client

from tests.hub import answering

NAME = "team"
# Made anew each time: in a file of the repository, they would be found there.
USER, SECRET = f"AKIA{secrets.token_hex(8).upper()}", secrets.token_hex(20)


class Bucket:
    """received, served: bytes of objects put and got, by key.

    moto checks no credentials, and neither does this check the signature: a request must name the user, as whoever
    signs does.
    """

    def __init__(self) -> None:
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.lock = threading.Lock()
        self.received: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.put("", b"")

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
        if f"Credential={USER}/" not in environ.get("HTTP_AUTHORIZATION", ""):
            start_response("403 Forbidden", [("Content-Length", "0")])
            return
        key = environ["PATH_INFO"].removeprefix(f"/{NAME}").removeprefix("/")
        if environ["REQUEST_METHOD"] == "PUT":
            self.count(self.received, key, int(environ["CONTENT_LENGTH"]))
        for piece in self.moto(environ, start_response):
            if environ["REQUEST_METHOD"] == "GET" and key:
                self.count(self.served, key, len(piece))
            yield piece

    def put(self, key: str, data: bytes) -> None:
        """Places an object, as somebody else might; the bucket itself where there is no key."""
        path = f"/{NAME}/{key}".removesuffix("/")
        headers = {"Host": "s3.amazonaws.com", "Authorization": f"AWS4-HMAC-SHA256 Credential={USER}/1/us-east-1/s3/x"}
        assert Client(self.moto).put(path, data=data, headers=headers).status_code == 200

    def count(self, counter: Counter[str], key: str, size: int) -> None:
        with self.lock:
            counter[key] += size

    def forget(self) -> None:
        self.received.clear()
        self.served.clear()


class Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@contextmanager
def serving(bucket: Bucket) -> Iterator[str]:
    """The address at which the bucket is served meanwhile."""
    server = make_server("127.0.0.1", 0, bucket, threaded=True, request_handler=Quiet)
    server.daemon_threads = True
    with answering(server) as address:
        yield address
