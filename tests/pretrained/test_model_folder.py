"""model/: the way out, the way back, and transformers as the judge."""

import hashlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from encore.errors import EncoreError
from encore.models.gpt2 import GPT2, GPT2Config
from encore.models.nanochat import NanoChat, NanoChatConfig
from encore.pretrained.hub_tokenizer import save_hub_tokenizer
from encore.pretrained.model_folder import CONFIG, RECORD, WEIGHTS, load_initial, load_model, save_model
from encore.tokens.ranks import write_ranks
from encore.tokens.token_files import RANKS_FILE

TOKENS = torch.randint(301, (2, 16), generator=torch.Generator().manual_seed(5))


def make_model(bias):
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=301, block_size=16, n_layer=2, n_head=2, n_embd=32, bias=bias, dropout=0.1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def exported(request, tmp_path):
    """A model and the folder that it was saved to."""
    model, folder = make_model(request.param), tmp_path / "model"
    folder.mkdir()
    save_model(folder, model, b"ranks", {"params": {"n_layer": 2}, "iter": 7})
    return model, folder


def test_a_model_comes_back_with_the_same_bits(exported):
    model, folder = exported
    loaded = load_model(folder)
    assert not loaded.training
    assert torch.equal(loaded.logits(TOKENS), model.logits(TOKENS))
    assert loaded.config.bias == model.config.bias
    assert dict(loaded.named_parameters()).keys() == dict(model.named_parameters()).keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name][:301], tensor[:301]), name


def test_transformers_reads_the_folder_offline(exported, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    model, folder = exported
    hub, notes = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, local_files_only=True
    )
    assert type(hub) is transformers.GPT2LMHeadModel
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = hub.eval()(TOKENS).logits
    assert torch.allclose(model.logits(TOKENS), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert (hub.config.bos_token_id, hub.config.eos_token_id) == (300, 300)
    assert hub.config.resid_pdrop == hub.config.embd_pdrop == hub.config.attn_pdrop == 0.1


def test_a_folder_of_transformers_is_read(tmp_path):
    """Without encore.json, as the published GPT-2 comes, and with its unprefixed names."""
    import transformers

    torch.manual_seed(3)
    sizes = {"vocab_size": 301, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
    hub = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=300, eos_token_id=300)).eval()
    hub.save_pretrained(tmp_path)
    expected = hub(TOKENS).logits
    assert torch.allclose(
        load_model(tmp_path).logits(TOKENS), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    assert torch.allclose(
        load_model(tmp_path).logits(TOKENS), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


def test_the_files_hold_what_they_should(exported):
    model, folder = exported
    assert sorted(path.name for path in folder.iterdir()) == sorted([CONFIG, WEIGHTS, RANKS_FILE, RECORD])
    assert (folder / RANKS_FILE).read_bytes() == b"ranks"
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (CONFIG, WEIGHTS, RANKS_FILE)}
    settings = {"bias": model.config.bias, "document_masking": False}
    record = {**settings, "params": {"n_layer": 2}, "iter": 7, "files_sha256": hashes}
    own = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    assert json.loads((folder / RECORD).read_text()) == {**record, "own_sha256": own}
    tensors = load_file(folder / WEIGHTS)
    assert tensors["transformer.wte.weight"].shape == (301, 32)
    assert tensors["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    biases = [name for name in tensors if name.endswith("bias")]
    assert len(biases) == 2 * 6 + 1
    assert any(tensors[name].any() for name in biases) == model.config.bias


def test_the_same_model_is_the_same_bytes(exported, tmp_path):
    model, folder = exported
    (tmp_path / "again").mkdir()
    save_model(tmp_path / "again", model, b"ranks", {"params": {"n_layer": 2}, "iter": 7})
    assert all((tmp_path / "again" / path.name).read_bytes() == path.read_bytes() for path in folder.iterdir())


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(exported, name):
    _, folder = exported
    (folder / name).unlink()
    with pytest.raises(EncoreError, match=f"^{folder / name} is missing; `dvc repro"):
        load_model(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, RECORD])
def test_a_truncated_file_is_an_error_that_names_the_folder(exported, name):
    _, folder = exported
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    with pytest.raises(EncoreError, match=f"^{folder}.* (not valid JSON|no model that fits|other bytes than)"):
        load_model(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 3},
        {"n_embd": 64},
        {"n_positions": 8},
        {"vocab_size": 290},
        {"vocab_size": 310},
        {"vocab_size": 900},
        {"n_layer": None},
    ],
)
def test_weights_of_other_shapes_than_the_config_says_are_refused(exported, change):
    _, folder = exported
    config = {**json.loads((folder / CONFIG).read_text()), **change}
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    forget_hashes(folder)
    with pytest.raises(EncoreError, match=f"^{folder} holds no model that fits its config.json"):
        load_model(folder)


def forget_hashes(folder):
    """As Encore wrote encore.json before it had them."""
    record = json.loads((folder / RECORD).read_text())
    del record["files_sha256"], record["own_sha256"]
    (folder / RECORD).write_text(json.dumps(record))


@pytest.mark.parametrize("masked", [True, False])
def test_a_model_masks_documents_if_it_was_trained_so(tmp_path, masked):
    shape = {"vocab_size": 301, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "document_masking": masked}
    for model in (GPT2(GPT2Config(**shape, bias=False)), NanoChat(NanoChatConfig(**shape))):
        save_model(tmp_path, model, b"ranks", {})
        assert load_model(tmp_path).config == model.config
        assert json.loads((tmp_path / RECORD).read_text())["document_masking"] is masked


