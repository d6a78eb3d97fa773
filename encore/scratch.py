"""The scratch folder: what must outlive a stage that is killed, downloads and checkpoints."""

import os
from pathlib import Path


def scratch_folder() -> Path:
    """`.encore` in the working directory, or the folder that the environment variable ENCORE_SCRATCH names.

    It is no output of DVC's, and git and DVC ignore it: DVC removes a stage's outputs before it runs the stage, and
    with them would go all that a killed run had done. What lies here is therefore named by what it depends on and
    checked before it is used. Queued and temporary experiments run in a copy of the repository that is deleted on
    failure, so for them ENCORE_SCRATCH must be an absolute path.
    """
    return Path(os.environ.get("ENCORE_SCRATCH") or ".encore")
