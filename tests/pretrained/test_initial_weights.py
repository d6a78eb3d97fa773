"""initial_weights.py: data/init from a Hub on loopback and from a folder, and a run of the pipeline from it."""

import csv
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from encore import files
from encore.errors import EncoreError
from encore.pretrained.init_from import PUBLISHED
from encore.pretrained.initial_weights import fetch_initial
from tests.conftest import SMALL, run_dvc, write_page
from tests.hub import ALWAYS, COMMIT, REPOSITORY, Fault, Hub, connected, serving
from tests.sealed import read_with_seal, write_with_seal
from tests.text_sources import sha256

SECRET = "hf_SeCrEtToKeN"
CONFIG = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 16}
WANTED = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": Random(1).randbytes(100_000)}
STORE = Path("scratch/hub-models/owner--corpus") / COMMIT


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Has a model as the Hub has GPT-2: the configuration in git, the weights in LFS, and more than is wanted."""
    published = PUBLISHED["gpt2"]._replace(repository=REPOSITORY, commit=COMMIT)
    monkeypatch.setitem(PUBLISHED, "gpt2", published)
    others = {"README.md": b"# GPT-2", "pytorch_model.bin": b"pickled", "onnx/config.json": b"{}"}
    with serving({**others, **WANTED}) as server, connected(monkeypatch, server.url, SECRET):
        server.kind = "models"
        server.in_git = {"README.md", "config.json", "onnx/config.json"}
        yield server


def fetch(folder: Path, init_from: str = "gpt2") -> None:
    """Anew into the folder, as the stage does."""
    shutil.rmtree(folder)
    folder.mkdir()
    fetch_initial(init_from, folder, Path("scratch"))


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the manifest, whose hashes are compared."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = read_with_seal(files.pop("manifest.json"))
    assert manifest["files"] == {name: sha256(content) for name, content in files.items()}
    return files


def test_scratch_is_a_manifest_alone(fetch_folder: Path) -> None:
    fetch_initial("scratch", fetch_folder, Path("scratch"))
    assert [path.name for path in fetch_folder.iterdir()] == ["manifest.json"]
    assert read_with_seal((fetch_folder / "manifest.json").read_bytes()) == {"init_from": "scratch", "files": {}}
    assert not Path("scratch").exists()


# from the Hub


def test_what_is_wanted_and_nothing_twice(hub: Hub, fetch_folder: Path) -> None:
    fetch(fetch_folder)
    assert contents(fetch_folder) == WANTED
    assert list(json.loads((fetch_folder / "manifest.json").read_bytes())["files"]) == list(WANTED)
    assert json.loads((fetch_folder / "manifest.json").read_bytes())["init_from"] == "gpt2"
    first = (fetch_folder / "manifest.json").read_bytes()
    fetch(fetch_folder)
    assert (fetch_folder / "manifest.json").read_bytes() == first
    assert hub.bodies_served() == {name: len(content) for name, content in WANTED.items()}
    assert hub.requests == {"list COMMIT": 2, "GET config.json": 1, "GET model.safetensors": 1}
    assert hub.authorizations == {f"Bearer {SECRET}"}
    for name in WANTED:  # one file with two names
        assert (STORE / name).samefile(fetch_folder / name)


@pytest.mark.parametrize("name", WANTED)
def test_a_file_with_other_bytes_is_refused(hub: Hub, fetch_folder: Path, name: str) -> None:
    """One in LFS is known by its sha256, one in git by its blob's id."""
    hub.faults[name] = [Fault("damage", ALWAYS)]
    with pytest.raises(EncoreError, match=rf"^hf:owner/corpus at {COMMIT}, file {name}\b.* not the listed one"):
        fetch(fetch_folder)
    assert not (STORE / name).exists()
    assert list(fetch_folder.iterdir()) == []


@pytest.mark.parametrize("name", WANTED)
def test_a_file_that_was_damaged_on_the_disk_is_fetched_again(hub: Hub, fetch_folder: Path, name: str) -> None:
    fetch(fetch_folder)
    (STORE / name).write_bytes(bytes(len(WANTED[name])))
    fetch(fetch_folder)
    assert contents(fetch_folder) == WANTED
    assert {name: hub.requests[f"GET {name}"] for name in WANTED} == {**dict.fromkeys(WANTED, 1), name: 2}


@pytest.mark.parametrize("name", WANTED)
def test_a_file_that_the_hub_lacks(hub: Hub, fetch_folder: Path, name: str) -> None:
    del hub.files[name]
    with pytest.raises(EncoreError) as error:
        fetch(fetch_folder)
    assert str(error.value) == f"hf:owner/corpus at {COMMIT} has no {name}; name other weights"
    assert hub.bodies_served() == {}


