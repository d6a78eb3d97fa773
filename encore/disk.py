"""Whether the disk has room, asked before anything is written."""

import os
import shutil
import tempfile
from pathlib import Path

from encore.errors import EncoreError


def check_room(writes: list[tuple[Path, int]], way_out: str) -> None:
    """Raises EncoreError where a disk has less free than the bytes that are going to be written into folders on it."""
    for folder, _ in writes:
        device = folder.stat().st_dev
        needed_bytes = sum(count for other, count in writes if other.stat().st_dev == device)
        free_bytes = shutil.disk_usage(folder).free
        if needed_bytes > free_bytes:
            raise EncoreError(
                f"{folder}: {needed_bytes / 1e6:,.1f} MB are going to be written and {free_bytes / 1e6:,.1f} MB are "
                f"free on its disk; {way_out}"
            )


def can_link(source: Path, target: Path) -> bool:
    """Whether a file in the folder `source` can have a hard link in the folder `target`; found by trying."""
    with tempfile.NamedTemporaryFile(dir=source, prefix=".link-") as probe:
        link = target / Path(probe.name).name
        try:
            os.link(probe.name, link)
        except OSError:
            return False
        link.unlink()
        return True
