"""ENCORE_RECOMPUTE: the same bits with less memory."""

import copy

import pytest
import torch

from bench.memory import kept_bytes
from encore.errors import EncoreError
from encore.models.architectures import make_config, make_model
from encore.models.recompute import recompute_layers, wants_recompute
from tests.conftest import MODERN
from tests.small_runs import run, small_machine, trainer_in, weights_of

MODELS = [{"dropout": 0.2}, MODERN, {**MODERN, "architecture": "nanochat-plus"}]
MASKED = [{**settings, "document_masking": True} for settings in MODELS]
NAMES = ["gpt2 with dropout", "nanochat", "nanochat-plus"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [*MODELS, *MASKED], ids=[*NAMES, *(f"{name}, documents masked" for name in NAMES)])
def test_training_ends_in_the_same_bits(settings, tiny_params, short_documents, tmp_path, monkeypatch):
    params = tiny_params(**settings, dtype="float32")
    weights = []
    with small_machine():
        for wish in ("0", "1"):
            monkeypatch.setenv("ENCORE_RECOMPUTE", wish)
            trainer = trainer_in(tmp_path / wish, short_documents, params)
            run(trainer)
            weights.append((weights_of(trainer), trainer.records.rows.train))
    (plain, rows), (recomputed, rows_again) = weights
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert rows == rows_again


@pytest.mark.parametrize("settings", MODELS[:2], ids=["gpt2", "nanochat"])
def test_a_layer_keeps_only_what_enters_it(settings, tiny_params):
    """B x T x C numbers of 4 bytes, or of 2 where autocast made them."""
    config = make_config(tiny_params(**settings, n_layer=6, block_size=64), vocab_size=300)
    models = [make_model(config), make_model(config)]
    recompute_layers(models[1])
    kept = [kept_bytes(model, 2) for model in models]
    deeper = make_model(make_config(tiny_params(**settings, n_layer=7, block_size=64), vocab_size=300))
    recompute_layers(deeper)
    assert kept_bytes(deeper, 2) - kept[1] <= 4 * 2 * 64 * config.n_embd
    assert kept[1] < kept[0] / 3


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, MODERN], ids=["gpt2", "nanochat"])
def test_compiled_it_has_the_same_gradients(settings, tiny_params, traced):
    torch.manual_seed(0)
    model = make_model(make_config(tiny_params(**settings), vocab_size=300))
    with torch.no_grad():
        for parameter in model.parameters():  # nanochat's begin with zeros, through which no gradient comes
            parameter += 0.02 * torch.randn_like(parameter)
    recomputed = copy.deepcopy(model)
    recompute_layers(recomputed)
    idx = torch.randint(300, (2, 17))
    for each in (model, recomputed):
        forward = torch.compile(each) if each is recomputed else each
        forward(idx[:, :-1], idx[:, 1:]).backward()
    for (name, mine), right in zip(recomputed.named_parameters(), model.parameters(), strict=True):
        assert right.grad.abs().max() > 0, name
        assert torch.allclose(mine.grad, right.grad, rtol=1e-4, atol=1e-6 * right.grad.abs().max().item()), name


def test_another_value_is_refused(monkeypatch):
    assert not wants_recompute()
    monkeypatch.setenv("ENCORE_RECOMPUTE", "yes")
    with pytest.raises(EncoreError, match=r"^ENCORE_RECOMPUTE is 'yes'; set 1 to save memory, or unset it$"):
        wants_recompute()
