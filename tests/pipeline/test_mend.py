"""What a killed dvc leaves of its own files, against DVC itself: its schema, and its commands."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from dvc.dvcfile import Lockfile
from dvc.exceptions import DvcException
from dvc.utils.serialize import parse_yaml
from dvc.utils.strictyaml import YAMLValidationError

from encore.pipeline.mend import is_json_object, is_lockfile
from tests.conftest import ROOT, commit, pipeline_environment, run_dvc

pytestmark = pytest.mark.usefixtures("forking")

STAGE = """
stages:
  copy:
    cmd: cp in.txt out.txt && echo ran >> runs.txt
    deps:
      - in.txt
    params:
      - lr
    outs:
      - out.txt
"""


@pytest.fixture(scope="module")
def _repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mend") / "repository"
    folder.mkdir()
    for command in (["init", "-q"], ["config", "user.name", "test"], ["config", "user.email", "test@localhost"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    (folder / ".dvc").mkdir()
    for name in (".dvc/config", ".dvc/.gitignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "dvc.yaml").write_text(STAGE)
    (folder / "params.yaml").write_text("lr: 0.1\n")
    (folder / "in.txt").write_text("first\n")
    run_dvc(folder, "repro", "-q")
    commit(folder, "results")
    return folder


@pytest.fixture
def repository(_repository: Path, tmp_path: Path) -> Path:
    """A pipeline of one stage that has run, with dvc.lock committed."""
    return Path(shutil.copytree(_repository, tmp_path / "repository"))


def mend(repository: Path) -> subprocess.CompletedProcess[str]:
    environment = pipeline_environment(PYTHONPATH=str(ROOT))
    return subprocess.run(
        [sys.executable, "-m", "encore", "mend"], cwd=repository, env=environment, capture_output=True, text=True
    )


def count_runs(repository: Path) -> int:
    return len((repository / "runs.txt").read_text().splitlines())


def test_an_empty_lockfile_and_an_empty_rwlock_are_mended(repository):
    """dvc.lock as git has it; the result that is newer than that comes out of the run cache."""
    committed = (repository / "dvc.lock").read_bytes()
    (repository / "in.txt").write_text("second\n")
    run_dvc(repository, "repro")
    subprocess.run(["git", "reset", "-q"], cwd=repository, check=True)
    newest = (repository / "dvc.lock").read_bytes()
    for name in ("dvc.lock", ".dvc/tmp/rwlock"):
        (repository / name).write_bytes(b"")
        run_dvc(repository, "repro", exit_code=255)
        done = mend(repository)
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith(f"encore: note: {name} was cut off when dvc was killed; ")
        assert done.stderr.count("\n") == 1
        assert name != "dvc.lock" or (repository / name).read_bytes() == committed
        run_dvc(repository, "repro")
        assert (repository / "dvc.lock").read_bytes() == newest
    assert (repository / "out.txt").read_text() == "second\n"
    assert count_runs(repository) == 2


def test_a_lockfile_that_git_does_not_have_is_removed(repository):
    whole = (repository / "dvc.lock").read_bytes()
    subprocess.run(["git", "rm", "-q", "--cached", "dvc.lock"], cwd=repository, check=True)
    subprocess.run(["git", "commit", "-qm", "no lock"], cwd=repository, check=True)
    (repository / "dvc.lock").write_bytes(whole[:20])
    assert "it is removed" in mend(repository).stderr
    assert not (repository / "dvc.lock").exists()
    run_dvc(repository, "repro")
    assert (repository / "dvc.lock").read_bytes() == whole
    assert count_runs(repository) == 1


def test_what_is_staged_comes_before_what_is_committed(repository):
    (repository / "in.txt").write_text("second\n")
    run_dvc(repository, "repro")  # which stages dvc.lock
    newest = (repository / "dvc.lock").read_bytes()
    (repository / "dvc.lock").write_bytes(b"")
    assert "git's is back" in mend(repository).stderr
    assert (repository / "dvc.lock").read_bytes() == newest


def test_a_lock_that_was_left_on_the_index_goes(repository):
    (repository / ".git/index.lock").touch()
    (repository / "in.txt").write_text("second\n")
    assert "index.lock" in run_dvc(repository, "repro", exit_code=255)
    assert "index.lock was left when dvc or git was killed" in mend(repository).stderr
    run_dvc(repository, "repro")


def test_whole_files_are_left_alone(repository):
    paths = [repository / "dvc.lock", repository / ".dvc/tmp/rwlock"]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    done = mend(repository)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before


def test_nothing_is_mended_while_dvc_runs(repository):
    (repository / "dvc.yaml").write_text(STAGE.replace("cp in.txt", "touch started && sleep 60 && cp in.txt"))
    dvc = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "-q"], cwd=repository, env=pipeline_environment(), start_new_session=True
    )
    try:
        while not (repository / "started").exists():
            assert dvc.poll() is None
        (repository / ".dvc/tmp/rwlock").write_bytes(b"")
        done = mend(repository)
        assert done.returncode == 1
        assert f"process {dvc.pid}" in done.stderr
        assert (repository / ".dvc/tmp/rwlock").read_bytes() == b""
    finally:
        for process in [*psutil.Process(dvc.pid).children(recursive=True), dvc]:
            process.kill()
        dvc.wait()


def dvc_reads(text: str) -> bool:
    """DVC's own verdict on a dvc.lock."""
    try:
        Lockfile.validate(parse_yaml(text, "dvc.lock"), "dvc.lock")
    except (DvcException, YAMLValidationError, ValueError):
        return False
    return True


def test_a_lockfile_cut_off_anywhere_is_judged_as_dvc_judges_it():
    """Every length up to the end of the first stages, where each kind of line has stood."""
    text = (ROOT / "dvc.lock").read_text()
    end = text.index("  count_tokens:")
    verdicts = {length: is_lockfile(text[:length].encode()) for length in range(0, end, 23)}
    assert verdicts == {length: dvc_reads(text[:length]) for length in verdicts}
    assert is_lockfile(text.encode())
    assert set(verdicts.values()) == {True, False}


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"\xff\xfe", b"- a\n", b"schema: '1.0'\n", b"stages: {}\n"])
def test_what_is_no_lockfile(data):
    assert not is_lockfile(data)
    assert not is_json_object(data)


def test_a_cut_off_rwlock():
    whole = json.dumps({"write": {"/a": {"pid": 1, "cmd": "dvc repro"}}, "read": {}})
    assert is_json_object(whole.encode())
    assert not any(is_json_object(whole[:length].encode()) for length in range(len(whole)))


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_repro_mends_before_it_calls_dvc():
    lines = (ROOT / "Makefile").read_text().split("\nrepro:")[1].splitlines()
    assert lines[1:3] == ["\t@python -m encore mend", "\t@dvc repro"]
