"""The model against transformers' GPT-2, its counts against published ones, and what it must not depend on."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from encore.models import gpt2
from encore.models.gpt2 import GPT2, GPT2Config
from encore.models.vocabulary import pad_vocab
from encore.pretrained.gpt2_hub import from_hub, to_hub, to_hub_config
from tests.small_models import assert_near, make_tokens

SMALL = GPT2Config(vocab_size=301, block_size=24, n_layer=3, n_head=4, n_embd=32, bias=True)
GPT2_124M = GPT2Config(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, bias=True)


def make_model(seed=0, **changes):
    """Every number is random, those too that start as zeros and ones."""
    torch.manual_seed(seed)
    model = GPT2(replace(SMALL, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_logits_loss_and_gradients_equal_those_of_transformers(bias):
    import transformers

    model, tokens = make_model(bias=bias), make_tokens()
    hub = transformers.GPT2LMHeadModel(transformers.GPT2Config(**to_hub_config(model.config)))
    left_out = hub.load_state_dict(to_hub(model), strict=False)
    assert (left_out.missing_keys, left_out.unexpected_keys) == (["lm_head.weight"], [])  # tied to the embedding

    output = hub(tokens, labels=tokens)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    assert_near(model.logits(tokens), output.logits, "logits")
    assert_near(loss, output.loss, "loss")

    output.loss.backward()
    loss.backward()
    expected = from_hub({name: parameter.grad for name, parameter in hub.named_parameters()}, model)
    assert len(expected) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert parameter.grad.any(), name
        if bias and name.endswith("c_attn.bias"):  # a key's bias moves all scores alike: its gradient is noise
            q, k, v = parameter.grad.split(model.config.n_embd)
            hub_q, _, hub_v = expected[name].split(model.config.n_embd)
            assert k.abs().max() < 1e-5 * q.abs().max()
            assert_near(torch.cat([q, v]), torch.cat([hub_q, hub_v]), f"gradient of {name}")
        else:
            assert_near(parameter.grad, expected[name], f"gradient of {name}")


@pytest.mark.parametrize("n_layer", [2, 8])
def test_initial_weights_have_the_deviations_of_the_paper(n_layer):
    torch.manual_seed(0)
    model = GPT2(replace(SMALL, n_layer=n_layer, n_embd=128, block_size=256))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".ln_" in name or name.startswith("ln_"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            expected = 0.02 / math.sqrt(2 * n_layer) if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name
    assert sum("c_proj.weight" in name for name, _ in model.named_parameters()) == 2 * n_layer


@pytest.mark.parametrize(("bias", "count"), [(True, 124_439_808), (False, 124_337_664)])
def test_the_smallest_gpt2_has_the_published_number_of_parameters(bias, count):
    with torch.device("meta"):
        model = GPT2(replace(GPT2_124M, bias=bias))
    assert model.count_parameters() == count
    assert model.wte.weight.shape == (50304, 768)


@pytest.mark.parametrize(("vocab_size", "padded"), [(1, 64), (64, 64), (65, 128), (50257, 50304)])
def test_vocabulary_is_padded_to_the_next_multiple_of_64(vocab_size, padded):
    assert pad_vocab(vocab_size) == padded


def test_dropout_acts_in_training_mode_only():
    model, plain, tokens = make_model(dropout=0.5), make_model(dropout=0.0), make_tokens()
    assert torch.equal(model.eval().logits(tokens), plain.logits(tokens))
    model.train()
    assert not torch.equal(model.logits(tokens), model.logits(tokens))
    torch.manual_seed(3)
    first = model.logits(tokens)
    torch.manual_seed(3)
    assert torch.equal(model.logits(tokens), first)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_on_the_embedding_the_attention_and_both_branches(training, monkeypatch):
    """The four places where GPT-2 has it, and the share of numbers it removes."""
    model, tokens = make_model(dropout=0.25).train(training), make_tokens()
    attention_dropouts, outputs = [], {}

    def attention(*args, dropout_p, **options):
        attention_dropouts.append(dropout_p)
        return F.scaled_dot_product_attention(*args, dropout_p=dropout_p, **options)

    functions = type("functions", (), {**vars(F), "scaled_dot_product_attention": staticmethod(attention)})
    monkeypatch.setattr(gpt2, "F", functions)
    block = model.h[0]
    block.register_forward_pre_hook(lambda _, inputs: outputs.update(embedding=inputs[0]))
    block.attn.register_forward_hook(lambda _, inputs, output: outputs.update(attn=output))
    block.mlp.register_forward_hook(lambda _, inputs, output: outputs.update(mlp=output))
    model.logits(tokens)

    assert attention_dropouts == [0.25 if training else 0.0] * SMALL.n_layer
    for name, output in outputs.items():
        removed = (output == 0).float().mean().item()
        assert removed == pytest.approx(0.25 if training else 0.0, abs=0.04), name
