"""lm-eval's HellaSwag over a Hub on loopback, against the same sums written out here; and what can go wrong."""

import json
import shutil
from hashlib import sha256
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from encore.download import task_data
from encore.download.task_data import fetch_tasks
from encore.errors import EncoreError
from encore.evaluation.tasks import run_tasks
from encore.json_files import write_sealed
from encore.models.nanochat import NanoChat, NanoChatConfig
from encore.pretrained.hub_tokenizer import save_hub_tokenizer
from encore.pretrained.model_folder import load_model, save_model
from encore.tokens.ranks import write_ranks
from encore.tokens.token_files import RANKS_FILE
from encore.tokens.tokenizer import load_tokenizer
from tests.conftest import run_dvc
from tests.pipeline.test_pipeline import stages_run
from tests.sealed import read_with_seal
from tests.task_hub import make_rows, serving_tasks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forking")]

pytest.importorskip("lm_eval", reason="lm-eval is not installed")


# Python runs this where it starts. lm-eval reads 13,000 pages of tasks each time, for seven seconds; here it reads the
# pages of one folder.
AT_START = """
import sys
if {"hellaswag", "helaswag"} & set(sys.orig_argv):
    from lm_eval.tasks import _index
    read = _index.TaskIndex._iter_yaml_files
    _index.TaskIndex._iter_yaml_files = staticmethod(lambda root: read(root / "hellaswag"))
"""


@pytest.fixture
def few_tasks(tmp_path, monkeypatch):
    """The processes in which lm-eval works know no other tasks than HellaSwag."""
    (tmp_path / "at-start").mkdir()
    (tmp_path / "at-start" / "sitecustomize.py").write_text(AT_START)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "at-start"))


@torch.no_grad()
def share_right(model, tokenizer, rows):
    """The share of the rows whose right ending has the highest log-likelihood; and the highest for a character."""
    right = right_per_character = 0
    for row in rows:
        context = tokenizer.encode_ordinary(f"Cooking: {row['ctx_a']} He")
        scores = []
        for ending in row["endings"]:
            ids = tokenizer.encode_ordinary(" " + ending)
            losses = F.log_softmax(model.logits(torch.tensor([context + ids])).double(), dim=-1)[0]
            scores.append(sum(losses[len(context) + i - 1, token].item() for i, token in enumerate(ids)))
        per_character = [score / len(ending) for score, ending in zip(scores, row["endings"], strict=True)]
        right += scores.index(max(scores)) == int(row["label"])
        right_per_character += per_character.index(max(per_character)) == int(row["label"])
    return right / len(rows), right_per_character / len(rows)


def test_no_tasks_need_no_lm_eval(tmp_path, monkeypatch):
    monkeypatch.setattr(task_data, "find_spec", lambda name: None)
    fetch_tasks([], tmp_path)
    expected = {"tasks": [], "lm_eval": None, "files": {}}
    assert read_with_seal((tmp_path / "manifest.json").read_text()) == expected


def test_a_missing_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(task_data, "find_spec", lambda name: None)
    with pytest.raises(EncoreError) as error:
        fetch_tasks(["hellaswag"], tmp_path)
    assert str(error.value) == (
        "evaluate_tasks asks for hellaswag, and lm-eval, which runs them, is not installed; "
        "`pip install -c requirements.lock -c requirements-dev.lock 'lm-eval[hf]'` brings it"
    )


