"""document_masking: a window of several documents against each document alone, by Encore and by transformers."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from bench.memory import kept_bytes
from encore.models import gpt2, nanochat
from encore.models.architectures import make_model
from encore.models.documents import find_positions, find_visible, make_mask
from encore.models.kv_cache import Cache
from encore.pretrained import gpt2_hub, nanochat_hub
from tests.models.test_architectures import CONFIGS, random_model
from tests.small_models import assert_near, make_tokens

END = 300  # of text
BORDERS = [(5, 6, 15), (0, 9, 23), (24,)]  # where end-of-text stands; the last row is the end of one long document
TRUE_DOCUMENTS = {(0, 5), (5, 6), (6, 15), (15, 24)}, {(0, 9), (9, 23), (23, 24)}, {(0, 24)}


def make_window(borders=BORDERS, length=24):
    """Inputs and targets, (B, length) each."""
    tokens = make_tokens(len(borders), length + 1) % END
    for row, places in zip(tokens, borders, strict=True):
        row[list(places)] = END
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def documents_of(idx, targets):
    """Inputs and targets of each document alone, (1, its tokens); it begins at the end-of-text before it."""
    for row, wanted in zip(idx, targets, strict=True):
        cuts = sorted({0, *(row == END).nonzero().flatten().tolist(), len(row)})
        for begin, end in pairwise(cuts):
            yield row[None, begin:end], wanted[None, begin:end]


def masked_and_plain(config, dtype=torch.float64):
    """The same weights in a model that masks documents and in one that does not."""
    models = [random_model(replace(config, document_masking=masked)).to(dtype) for masked in (True, False)]
    assert all(torch.equal(*pair) for pair in zip(*(model.parameters() for model in models), strict=True))
    return models


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request):
    return request.param


def test_the_reference_finds_the_documents():
    idx, targets = make_window()
    lengths = [parts[0].shape[1] for parts in documents_of(idx, targets)]
    assert lengths == [end - begin for row in TRUE_DOCUMENTS for begin, end in sorted(row)]


def test_who_sees_whom_and_from_where_positions_count():
    begins = torch.tensor([[False, False, True, False, True]])
    visible = find_visible(begins)
    expected = ["X....", "XX...", "..X..", "..XX.", "....X"]
    assert ["".join(".X"[see] for see in row) for row in visible[0].tolist()] == expected
    assert find_positions(visible).tolist() == [[0, 1, 0, 1, 0]]
    mask = make_mask(visible, torch.bfloat16)
    assert (mask.shape, mask.dtype) == ((1, 1, 5, 5), torch.bfloat16)
    assert torch.equal(mask[0, 0] == 0, visible[0])
    assert torch.equal(mask[0, 0] == -torch.inf, ~visible[0])


def test_loss_and_gradients_are_those_of_each_document_alone(config):
    """In float64; the tables of rotations are float32, so that what is as far apart is so within 1e-7."""
    masked, plain = masked_and_plain(config)
    idx, targets = make_window()
    alone = [(plain(*document), document[0].shape[1]) for document in documents_of(idx, targets)]
    expected = sum(loss * tokens for loss, tokens in alone) / idx.numel()
    loss = masked(idx, targets)
    assert_near(loss.detach(), expected.detach(), "loss", relative=1e-7)
    losses = torch.cat([plain.token_losses(*document)[0] for document in documents_of(idx, targets)])
    assert_near(masked.token_losses(idx, targets).flatten(), losses, "token losses", relative=1e-6)
    logits = torch.cat([plain.logits(inputs)[0] for inputs, _ in documents_of(idx, targets)])
    assert_near(masked.logits(idx).flatten(0, 1), logits, "logits", relative=1e-6)
    right = gradients(plain, expected)
    for name, gradient in gradients(masked, loss).items():
        assert right[name].any(), name
        assert_near(gradient, right[name], f"gradient of {name}", relative=1e-6)
    assert abs(plain(idx, targets) - expected) > 1e-3  # the window as one text is another thing


def transformers_model(model):
    """What transformers computes with these weights, in float64."""
    import transformers

    from encore.pretrained.modeling_nanochat_plus import NanoChatPlusConfig, NanoChatPlusForCausalLM

    if isinstance(model, gpt2.GPT2):
        hub = transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2_hub.to_hub_config(model.config)))
        weights = gpt2_hub.to_hub(model)
    else:
        kinds = (transformers.NanoChatForCausalLM, transformers.NanoChatConfig)
        kind, its_config = (NanoChatPlusForCausalLM, NanoChatPlusConfig) if model.config.plus else kinds
        hub, weights = kind(its_config(**nanochat_hub.to_hub_config(model.config))), nanochat_hub.to_hub(model)
    hub.load_state_dict(weights, strict=False)
    return hub.double().eval()


def test_loss_and_gradients_are_those_of_transformers_on_each_document_alone(config):
    model = random_model(replace(config, document_masking=True))
    hub, idx, targets = transformers_model(model), *make_window()
    model.double()
    nats = [
        F.cross_entropy(hub(inputs, use_cache=False).logits[0], wanted[0], reduction="sum")
        for inputs, wanted in documents_of(idx, targets)
    ]
    loss, expected = model(idx, targets), sum(nats) / idx.numel()
    assert_near(loss.detach(), expected.detach(), "loss", relative=1e-6)
    found = gradients(model, loss)
    expected.backward()
    theirs = {name: parameter.grad for name, parameter in hub.named_parameters()}
    from_hub = gpt2_hub.from_hub if isinstance(model, gpt2.GPT2) else nanochat_hub.from_hub
    padded = {name: tensor.float() for name, tensor in theirs.items()}
    for name, right in from_hub(padded, model).items():
        assert_near(found[name].float(), right, f"gradient of {name}", relative=2e-6)


def test_transformers_masks_documents_where_their_positions_begin_anew(config):
    """What docs/training.md tells those who give transformers a window of several documents."""
    model = random_model(replace(config, document_masking=True))
    hub, (idx, _) = transformers_model(model), make_window()
    positions = find_positions(find_visible(idx == END))
    logits = hub(idx, position_ids=positions, use_cache=False).logits
    assert_near(model.double().logits(idx), logits, "logits", relative=1e-6)


def test_a_change_in_an_earlier_document_changes_no_bit_of_a_later_one(config):
    model = random_model(replace(config, document_masking=True))
    idx, _ = make_window()
    changed = idx.clone()
    changed[0, 10] = (changed[0, 10] + 1) % END  # in the third document of the first row
    before, after = model.logits(idx)[0], model.logits(changed)[0]
    assert torch.equal(after[:10], before[:10])
    assert (after[10:15] != before[10:15]).any(dim=1).all()
    assert torch.equal(after[15:], before[15:])


@pytest.mark.parametrize("name", ["gpt2", "nanochat-plus"])
def test_a_document_far_into_the_window_sees_none_of_what_is_before(name):
    """A kernel works on 512 keys at a time on a CPU; here whole such blocks are masked."""
    masked, plain = masked_and_plain(replace(CONFIGS[name], block_size=1500, n_layer=1), torch.float32)
    idx, targets = make_window([(1100, 1300)], length=1500)
    alone = torch.cat([plain.token_losses(*document)[0] for document in documents_of(idx, targets)])
    assert_near(masked.token_losses(idx, targets)[0], alone, "token losses", relative=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients(masked, masked(idx, targets)).values())


def test_a_document_that_fills_the_window_is_computed_as_without_a_mask(config):
    masked, plain = masked_and_plain(config, torch.float32)
    idx, targets = make_window(BORDERS[2:])
    assert_near(masked.logits(idx), plain.logits(idx), "logits")
    right = gradients(plain, plain(idx, targets))
    for name, gradient in gradients(masked, masked(idx, targets)).items():
        assert_near(gradient, right[name], f"gradient of {name}")


def test_without_it_nothing_of_it_is_computed(config, monkeypatch):
    """Attention gets no mask, as before there was one, so that its kernel is the causal one."""
    asked = []

    def attention(*args, attn_mask, is_causal, **options):
        asked.append((attn_mask, is_causal))
        return F.scaled_dot_product_attention(*args, is_causal=is_causal, **options)

    functions = type("functions", (), {**vars(F), "scaled_dot_product_attention": staticmethod(attention)})
    for module in (gpt2, nanochat):
        monkeypatch.setattr(module, "F", functions)
        monkeypatch.setattr(module, "find_visible", None)
        monkeypatch.setattr(module, "make_mask", None)
    random_model(config)(*make_window())
    assert asked == [(None, True)] * config.n_layer


def test_the_layers_share_one_mask_in_the_type_of_the_products(config):
    """A layer more keeps as many bytes for the backward pass with it as without, and the model a mask more."""
    kept = {
        (masked, n_layer): kept_bytes(make_model(replace(config, document_masking=masked, n_layer=n_layer)), 2)
        for masked in (True, False)
        for n_layer in (3, 5)
    }
    assert kept[True, 5] - kept[True, 3] == kept[False, 5] - kept[False, 3]
    mask, ids = 2 * 24 * 24 * 2, 2 * 24 * 8
    assert mask <= kept[True, 3] - kept[False, 3] <= mask + 2 * ids


def test_a_cache_holds_one_document(config):
    """generate stops at end-of-text, so it needs no mask."""
    model, idx = random_model(replace(config, document_masking=True)), make_window([(0,)])[0]
    cache = Cache(config.n_layer, size=24)
    with torch.no_grad():
        parts = [model.logits(idx[:, :7], cache), *(model.logits(idx[:, i : i + 1], cache) for i in range(7, 24))]
        assert_near(torch.cat(parts, dim=1), model.logits(idx), "logits")
