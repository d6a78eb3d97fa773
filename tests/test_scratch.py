"""encore/scratch.py: where downloads and checkpoints lie."""

from pathlib import Path

import pytest

from encore.errors import EncoreError
from encore.scratch import scratch_folder


@pytest.mark.parametrize(("name", "expected"), [("~", "{home}"), ("~/x", "{home}/x"), ("a/~b", "a/~b"), ("/x", "/x")])
def test_a_home_is_found_where_quotes_hid_it_from_the_shell(
    name: str, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ENCORE_SCRATCH", name)
    assert scratch_folder() == Path(expected.format(home=tmp_path))


def test_a_home_of_nobody_makes_no_folder_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENCORE_SCRATCH", "~no-such-user/x")
    with pytest.raises(EncoreError, match=r"^ENCORE_SCRATCH: ~no-such-user/x begins with a home that is not there; "):
        scratch_folder()