def test_a_folder_from_before_documents_could_be_masked_masks_none(exported):
    model, folder = exported
    forget_hashes(folder)
    record = json.loads((folder / RECORD).read_text())
    del record["document_masking"]
    (folder / RECORD).write_text(json.dumps(record))
    assert load_model(folder).config == replace(model.config, dropout=0.0)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, RANKS_FILE, RECORD])
def test_any_flipped_bit_is_refused(exported, name):
    _, folder = exported
    whole = (folder / name).read_bytes()
    sentence = f"^{folder / name}: other bytes than {folder / RECORD} has the hash of; "
    if name == RECORD:
        sentence = f"^{folder / RECORD} (has other bytes than Encore wrote|is not)"
    random = np.random.default_rng(0)
    for place, bit in zip(random.integers(len(whole), size=30), random.integers(8, size=30), strict=True):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        (folder / name).write_bytes(flipped)
        with pytest.raises(EncoreError, match=sentence):
            load_model(folder)
    (folder / name).write_bytes(whole)
    load_model(folder)


def test_a_folder_from_before_there_were_hashes_is_read(exported):
    model, folder = exported
    forget_hashes(folder)
    assert torch.equal(load_model(folder).logits(TOKENS), model.logits(TOKENS))


# what training starts from


@pytest.mark.parametrize("block_size", [16, 15, 5, 1])
def test_a_start_has_the_logits_of_its_weights_on_the_positions_that_are_left(exported, block_size):
    saved, folder = exported
    model = load_initial(folder, replace(saved.config, block_size=block_size, dropout=0.3), b"ranks")
    assert model.training
    assert (model.config.block_size, model.config.dropout) == (block_size, 0.3)
    assert model.wpe.weight.shape == (block_size, 32)
    logits, expected = model.eval().logits(TOKENS[:, :block_size]), saved.logits(TOKENS)[:, :block_size]
    assert torch.allclose(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_start_masks_documents_as_params_yaml_says(exported):
    saved, folder = exported
    for masked in (True, False):
        config = replace(saved.config, document_masking=masked)
        assert load_initial(folder, config, b"ranks").config == config


@pytest.mark.slow
def test_a_start_of_transformers_has_its_logits(tmp_path):
    """The published GPT-2 comes so: biases, no record, no ranks."""
    import transformers

    torch.manual_seed(3)
    sizes = {"vocab_size": 301, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
    hub = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=300, eos_token_id=300)).eval()
    with torch.no_grad():
        for parameter in hub.parameters():
            parameter.normal_(std=0.2)
    hub.save_pretrained(tmp_path)
    assert not (tmp_path / RANKS_FILE).exists()
    model = load_initial(tmp_path, replace(make_model(bias=True).config, block_size=9), b"any").eval()
    expected = hub(TOKENS[:, :9]).logits
    assert torch.allclose(model.logits(TOKENS[:, :9]), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_start_for_another_vocabulary_is_refused(exported):
    saved, folder = exported
    sentence = (
        f"{folder} holds weights for another vocabulary (301 ids) than that of data/tokens ({{}}); set "
        "init_from: scratch, or weights of this tokenizer"
    )
    for ranks, vocab_size in ((b"ranks", 300), (b"ranks", 302), (b"other", 301)):
        with pytest.raises(EncoreError) as error:
            load_initial(folder, replace(saved.config, vocab_size=vocab_size), ranks)
        assert str(error.value) == sentence.format(vocab_size)
    (folder / RANKS_FILE).unlink()
    load_initial(folder, saved.config, b"other")  # nothing says that they are others


def test_a_start_whose_tokenizer_json_has_other_ids_is_refused(tmp_path):
    """As transformers leaves a model: tokenizer.json, and no ranks."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"%03d" % number: 256 + number for number in range(44)}
    model = make_model(bias=True)
    save_model(tmp_path, model, write_ranks(ranks), {})
    save_hub_tokenizer(tmp_path, ranks, block_size=16)
    (tmp_path / RANKS_FILE).unlink()
    load_initial(tmp_path, model.config, write_ranks(ranks))
    ranks[b"000"], ranks[b"001"] = ranks[b"001"], ranks[b"000"]
    with pytest.raises(EncoreError, match=f"^{tmp_path} holds weights for another vocabulary"):
        load_initial(tmp_path, model.config, write_ranks(ranks))


@pytest.mark.parametrize("change", [{"n_layer": 1}, {"n_layer": 3}, {"n_head": 4}, {"n_embd": 64}, {"block_size": 17}])
def test_a_start_of_another_shape_is_refused(exported, change):
    saved, folder = exported
    with pytest.raises(EncoreError) as error:
        load_initial(folder, replace(saved.config, **change), b"ranks")
    assert str(error.value).startswith(f"{folder} holds another model than params.yaml describes: GPT2Config(vocab_siz")
    assert "block_size=16, n_layer=2, n_head=2, n_embd=32" in str(error.value)


def test_a_start_with_biases_is_none_without_and_the_other_way_round(exported):
    saved, folder = exported
    with pytest.raises(EncoreError, match=f"^{folder} holds another model than params.yaml describes: "):
        load_initial(folder, replace(saved.config, bias=not saved.config.bias), b"ranks")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_neither_written_nor_read(tmp_path, value):
    model = make_model(False)
    save_model(tmp_path, model, b"ranks", {})
    weights = load_file(tmp_path / WEIGHTS)
    weights["transformer.ln_f.weight"][3] = value
    save_file(weights, tmp_path / WEIGHTS)
    forget_hashes(tmp_path)
    with pytest.raises(EncoreError, match=r"model\.safetensors: transformer\.ln_f\.weight holds numbers that"):
        load_model(tmp_path)
    with torch.no_grad():
        model.wte.weight[5, 5] = value
    with pytest.raises(EncoreError, match=r"^the trained model: transformer\.wte\.weight holds numbers that"):
        save_model(tmp_path, model, b"ranks", {})
