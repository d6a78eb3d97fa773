"""What a `dvc repro` with nothing to do costs: Encore's pipeline against as many stages that copy one small file.

    python -m bench.noop_repro [RUNS]

Both run in turn in one go; the ratio of the medians is what DVC itself does not account for.
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
RUNS = 9
COUNT = len(YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"])


def empty_pipeline(folder: Path) -> Path:
    """A repository of as many stages as Encore has, in a chain, run once."""
    stages = "".join(
        f"  stage_{i}:\n    cmd: cp file_{i} file_{i + 1}\n    deps: [file_{i}]\n    outs: [file_{i + 1}]\n"
        for i in range(COUNT)
    )
    folder.mkdir()
    (folder / "file_0").write_text("0\n")
    (folder / "dvc.yaml").write_text("stages:\n" + stages)
    (folder / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    repro(folder)
    return folder


def repro(folder: Path) -> float:
    """Seconds that a `dvc repro` takes as a whole process."""
    started = time.perf_counter()
    subprocess.run(["dvc", "repro", "--quiet"], cwd=folder, check=True)
    return time.perf_counter() - started


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else RUNS
    status = subprocess.run(["dvc", "status"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    if "up to date" not in status:
        raise SystemExit(f"bench: run `dvc repro` first, so that there is nothing to do; dvc status says:\n{status}")
    with tempfile.TemporaryDirectory() as folder:
        empty = empty_pipeline(Path(folder) / "empty")
        pairs = [(repro(ROOT), repro(empty)) for _ in range(runs + 1)][1:]
    ours, theirs = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(
        f"no-op dvc repro, medians of {runs}: Encore {ours:.2f} s, {COUNT} empty stages {theirs:.2f} s, "
        f"ratio {ratio:.2f}"
    )


if __name__ == "__main__":
    main()
