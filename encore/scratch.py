"""The scratch folder: what must outlive a stage that is killed, downloads and checkpoints."""

import os
from pathlib import Path

from encore.errors import EncoreError


def scratch_folder() -> Path:
    """`.encore` in the working directory, or the folder that the environment variable ENCORE_SCRATCH names.

    It is no output of DVC's, and git and DVC ignore it: DVC removes a stage's outputs before it runs the stage, and
    with them would go all that a killed run had done. What lies here is therefore named by what it depends on and
    checked before it is used. Queued and temporary experiments run in a copy of the repository that is deleted on
    failure, so for them ENCORE_SCRATCH must be an absolute path, or begin with a ~, which stands for a home even where
    quotes hid it from the shell. Raises EncoreError where there is no such home.
    """
    name = os.environ.get("ENCORE_SCRATCH") or ".encore"
    folder = Path(os.path.expanduser(name))
    if folder.parts[:1] and folder.parts[0].startswith("~"):
        raise EncoreError(f"ENCORE_SCRATCH: {name} begins with a home that is not there; give the whole path")
    return folder
