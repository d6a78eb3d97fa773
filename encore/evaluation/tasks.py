"""Standard tasks (HellaSwag, LAMBADA, ...) by EleutherAI's lm-eval, with the data of download/task_data.py."""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from encore.download.task_data import MANIFEST, WAY_OUT, check_installed, run_lm_eval
from encore.errors import EncoreError, run_stage
from encore.files import sha256_of, write_json
from encore.integrity import check_files
from encore.json_files import read_json, read_sealed
from encore.pretrained.init_from import CONFIG, bring_model_back
from encore.pretrained.nanochat_hub import MODELING, PLUS
from encore.schemas import HubConfig, TasksManifest

BATCH_SIZE = 16
BOOTSTRAP_SAMPLES = 1000  # for the standard errors that have no formula, perplexity's


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
    check_installed(names)
    with tempfile.TemporaryDirectory() as place:
        # A copy: `datasets` writes locks and what it derives beside its files, and an output of DVC must stay as it is.
        data, results = Path(place, "data"), Path(place, "results.json")
        shutil.copytree(folder, data)
        arguments = [str(model), str(results), device, *names]
        run_lm_eval("encore.evaluation.tasks", arguments, HF_DATASETS_CACHE=str(data), HF_HUB_OFFLINE="1")
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


def main() -> None:
    model, results, device, *names = sys.argv[1:]
    write_json(Path(results), _evaluate(Path(model), device, names))


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
