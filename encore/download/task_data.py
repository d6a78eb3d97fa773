"""The data of lm-eval's standard tasks (HellaSwag, LAMBADA, ...): fetched here, used by evaluation/tasks.py.

lm-eval runs in a process of its own: where `datasets` keeps its files and whether it may use the network are settings
that it reads when it is imported.
"""

import difflib
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from encore.errors import EncoreError, bring_back, run_stage
from encore.files import sha256_of
from encore.json_files import write_sealed

MANIFEST = "manifest.json"
WAY_OUT = bring_back("data/tasks", "download_tasks")
SECONDS_TO_REACH = 10
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
        check_installed(names)
        _check_network(names)
        with tempfile.TemporaryDirectory() as downloads:
            caches = {"HF_DATASETS_CACHE": str(folder.resolve()), "HF_HUB_CACHE": downloads}
            run_lm_eval("encore.download.task_data", names, **caches)
        for path in [*folder.rglob("*.lock"), *folder.rglob("cache-*.arrow")]:  # of the process that is done
            path.unlink()
    # A task is what its version of lm-eval makes of it.
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): sha256_of(path) for path in paths}
    lm_eval = version("lm_eval") if names else None
    write_sealed(folder / MANIFEST, {"tasks": names, "lm_eval": lm_eval, "files": files})


def check_installed(names: list[str]) -> None:
    """Raises EncoreError where lm-eval is missing."""
    if find_spec("lm_eval") is None:
        raise EncoreError(
            f"evaluate_tasks asks for {', '.join(names)}, and lm-eval, which runs them, is not installed; "
            "`pip install -c requirements.lock -c requirements-dev.lock 'lm-eval[hf]'` brings it"
        )


def _check_network(names: list[str]) -> None:
    """Raises EncoreError where the Hub cannot be reached: `datasets` would ask it for 40 seconds before it says so."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    address = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    try:
        get_session().head(address, timeout=SECONDS_TO_REACH)
    except Exception as error:  # whatever httpx raises: no such name, refused, a proxy that is none
        raise EncoreError(
            f"evaluate_tasks: the data of {', '.join(names)} cannot be fetched, since {address} cannot be "
            f"reached ({error}); check the network and HF_ENDPOINT, or set evaluate_tasks: []"
        ) from None


def run_lm_eval(module: str, arguments: list[str], **settings: str) -> None:
    """Runs a module of ours that uses lm-eval, with these environment variables. Raises EncoreError where it fails."""
    environment = {**os.environ, **SETTINGS, **settings}
    done = subprocess.run([sys.executable, "-m", module, *arguments], env=environment)
    if done.returncode:
        raise EncoreError("evaluate_tasks: lm-eval failed, see above; mend it, or set evaluate_tasks: []")


def main() -> None:
    """Has lm-eval fetch the data of the tasks that the command line names."""
    from lm_eval.tasks import TaskManager

    names = sys.argv[1:]
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


if __name__ == "__main__":
    run_stage(main)
