"""What docs/serving.md says: the files, names and shapes on which vLLM and llama.cpp depend, and llama.cpp itself where
it is there."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from safetensors import safe_open

from encore.models.architectures import make_model
from encore.models.gpt2 import GPT2, GPT2Config
from encore.models.nanochat import NanoChatConfig
from encore.pretrained.hub_tokenizer import save_hub_tokenizer
from encore.pretrained.model_folder import CONFIG, WEIGHTS, save_model
from encore.tokens.ranks import write_ranks
from encore.tokens.tokenizer import END_OF_TEXT, make_tokenizer, train_bpe
from tests.conftest import ROOT
from tests.small_models import RECORD

LLAMA_CPP = os.environ.get("LLAMA_CPP_DIR")  # a copy of its repository, for the converter
CONVERTER = "convert_hf_to_gguf.py"
PROMPT = "It was the 4th day; they hadn't seen 1481 ships, naïve or not.\n\n  So they'd wait. 天～"
PROSE = [f"It was the {n}th day; they hadn't seen {n * 37} ships.\n\n  So they'd wait." for n in range(60)]
SHAPE = {"vocab_size": 301, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 64}


def make_random(config):
    torch.manual_seed(0)
    model = make_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def save(folder, model, ranks):
    folder.mkdir()
    save_hub_tokenizer(folder, ranks, model.config.block_size)
    save_model(folder, model, write_ranks(ranks), RECORD)
    return folder


@pytest.fixture(scope="module")
def ranks():
    return train_bpe(PROSE, SHAPE["vocab_size"])


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def gpt2_folder(request, ranks, tmp_path):
    return save(tmp_path / "model", make_random(GPT2Config(**SHAPE, bias=request.param)), ranks)


def shapes_of(folder):
    with safe_open(folder / WEIGHTS, "pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def test_gpt2_has_the_tensors_of_transformers_and_no_others(gpt2_folder):
    """vLLM's GPT2LMHeadModel takes these names, refuses others, and ties the head itself."""
    import transformers

    declared = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained(gpt2_folder)).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in declared.items() if name != "lm_head.weight"}
    assert shapes_of(gpt2_folder) == expected
    assert expected["transformer.wte.weight"] == (301, 64)


def test_gpt2_has_what_the_loaders_read_of_the_config(gpt2_folder):
    import transformers

    written = json.loads((gpt2_folder / CONFIG).read_text())
    assert written["architectures"] == ["GPT2LMHeadModel"]
    # llama.cpp's converter reads the file without transformers, and asks for these.
    asked = {"n_ctx": 64, "n_embd": 64, "n_head": 2, "n_layer": 2, "layer_norm_epsilon": 1e-5}
    assert {key: written[key] for key in asked} == asked
    config = transformers.AutoConfig.from_pretrained(gpt2_folder)
    assert (config.max_position_embeddings, config.vocab_size, config.tie_word_embeddings) == (64, 301, True)
    assert config.n_inner in (None, 4 * 64)
    # vLLM has no other kinds of GPT-2.
    kinds = (config.add_cross_attention, config.scale_attn_by_inverse_layer_idx, config.reorder_and_upcast_attn)
    assert kinds == (False, False, False)


def test_the_tokenizer_has_a_token_for_each_id_and_merges_in_its_file(gpt2_folder):
    """llama.cpp would name an id without a token [PAD...]; it takes the merges from tokenizer.json, as text."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2_folder)
    assert sorted(tokenizer.get_vocab().values()) == list(range(301))
    assert tokenizer.get_added_vocab() == {END_OF_TEXT: 300}
    merges = json.loads((gpt2_folder / "tokenizer.json").read_text())["model"]["merges"]
    assert len(merges) == 300 - 256
    assert all(len(merge.split(" ")) == 2 for merge in merges)


def test_nanochat_is_the_class_that_vllm_runs_by_transformers(ranks, tmp_path):
    import transformers

    folder = save(tmp_path / "model", make_random(NanoChatConfig(**SHAPE)), ranks)
    config = transformers.AutoConfig.from_pretrained(folder)
    (architecture,) = config.architectures
    declared = getattr(transformers, architecture)
    assert declared.is_backend_compatible()
    expected = {name: tuple(tensor.shape) for name, tensor in declared(config).state_dict().items()}
    assert shapes_of(folder) == expected
    assert (config.final_logit_softcapping, config.tie_word_embeddings) == (15.0, False)


@pytest.mark.slow
def test_nanochat_plus_is_refused_by_what_vllm_makes_of_it(ranks, tmp_path):
    """vLLM takes the layers by AutoModel. It must not get them: it computes a token without the one before it."""
    import transformers

    folder = save(tmp_path / "model", make_random(NanoChatConfig(**SHAPE, plus=True)), ranks)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        transformers.AutoModel.from_config(config, trust_remote_code=True)


def published_ranks():
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is unset: no published ranks")
    return tiktoken.get_encoding("r50k_base")._mergeable_ranks


def copy_converter(target):
    """The converter with the one line that docs/serving.md changes for a learned tokenizer, by its command."""
    target.mkdir()
    shutil.copy(Path(LLAMA_CPP) / CONVERTER, target)
    for folder in ("conversion", "gguf-py"):
        shutil.copytree(Path(LLAMA_CPP) / folder, target / folder)
    (command,) = re.findall(r"^    (sed -i .*)$", (ROOT / "docs/serving.md").read_text(), re.M)
    before = (target / "conversion/base.py").read_text()
    subprocess.run(command, shell=True, cwd=target.parent, check=True)
    assert (target / "conversion/base.py").read_text() != before
    return target


def convert(converter, folder, target):
    command = [sys.executable, converter / CONVERTER, folder, "--outtype", "f32", "--outfile", target]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA_CPP, reason="LLAMA_CPP_DIR is unset: no converter to GGUF")
@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe"])
def test_llama_cpp_computes_the_same(tokenizer, ranks, tmp_path):
    """Ids, logits of each position and what is written greedily."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: nothing to run a GGUF")
    ranks = published_ranks() if tokenizer == "gpt2" else ranks
    config = GPT2Config(**{**SHAPE, "vocab_size": len(ranks) + 1, "block_size": 256}, bias=tokenizer == "gpt2")
    model = make_random(config)
    folder, gguf = save(tmp_path / "model", model, ranks), tmp_path / "model.gguf"
    converter = Path(LLAMA_CPP)
    if tokenizer == "bpe":
        assert "BPE pre-tokenizer was not recognized" in convert(converter, folder, gguf).stderr
        converter = copy_converter(tmp_path / "llama.cpp")
    done = convert(converter, folder, gguf)
    assert done.returncode == 0, done.stderr

    llama = llama_cpp.Llama(str(gguf), n_ctx=0, logits_all=True, n_threads=1, verbose=False)
    ids = llama.tokenize(PROMPT.encode(), add_bos=False)
    assert ids == make_tokenizer(ranks).encode_ordinary(PROMPT)
    llama.eval(ids)
    expected = logits_of(model, ids)
    # It keeps keys and values in 16 bits, and has a table of 16 bits in place of GELU.
    assert np.abs(llama.scores[: len(ids)] - expected).max() <= 2e-3 * np.abs(expected).max()
    for _ in range(20):
        ids.append(int(logits_of(model, ids)[-1].argmax()))
        assert int(llama.scores[len(ids) - 2].argmax()) == ids[-1]
        llama.eval(ids[-1:])
    assert llama.token_eos() == len(ranks)
    llama.close()


def logits_of(model: GPT2, ids):
    with torch.no_grad():
        return model.logits(torch.tensor([ids]))[0, :, : model.config.vocab_size].numpy()
