"""ENCORE_PROFILE: a trace of the steps it names, and the same weights."""

import json

import torch

from tests.small_runs import run, small_machine, trainer_in, weights_of


def test_a_trace_of_three_steps_and_the_same_weights(tiny_params, tokens_folder, tmp_path, monkeypatch, capfd):
    params = tiny_params(dtype="float32", max_iters=8)
    with small_machine():
        plain = trainer_in(tmp_path / "plain", tokens_folder, params)
        run(plain)
        monkeypatch.setenv("ENCORE_PROFILE", str(tmp_path / "traces"))
        capfd.readouterr()
        profiled = trainer_in(tmp_path / "profiled", tokens_folder, params)
        run(profiled)
    path = tmp_path / "traces/steps-5-7.json"
    assert list(path.parent.iterdir()) == [path]
    assert f"encore: note: ENCORE_PROFILE: {path} has a trace of 3 steps; " in capfd.readouterr().err
    events = json.loads(path.read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    assert {"ProfilerStep#4", "ProfilerStep#5", "ProfilerStep#6"} <= set(names)
    assert sum("_scaled_dot_product" in str(name) for name in names) >= 3 * 2 * 2  # steps, micro-batches, layers
    assert all(torch.equal(weights_of(plain)[name], tensor) for name, tensor in weights_of(profiled).items())


def test_a_run_that_ends_before_has_no_trace(tiny_params, tokens_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ENCORE_PROFILE", str(tmp_path / "traces"))
    with small_machine():
        run(trainer_in(tmp_path / "run", tokens_folder, tiny_params(dtype="float32", max_iters=3)))
    assert list((tmp_path / "traces").iterdir()) == []
