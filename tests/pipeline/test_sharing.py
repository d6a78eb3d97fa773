"""The circle: one clone pushes, others pull, over an S3 server on loopback and a bare git repository on disk."""

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from encore.files import sha256_of
from tests.bucket import NAME, SECRET, USER, Bucket, serving
from tests.conftest import commit, run_dvc
from tests.pipeline.test_pipeline import stages_run

pytestmark = pytest.mark.usefixtures("forking")


@dataclass
class Team:
    """One member's clone, in which the pipeline has run; the git remote and the bucket to which it was pushed."""

    first: Path
    git_remote: Path
    bucket: Bucket
    pushed: dict[str, int]  # bytes by key
    model: dict[str, str]  # hashes by file
    nobody: dict[str, str]  # an environment without credentials, the developer's own among them
    member: dict[str, str]  # and with them

    def clone(self, folder: Path) -> Path:
        """Another member's: no results, no cache."""
        git(folder.parent, "clone", "-q", str(self.git_remote), folder.name)
        self.bucket.forget()
        return folder


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def team(_finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    folder = tmp_path_factory.mktemp("team")
    first = Path(shutil.copytree(_finished, folder / "first", symlinks=True))
    git(folder, "init", "-q", "--bare", "-b", "main", "remote.git")
    (folder / "no-aws-config").touch()
    nobody = {
        "AWS_CONFIG_FILE": str(folder / "no-aws-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "no-aws-config"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "*",
    }
    member = {**nobody, "AWS_ACCESS_KEY_ID": USER, "AWS_SECRET_ACCESS_KEY": SECRET}
    bucket = Bucket()
    with serving(bucket) as url:
        run_dvc(first, "remote", "add", "--default", "storage", f"s3://{NAME}/encore")
        run_dvc(first, "remote", "modify", "storage", "endpointurl", url)
        run_dvc(first, "remote", "modify", "storage", "verify", "true")
        commit(first, "where results are shared")
        git(first, "remote", "add", "origin", str(folder / "remote.git"))
        run_dvc(first, "push", **member)
        git(first, "push", "-q", "origin", "HEAD:main")
        yield Team(
            first, folder / "remote.git", bucket, dict(bucket.received), file_hashes(first / "model"), nobody, member
        )


def read_yaml(path: Path) -> dict:
    return YAML(typ="safe", pure=True).load(path.read_text())


def locked_outputs(repository: Path) -> dict[str, dict]:
    """What dvc.lock says of each output that DVC's cache keeps, by path."""
    stages = read_yaml(repository / "dvc.yaml")["stages"]
    cached = {path for stage in stages.values() for path in stage.get("outs", [])}
    locked = [out for stage in read_yaml(repository / "dvc.lock")["stages"].values() for out in stage["outs"]]
    return {out["path"]: out for out in locked if out["path"] in cached}


def key_of(output: dict) -> str:
    """Where the bucket has it."""
    return f"encore/files/md5/{output['md5'][:2]}/{output['md5'][2:]}"


def distinct_sizes(repository: Path) -> dict[str, int]:
    """The bytes of each different file in the outputs, by its sha256."""
    places = [repository / name for name in locked_outputs(repository)]
    files = [path for place in places for path in (place, *place.rglob("*")) if path.is_file()]
    return {sha256_of(path): path.stat().st_size for path in files}


def file_hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def files_of(objects: dict[str, int]) -> dict[str, int]:
    """Without the listings of folders, which DVC reads more than once."""
    return {key: size for key, size in objects.items() if not key.endswith(".dir")}


def test_every_output_is_pushed_once(team):
    outputs = locked_outputs(team.first)
    assert {"data/raw", "data/tokens", "model"} <= set(outputs)
    assert {key_of(out) for out in outputs.values()} <= set(team.pushed)
    # A file that two outputs hold, such as the tokenizer, crosses the wire once.
    assert sorted(files_of(team.pushed).values()) == sorted(distinct_sizes(team.first).values())
    assert run_dvc(team.first, "push", **team.member).strip() == "Everything is up to date."


def test_where_all_is_pulled_nothing_needs_to_run(team, tmp_path):
    second = team.clone(tmp_path / "second")
    for option, value in (("access_key_id", USER), ("secret_access_key", SECRET)):
        run_dvc(second, "remote", "modify", "--local", "storage", option, value)
    run_dvc(second, "pull", **team.nobody)
    assert set(team.bucket.served) == set(team.pushed)
    assert files_of(team.bucket.served) == files_of(team.pushed)
    for name in ("data/raw", "data/tokens"):
        assert file_hashes(second / name) == file_hashes(team.first / name)
    assert file_hashes(second / "model") == team.model
    output = run_dvc(second, "repro")
    assert stages_run(output) == []
    assert "up to date" in output
    assert git(second, "status", "--porcelain") == ""
    assert SECRET in (second / ".dvc/config.local").read_text()


def test_without_credentials_nothing_is_served(team, tmp_path):
    stranger = team.clone(tmp_path / "stranger")
    refused = run_dvc(stranger, "pull", exit_code=1, **team.nobody)
    assert "Forbidden" in refused or "Unable to locate credentials" in refused
    assert not team.bucket.served
    assert not (stranger / "model").exists()


def test_the_model_alone(team, tmp_path):
    """On a machine that has no room for the data, nothing of it crosses the wire, and nothing is missed."""
    third = team.clone(tmp_path / "third")
    run_dvc(third, "pull", "model", **team.member)
    model = locked_outputs(third)["model"]
    assert file_hashes(third / "model") == team.model
    assert not (third / "data").exists()
    files = files_of(team.bucket.served)
    assert len(files) == model["nfiles"]
    assert sum(files.values()) == model["size"]
    assert [key.replace("/", "")[-36:] for key in set(team.bucket.served) - set(files)] == [model["md5"]]


def test_an_overwritten_object_is_not_pulled(team, tmp_path):
    weights = team.first / "model/model.safetensors"
    whole = weights.read_bytes()
    digest = hashlib.md5(whole).hexdigest()
    key = f"encore/files/md5/{digest[:2]}/{digest[2:]}"
    clone = team.clone(tmp_path / "clone")
    team.bucket.put(key, whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        run_dvc(clone, "pull", "model", exit_code=1, **team.member)
    finally:
        team.bucket.put(key, whole)
    assert not (clone / "model/model.safetensors").exists()
    run_dvc(clone, "pull", "model", **team.member)
    assert file_hashes(clone / "model") == team.model


def test_an_experiment_goes_to_a_colleague(team, tmp_path):
    """Its commit over git, its files over the bucket."""
    author = Path(shutil.copytree(team.first, tmp_path / "author", symlinks=True))
    run_dvc(author, "exp", "run", "-S", "max_iters=14", "-n", "longer")
    team.bucket.forget()
    run_dvc(author, "exp", "push", "origin", "longer", **team.member)
    before, after = locked_outputs(team.first), locked_outputs(author)
    changed = {path for path in before if before[path] != after[path]}
    assert "model" in changed
    assert not changed & {"data/raw", "data/tokens"}
    assert {key_of(after[path]) for path in changed} <= set(team.bucket.received)
    known = distinct_sizes(team.first)
    new = [size for sha256, size in distinct_sizes(author).items() if sha256 not in known]
    assert sorted(files_of(team.bucket.received).values()) == sorted(new)

    colleague = team.clone(tmp_path / "colleague")
    run_dvc(colleague, "exp", "pull", "origin", "longer", **team.member)
    run_dvc(colleague, "exp", "apply", "longer")
    assert file_hashes(colleague / "model") == file_hashes(author / "model") != team.model
    assert stages_run(run_dvc(colleague, "repro")) == []
    table = run_dvc(colleague, "exp", "show", "--csv", "--only-changed").splitlines()
    column = table[0].split(",").index("iter")
    assert {row.split(",")[column] for row in table[1:]} == {"12", "14"}


def test_the_model_from_another_folder(team, tmp_path):
    run_dvc(tmp_path, "get", str(team.git_remote), "model", **team.member)
    assert file_hashes(tmp_path / "model") == team.model


def test_a_registered_version_of_the_model(team, tmp_path):
    git(team.first, "tag", "-a", "model@v0.0.1", "-m", "registered", "origin/main")
    git(team.first, "push", "-q", "origin", "model@v0.0.1")
    run_dvc(tmp_path, "artifacts", "get", str(team.git_remote), "model", "--rev", "v0.0.1", **team.member)
    assert file_hashes(tmp_path / "model") == team.model


def test_no_commit_holds_the_secret(team):
    for repository in (team.first, team.git_remote):
        commits = git(repository, "rev-list", "--all").split()
        assert git(repository, "grep", "-l", "endpointurl", *commits, "--", ".dvc/config")
        search = ["git", "grep", "-l", "-e", SECRET, "-e", USER, *commits]
        assert subprocess.run(search, cwd=repository).returncode == 1  # git grep's word for: not there
