"""stages/check.py: its output, which every other stage waits for, says which code they run and nothing of the page."""

import json
from pathlib import Path

import pytest

from encore.code import describe_code
from encore.errors import EncoreError
from stages import check
from tests.conftest import MODERN, write_page


@pytest.fixture(autouse=True)
def _root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_output_is_the_same_for_every_right_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Were it not, a changed max_iters would make the download run again."""
    outputs = []
    for changes in ({}, {"max_iters": 1000}, {"dataset_revision": "1.13.3"}):
        write_page(Path("params.yaml"), **changes)
        check.main()
        outputs.append({path.name: path.read_text() for path in check.FOLDER.iterdir()})
    assert outputs == 3 * [{f"{stage}.txt": describe_code(f"stages.{stage}") for stage in check.STAGES}]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("changes", [{"max_iters": 0}, {"max_iter": 10}, {"n_head": 5}])
def test_a_wrong_page_gets_none(changes: dict[str, int]) -> None:
    write_page(Path("params.yaml"), **changes)
    with pytest.raises(EncoreError, match=r"^params\.yaml has 1 problem; nothing was run:"):
        check.main()
    assert not check.FOLDER.exists()


def test_a_page_that_describes_other_weights_than_it_starts_from_gets_none() -> None:
    weights = Path("weights")
    weights.mkdir()
    write_page(Path("params.yaml"), init_from="weights/", n_layer=2, n_head=6, n_embd=192, block_size=128, bias=True)
    with pytest.raises(EncoreError, match=r"^init_from: weights/config\.json is missing;"):
        check.main()
    (weights / "model.safetensors").touch()
    config = {"model_type": "gpt2", "n_layer": 3, "n_head": 6, "n_embd": 384, "n_positions": 128}
    (weights / "config.json").write_text(json.dumps(config))
    with pytest.raises(EncoreError) as error:
        check.main()
    assert str(error.value).splitlines() == [
        "params.yaml has 2 problems; nothing was run:",
        "  n_layer: 2 is not what the weights of init_from, weights/, have: 3",
        "  n_embd: 192 is not what the weights of init_from, weights/, have: 384",
    ]
    assert not check.FOLDER.exists()

    (weights / "config.json").write_text(json.dumps({**config, "n_layer": 2, "n_embd": 192}))
    check.main()
    assert check.FOLDER.exists()


def test_a_page_whose_size_auto_was_never_tried_with_gets_none() -> None:
    write_page(Path("params.yaml"), **{**MODERN, "learning_rate": "auto", "n_layer": 13, "n_head": 2})
    with pytest.raises(EncoreError, match=r"learning_rate: auto was tried with n_layer from 2 to 12, not 13; give"):
        check.main()
    assert not check.FOLDER.exists()
    write_page(Path("params.yaml"), **{**MODERN, "learning_rate": "auto", "n_layer": 12, "n_head": 2})
    check.main()
    assert check.FOLDER.exists()


def test_a_page_that_is_missing_gets_none() -> None:
    with pytest.raises(EncoreError, match=r"^params\.yaml is missing;"):
        check.main()
    assert not check.FOLDER.exists()


def test_a_doubtful_page_passes_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    write_page(Path("params.yaml"), max_iters=1000, lr_decay_iters=600_000)
    check.main()
    assert check.FOLDER.exists()
    assert capsys.readouterr().err.startswith("encore: note: lr_decay_iters is 600000 and max_iters is 1000, so ")
