"""hf:OWNER/NAME: how a Hub refuses, is ill or out of reach, and that the token is nowhere afterwards."""

import random
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from encore.download import hub as hub_module
from encore.download import retries, transfer
from encore.download.hub import DataSet, fetch_model, newest_commit
from encore.download.raw_folder import RawFolder
from encore.download.sources import current_revision, fetch
from encore.errors import EncoreError
from tests.hub import ALWAYS, COMMIT, LISTING, REPOSITORY, Fault, Hub, connected, serving
from tests.text_sources import PLENTY, parquet_bytes, sha256, want

pytestmark = pytest.mark.slow

SECRET = "hf_SeCrEtToKeN"
NAMES = [f"data/train-{number:05d}-of-00003.parquet" for number in range(3)]
SHARDS = {name: parquet_bytes([name * 100]) for name in NAMES}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(dict(SHARDS)) as server, connected(monkeypatch, server.url, SECRET):
        yield server


def fetch_hub(
    folder: Path, wanted_text_bytes: int = PLENTY, place: str = REPOSITORY, commit: str = COMMIT
) -> RawFolder:
    return fetch(f"hf:{place}", commit, want(wanted_text_bytes), folder, Path("scratch"))


@pytest.mark.parametrize("status", [401, 403])
def test_refusal(status: int, hub: Hub, fetch_folder: Path) -> None:
    hub.failure = (status, "GatedRepo")
    with pytest.raises(EncoreError, match=rf"refuses it \({status}\).*accept the terms.*HF_TOKEN"):
        fetch_hub(fetch_folder)


def test_does_not_know_it(hub: Hub, fetch_folder: Path) -> None:
    with pytest.raises(EncoreError, match=r"hf:owner/other.*no such thing \(404\); check the spelling of dataset,"):
        fetch_hub(fetch_folder, place="owner/other")
    with pytest.raises(EncoreError, match=rf"hf:owner/corpus at {'f' * 40}.*\(404\)"):
        fetch_hub(fetch_folder, commit="f" * 40)
    hub.faults[NAMES[1]] = [Fault("status", status=404)]
    with pytest.raises(EncoreError, match=r"file data/train-00001-of-00003\.parquet.*\(404\)"):
        fetch_hub(fetch_folder)


