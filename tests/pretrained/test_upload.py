"""A model or tokens on a Hub on loopback, which answers what huggingface_hub asks for an upload over HTTP."""

import base64
import json
import re
import sys
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from encore.errors import EncoreError
from encore.pretrained.init_from import RECORD, WEIGHTS
from encore.pretrained.model_card import CARD
from encore.pretrained.upload import main, upload_model, upload_tokens
from tests.hub import COMMIT, answering, connected
from tests.small_models import save_small_model
from tests.token_folders import make_documents, write_token_folder

NAME = "owner/name"


class Hub(ThreadingHTTPServer):
    """What it got: the repository as it was asked for, the files of the commit, the cards, and the tokens."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.made, self.files, self.objects, self.cards, self.tokens = [], {}, {}, [], set()
        self.refuses = None  # the status of every answer

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self.send(404, {})

    def do_PUT(self):
        """The bytes of a large file."""
        self.server.objects[self.path.rpartition("/")[2]] = self.read()
        self.send(200, {})

    def do_POST(self):
        hub, body = self.server, self.read()
        hub.tokens.add(self.headers["Authorization"])
        if hub.refuses:
            self.send(hub.refuses, {"error": "no"})
        elif self.path == "/api/repos/create":
            hub.made.append(json.loads(body))
            self.send(409 if len(hub.made) > 1 else 200, {"url": f"{hub.url}/{NAME}"})
        elif self.path == "/api/validate-yaml":
            hub.cards.append(json.loads(body))
            self.send(200, {"errors": [], "warnings": []})
        elif re.fullmatch(f"/api/(models|datasets)/{NAME}/preupload/main", self.path):
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith((".safetensors", ".bin")) else "regular" for path in asked}
            rows = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self.send(200, {"files": rows})
        elif self.path in (f"/{NAME}.git/info/lfs/objects/batch", f"/datasets/{NAME}.git/info/lfs/objects/batch"):
            rows = json.loads(body)["objects"]
            actions = [{**row, "actions": {"upload": {"href": f"{hub.url}/store/{row['oid']}"}}} for row in rows]
            self.send(200, {"transfer": "basic", "objects": actions})
        elif re.fullmatch(f"/api/(models|datasets)/{NAME}/commit/main", self.path):
            self.commit([json.loads(line) for line in body.splitlines()])
        else:
            self.send(404, {})

    def commit(self, lines):
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.objects[value["oid"]]
            else:
                self.server.files[value["path"]] = base64.b64decode(value["content"])
        self.send(200, {"commitUrl": f"{self.server.url}/{NAME}/commit/{COMMIT}", "commitOid": COMMIT})

    def read(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            whole = b""
            while size := int(self.rfile.readline(), 16):
                whole += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return whole
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the other way to the same end, over another server
    server = Hub()
    with answering(server), connected(monkeypatch, server.url, "hf_secret"):
        yield server


@pytest.fixture
def tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("ENCORE_SCRATCH", str(tmp_path / "scratch"))
    train, val = make_documents([30, 40], 300, seed=1), make_documents([20], 300, seed=2)
    write_token_folder(tmp_path / "data/tokens", train, val, 300, shard_tokens=40)
    return tmp_path / "data/tokens"


@pytest.fixture
def folder(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    save_small_model(model)
    (model / CARD).write_text("---\nlibrary_name: transformers\n---\n\n# A model\n")
    return model


def test_the_files_of_the_model_arrive_and_no_others(hub, folder, monkeypatch, capsys):
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {WEIGHTS, RECORD, CARD, "config.json", "tokenizer.tiktoken"} == set(expected)
    (folder / "notes.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["encore upload", NAME, "--model", str(folder), "--private"])
    main()
    assert capsys.readouterr().out == f"{hub.url}/{NAME}\n"
    assert hub.files == expected
    assert list(hub.objects) == [sha256(expected[WEIGHTS]).hexdigest()]
    assert hub.tokens == {"Bearer hf_secret"}
    assert hub.made == [{"name": "name", "organization": "owner", "type": "model", "visibility": "private"}]
    hub.files.clear()
    upload_model(folder, NAME, private=False)  # a second time, to the same repository
    assert hub.files == expected
    assert hub.made[1]["visibility"] == "public"


def test_tokens_arrive_with_a_card_as_a_data_set(hub, tokens, monkeypatch, capsys, tmp_path):
    expected = {path.name: path.read_bytes() for path in tokens.iterdir()}
    assert set(expected) == {"manifest.json", "tokenizer.tiktoken", *(f"train_0000{n}.bin" for n in (0, 1))} | {
        "val_00000.bin"
    }
    (tokens / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["encore upload", NAME, "--data", "--private"])
    main()
    assert capsys.readouterr().out == f"{hub.url}/{NAME}\n"
    card = hub.files.pop(CARD).decode()
    assert "| `package:made-up` | `1.0` | MIT | 70 |" in card.splitlines()
    assert hub.files == expected
    assert hub.made == [{"name": "name", "organization": "owner", "type": "dataset", "visibility": "private"}]
    assert hub.cards == [{"content": card, "repoType": "dataset"}]
    assert not (tokens / CARD).exists()


def test_damaged_tokens_are_not_uploaded(hub, tokens):
    shard = tokens / "train_00001.bin"
    shard.write_bytes(shard.read_bytes()[::-1])
    with pytest.raises(EncoreError, match=f"^{shard} has other bytes than its manifest says; "):
        upload_tokens(tokens, NAME, private=False)
    assert (hub.made, hub.files) == ([], {})


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_damaged_file_is_not_uploaded(hub, folder, name):
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    with pytest.raises(EncoreError, match=f"^{folder / name}: other bytes than {folder / RECORD} has the hash of; "):
        upload_model(folder, NAME, private=False)
    assert (hub.made, hub.files) == ([], {})


@pytest.mark.parametrize("name", [WEIGHTS, CARD])
def test_a_missing_file_is_told(hub, folder, name):
    (folder / name).unlink()
    with pytest.raises(EncoreError, match=f"^{folder} lacks {name}; bring {folder} back from where it came$"):
        upload_model(folder, NAME, private=False)


def test_a_folder_without_hashes_is_refused(hub, tmp_path):
    with pytest.raises(EncoreError, match="has no hashes; name the folder of a model that Encore wrote"):
        upload_model(tmp_path, NAME, private=False)


@pytest.mark.parametrize(
    ("status", "told"),
    [(401, r"refuses it \(401\); check the spelling"), (403, r"refuses it \(403\)"), (500, r"an error \(500\)")],
)
def test_a_refusal_is_a_sentence(hub, folder, status, told):
    hub.refuses = status
    with pytest.raises(EncoreError, match=f"^{NAME}: the Hub .*{told}"):
        upload_model(folder, NAME, private=False)


def test_no_token_no_network_and_no_name_are_sentences(hub, folder, monkeypatch, tmp_path):
    with pytest.raises(EncoreError, match=r"^own er/name: it cannot be uploaded \(.*\); mend that and run again$"):
        upload_model(folder, "own er/name", private=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(EncoreError, match=f"^{NAME}: the connection to the Hub fails .*HF_HUB_OFFLINE and run again$"):
        upload_model(folder, NAME, private=False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(EncoreError, match=f"^{NAME}: the Hub wants a token; set HF_TOKEN, or run `hf auth login`$"):
        upload_model(folder, NAME, private=False)
    monkeypatch.setattr(sys, "argv", ["encore upload", "name"])
    with pytest.raises(EncoreError, match=r"^name is no repository of the Hub; name one as OWNER/NAME$"):
        main()
