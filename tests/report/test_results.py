"""results.py: a result that is not the one of dvc.lock is refused, and so are pages that cannot be read."""

from pathlib import Path

import pytest

from encore.errors import EncoreError
from encore.report.page import render
from encore.report.revisions import find_revision


@pytest.fixture
def here(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished repository as the working directory."""
    monkeypatch.chdir(finished)
    return finished


@pytest.mark.parametrize(
    "name", ["metrics/metrics.json", "metrics/train.tsv", "metrics/position.tsv", "metrics/samples.md", "training.log"]
)
def test_a_result_that_is_not_the_one_of_dvc_lock_is_refused(here: Path, name: str) -> None:
    data = (here / name).read_bytes()
    (here / name).unlink()
    (here / name).write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(EncoreError) as error:
        render([find_revision("workspace")])
    assert str(error.value) == (
        f"{name} is not the one that dvc.lock has the hash of, so the run has not ended, or the file was changed "
        "afterwards; `dvc repro` makes both anew, `git restore` brings back what was committed"
    )


@pytest.mark.parametrize("name", ["dvc.lock", "dvc.yaml", "params.yaml"])
def test_yaml_that_cannot_be_read_is_a_sentence(here: Path, name: str) -> None:
    (here / name).write_text((here / name).read_text() + "\n\tx: [\n")
    with pytest.raises(EncoreError, match=rf"^{name} is not valid YAML \(.*\); `git restore {name}` brings it back$"):
        render([find_revision("workspace")])