def test_a_model_that_the_hub_lacks(hub: Hub, fetch_folder: Path) -> None:
    hub.kind = "datasets"
    with pytest.raises(EncoreError, match=rf"^hf:owner/corpus at {COMMIT}: the Hub has no such thing \(404\); "):
        fetch(fetch_folder)


def test_what_has_arrived_is_kept_and_continued(hub: Hub, fetch_folder: Path) -> None:
    hub.faults["model.safetensors"] = [Fault("end", after_bytes=60_000), Fault("end", ALWAYS, after_bytes=0)]
    with pytest.raises(EncoreError, match=r"run again; what is on the disk already is kept$"):
        fetch(fetch_folder)
    hub.faults.clear()
    fetch(fetch_folder)
    assert contents(fetch_folder) == WANTED
    assert hub.bytes_served["model.safetensors"] == 100_000


def test_room_is_asked_for_first(hub: Hub, fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = sum(map(len, WANTED.values())) - 1
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    sentence = rf"^{STORE}: 0\.1 MB are going .*; make room, or set ENCORE_SCRATCH to a folder on a larger disk$"
    with pytest.raises(EncoreError, match=sentence):
        fetch(fetch_folder)
    assert hub.bodies_served() == {}
    free += 1
    fetch(fetch_folder)
    free = 0
    fetch(fetch_folder)  # all is there


# from a folder


def test_a_folder_is_copied_and_stays_the_users(fetch_folder: Path) -> None:
    tokenizers = {"tokenizer.tiktoken": b"ranks", "tokenizer.json": b"{}", "vocab.json": b"{}"}
    files = {**WANTED, "encore.json": b'{"bias": false}', **tokenizers}
    weights = Path("weights")
    (weights / "runs").mkdir(parents=True)
    for name, content in {**files, "optimizer.pt": b"pickled", "README.md": b"mine", "secret.tiktoken": b"?"}.items():
        (weights / name).write_bytes(content)
    fetch(fetch_folder, "weights/")
    assert contents(fetch_folder) == files
    assert json.loads((fetch_folder / "manifest.json").read_bytes())["init_from"] == "weights/"
    for path in fetch_folder.iterdir():
        assert path.stat().st_nlink == 1
        path.chmod(0o444)  # as DVC does
        path.unlink()
    for name, content in files.items():
        assert (weights / name).read_bytes() == content
        assert (weights / name).stat().st_mode & 0o200


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_is_not_the_one_of_the_record_is_refused(fetch_folder: Path, name: str) -> None:
    folder = write_weights(Path("weights"))
    (folder / "tokenizer.json").write_bytes(b"{}")
    hashes = {path.name: sha256(path.read_bytes()) for path in folder.iterdir()}
    write_with_seal(folder / "encore.json", {"bias": False, "files_sha256": hashes})
    fetch(fetch_folder, "weights/")
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    with pytest.raises(EncoreError) as error:
        fetch(fetch_folder, "weights/")
    assert str(error.value) == (
        f"weights/{name}: other bytes than weights/encore.json has the hash of; bring weights back from where it came"
    )


def write_weights(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in WANTED.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "encore.json", "tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("link", ["absolute", "relative", "through a folder", "to another link"])
def test_a_link_to_elsewhere_is_refused(fetch_folder: Path, name: str, link: str) -> None:
    secret = Path("credentials")
    secret.write_text(json.dumps(CONFIG))
    folder = write_weights(Path("weights"))
    (folder / name).unlink(missing_ok=True)
    targets = {"absolute": secret.absolute(), "relative": "../credentials", "through a folder": "home/credentials"}
    (folder / "home").symlink_to(Path.cwd())
    (folder / "other").symlink_to(secret.absolute())
    (folder / name).symlink_to(targets.get(link, "other"))
    with pytest.raises(EncoreError) as error:
        fetch(fetch_folder, "./weights")
    assert str(error.value) == (
        f"init_from: weights/{name} is a link to {secret.absolute()}, outside of its folder; "
        "put a copy in its place (`cp -L`), or name the folder of the files themselves"
    )
    assert list(fetch_folder.iterdir()) == []


def test_links_within_the_folder_and_of_the_hubs_cache_are_followed(fetch_folder: Path) -> None:
    """The cache keeps models--OWNER--NAME/blobs/HASH, and links to them in snapshots/COMMIT."""
    cache = Path("models--owner--name")
    blobs, snapshot = write_weights(cache / "blobs"), cache / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in WANTED:
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    fetch(fetch_folder, f"./{snapshot}")
    assert contents(fetch_folder) == WANTED
    assert not any(path.is_symlink() for path in fetch_folder.iterdir())

    (blobs / "runs").mkdir()
    (blobs / "model.safetensors").rename(blobs / "runs/newest")
    (blobs / "model.safetensors").symlink_to("runs/newest")
    Path("named").symlink_to(blobs)  # the folder itself may be a link: it is what was asked for
    fetch(fetch_folder, "./named")
    assert contents(fetch_folder) == WANTED


def test_a_blob_that_is_a_link_to_elsewhere_is_refused(fetch_folder: Path) -> None:
    cache = Path("models--owner--name")
    snapshot = write_weights(cache / "snapshots" / COMMIT)
    (cache / "blobs").mkdir()
    Path("credentials").write_text(json.dumps(CONFIG))
    (cache / "blobs/hash").symlink_to(Path("credentials").absolute())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../blobs/hash")
    with pytest.raises(EncoreError, match=r"/config\.json is a link to .*/credentials, outside"):
        fetch(fetch_folder, f"./{snapshot}")


def test_what_is_no_regular_file_is_not_read(fetch_folder: Path) -> None:
    folder = write_weights(Path("weights"))
    os.mkfifo(folder / "tokenizer.json")
    (folder / "vocab.json").mkdir()
    fetch(fetch_folder, "./weights")
    assert contents(fetch_folder) == WANTED
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(EncoreError, match=r"^init_from: weights/config\.json is missing; "):
        fetch(fetch_folder, "./weights")


def test_weights_without_a_tokenizer_are_noted(fetch_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_weights(Path("weights"))
    fetch(fetch_folder, "./weights")
    assert capsys.readouterr().err.startswith(
        "encore: note: ./weights has no tokenizer.tiktoken or tokenizer.json or vocab.json, so nothing tells whether"
    )
    (folder / "vocab.json").write_text("{}")
    fetch(fetch_folder, "./weights")
    assert capsys.readouterr().err == ""


def test_a_folder_without_weights_is_refused(fetch_folder: Path) -> None:
    Path("weights").mkdir()
    with pytest.raises(EncoreError, match=r"^init_from: weights/config\.json is missing; "):
        fetch(fetch_folder, "./weights")
    assert list(fetch_folder.iterdir()) == []


# through DVC


def read_val_losses(repository: Path) -> list[float]:
    with (repository / "metrics/eval.tsv").open() as file:
        return [float(row["val_loss"]) for row in csv.DictReader(file, delimiter="\t")]


def test_a_run_goes_on_from_the_weights_of_another(finished: Path) -> None:
    weights = finished / "weights"
    shutil.copytree(finished / "model", weights)
    for path in weights.iterdir():
        path.chmod(0o644)  # DVC's files are read-only
    before = {path.name: path.read_bytes() for path in weights.iterdir()}
    losses = read_val_losses(finished)
    assert losses[-1] < losses[0] - 0.1

    page = {**SMALL, "init_from": "./weights/"}
    write_page(finished / "params.yaml", **page)
    run_dvc(finished, "repro")
    assert read_val_losses(finished)[0] == pytest.approx(losses[-1], abs=1e-4)
    brought = {"config.json", "encore.json", "model.safetensors", "tokenizer.tiktoken", "tokenizer.json"}
    assert contents(finished / "data/init") == {name: before[name] for name in brought}
    assert {path.name: path.read_bytes() for path in weights.iterdir()} == before
    assert all(os.access(path, os.W_OK) and path.stat().st_nlink == 1 for path in weights.iterdir())
    record = json.loads((finished / "model/encore.json").read_bytes())
    assert record["params"]["init_from"] == "./weights/"
    assert record["init_sha256"] == sha256((finished / "data/init/manifest.json").read_bytes())

    # Another model than the weights are: nothing that there is goes.
    outputs = ["data/init/manifest.json", "data/raw/manifest.json", "data/tokens/manifest.json", "model/config.json"]
    outputs += ["training.log", "metrics/metrics.json", "metrics/eval.json", "metrics/samples.md"]
    there = {name: (finished / name).read_bytes() for name in outputs}
    write_page(finished / "params.yaml", **{**page, "n_embd": 64})
    output = run_dvc(finished, "repro", exit_code=255)
    assert "  n_embd: 64 is not what the weights of init_from, ./weights/, have: 32\n" in output
    assert "Traceback" not in output
    assert {name: (finished / name).read_bytes() for name in outputs} == there
