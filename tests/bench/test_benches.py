"""Each bench that measures steps goes to its end, with a model of nothing: an error would come after minutes."""

import re
import sys
from importlib import import_module

import pytest

from bench import train
from bench.train import MODELS, WARM_UP_STEPS

TINY = {"n_layer": 1, "n_head": 1, "n_embd": 128, "block_size": 64, "batch_size": 8}
NUMBER = r"([\d,.]+)"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """What a bench prints, of one round."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENCORE_DEVICE", "cpu")
    monkeypatch.setitem(MODELS, "4x128", TINY)
    monkeypatch.setattr(train, "VOCAB_SIZE", 300)

    def main(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--rounds", "1"])
        import_module(f"bench.{name}").main()
        return capsys.readouterr().out

    return main


def numbers(pattern, output):
    """Those where a pattern has NUMBER, which must be there."""
    found = re.search(pattern.replace("NUMBER", NUMBER), output)
    assert found, output
    return [float(number.replace(",", "")) for number in found.groups()]


def test_train(run):
    output = run("train", "--steps", "2")
    assert f"iter {2 + WARM_UP_STEPS}/{2 + WARM_UP_STEPS}" in output
    ours, tokens_per_second = numbers(r"Encore's step +NUMBER ms +NUMBER tokens/s", output)
    assert tokens_per_second == pytest.approx(8 * 64 / ours * 1e3, rel=0.1)  # rounded to a tenth of a millisecond
    (bare,) = numbers(r"bare step +NUMBER ms", output)
    assert numbers("speed over the bare loop: NUMBER", output) == pytest.approx([bare / ours], rel=0.2)
    assert re.search(r"^  [\d.]+ TFLOP/s$", output, re.M)  # no share of a peak: a CPU has none
    for part in ("waiting for data", "logging", "evaluation", "saving"):
        assert numbers(rf"{part} +NUMBER% of the run", output)[0] < 100


def test_document_masking(run):
    output = run("document_masking", "--model", "4x128", "--vocab-size", "300", "--document-tokens", "5")
    with_masks, without = (numbers(rf"{how} +NUMBER ms", output)[0] for how in ("with", "without"))
    assert numbers("with over without: NUMBER", output) == pytest.approx([with_masks / without], rel=0.2)


def test_recipes(run):
    output = run("recipes", "--model", "4x128", "--vocab-size", "300")
    for recipe in ("nanochat", "nanochat-plus"):
        assert numbers(rf"step of {recipe}, Muon over that of GPT-2, AdamW: NUMBER", output)[0] > 0


def test_verification(run):
    output = run("verification", "--model", "4x128", "--gigabytes", "0.001")
    assert numbers(r"a step beside it +NUMBER ms", output)[0] > 0
