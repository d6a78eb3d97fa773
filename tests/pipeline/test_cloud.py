"""cloud/: what its files name is there, and what can be run without a cloud runs."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from ruamel.yaml import YAML

from encore.scratch import scratch_folder
from tests.bucket import NAME, SECRET, USER, Bucket, serving
from tests.conftest import ROOT, pipeline_environment, run_dvc
from tests.hub import answering
from tests.pipeline.test_pipeline import data_hashes, stages_run
from tests.ranks import find_port

CLOUD = ROOT / "cloud"
TASK: dict[str, Any] = YAML(typ="safe", pure=True).load((CLOUD / "encore.yaml").read_text())
DOCKERFILE = (CLOUD / "Dockerfile").read_text()
SCRIPTS = TASK["setup"] + TASK["run"]

pytestmark = pytest.mark.usefixtures("forking")


def test_what_the_task_names_is_there():
    for name in re.findall(r"(?:presets|cloud)/[\w./-]+|requirements[\w.-]*\.lock", SCRIPTS):
        assert (ROOT / name).is_file(), name
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", SCRIPTS):
        assert re.search(rf"^{target}:", makefile, re.M), target
    stages = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
    for names in re.findall(r"dvc (?:repro --pull|push --run-cache) (\w[\w ]*)", SCRIPTS):
        assert set(names.split()) <= set(stages)
    assert f"{scratch_folder()}/checkpoints\n" in TASK["run"]


def test_the_task_is_of_the_machine_that_the_docs_speak_of():
    page = (ROOT / "docs/record.md").read_text()
    assert f"on one A10G (AWS {TASK['resources']['instance_type']})" in page
    assert TASK["resources"]["disk_size"] >= int(re.search(r"\*\*(\d+) GB of disk", page)[1])
    assert "cp presets/gpt2-owt-4b.yaml params.yaml\n" in page
    assert "cp presets/gpt2-owt-4b.yaml params.yaml\n" in TASK["run"]


def test_the_task_names_nobodys_bucket_and_holds_no_credentials():
    assert TASK["envs"] == {"REPOSITORY": None, "BUCKET": None}
    assert TASK["file_mounts"]["/bucket"]["source"] == "s3://${BUCKET}"
    text = (CLOUD / "encore.yaml").read_text()
    assert not re.search(r"AKIA|access_key|secret|token(?!ize|s)", text, re.I)


def test_an_instance_goes_on_where_another_was_lost(finished, tmp_path):
    """The task's own commands, on a small page and an S3 server on loopback: data come from the bucket, not from the
    source, and what belongs in git comes back through it."""
    instance = tmp_path / "instance"
    subprocess.run(["git", "clone", "-q", str(finished), str(instance)], check=True)
    subprocess.run(["git", "checkout", "-q", "HEAD~1"], cwd=instance, check=True)  # before there were results
    assert not (instance / "dvc.lock").exists()
    (instance / "presets/gpt2-owt-4b.yaml").write_bytes((instance / "params.yaml").read_bytes())
    activate = instance / ".venv/bin/activate"
    activate.parent.mkdir(parents=True)
    activate.touch()  # the environment below is an activated one already
    mount = tmp_path / "mount"
    bucket = Bucket()
    with serving(bucket) as url:
        environment = {
            "AWS_ACCESS_KEY_ID": USER,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "*",
        }
        run_dvc(finished, "remote", "add", "--default", "storage", f"s3://{NAME}/dvc")
        run_dvc(finished, "push", "--run-cache", "download", "tokenize", **environment)
        bucket.forget()
        done = subprocess.run(
            ["bash", "-c", TASK["run"].replace("/bucket", str(mount))],
            cwd=instance,
            env=pipeline_environment(**environment, BUCKET=NAME, EC2_METADATA=f"http://127.0.0.1:{find_port()}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    assert done.returncode == 0, done.stdout
    # The metric of count_tokens is in git and not in the bucket, so that stage runs again.
    assert not {"download", "tokenize"} & set(stages_run(done.stdout))
    assert {"count_tokens", "train", "evaluate"} <= set(stages_run(done.stdout))
    assert list(mount.glob("checkpoints/*/iter-*/model.safetensors"))
    results = mount / "results"
    assert (results / "metrics/metrics.json").read_bytes() == (instance / "metrics/metrics.json").read_bytes()
    assert (results / "params.yaml").read_bytes() == (finished / "params.yaml").read_bytes()
    shutil.copy2(results / "dvc.lock", tmp_path / "dvc.lock")
    assert data_hashes(tmp_path) == data_hashes(finished)
    locked = YAML(typ="safe", pure=True).load((results / "dvc.lock").read_text())["stages"]["train"]["outs"]
    model = next(out["md5"] for out in locked if out["path"] == "model")
    assert f"dvc/files/md5/{model[:2]}/{model[2:]}" in bucket.received


needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="cloud/until_told.sh asks by curl")


class Metadata(ThreadingHTTPServer):
    """EC2's: it gives a token, and with that token tells of the instance's end, once that is decided."""

    daemon_threads = True
    decided = False
    asked = 0


class Answer(BaseHTTPRequestHandler):
    server: Metadata

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_PUT(self) -> None:
        self.send(200 if self.path == "/latest/api/token" else 404, b"the token")

    def do_GET(self) -> None:
        assert self.path == "/latest/meta-data/spot/instance-action"
        self.server.asked += 1
        authorized = self.headers["X-aws-ec2-metadata-token"] == "the token"
        self.send(200 if authorized and self.server.decided else 404, b'{"action": "terminate"}')

    def send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    server = Metadata(("127.0.0.1", 0), Answer)
    with answering(server):
        yield server


def until_told(port: int, *command: str) -> subprocess.Popen:
    settings = {"EC2_METADATA": f"http://127.0.0.1:{port}", "EC2_METADATA_SECONDS": "0.05", "no_proxy": "*"}
    return subprocess.Popen(
        ["bash", str(CLOUD / "until_told.sh"), *command],
        env=pipeline_environment(**settings),
        stdout=subprocess.PIPE,
        text=True,
    )


@needs_curl
def test_without_a_notice_the_exit_code_is_the_commands(metadata):
    for port in (metadata.server_port, find_port()):
        process = until_told(port, "sh", "-c", "sleep 0.3; exit 7")
        process.communicate(timeout=30)
        assert process.returncode == 7
    assert metadata.asked


SAVES = """
import signal, subprocess, sys, time
below = subprocess.Popen([sys.executable, "-c", '''
import time
print("training", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("saved", flush=True)
'''])
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as dvc does
below.wait()
"""


@needs_curl
def test_told_of_its_end_it_stops_the_command_and_waits_for_the_instance_to_go(metadata):
    process = until_told(metadata.server_port, sys.executable, "-c", SAVES)
    with process:
        try:
            assert process.stdout.readline() == "training\n"
            metadata.decided = True
            assert process.stdout.readline() == "saved\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
        finally:
            process.kill()


def test_the_image_is_built_from_what_is_there():
    assert re.search(r"^ARG BASE=(\S+:\S+)\nFROM \$\{BASE\}$", DOCKERFILE, re.M)
    copied = re.search(r"^COPY (.+) /tmp/$", DOCKERFILE, re.M)[1].split()
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignore == ["*", *(f"!{name}" for name in copied)]
    assert all((ROOT / name).is_file() for name in copied)
    assert "\ndvc-s3==" in (ROOT / "requirements-dev.lock").read_text()
    packages = re.search(r"--no-install-recommends \\\n(.*?)    &&", DOCKERFILE, re.S)[1].replace("\\", "").split()
    assert [name for name in packages if "=" not in name] == []


def test_the_image_runs_as_a_user_without_rights():
    uid = re.search(r"useradd --uid (\d+)", DOCKERFILE)[1]
    assert int(uid) > 0
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.M) == [uid]
