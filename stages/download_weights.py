"""Brings the weights that training starts from, `init_from`, to data/init; from scratch, a manifest that says so."""

from pathlib import Path

from encore.code import check_code
from encore.download.stopping import run_download
from encore.files import whole_folder
from encore.params import load_params
from encore.pipeline.experiment_copy import check_copied
from encore.pipeline.stage_history import record_stage
from encore.pretrained.initial_weights import MANIFEST, fetch_initial
from encore.scratch import scratch_folder
from stages import STARTED

INIT = Path("data/init")


def main() -> None:
    check_code("download_weights")
    params = load_params("download_weights")
    check_copied(init_from=params.init_from)
    with whole_folder(INIT) as folder:
        fetch_initial(params.init_from, folder, scratch_folder())
    record_stage("download_weights", INIT / MANIFEST, STARTED)


if __name__ == "__main__":
    run_download(main)
