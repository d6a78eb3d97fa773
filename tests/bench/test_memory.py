"""bench.memory multiplies what one layer and one sequence keep; here it is compared with whole models."""

import pytest

from bench.memory import count, kept_bytes, sequence_bytes
from encore.models.architectures import make_config, make_model
from encore.params import StageParams, check_page
from tests.conftest import ROOT

PRESETS = ROOT / "presets"
SMALL = {"block_size": 64, "n_head": 2, "n_embd": 64}


@pytest.mark.parametrize("preset", ["gpt2-sympy", "quickstart"])
def test_layers_and_sequences_multiply(preset):
    params = check_page(PRESETS / f"{preset}.yaml").model_copy(update=SMALL)
    page = StageParams("train", {**params.model_dump(), "n_layer": 5})
    whole = make_model(make_config(page, vocab_size=257))
    five_sequences = kept_bytes(whole, 6) - kept_bytes(whole, 1)
    one, two = (sequence_bytes(params, n_layer) for n_layer in (1, 2))
    assert five_sequences == pytest.approx(5 * (one + 4 * (two - one)), rel=1e-3)
    # A layer keeps at least what enters and leaves its matrices, in 2 bytes: 10 vectors of the width in GPT-2.
    assert two - one > 10 * 2 * SMALL["block_size"] * SMALL["n_embd"]


def test_weights_gradients_and_moments_of_124m_parameters():
    # Tokens, with the vocabulary padded to 50,304, positions, twelve layers' matrices, 25 norms; no biases.
    padded_parameters = (50_304 + 1024 + 12 * 12 * 768 + 25) * 768
    parts = count(PRESETS / "gpt2-owt-4b.yaml", 2**25)
    for part in ("weights and gradients", "optimizer"):
        assert parts[part] == pytest.approx(8 * padded_parameters / 1e9, rel=1e-9), part


@pytest.mark.parametrize(
    ("sequences", "scores_at_once", "measured_gb"), [(12, 2**25, 8.1), (32, 2**25, 17.5), (32, 2**28, 15.4)]
)
def test_gpt2_124m_takes_what_was_measured_on_an_h200(sequences, scores_at_once, measured_gb, tmp_path):
    """Compiled, in bfloat16, torch 2.11; peaks of allocated memory of November 2026."""
    page = (PRESETS / "gpt2-owt-4b.yaml").read_text()
    changed = page.replace("batch_size: 12 ", f"batch_size: {sequences} ")
    (tmp_path / "page.yaml").write_text(changed)
    assert sequences == 12 or changed != page
    assert sum(count(tmp_path / "page.yaml", scores_at_once).values()) == pytest.approx(measured_gb, rel=0.05)
