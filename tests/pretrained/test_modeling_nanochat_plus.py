"""A folder of nanochat-plus in transformers: the numbers of our own model, by the code that lies in the folder.

The model's scores reach about 4, where the cap of 15 bends them and leaves no ties for greedy generation to break.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from encore.evaluation.generate import generate
from encore.models.nanochat import NanoChat, NanoChatConfig
from encore.pretrained.hub_tokenizer import save_hub_tokenizer
from encore.pretrained.init_from import RECORD
from encore.pretrained.model_folder import load_model, save_model
from encore.pretrained.nanochat_hub import MODELING
from encore.tokens.ranks import write_ranks
from tests.conftest import ROOT
from tests.small_models import assert_near, make_tokens

pytest.importorskip("transformers")
RANKS = {bytes([byte]): byte for byte in range(256)} | {b"%03d?" % number: 256 + number for number in range(44)}
END = len(RANKS)
TEXT = make_tokens(batch=1, length=9)[0].tolist()


@pytest.fixture(autouse=True)
def own_modules(tmp_path_factory, monkeypatch):
    """Where transformers puts the code that it runs."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))


@pytest.fixture(scope="module", params=[3, 4], ids=["three layers", "four layers"])
def saved(request, tmp_path_factory):
    """A model and its folder."""
    torch.manual_seed(0)
    model = NanoChat(NanoChatConfig(END + 1, block_size=32, n_layer=request.param, n_head=4, n_embd=32, plus=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=1.0 if "embed" in name or name == "smear" else 0.2)
    folder = tmp_path_factory.mktemp("model")
    save_hub_tokenizer(folder, RANKS, 32)
    save_model(folder, model.eval(), write_ranks(RANKS), {})
    return model, folder


def load(folder, **options):
    """The model by the code of the folder, with every weight of the file and no other."""
    from transformers import AutoModelForCausalLM

    hub, notes = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert type(hub).__module__.startswith("transformers_modules.")
    assert not any(notes.values())
    return hub


def write_greedily(model, prompt, count):
    """Ours, with its cache, and with no end of text among it."""
    ids = list(generate(model, prompt, count, 0.0, None, 1.0, END, torch.Generator()))
    assert len(ids) == count
    return ids


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_its_logits_loss_and_gradients_are_ours(saved, attention):
    model, folder = saved
    hub, tokens = load(folder, attn_implementation=attention), make_tokens()
    output = hub(tokens, labels=tokens)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    assert 2 < output.logits.abs().max() < 10
    assert (output.logits - model.logits(tokens)).abs().max() < 1e-5
    assert abs(output.loss - loss) < 1e-5
    model.zero_grad()
    output.loss.backward()
    loss.backward()
    theirs = {name.removeprefix("model."): parameter.grad for name, parameter in hub.named_parameters()}
    ours = dict(model.named_parameters())
    assert theirs.keys() == ours.keys()
    for name, grad in theirs.items():
        assert grad.any(), name
        assert_near(ours[name].grad[: len(grad)], grad, f"gradient of {name}", relative=1e-4)


def test_it_writes_what_ours_writes_with_a_cache_and_without(saved):
    model, folder = saved
    hub, prompt = load(folder), torch.tensor([TEXT])
    expected = write_greedily(model, TEXT, 20)
    assert len(set(expected)) > 5
    plain = {"do_sample": False, "max_new_tokens": 20, "attention_mask": torch.ones_like(prompt)}
    for options in (
        {"use_cache": True},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},  # which crops the cache
    ):
        assert hub.generate(prompt, **plain, **options)[0, len(TEXT) :].tolist() == expected, options
    beams = {**plain, "num_beams": 4}  # which reorders it
    assert torch.equal(hub.generate(prompt, **beams), hub.generate(prompt, **beams, use_cache=False))


def test_padding_on_either_side_takes_no_part(saved):
    """With positions that begin behind the padding, as generate gives them, and with those that begin in front."""
    model, folder = saved
    hub, pads, text = load(folder), torch.full((1, 5), 7), torch.tensor([TEXT])
    expected = model.logits(text)
    ones, zeros = torch.ones_like(text), torch.zeros_like(pads)
    left, right = torch.cat([pads, text], dim=1), torch.cat([text, pads], dim=1)
    masks = torch.cat([zeros, ones], dim=1), torch.cat([ones, zeros], dim=1)
    positions = (masks[0].cumsum(-1) - 1).clamp(min=0)
    for logits in (
        hub(left, attention_mask=masks[0]).logits[:, 5:],
        hub(left, attention_mask=masks[0], position_ids=positions).logits[:, 5:],
        hub(right, attention_mask=masks[1]).logits[:, :-5],
    ):
        assert (logits - expected).abs().max() < 1e-5
    assert (hub(left).logits[:, 5:] - expected).abs().max() > 0.1  # or the padding would not show


