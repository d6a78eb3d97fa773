"""A server on loopback that speaks as much of Weights & Biases' protocol as wandb 0.31 asks for, and keeps what comes.

A run's history is kept as wandb's server keeps it: a request writes its lines at the offset that it names. Nothing is
dropped or put in order, so that tests see what a client sends.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from tests.hub import answering

ENTITY = "someone"


@dataclass
class Run:
    """What the server has of one run. files: by name, uploaded by the run, media included."""

    id: str
    project: str
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """The config without wandb's own part."""
        return {key: item["value"] for key, item in self.config.items() if key != "_wandb"}

    def rows(self) -> list[dict[str, Any]]:
        """The history without wandb's own columns."""
        return [{key: value for key, value in row.items() if not key.startswith("_")} for row in self.history]


@dataclass
class Artifact:
    """files: by the path within it."""

    id: str
    name: str
    type: str
    run: str
    committed: bool = False
    manifest: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


class WandbServer(ThreadingHTTPServer):
    """runs: by id. operations: the names of all GraphQL requests, in order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, Run] = {}
        self.artifacts: list[Artifact] = []
        self.operations: list[str] = []
        self.errors: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is no error of the server's; all others are for the test."""
        error = sys.exception()
        if not isinstance(error, OSError):
            self.errors.append(repr(error))

    def answer(self, query: str, values: dict[str, Any]) -> dict[str, Any]:
        """The `data` of a GraphQL request."""
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found[1] if found else query
        self.operations.append(name)
        return getattr(self, f"on_{name}")(values)

    def on_Viewer(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}}

    def on_ServerFeaturesQuery(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def on_RunResumeStatus(self, values: dict[str, Any]) -> dict[str, Any]:
        entity = {"id": "1", "name": ENTITY}
        run = self.runs.get(values["name"])
        return {"model": {"id": "1", "name": values["project"], "entity": entity, "bucket": run and describe(run)}}

    def on_UpsertBucket(self, values: dict[str, Any]) -> dict[str, Any]:
        inserted = values["name"] not in self.runs
        run = self.runs.setdefault(values["name"], Run(values["name"], values["project"]))
        if values.get("config"):
            run.config = json.loads(values["config"])
        project = {"id": "1", "name": run.project, "entity": {"id": "1", "name": ENTITY}}
        return {"upsertBucket": {"bucket": {**describe(run), "project": project}, "inserted": inserted}}

    def on_OrganizationCoreWeaveOrganizationID(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"entity": None}

    def on_ArtifactType(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}  # there is none of this name yet

    def on_RunStoppedStatus(self, values: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"stopped": False}}}

    def on_CreateRunFiles(self, values: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/file/{values['run']}/{name}"} for name in values["files"]]
        return {"createRunFiles": {"runID": values["run"], "uploadHeaders": [], "files": files}}

    def on_CreateArtifact(self, values: dict[str, Any]) -> dict[str, Any]:
        asked = values["input"]
        id = str(len(self.artifacts))
        names = (asked.get("artifactCollectionNames"), asked.get("artifactCollectionName"))
        name = names[1] or names[0][0]
        self.artifacts.append(Artifact(id, name, asked["artifactTypeName"], asked["runName"]))
        sequence = {"latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": id, "state": "PENDING", "artifactSequence": sequence}}}

    def on_CreateArtifactManifest(self, values: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "1", "uploadUrl": f"{self.url}/manifest/{values['artifactID']}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": values["artifactID"], "file": file}}}

    def on_UpdateArtifactManifest(self, values: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "1", "uploadUrl": f"{self.url}/manifest/{values['artifactManifestID']}", "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": values["artifactManifestID"], "file": file}}}

    def on_CreateArtifactFiles(self, values: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for file in values["input"]["artifactFiles"]:
            url = f"{self.url}/artifact/{file['artifactID']}/{file['name']}"
            node = {"storagePath": file["name"], "uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}
            edges.append({"node": {**node, "artifact": {"id": file["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def on_CommitArtifact(self, values: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[int(values["artifactID"])]
        artifact.committed = True
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": "0"}}}

    def take_stream(self, run: Run, sent: dict[str, Any]) -> None:
        """A file_stream request: lines of a file from an offset on."""
        for name, chunk in (sent.get("files") or {}).items():
            lines = chunk["content"]
            if name == "wandb-summary.json":
                run.summary = json.loads(lines[-1])
            kept = {"wandb-history.jsonl": run.history, "wandb-events.jsonl": run.events}.get(name)
            if kept is not None:
                kept[chunk["offset"] :] = [json.loads(line) for line in lines]
        if sent.get("complete"):
            run.exit_codes.append(sent["exitcode"])

    def take_upload(self, path: str, body: bytes) -> None:
        """A file of a run or an artifact, or an artifact's manifest."""
        kind, owner, *rest = path.strip("/").split("/")
        name = "/".join(rest)
        if kind == "file":
            self.runs[owner].files[name] = body
        elif kind == "manifest":
            self.artifacts[int(owner)].manifest = json.loads(body)
        else:
            self.artifacts[int(owner)].files[name] = body


def describe(run: Run) -> dict[str, Any]:
    """A run as the server tells of it, also to who resumes it."""
    return {
        "id": f"storage-{run.id}",
        "name": run.id,
        "displayName": run.id,
        "sweepName": None,
        "summaryMetrics": json.dumps(run.summary),
        "logLineCount": 0,
        "historyLineCount": len(run.history),
        "eventsLineCount": len(run.events),
        "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
        "eventsTail": json.dumps([json.dumps(row) for row in run.events[-1:]]),
        "config": json.dumps(run.config),
        "tags": [],
        "notes": None,
        "wandbConfig": json.dumps({"t": 1}),
    }


class Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.body()
        if self.path.endswith("/graphql"):
            sent = json.loads(body)
            self.send(json.dumps({"data": self.server.answer(sent["query"], sent.get("variables") or {})}))
        elif self.path.endswith("/file_stream"):
            self.server.take_stream(self.server.runs[unquote(self.path).split("/")[-2]], json.loads(body))
            self.send("{}")
        else:  # what wandb tells its maker of errors and usage
            self.send("{}", 404)

    def do_PUT(self) -> None:
        self.server.take_upload(unquote(self.path), self.body())
        self.send("")

    def do_GET(self) -> None:
        self.send("{}", 404)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, text: str, status: int = 200) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving() -> Iterator[WandbServer]:
    """A server that answers until the block ends."""
    server = WandbServer()
    with answering(server):
        yield server
