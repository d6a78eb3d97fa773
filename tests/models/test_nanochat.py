"""The model against transformers' NanoChat, its counts against published ones, and what it must not depend on."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from encore.errors import EncoreError
from encore.models.flops import flops_per_token
from encore.models.gpt2 import GPT2Config
from encore.models.nanochat import SOFT_CAP, NanoChat, NanoChatConfig
from encore.pretrained.init_from import Shape, find_misfits, read_shape
from encore.pretrained.model_folder import load_initial, load_model, save_model
from encore.pretrained.nanochat_hub import from_hub, to_hub, to_hub_config
from tests.small_models import assert_near, make_tokens

SMALL = NanoChatConfig(vocab_size=301, block_size=24, n_layer=3, n_head=4, n_embd=32)
D20 = NanoChatConfig(vocab_size=65_536, block_size=2048, n_layer=20, n_head=10, n_embd=1280)


def make_model(seed=0):
    """Every number is random, those too that start as zeros, and large enough for the cap to bend some scores."""
    torch.manual_seed(seed)
    model = NanoChat(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def test_logits_loss_and_gradients_equal_those_of_transformers():
    import transformers

    model, tokens = make_model(), make_tokens()
    hub = transformers.NanoChatForCausalLM(transformers.NanoChatConfig(**to_hub_config(model.config)))
    hub.load_state_dict(to_hub(model))

    output = hub(tokens, labels=tokens)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    assert output.logits.abs().max() > 0.9 * SOFT_CAP
    assert_near(model.logits(tokens), output.logits, "logits")
    assert_near(loss, output.loss, "loss")

    output.loss.backward()
    loss.backward()
    expected = from_hub({name: parameter.grad for name, parameter in hub.named_parameters()}, model)
    assert len(expected) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert parameter.grad.any(), name
        assert_near(parameter.grad, expected[name], f"gradient of {name}", relative=1e-4)


def make_plus(seed=0):
    torch.manual_seed(seed)
    model = NanoChat(replace(SMALL, plus=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def test_plus_is_what_transformers_computes_with_the_additions_hooked_in():
    """Value embeddings behind v_proj of its first and third layer, smeared embeddings before the first."""
    import transformers

    model, tokens = make_plus(), make_tokens()
    added = {name: tensor for name, tensor in model.named_parameters() if "value_embeds" in name or name == "smear"}
    assert list(added) == ["smear", "value_embeds.0.weight", "value_embeds.2.weight"]
    smear, first, third = copies = [tensor.detach().clone().requires_grad_() for tensor in added.values()]
    hub = transformers.NanoChatForCausalLM(transformers.NanoChatConfig(**to_hub_config(SMALL)))
    hub.load_state_dict(
        {name: tensor for name, tensor in to_hub(model).items() if name.removeprefix("model.") not in added}
    )
    layers = hub.model.layers
    layers[0].self_attn.v_proj.register_forward_hook(lambda _, __, values: values + first[tokens])
    layers[2].self_attn.v_proj.register_forward_hook(lambda _, __, values: values + third[tokens])
    layers[0].register_forward_pre_hook(lambda _, inputs: (inputs[0] + smear * F.pad(inputs[0], (0, 0, 1, -1)),))

    output, loss = hub(tokens, labels=tokens), model(tokens[:, :-1], tokens[:, 1:])
    assert_near(model.logits(tokens), output.logits, "logits")
    assert_near(loss, output.loss, "loss")
    output.loss.backward()
    loss.backward()
    for (name, tensor), copy in zip(added.items(), copies, strict=True):
        assert_near(tensor.grad, copy.grad, f"gradient of {name}", relative=1e-4)


def test_a_folder_of_plus_is_read(tmp_path):
    """By transformers too: tests/pretrained/test_modeling_nanochat_plus.py."""
    model, tokens = make_plus().eval(), make_tokens()
    save_model(tmp_path, model, b"ranks", {})
    assert torch.equal(load_model(tmp_path).logits(tokens), model.logits(tokens))
    assert read_shape(tmp_path) == Shape("nanochat-plus", n_layer=3, n_head=4, n_embd=32, bias=False, block_size=24)
    start = load_initial(tmp_path, replace(model.config, block_size=21), b"ranks")
    assert torch.equal(start.logits(tokens), model.logits(tokens))


def test_what_plus_adds_is_counted_as_parameters_and_not_as_work():
    plain, plus = NanoChat(SMALL), NanoChat(replace(SMALL, plus=True))
    assert plus.count_parameters() == plain.count_parameters() + 2 * 301 * 32 + 32
    assert plus.count_factors() == plain.count_factors()


def test_transformers_reads_our_folder_and_we_read_theirs(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    model, tokens = make_model().eval(), make_tokens()
    save_model(ours, model, b"ranks", {"iter": 7})
    hub, notes = transformers.AutoModelForCausalLM.from_pretrained(
        ours, output_loading_info=True, local_files_only=True
    )
    assert type(hub) is transformers.NanoChatForCausalLM
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = hub.eval()(tokens).logits
    assert (model.logits(tokens) - expected).abs().max() < 1e-4
    assert torch.equal(load_model(ours).logits(tokens), model.logits(tokens))

    hub.save_pretrained(theirs)
    assert (load_model(theirs).logits(tokens) - expected).abs().max() < 1e-4
    shape = Shape("nanochat", n_layer=3, n_head=4, n_embd=32, bias=False, block_size=24)
    assert read_shape(ours) == read_shape(theirs) == shape


def test_training_can_start_from_its_weights_with_a_shorter_context(tmp_path):
    model, tokens = make_model().eval(), make_tokens(length=16)
    save_model(tmp_path, model, b"ranks", {})
    start = load_initial(tmp_path, replace(SMALL, block_size=16), b"ranks")
    assert torch.equal(start.logits(tokens), model.logits(tokens))
    with pytest.raises(
        EncoreError, match=f"^{tmp_path} holds another model than params.yaml describes: NanoChatConfig"
    ):
        load_initial(tmp_path, replace(SMALL, block_size=25), b"ranks")
    gpt2 = GPT2Config(vocab_size=301, block_size=24, n_layer=3, n_head=4, n_embd=32, bias=False)
    with pytest.raises(
        EncoreError, match=f"^{tmp_path} holds another model than params.yaml describes: NanoChatConfig"
    ):
        load_initial(tmp_path, gpt2, b"ranks")
    page = {**gpt2.__dict__, "architecture": "gpt2", "init_from": f"{tmp_path}/", "tokenizer": "bpe"}
    assert find_misfits(page) == [
        f"architecture: gpt2 is not what the weights of init_from, {tmp_path}/, have: nanochat"
    ]


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("num_key_value_heads", 2, "as many heads for keys and values as for queries"),
        ("intermediate_size", 100, "an MLP four times wider"),
        ("final_logit_softcapping", 30.0, "Encore computes with 15.0 only"),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 10_000.0}, "Encore computes with"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(tmp_path, key, value, told):
    save_model(tmp_path, make_model(), b"ranks", {})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(EncoreError, match=told):
        read_shape(tmp_path)


def test_the_untrained_model_gives_each_id_the_same_score():
    torch.manual_seed(0)
    model, tokens = NanoChat(SMALL), make_tokens()
    assert not model.logits(tokens).any()
    assert model(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(torch.tensor(301.0).log().item(), rel=1e-6)
    q = model.layers[1].self_attn.q_proj.weight
    assert q.std().item() == pytest.approx(32**-0.5, rel=0.05)
    assert q.abs().max().item() <= (3 / 32) ** 0.5
    assert model.embed_tokens.weight.std().item() == pytest.approx(1, rel=0.05)


def test_d20_has_the_published_number_of_parameters():
    """nanochat's "$100" model; its speedrun prints 560,988,160."""
    with torch.device("meta"):
        model = NanoChat(D20)
        odd = NanoChat(replace(D20, vocab_size=65_530))
    assert model.count_parameters() == 560_988_160
    assert odd.count_parameters() == 560_988_160 - 2 * 6 * 1280
    # 6 operations for each weight but the embedding's, and 12 T for each layer's numbers: scores and their use.
    assert flops_per_token(model) == 6 * (560_988_160 - 65_536 * 1280) + 12 * 20 * 1280 * 2048