def test_is_ill(hub: Hub, fetch_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.failure = (503, "")
    with pytest.raises(EncoreError, match=r"answers with an error \(503\); run again later; .* is kept"):
        fetch_hub(fetch_folder)
    notes = capsys.readouterr().err.splitlines()
    line = f"encore: note: hf:{REPOSITORY} at {COMMIT}: status 503; trying again in 0.01 s"
    assert notes == [line] * (retries.TRIES - 1)
    hub.failure, hub.page = None, b"<html>Room number?</html>"
    with pytest.raises(EncoreError, match=r"what answers is no Hub \(JSONDecodeError\).*whether this network"):
        fetch_hub(fetch_folder)


def test_listing_is_tried_again(hub: Hub, fetch_folder: Path) -> None:
    hub.faults[LISTING] = [
        Fault("status", status=429, headers={"Retry-After": "1"}),
        Fault("status", status=500),
        Fault("reset", after_bytes=None),
        Fault("end", after_bytes=100),
    ]
    assert len(fetch_hub(fetch_folder, 1).files) == 1
    assert hub.requests["list COMMIT"] == 5


@pytest.mark.parametrize("commit", ["f" * 40, COMMIT[:7], "main", ""])
def test_another_commit_than_the_pinned_one(commit: str, hub: Hub, fetch_folder: Path) -> None:
    hub.commit = commit
    with pytest.raises(EncoreError) as error:
        fetch_hub(fetch_folder)
    assert str(error.value) == (
        f"hf:{REPOSITORY} at {COMMIT}: the Hub answers with another commit ({commit or 'none'}); check HF_ENDPOINT and "
        "run again, and where that does not help, pin the commit that it has"
    )
    assert list(hub.requests) == ["list COMMIT"]
    hub.kind = "models"
    with pytest.raises(EncoreError, match="answers with another commit"):
        fetch_model(REPOSITORY, COMMIT, NAMES[:1], Path("scratch"))


def test_a_list_of_no_commit(hub: Hub) -> None:
    hub.commit = ""
    with pytest.raises(EncoreError, match="answers with another commit"):
        newest_commit(REPOSITORY)


def test_a_file_outside_itself(hub: Hub, fetch_folder: Path) -> None:
    hub.files["../train-escape.parquet"] = b"x"
    with pytest.raises(EncoreError, match="lists a file outside its own folder"):
        fetch_hub(fetch_folder)


def test_a_tail_that_does_not_end_is_cut_off(hub: Hub, fetch_folder: Path) -> None:
    hub.faults[f"{NAMES[0]}#tail"] = [Fault("flood", ALWAYS)]
    with pytest.raises(EncoreError, match=r"\(more comes than the [\d,]+ bytes that were asked for\)"):
        fetch_hub(fetch_folder)
    assert hub.bytes_served[f"{NAMES[0]}#tail"] < 32_000_000  # what sockets hold, and no more


def test_a_file_that_hardly_comes_is_given_up(
    hub: Hub, fetch_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However many bytes each try brings."""
    text = random.Random(0).randbytes(400_000).hex()
    hub.files = {NAMES[0]: parquet_bytes([text])}
    monkeypatch.setattr(transfer, "PACE_SECONDS", 0.03)
    monkeypatch.setattr(transfer, "LEAST_BYTES", 10**6)
    monkeypatch.setattr(transfer, "read_tail", lambda *_: None)  # so that the whole file is fetched first
    hub.seconds_for_piece = 0.02
    with pytest.raises(EncoreError, match=r"\(it sends less than a kilobyte a second\).*is kept$"):
        fetch_hub(fetch_folder)
    notes = capsys.readouterr().err
    assert notes.count("it sends less than a kilobyte a second; trying again") == retries.TRIES - 1
    kept = Path("scratch/hub/owner--corpus", COMMIT, f"{NAMES[0]}.partial").stat().st_size
    assert 0 < kept < len(hub.files[NAMES[0]])
    monkeypatch.setattr(transfer, "LEAST_BYTES", 1)
    assert fetch_hub(fetch_folder).text_bytes >= len(text)


def test_a_list_that_hardly_comes_is_given_up(hub: Hub, fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "LISTING_SECONDS", 0.2)
    hub.faults[LISTING] = [Fault("stall", ALWAYS, after_bytes=10)]
    with pytest.raises(EncoreError, match=r"\(its list of files has not arrived within 0 seconds\)"):
        fetch_hub(fetch_folder)


def test_a_footer_that_claims_to_be_huge(hub: Hub, fetch_folder: Path) -> None:
    content = SHARDS[NAMES[0]]
    hub.files[NAMES[0]] = content[:-8] + (400_000_000).to_bytes(4, "little") + b"PAR1"
    with pytest.raises(EncoreError, match=r"train-00000\S+ claims a footer of 400,000,000 bytes, and"):
        fetch_hub(fetch_folder)
    Path("a.parquet").write_bytes(hub.files[NAMES[0]])
    revision = current_revision("files:a.parquet")
    with pytest.raises(EncoreError, match=r"^a\.parquet claims a footer of 400,000,000 bytes, .* or leave it out$"):
        fetch("files:a.parquet", revision, want(PLENTY), fetch_folder, Path("scratch"))


def test_a_tail_that_was_damaged_on_its_way_condemns_no_file(hub: Hub, fetch_folder: Path) -> None:
    """The whole file, whose bytes are compared, has the last word."""
    read_tail = transfer.read_tail
    with pytest.MonkeyPatch.context() as patch:
        huge = (400_000_000).to_bytes(4, "little") + b"PAR1"
        patch.setattr(transfer, "read_tail", lambda *arguments: read_tail(*arguments)[:-8] + huge)
        assert len(fetch_hub(fetch_folder).files) == 3


def test_no_network(fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(dict(SHARDS)) as hub, connected(monkeypatch, hub.url, SECRET):
        data_set = DataSet(REPOSITORY, COMMIT, Path("scratch"))
        data_set.fetch_enough(NAMES, "text", 1, fetch_folder)
    with connected(monkeypatch, hub.url, SECRET):
        with pytest.raises(
            EncoreError, match=r"train-00001.* connection to the Hub fails \(ConnectError\).*run again; "
        ):
            data_set.fetch_enough(NAMES, "text", PLENTY, fetch_folder)
        kept = Path("scratch/owner--corpus", COMMIT, NAMES[0])
        assert kept.read_bytes() == SHARDS[NAMES[0]]
        with pytest.raises(EncoreError, match=r"hf:owner/corpus at \w{40}: the connection to the Hub fails \(Connect"):
            fetch_hub(fetch_folder)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        huggingface_hub.close_session()
        with pytest.raises(EncoreError, match=r"connection to the Hub fails \(HF_HUB_OFFLINE is set\)"):
            fetch_hub(fetch_folder)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:port", "127.0.0.1:1", "http://"])
def test_endpoint_that_is_none(
    endpoint: str, fetch_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        connected(monkeypatch, endpoint, SECRET),
        pytest.raises(EncoreError, match=r"the Hub fails \(\w+\); check the network, proxies and HF_ENDPOINT"),
    ):
        fetch_hub(fetch_folder)
    assert capsys.readouterr().err == ""  # nothing to wait for


@pytest.mark.parametrize("token", ["hf_“quoted”", "hf_\x07bell"])
def test_token_that_is_none(token: str, hub: Hub, fetch_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(EncoreError, match=r"HF_TOKEN, .*, holds signs that no token has; copy it anew") as error:
        fetch_hub(fetch_folder)
    assert token not in str(error.value)
    assert not hub.requests


# the token


def test_token_does_not_follow_to_storage(hub: Hub, fetch_folder: Path) -> None:
    with serving(hub.files) as storage:
        hub.token, hub.storage = SECRET, storage.url
        storage.faults[NAMES[0]] = [Fault("status"), Fault("end", after_bytes=200)]
        assert fetch_hub(fetch_folder, 1).files[0].sha256 == sha256(SHARDS[NAMES[0]])
        assert storage.requests[f"GET {NAMES[0]}"] == 3
        assert storage.authorizations == {None}


FAILURES = {
    "refused": {LISTING: [Fault("status", ALWAYS, 401)]},
    "listing is ill": {LISTING: [Fault("status", ALWAYS, 503)]},
    "listing breaks off": {LISTING: [Fault("reset", ALWAYS)]},
    "gated file": {f"{NAMES[0]}#tail": [Fault("status", ALWAYS, 403)]},
    "footer is ill": {f"{NAMES[0]}#tail": [Fault("status", ALWAYS, 500)]},
    "footer stalls": {f"{NAMES[0]}#tail": [Fault("stall", ALWAYS, after_bytes=None)]},
    "no such file": {NAMES[0]: [Fault("status", ALWAYS, 404)]},
    "too many requests": {NAMES[0]: [Fault("status", ALWAYS, 429)]},
    "file breaks off": {NAMES[0]: [Fault("reset", ALWAYS, after_bytes=None)]},
    "file ends early": {NAMES[0]: [Fault("end", ALWAYS)]},
    "file stalls": {NAMES[0]: [Fault("stall", ALWAYS)]},
    "file is damaged": {NAMES[0]: [Fault("damage", ALWAYS)]},
}


@pytest.mark.parametrize("redirected", [False, True], ids=["hub", "storage"])
@pytest.mark.parametrize("failure", FAILURES)
def test_token_is_nowhere_after(
    failure: str,
    redirected: bool,
    hub: Hub,
    fetch_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(transfer, "TIMEOUT_SECONDS", 0.1)
    caplog.set_level("DEBUG")
    with serving(hub.files) as storage:
        hub.storage = storage.url if redirected else None
        for server in (hub, storage):
            server.faults = {
                name: [Fault(**vars(fault)) for fault in faults] for name, faults in FAILURES[failure].items()
            }
        with pytest.raises(EncoreError) as caught:
            fetch_hub(fetch_folder, 1)
        assert storage.authorizations <= {None}
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in f"{error} {error!r} {vars(error)}"
        assert not hasattr(error, "request")
        assert not hasattr(error, "response")
        error = error.__cause__ or error.__context__
    written = capfd.readouterr()
    assert SECRET not in written.out + written.err + caplog.text
    assert all(SECRET.encode() not in path.read_bytes() for path in Path().rglob("*") if path.is_file())
