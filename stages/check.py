"""The first stage: stops a wrong params.yaml, and finds out which code each other stage runs.

DVC removes a stage's outputs before it runs the stage. All others depend on this stage's output, so a wrong page stops
every run here, before anything is lost. The output says nothing of the page and nothing of comments: where only those
have changed, no later stage runs again.
"""

import sys

from encore.code import FOLDER, describe_code
from encore.errors import EncoreError, run_stage
from encore.files import whole_folder
from encore.mixture import list_sources
from encore.muon_rates import find_untested
from encore.params import PAGE, check_page, find_warnings, list_problems
from encore.pipeline.experiment_copy import check_copied
from encore.pipeline.stage_history import record_stage
from encore.pretrained.init_from import find_misfits
from stages import STARTED

STAGES = ("download", "download_weights", "download_tasks", "tokenize", "train", "evaluate", "count_tokens")


def main() -> None:
    params = check_page(PAGE)
    for source in list_sources(params):
        check_copied(source.dataset, params.init_from)
    page = params.model_dump()
    if misfits := find_misfits(page) + find_untested(page, page["vocab_size"]):
        raise EncoreError(list_problems(PAGE, misfits))
    for warning in find_warnings(params):
        print(f"encore: note: {warning}", file=sys.stderr)
    with whole_folder(FOLDER) as folder:
        for stage in STAGES:
            (folder / f"{stage}.txt").write_text(describe_code(f"stages.{stage}"))
    record_stage("check", FOLDER / "train.txt", STARTED)


if __name__ == "__main__":
    run_stage(main)