def test_an_unknown_task_is_told_with_the_nearest(few_tasks, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(task_data, "_check_network", lambda names: None)
    with pytest.raises(EncoreError):
        fetch_tasks(["helaswag"], tmp_path)
    assert "encore: evaluate_tasks: lm-eval has no task helaswag; did you mean hellaswag?" in capfd.readouterr().err


def test_data_of_other_tasks_is_not_taken(tmp_path):
    fetch_tasks([], tmp_path)
    with pytest.raises(EncoreError, match="lacks the data of hellaswag; `dvc repro download_tasks` brings it"):
        run_tasks(["hellaswag"], tmp_path, Path("model"), "cpu")
    shutil.rmtree(tmp_path)


def test_a_task_is_a_parameter_of_the_pipeline(finished, few_tasks):
    """Asked for, it is fetched once and evaluated without a network; nothing is tokenized or trained again."""
    rows, data = make_rows(12), finished / "data/tasks"
    page = finished / "params.yaml"
    page.write_text(page.read_text().replace("evaluate_tasks: []", "evaluate_tasks: [hellaswag]"))
    output = run_dvc(finished, "repro", exit_code=255, HF_ENDPOINT="http://127.0.0.1:9")
    assert "encore: evaluate_tasks: the data of hellaswag cannot be fetched, since http://127.0.0.1:9 cannot" in output
    assert (finished / "data/raw/manifest.json").exists()  # the corpus is another stage's
    with serving_tasks(rows) as (address, asked):
        fetched = run_dvc(finished, "repro", "download_tasks", HF_ENDPOINT=address)
        assert any(path.endswith("data/validation-00000-of-00001.parquet") for path in asked)
    assert stages_run(fetched) == ["download_tasks"]
    paths = [path for path in sorted(data.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    files = {str(path.relative_to(data)): sha256(path.read_bytes()).hexdigest() for path in paths}
    assert len(files) > 2
    assert {path.suffix for path in paths} == {".arrow", ".json"}
    manifest = read_with_seal((data / "manifest.json").read_text())
    assert manifest == {"tasks": ["hellaswag"], "lm_eval": metadata.version("lm_eval"), "files": files}

    output = run_dvc(finished, "repro", HF_ENDPOINT=address)  # nobody listens there any more
    assert stages_run(output) == ["evaluate"]
    assert "hellaswag: " in output
    shown = json.loads((finished / "metrics/eval.json").read_text())["task"]["hellaswag"]
    model = load_model(finished / "model").eval()
    acc, acc_norm = share_right(model, load_tokenizer(finished / "model" / RANKS_FILE), rows)
    assert 0 < acc < 1  # or a score that is always 0 would do
    assert shown["acc"] == pytest.approx(acc)
    assert shown["acc_norm"] == pytest.approx(acc_norm)
    assert shown["acc_stderr"] == pytest.approx((acc * (1 - acc) / 11) ** 0.5)
    assert run_dvc(finished, "status").strip() == "Data and pipelines are up to date."  # lm-eval has changed no file


@pytest.fixture
def plus(tmp_path):
    """The folder of a nanochat-plus whose scores differ, with its tokenizer."""
    folder, ranks = tmp_path / "model", {bytes([byte]): byte for byte in range(256)}
    folder.mkdir()
    torch.manual_seed(0)
    model = NanoChat(NanoChatConfig(257, block_size=128, n_layer=2, n_head=2, n_embd=32, plus=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=1.0 if "embed" in name or name == "smear" else 0.2)
    save_hub_tokenizer(folder, ranks, 128)
    save_model(folder, model, write_ranks(ranks), {})
    return folder


def test_a_nanochat_plus_is_evaluated_by_our_code_and_none_of_its_folder_s(plus, few_tasks, tmp_path, monkeypatch):
    rows, data, home = make_rows(12), tmp_path / "data", tmp_path / "home"
    monkeypatch.setenv("HF_HOME", str(home))
    with serving_tasks(rows) as (address, _):
        monkeypatch.setenv("HF_ENDPOINT", address)
        fetch_tasks(["hellaswag"], data)
    # What transformers would run of a folder that it trusts, beside the code that config.json names.
    (plus / "custom_generate").mkdir()
    (plus / "custom_generate/generate.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\ndef generate(): pass\n")
    shown = run_tasks(["hellaswag"], data, plus, "cpu")["hellaswag"]
    acc, acc_norm = share_right(load_model(plus), load_tokenizer(plus / RANKS_FILE), rows)
    assert 0 < acc < 1
    assert shown["acc"] == pytest.approx(acc)
    assert shown["acc_norm"] == pytest.approx(acc_norm)
    assert not (tmp_path / "run").exists()
    assert not list(home.rglob("*.py"))  # where transformers would keep the code that it trusts


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_nanochat_plus_with_other_code_is_refused(plus, tmp_path, damage):
    data, code = tmp_path / "data", plus / "modeling_nanochat_plus.py"
    data.mkdir()
    write_sealed(data / "manifest.json", {"tasks": ["hellaswag"], "lm_eval": "0", "files": {}})
    if damage == "changed":
        code.write_bytes(code.read_bytes() + b"\n")
    else:
        code.unlink()
    with pytest.raises(EncoreError) as error:
        run_tasks(["hellaswag"], data, plus, "cpu")
    assert str(error.value) == (
        f"evaluate_tasks: {code} is not the code that Encore computes nanochat-plus by in transformers; "
        f"bring {plus} back from where it came"
    )
