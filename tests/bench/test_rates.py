"""bench.rates: what a point means, which runs its sweep has, and a sweep of tiny runs to its end."""

import json
import sys

import pytest

from bench import rates
from bench.rates import make_page, sweep
from encore.errors import EncoreError
from encore.muon_rates import KEYS, find_rates, measure
from encore.params import find_problems
from encore.tokens.token_files import manifest_sha256
from tests.small_runs import small_machine

RATES = dict(zip(KEYS, (0.06, 0.3, 0.03, 2.0), strict=True))


def test_a_point_is_a_page_of_that_size():
    page = make_page("nanochat-plus:3x256:16384x200", seed=5)
    assert (page["architecture"], page["n_layer"], page["n_embd"], page["n_head"]) == ("nanochat-plus", 3, 256, 2)
    assert measure(page, 2048).tokens_per_iter == 16_384
    assert (page["max_iters"], page["seed"]) == (200, 5)
    assert find_problems(page) == []


@pytest.mark.parametrize("point", ["gpt2:2x64:4096x100", "nanochat:2x64:4096", "nanochat:2x64:100x100"])
def test_what_is_no_point_is_refused(point):
    with pytest.raises(EncoreError, match=point):
        make_page(point)


def test_a_sweep_is_all_rates_and_each_up_and_down():
    runs = dict(sweep(RATES))
    assert runs.pop("the rule") == RATES
    assert len(runs) == 8
    assert runs["all three x 1.5"] == pytest.approx(dict(zip(KEYS, (0.09, 0.45, 0.045, 2.0), strict=True)))
    assert runs["head_lr x 0.67"] == pytest.approx({**RATES, "head_lr": 0.02})
    assert list(dict(sweep(RATES, together=True))) == ["the rule", "all three x 0.67", "all three x 1.5"]


def test_a_sweep_ends_in_a_row_and_is_not_run_again(tokens_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rates, "BLOCK_SIZE", 16)
    results = tmp_path / "results"
    monkeypatch.chdir(tmp_path)
    arguments = ["nanochat:1x32:64x3", "--together", "--tokens", str(tokens_folder), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["bench.rates", *arguments])
    with small_machine():
        rates.main()
    head, _, row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    runs = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(runs) == 3
    hashes, pages, losses = zip(*runs, strict=True)
    assert set(hashes) == {manifest_sha256(tokens_folder)}
    expected = find_rates(measure(pages[0], int(cells["ids"])))
    assert {key: pages[0][key] for key in KEYS} == expected == {key: float(cells[key]) for key in KEYS}
    assert len(set(losses)) == 3
    assert (cells["loss"], cells["best of the sweep"]) == (f"{losses[0]:.4f}", f"{min(losses):.4f}")

    monkeypatch.setattr(rates, "train", None)  # which a second time is not called
    with small_machine():
        rates.main()
    assert row in capsys.readouterr().out
    monkeypatch.setattr(rates, "manifest_sha256", lambda folder: "other tokens")
    with pytest.raises(TypeError), small_machine():  # whose losses are others
        rates.main()
