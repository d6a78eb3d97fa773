"""Brings the data of `evaluate_tasks`, lm-eval's standard tasks, to data/tasks; for none, a manifest that says so."""

from pathlib import Path

from encore.code import check_code
from encore.download.stopping import run_download
from encore.download.task_data import MANIFEST, fetch_tasks
from encore.files import whole_folder
from encore.params import load_params
from encore.pipeline.stage_history import record_stage
from stages import STARTED

TASKS = Path("data/tasks")


def main() -> None:
    check_code("download_tasks")
    params = load_params("download_tasks")
    with whole_folder(TASKS) as folder:
        fetch_tasks(params.evaluate_tasks, folder)
    record_stage("download_tasks", TASKS / MANIFEST, STARTED)


if __name__ == "__main__":
    run_download(main)
