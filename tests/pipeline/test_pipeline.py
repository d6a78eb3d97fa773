"""The pipeline as a DVC user meets it: whole runs in a temporary repository, on the default data with a small model."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from encore.files import sha256_of
from stages.check import STAGES
from tests.conftest import ROOT, SMALL, commit, copy_repository, pipeline_environment, read_page, run_dvc, write_page

pytestmark = pytest.mark.usefixtures("forking")


def stages_run(output: str) -> list[str]:
    """The stages whose commands were executed, in order."""
    return re.findall(r"Running stage '(\w+)'", output)


def data_hashes(repository: Path) -> dict[str, str]:
    """What dvc.lock says of the two data folders."""
    stages = YAML(typ="safe", pure=True).load((repository / "dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for name in ("download", "tokenize") for out in stages[name]["outs"]}


def last_lr(highest: float, least: float) -> float:
    """The learning rate of the last of 12 iterations: after 2 of warm-up, 9 tenths of the way down the cosine."""
    return least + (highest - least) * (1 + math.cos(0.9 * math.pi)) / 2


def test_whole_run(finished):
    ran = stages_run((finished / "output.txt").read_text())
    assert ran[0] == "check"
    assert sorted(ran) == sorted(["check", *STAGES])
    assert ran.index("download") < ran.index("tokenize") < ran.index("count_tokens")
    assert ran.index("download_weights") < ran.index("train") < ran.index("evaluate")
    assert ran.index("tokenize") < ran.index("train")
    metrics = json.loads((finished / "metrics/metrics.json").read_text())
    tokens = json.loads((finished / "metrics/tokens.json").read_text())
    evaluation = json.loads((finished / "metrics/eval.json").read_text())["eval"]
    assert metrics["iter"] == SMALL["max_iters"]
    assert metrics["lr"] == pytest.approx(last_lr(read_page()["learning_rate"], read_page()["min_lr"]))
    assert metrics["tokens_seen"] == 12 * 4 * 2 * 64
    assert SMALL["token_cap"] <= tokens["train_tokens"] < SMALL["token_cap"] + 100_000
    assert evaluation["tokens"] == tokens["val_tokens"] - 1
    assert evaluation["loss"] == pytest.approx(metrics["val"]["loss"], abs=0.3)
    assert (finished / "metrics/samples.md").read_text().count("~~~~~~") == 2 * SMALL["num_samples"]
    # Metrics and curves are in git, nothing else that the pipeline writes is.
    tracked = subprocess.run(["git", "ls-files", "-o", "-c"], cwd=finished, capture_output=True, text=True).stdout
    ignored = subprocess.run(["git", "status", "--porcelain"], cwd=finished, capture_output=True, text=True).stdout
    assert {"metrics/metrics.json", "metrics/train.tsv", "metrics/eval.tsv", "dvc.lock"} <= set(tracked.split())
    assert ignored == ""


@pytest.fixture
def committed_hashes() -> dict[str, str]:
    """The hashes that came with Encore. A user's own dvc.lock, of another page, has others."""
    stages = YAML(typ="safe", pure=True).load((ROOT / "dvc.lock").read_text())["stages"]
    params = stages["download"]["params"]["params.yaml"] | stages["tokenize"]["params"]["params.yaml"]
    if params != {key: read_page()[key] for key in params}:
        pytest.skip("dvc.lock is of other data than the presets'")
    return data_hashes(ROOT)


def test_second_repro_does_nothing(finished):
    output = run_dvc(finished, "repro")
    assert stages_run(output) == []
    assert "up to date" in output
    assert run_dvc(finished, "status").strip() == "Data and pipelines are up to date."


def test_max_iters_there_and_back(compared):
    """A changed max_iters trains and evaluates; the old value comes back from the run cache, log and all."""
    output = (compared / ".dvc/tmp/longer.txt").read_text()
    assert stages_run(output) == ["check", "train", "evaluate"]
    assert "iter 14/14:" in output
    log = (compared / "training.log").read_bytes()
    weights = sha256_of(compared / "model/model.safetensors")
    assert stages_run(run_dvc(compared, "exp", "run", "-S", "max_iters=14")) == []
    assert sha256_of(compared / "model/model.safetensors") != weights
    assert stages_run(run_dvc(compared, "exp", "run", "-S", "max_iters=12")) == []
    assert (compared / "training.log").read_bytes() == log
    assert sha256_of(compared / "model/model.safetensors") == weights
    names, *rows = (row.split(",") for row in run_dvc(compared, "exp", "show", "--csv", "--only-changed").split())
    assert {"12", "14"} <= {row[names.index("iter")] for row in rows}
    assert names[: names.index("val.loss")] == ["Experiment", "rev", "typ", "Created"]


# Edited together, so that fewer commands of dvc are needed.
EDITS = [
    ({"encore/models/gpt2.py", "encore/report/page.py", "encore/params.py", "encore/errors.py"}, {"train", "evaluate"}),
    (
        {"encore/training/trainer.py", "encore/tokens/encode.py", "encore/download/hub.py"},
        {"download", "download_weights", "tokenize", "train"},
    ),
]


