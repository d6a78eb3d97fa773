"""The fit of bench.loss_by_size finds a law that losses were made from."""

import json
import subprocess
import sys

import pytest

from bench.loss_by_size import count_in_layers, fit, main

LAYERS = (2, 3, 4, 6)


def law(parameters):
    return 1.7 + 40 * parameters**-0.35


def test_the_law_is_found_again():
    parameters = [count_in_layers(layers, 32 * layers) for layers in LAYERS]
    assert parameters[2] == 4 * (4 * 128**2 + 2 * 128 * 512)
    found = fit(parameters, [law(count) for count in parameters])
    assert found == pytest.approx((1.7, 40, 0.35), rel=1e-6)
    assert found.loss(10**7) == pytest.approx(law(10**7), rel=1e-9)


def test_experiments_are_read_from_git_and_a_larger_model_is_foretold(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics").mkdir()
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    for layers in LAYERS:
        (tmp_path / "params.yaml").write_text(f"n_layer: {layers}\nn_embd: {32 * layers}\n")
        val = {"val": {"loss": law(count_in_layers(layers, 32 * layers))}}
        (tmp_path / "metrics/metrics.json").write_text(json.dumps(val))
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-qm", "an experiment"], check=True)
        subprocess.run([*git, "tag", f"layers-{layers}"], check=True)
    monkeypatch.setattr(sys, "argv", ["bench", *(f"layers-{layers}" for layers in LAYERS), "--predict", "12x768"])
    main()
    output = capsys.readouterr().out
    for which in ("without the largest", "all"):
        assert f"{which}: L(N) = 1.7000 + 40 / N^0.350" in output
    assert f"12x768, N = 84,934,656: {law(84_934_656):.4f} foretold" in output
