"""`encore verify` where the pipeline has run: what it finds, and that its ways out bring it back."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import pipeline_environment

pytestmark = pytest.mark.usefixtures("forking")

GROUPS = ["data/raw", "data/tokens", "model", "metrics and log", ".encore/checkpoints", ".encore/checkpoints"]


def flip(path: Path, place: int = 60) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def verify(repository: Path, exit_code: int) -> tuple[list[str], list[str]]:
    """The lines of both streams, blanks in a row as one."""
    command = [sys.executable, "-m", "encore", "verify"]
    done = subprocess.run(command, cwd=repository, env=pipeline_environment(), capture_output=True, text=True)
    assert done.returncode == exit_code, done.stdout + done.stderr
    out, err = (re.sub(r"  +", "  ", text).splitlines() for text in (done.stdout, done.stderr))
    return out, [line.strip() for line in err]


def cached(repository: Path, name: str) -> str:
    """Where DVC's cache has a file."""
    md5 = hashlib.md5((repository / name).read_bytes()).hexdigest()
    return f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}"


def hashes(repository: Path) -> dict[str, str]:
    names = ["data/tokens/manifest.json", "model/model.safetensors", "model/encore.json", "metrics/eval.json"]
    return {name: hashlib.sha256((repository / name).read_bytes()).hexdigest() for name in names}


def test_what_is_whole_is_counted(finished: Path) -> None:
    out, err = verify(finished, 0)
    assert err == []
    whole = [re.fullmatch(r"(\S.*?)  whole: (\d+|1) files?, ([\d,]+) bytes", line) for line in out]
    assert all(whole), out
    assert [re.sub(r"/\w+/iter-\d+", "", match[1]) for match in whole] == [*GROUPS, ".dvc/cache"]
    tokens = sum(path.stat().st_size for path in (finished / "data/tokens").iterdir() if path.name != "manifest.json")
    assert int(whole[1][3].replace(",", "")) == tokens
    assert int(whole[-1][2]) == sum(path.is_file() for path in (finished / ".dvc/cache/files/md5").rglob("*"))


def test_all_that_is_broken_is_told_and_comes_back_as_it_says(finished: Path) -> None:
    before = hashes(finished)
    weights, record = (cached(finished, f"model/{name}") for name in ("model.safetensors", "encore.json"))
    (checkpoint,) = finished.glob(".encore/checkpoints/*/iter-0000008")
    checkpoint = checkpoint.relative_to(finished)
    for name in ("data/tokens/val_00000.bin", "metrics/eval.json", weights, checkpoint / "optimizer.safetensors"):
        flip(finished / name)
    (finished / "data/raw/manifest.json").unlink()

    out, err = verify(finished, 1)
    assert [line for line in out if "BROKEN" in line] == [
        "data/raw  BROKEN: data/raw/manifest.json is missing",
        "data/tokens  BROKEN: data/tokens/val_00000.bin has other bytes",
        "metrics and log  BROKEN: metrics/eval.json has other bytes",
        f"{checkpoint}  BROKEN: {checkpoint}/optimizer.safetensors has other bytes",
        f".dvc/cache  BROKEN: {weights}, of model, has other bytes",
    ]
    assert err == [
        "encore: not all is as it was written. The way out:",
        "data/raw: dvc checkout --force data/raw, or dvc repro -s -f download",
        "data/tokens: dvc checkout --force data/tokens, or dvc repro -s -f tokenize",
        "metrics/eval.json: git restore metrics/eval.json, or dvc repro -s -f evaluate",
        f"model: rm -f {weights}; then dvc repro -s -f train, or dvc pull where a remote has it",
        f"{checkpoint}: rm -r {checkpoint}; a run goes on from the checkpoint before",
    ]
    for line in err[1:]:
        _, _, way_out = line.partition(": ")
        command = re.split(r", or |; a run", way_out)[0].replace("; then", " &&")
        done = subprocess.run(
            command, shell=True, cwd=finished, env=pipeline_environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    verify(finished, 0)
    assert hashes(finished) == before
    assert (finished / record).exists()


def test_an_object_of_another_run_and_a_damaged_list_of_a_folder(finished: Path) -> None:
    stranger = finished / ".dvc/cache/files/md5/00/1122334455667788990011223344ff"
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_bytes(b"what nobody has recorded")
    listing = re.search(r"path: model\n\s+hash: md5\n\s+md5: (\w+\.dir)", (finished / "dvc.lock").read_text())[1]
    listing = f".dvc/cache/files/md5/{listing[:2]}/{listing[2:]}"
    flip(finished / listing)
    out, err = verify(finished, 1)
    assert f".dvc/cache  BROKEN: {listing}, of model, has other bytes" in out
    assert err[1:] == [
        f"model: rm -f {listing}; then dvc repro -s -f train, or dvc pull where a remote has it",
        f"of other runs: rm -f {stranger.relative_to(finished)}; what needs them makes them anew",
    ]


@pytest.mark.parametrize("missing", ["everything", "dvc.lock"])
def test_where_nothing_is_there_nothing_is_broken(finished: Path, missing: str) -> None:
    (finished / "dvc.lock").unlink()
    if missing == "everything":
        for name in ("data", "model", ".encore", ".dvc/cache"):
            (finished / name).rename(finished.parent / name.replace("/", "-"))
    out, err = verify(finished, 0)
    assert err == []
    assert (len(out) == 1) == (missing == "everything")