def test_an_edit_of_code_makes_the_stages_run_again_that_it_can_change(finished):
    for path in set.union(*(paths for paths, _ in EDITS)):
        (finished / path).write_text("# A comment.\n" + (finished / path).read_text())
    assert stages_run(run_dvc(finished, "repro")) == ["check"]
    for paths, stages in EDITS:
        texts = {path: (finished / path).read_text() for path in paths}
        for path, text in texts.items():
            (finished / path).write_text(text + "\nNEW = 1\n")
        run_dvc(finished, "repro", "check")
        assert set(re.findall(r"^(\w+):", run_dvc(finished, "status"), re.M)) == stages
        for path, text in texts.items():
            (finished / path).write_text(text)


def test_a_preset_is_a_copy_away(finished):
    (finished / "params.yaml").write_bytes((ROOT / "presets/gpt2-owt-4b.yaml").read_bytes())
    difference = json.loads(run_dvc(finished, "params", "diff", "--json"))["params.yaml"]
    before = {**read_page(), **SMALL}
    after = read_page(ROOT / "presets/gpt2-owt-4b.yaml")
    changed = {key for key in before if before[key] != after[key]}
    assert set(difference) == changed
    assert difference["token_cap"] == {"old": 300_000, "new": 4_000_000_000, "diff": 3_999_700_000}


WRONG_PAGES = {
    "max_itres: 1\n": "max_itres: no such key; did you mean max_iters?",
    "n_embd: 130\nn_head: 4\n": "n_embd: 130 does not divide by n_head, 4",
    "token_cap: -1\n": "token_cap: -1 will not do",
    "dataset: hf:nobody\n": "dataset: 'hf:nobody' will not do; a source is hf:OWNER/NAME",
    "architecture: gpt5\n": "architecture: 'gpt5' will not do; it should be 'gpt2'",
    "seed:\n": "seed: null will not do",
}


@pytest.mark.parametrize("lines", WRONG_PAGES)
def test_wrong_value_stops_before_anything_is_removed(finished, lines):
    page = {**read_page(finished / "params.yaml"), **YAML(typ="safe", pure=True).load(lines)}
    with (finished / "params.yaml").open("w") as file:
        YAML().dump(page, file)
    assert_stopped(finished, WRONG_PAGES[lines])


def test_all_problems_are_told_at_once(finished):
    page = read_page(finished / "params.yaml")
    del page["seed"]
    with (finished / "params.yaml").open("w") as file:
        YAML().dump({**page, "max_itres": 1, "token_cap": -1}, file)
    assert_stopped(finished, "params.yaml has 3 problems", "max_itres:", "token_cap: -1", "seed: missing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "seed"),
        ("seed:\t1\n\tbias: true\n", "params.yaml"),
        ("", "params.yaml holds no `key: value` lines"),
    ],
    ids=["duplicated key", "tab", "empty"],
)
def test_broken_page_stops_before_anything_is_removed(finished, text, message):
    (finished / "params.yaml").write_text(text)
    assert_stopped(finished, message)


def test_missing_page_stops_before_anything_is_removed(finished):
    (finished / "params.yaml").unlink()
    assert_stopped(finished, "params.yaml")


def test_misspelt_key_of_exp_run_is_refused(finished):
    output = run_dvc(finished, "exp", "run", "-S", "max_itres=1", exit_code=255)
    assert "max_itres" in output
    assert (finished / "model/model.safetensors").exists()


def assert_stopped(repository: Path, *messages: str) -> None:
    """A full repro fails with these words, without a traceback, and every output is still there."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=repository,
        env=pipeline_environment(),
        capture_output=True,
        text=True,
    )
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "Traceback" not in output
    for message in messages:
        assert message in output
    for name in ("data/raw/manifest.json", "data/tokens/manifest.json", "model/config.json", "training.log"):
        assert (repository / name).exists(), f"{name} was removed\n{output}"
    for name in ("metrics/metrics.json", "metrics/eval.json", "metrics/samples.md"):
        assert (repository / name).exists(), f"{name} was removed\n{output}"


def test_metrics_and_plots_compare_two_runs(compared):
    shown = json.loads(run_dvc(compared, "metrics", "show", "--json"))[""]["data"]
    assert {"metrics/metrics.json", "metrics/tokens.json", "metrics/eval.json"} == {
        Path(name).as_posix() for name in shown
    }
    names = [name for data in shown.values() for name in data["data"]]
    assert len(names) == len(set(names)), "a key that two metrics files share is lost in dvc.api.metrics_show()"
    difference = json.loads(run_dvc(compared, "metrics", "diff", "HEAD", "longer", "--json"))
    changed = next(value for name, value in difference["metrics/metrics.json"].items() if name == "iter")
    assert changed == {"old": 12, "new": 14, "diff": 2}
    page = run_dvc(compared, "plots", "diff", "HEAD", "longer").strip().removeprefix("file://")
    html = Path(page).read_text()
    for title in ("Loss (nats a token)", "Learning rate", "Tokens per second"):
        assert html.count(title) == 1
    assert "longer" in html


def test_a_fresh_copy_makes_the_data_of_the_committed_lock(tmp_path, committed_hashes):
    """Invariant: data/raw and data/tokens have the same bytes on every machine."""
    repository = copy_repository(tmp_path / "elsewhere")
    write_page(repository / "params.yaml")
    commit(repository, "the default page")
    run_dvc(repository, "repro", "count_tokens")
    assert data_hashes(repository) == committed_hashes