def test_a_padded_batch_is_continued_as_each_text_alone(saved):
    model, folder = saved
    texts = [TEXT, TEXT[4:], TEXT[:2]]
    batch = torch.tensor([[7] * (len(TEXT) - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (len(TEXT) - len(text)) + [1] * len(text) for text in texts])
    done = load(folder).generate(batch, attention_mask=mask, do_sample=False, max_new_tokens=12)
    for row, text in zip(done[:, len(TEXT) :].tolist(), texts, strict=True):
        assert row == write_greedily(model, text, 12)


def test_texts_in_one_row_begin_at_position_zero(saved):
    """As transformers packs them."""
    model, folder = saved
    two, positions = torch.tensor([TEXT + TEXT[:5]]), torch.tensor([[*range(9), *range(5)]])
    hub = load(folder)
    logits = hub(two, position_ids=positions, use_cache=False).logits[:, 9:]
    assert (logits - model.logits(torch.tensor([TEXT[:5]]))).abs().max() < 1e-5


def test_a_chunk_behind_a_cache_has_the_logits_of_the_whole(saved):
    model, folder = saved
    hub, tokens = load(folder), make_tokens()
    begun = hub(tokens[:, :8], use_cache=True)
    rest = hub(tokens[:, 8:], past_key_values=begun.past_key_values)
    assert (rest.logits - model.logits(tokens)[:, 8:]).abs().max() < 1e-5


def test_a_few_steps_lower_the_loss_and_the_folder_goes_both_ways(saved, tmp_path):
    _, folder = saved
    hub, tokens = load(folder).train(), make_tokens()
    before = {name: parameter.clone() for name, parameter in hub.named_parameters()}
    optimizer, losses = torch.optim.AdamW(hub.parameters(), lr=1e-2), []
    for _ in range(6):
        losses.append(hub(tokens, labels=tokens).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1
    assert not any(torch.equal(before[name], parameter) for name, parameter in hub.named_parameters())

    hub.eval().save_pretrained(tmp_path)
    assert (tmp_path / MODELING.name).read_bytes() == MODELING.read_bytes()
    expected = hub(tokens).logits
    assert torch.equal(load(tmp_path)(tokens).logits, expected)
    assert (load_model(tmp_path).logits(tokens) - expected).abs().max() < 1e-5


def test_it_loads_in_bfloat16(saved):
    """Which has 8 bits: the logits of a few layers are off by some of them."""
    model, folder = saved
    hub, tokens = load(folder, dtype=torch.bfloat16), make_tokens()
    assert {parameter.dtype for parameter in hub.parameters()} == {torch.bfloat16}
    logits = hub(tokens).logits
    assert logits.dtype == torch.bfloat16
    assert_near(logits.float(), model.logits(tokens), "logits", relative=0.05)


def test_an_untrained_one_adds_nothing(saved):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(saved[1], trust_remote_code=True)
    hub = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    added = [tensor for name, tensor in hub.named_parameters() if "value_embeds" in name or name.endswith("smear")]
    assert len(added) == 3
    assert not any(tensor.any() for tensor in added)
    assert hub.model.embed_tokens.weight.any()


def test_what_it_cannot_compute_it_says(saved):
    hub = load(saved[1])
    with pytest.raises(ValueError, match="pass input_ids, not inputs_embeds"):
        hub(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="leave cache_implementation out, or set dynamic"):
        hub.generate(torch.tensor([TEXT]), max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match=r"attention_mask of 2 dimensions, \(batch, tokens\), not 4"):
        hub(torch.tensor([TEXT]), attention_mask=torch.ones(1, 1, 9, 9))


def test_the_file_is_one_of_the_hashed_and_a_model_of_transformers_own_has_none(saved, tmp_path):
    from hashlib import sha256

    hashes = json.loads((saved[1] / RECORD).read_text())["files_sha256"]
    assert hashes[MODELING.name] == sha256(MODELING.read_bytes()).hexdigest()
    save_model(tmp_path, NanoChat(NanoChatConfig(END + 1, 32, 1, 4, 32)), b"ranks", {})
    assert not (tmp_path / MODELING.name).exists()
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_transformers_asks_before_it_runs_the_code(saved):
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(saved[1], trust_remote_code=False)


ELSEWHERE = """
import importlib.util, json, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith("__editable__")]
assert importlib.util.find_spec("encore") is None
from transformers import AutoConfig, pipeline
assert AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True).model_type == "nanochat-plus"
write = pipeline("text-generation", sys.argv[1], trust_remote_code=True, device="cpu")
done = write("Two", do_sample=False, max_new_tokens=12, return_tensors=True)
print(json.dumps(done[0]["generated_token_ids"]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("forking")
def test_a_folder_works_where_encore_is_not_installed(saved, tmp_path):
    model, folder = saved
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    prompt = list(b"Two")
    assert json.loads(done.stdout.splitlines()[-1]) == prompt + write_greedily(model, prompt, 12)


@pytest.mark.slow
@pytest.mark.usefixtures("forking")
def test_saving_a_model_does_not_load_transformers(tmp_path):
    code = """
import sys
from pathlib import Path
import stages.train
from encore.models.nanochat import NanoChat, NanoChatConfig
from encore.pretrained.model_folder import load_model, save_model
folder = Path(sys.argv[1])
save_model(folder, NanoChat(NanoChatConfig(300, 8, 1, 2, 16, plus=True)), b"ranks", {})
load_model(folder)
print((folder / "modeling_nanochat_plus.py").exists(), "transformers" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False"]
