"""Checks the whole of params.yaml before any other stage runs, so that a wrong page costs nothing.

DVC removes a stage's outputs before it runs the stage. `download` depends on this stage's output, a constant,
so a wrong page stops every run here, and a right one never makes a later stage run again.
"""

import sys
from pathlib import Path

from encore.copies import check_copied
from encore.errors import EncoreError, run_stage
from encore.files import write_whole
from encore.history import record_stage
from encore.init_from import find_misfits
from encore.params import PAGE, check_page, find_warnings, list_problems
from stages import STARTED

MARKER = Path("data/params_checked")


def main() -> None:
    params = check_page(PAGE)
    check_copied(params.dataset, params.init_from)
    if misfits := find_misfits(params.model_dump()):
        raise EncoreError(list_problems(PAGE, misfits))
    for warning in find_warnings(params):
        print(f"encore: note: {warning}", file=sys.stderr)
    write_whole(MARKER, b"params.yaml passed the schema of encore/params.py\n")
    record_stage("check_params", MARKER, STARTED)


if __name__ == "__main__":
    run_stage(main)
