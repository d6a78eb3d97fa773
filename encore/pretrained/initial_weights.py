"""Brings the weights that training starts from to the folder data/init. The stage download_weights."""

import shutil
import sys
from pathlib import Path

from encore.download.hub import fetch_model
from encore.files import link_or_copy, sha256_of
from encore.json_files import write_sealed
from encore.pretrained.init_from import (
    CONFIG,
    PUBLISHED,
    SCRATCH,
    TOKENIZERS,
    WEIGHTS,
    check_hashes,
    find_files,
    read_record,
    read_shape,
)

MANIFEST = "manifest.json"


def fetch_initial(init_from: str, folder: Path, scratch: Path) -> None:
    """Fills `folder` with the weights and a manifest that has their hashes; with the manifest alone from scratch.

    Downloads are kept in `scratch`. Raises EncoreError where the weights are missing or cannot be reached.
    """
    if init_from in PUBLISHED:
        published = PUBLISHED[init_from]
        for path in fetch_model(published.repository, published.commit, [CONFIG, WEIGHTS], scratch / "hub-models"):
            link_or_copy(path, folder / path.name)
    elif init_from != SCRATCH:
        read_shape(Path(init_from))
        paths = find_files(Path(init_from))
        if record := read_record(Path(init_from)):
            check_hashes(Path(init_from), record, [path.name for path in paths])
        for path in paths:
            # A copy: DVC would make a hard link, and the user's file with it, read-only.
            shutil.copyfile(path, folder / path.name)
        if not any(path.name in TOKENIZERS for path in paths):
            print(
                f"encore: note: {init_from} has no {' or '.join(TOKENIZERS)}, so nothing tells whether its ids mean "
                "the tokens of the data; compare the first loss of training with that of the weights",
                file=sys.stderr,
            )
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    write_sealed(folder / MANIFEST, {"init_from": init_from, "files": files})
