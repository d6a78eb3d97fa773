"""Standard tasks (HellaSwag, LAMBADA, ...) by EleutherAI's lm-eval.

Their data is fetched in one stage and used in another, both in a process of their own: where `datasets` keeps its files
and whether it may use the network are settings that it reads when it is imported.
"""

import difflib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from encore.errors import EncoreError, bring_back, run_stage
from encore.files import sha256_of, write_json
from encore.integrity import check_files
from encore.json_files import read_json, read_sealed, write_sealed
from encore.pretrained.init_from import CONFIG, bring_model_back
from encore.pretrained.nanochat_hub import MODELING, PLUS
from encore.schemas import HubConfig, TasksManifest

MANIFEST = "manifest.json"
WAY_OUT = bring_back("data/tasks", "download_tasks")
BATCH_SIZE = 16
SECONDS_TO_REACH = 10
BOOTSTRAP_SAMPLES = 1000  # for the standard errors that have no formula, perplexity's
SETTINGS = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def fetch_tasks(names: list[str], folder: Path) -> None:
    """Fills `folder` with the data of lm-eval's tasks of these names, and a manifest. No names: the manifest alone.

    Raises EncoreError where lm-eval is missing, has no such task or cannot reach the Hub.
    """
    if names:
        _check_installed(names)
        _check_network(names)
        with tempfile.TemporaryDirectory() as downloads:
            _run(["fetch", str(folder), *names], HF_DATASETS_CACHE=str(folder.resolve()), HF_HUB_CACHE=downloads)
        for path in [*folder.rglob("*.lock"), *folder.rglob("cache-*.arrow")]:  # of the process that is done
            path.unlink()
    # A task is what its version of lm-eval makes of it.
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}
    lm_eval = version("lm_eval") if names else None
    write_sealed(folder / MANIFEST, {"tasks": names, "lm_eval": lm_eval, "files": files})


def run_tasks(names: list[str], folder: Path, model: Path, device: str) -> dict[str, dict[str, float]]:
    """The metrics of each task (acc, acc_stderr, ...) for the model in `model`, from the data of `fetch_tasks`.

    Raises EncoreError where the data is of other tasks, the model comes with other code than ours, or lm-eval is
    missing or fails.
    """
    manifest = read_sealed(folder / MANIFEST, TasksManifest, WAY_OUT)
    missing = set(names) - set(manifest["tasks"])
    if missing:
        names_missing = ", ".join(sorted(missing))
        raise EncoreError(f"{folder} lacks the data of {names_missing}; `dvc repro download_tasks` brings it")
    if not names:
        return {}
    check_files(folder, manifest["files"], WAY_OUT)
    check_own_code(model)
    _check_installed(names)
    with tempfile.TemporaryDirectory() as place:
        # A copy: `datasets` writes locks and what it derives beside its files, and an output of DVC must stay as it is.
        data, results = Path(place, "data"), Path(place, "results.json")
        shutil.copytree(folder, data)
        _run(["run", str(model), str(results), device, *names], HF_DATASETS_CACHE=str(data), HF_HUB_OFFLINE="1")
        return read_json(results, dict[str, dict[str, float]])


def check_own_code(model: Path) -> None:
    """Raises EncoreError where a nanochat-plus comes with other code for transformers than what is evaluated here."""
    if _architecture(model) != PLUS:
        return
    code = model / MODELING.name
    if not code.is_file() or sha256_of(code) != sha256_of(MODELING):
        raise EncoreError(
            f"evaluate_tasks: {code} is not the code that Encore computes nanochat-plus by in transformers; "
            f"{bring_model_back(model)}"
        )


def _architecture(model: Path) -> str:
    return read_json(model / CONFIG, HubConfig, bring_model_back(model))["model_type"]


def _check_installed(names: list[str]) -> None:
    if find_spec("lm_eval") is None:
        raise EncoreError(
            f"evaluate_tasks asks for {', '.join(names)}, and lm-eval, which runs them, is not installed; "
            "`pip install -c requirements.lock -c requirements-dev.lock 'lm-eval[hf]'` brings it"
        )


def _check_network(names: list[str]) -> None:
    """Raises EncoreError where the Hub cannot be reached: `datasets` would ask it for 40 seconds before it says so."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS_TO_REACH)
    except Exception as error:  # whatever httpx raises: no such name, refused, a proxy that is none
        raise EncoreError(
            f"evaluate_tasks: the data of {', '.join(names)} cannot be fetched, since {constants.ENDPOINT} cannot be "
            f"reached ({error}); check the network and HF_ENDPOINT, or set evaluate_tasks: []"
        ) from None


def _run(arguments: list[str], **settings: str) -> None:
    environment = {**os.environ, **SETTINGS, **settings}
    done = subprocess.run([sys.executable, "-m", "encore.evaluation.tasks", *arguments], env=environment)
    if done.returncode:
        raise EncoreError("evaluate_tasks: lm-eval failed, see above; mend it, or set evaluate_tasks: []")


def main() -> None:
    action, *arguments = sys.argv[1:]
    if action == "fetch":
        _fetch(arguments[1:])
    else:
        model, results, device, *names = arguments
        write_json(Path(results), _evaluate(Path(model), device, names))


def _fetch(names: list[str]) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    problems = []
    for name in names:
        if name not in manager.all_tasks:
            nearest = difflib.get_close_matches(name, manager.all_tasks, n=1)
            problems.append(f"lm-eval has no task {name}" + (f"; did you mean {nearest[0]}?" if nearest else ""))
    if problems:
        raise EncoreError("evaluate_tasks: " + "; ".join(problems))
    try:
        manager.load(names)
    except Exception as error:  # whatever datasets, httpx or the task's own code raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise EncoreError(
            f"evaluate_tasks: the data of {', '.join(names)} cannot be fetched ({reason}); check the network"
        ) from None


def _evaluate(model: Path, device: str, names: list[str]) -> dict[str, dict[str, float]]:
    import lm_eval

    if _architecture(model) == PLUS:
        _introduce_plus()
    done = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=names,
        batch_size=BATCH_SIZE,
        device=device,
        bootstrap_iters=BOOTSTRAP_SAMPLES,
        log_samples=False,
    )
    results = {name: _numbers(done["results"][name]) for name in done["results"]}
    for name, numbers in results.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in numbers.items()))
    return results


def _introduce_plus() -> None:
    """Has transformers compute nanochat-plus by our module, which is the same file as the folder's. Nothing in the
    folder is run then, as its tokenizer's code and its own `generate` would be with trust_remote_code."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from encore.pretrained.modeling_nanochat_plus import NanoChatPlusConfig, NanoChatPlusForCausalLM

    AutoConfig.register(PLUS, NanoChatPlusConfig)
    AutoModelForCausalLM.register(NanoChatPlusConfig, NanoChatPlusForCausalLM)


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """lm-eval's keys are METRIC,FILTER, and its filter `none` says nothing."""
    numbers = {key.removesuffix(",none").replace(",", "_"): value for key, value in row.items() if "," in key}
    return {key: value for key, value in numbers.items() if isinstance(value, int | float)}


if __name__ == "__main__":
    run_stage(main)
