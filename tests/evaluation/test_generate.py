"""Sampling against loops written out, with models whose next token is known."""

import codecs
import io
import sys
from dataclasses import replace

import pytest
import torch

from encore.errors import EncoreError
from encore.evaluation import generate as command
from encore.evaluation.generate import generate, generate_with_scores, sample
from encore.models.gpt2 import GPT2, GPT2Config
from encore.tokens.token_files import RANKS_FILE
from encore.tokens.tokenizer import load_tokenizer
from tests.small_models import save_small_model

END = 69
CONFIG = GPT2Config(vocab_size=70, block_size=8, n_layer=2, n_head=2, n_embd=16, bias=True)


@pytest.fixture
def model():
    torch.manual_seed(2)
    model = GPT2(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


class Counting(torch.nn.Module):
    """Gives all the weight to the id after the last one, and notes how many ids it was given, and behind how many."""

    config = CONFIG

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.given = []

    def logits(self, idx, cache=None):
        self.given.append((idx.shape[1], cache.length if cache else 0))
        if cache:
            for layer in range(CONFIG.n_layer):
                cache.extend(layer, *torch.zeros(2, 1, 2, idx.shape[1], 8))
            cache.advance(idx.shape[1])
        return torch.nn.functional.one_hot((idx + 1) % 70, 70) * 1e4


def run(model, prompt, tokens=12, temperature=1.0, top_k=None, top_p=1.0, seed=0, end=END):
    generator = torch.Generator().manual_seed(seed)
    return list(generate(model, prompt, tokens, temperature, top_k, top_p, end, generator))


def test_a_model_that_masks_documents_writes_the_same_text(model):
    """Within the context and beyond it: what is written is one document, which begins at the end-of-text token."""
    plain = [run(model, prompt, tokens=20, temperature=0.8) for prompt in ([END], [3, 1, 4], [*range(9)])]
    model.config = replace(CONFIG, document_masking=True)
    masked = [run(model, prompt, tokens=20, temperature=0.8) for prompt in ([END], [3, 1, 4], [*range(9)])]
    assert masked == plain
    assert max(map(len, masked)) == 20


def argmax_loop(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(model.logits(torch.tensor([ids[-8:]]))[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("prompt", [[5], [1, 2, 3], list(range(7)), list(range(8)), list(range(30))])
def test_greedy_text_is_the_argmax_loop_even_behind_a_prompt_longer_than_the_block(model, prompt):
    expected = argmax_loop(model, prompt, 12)
    assert len(set(expected)) > 1
    assert run(model, prompt, temperature=0, end=-1) == expected


def test_sampled_text_is_that_of_a_loop_without_a_cache(model):
    generator, ids = torch.Generator().manual_seed(3), [5, 6]
    for _ in range(12):
        with torch.no_grad():
            scores = model.logits(torch.tensor([ids[-8:]]))[0, -1]
        ids.append(sample(scores, 2.0, 40, 0.9, generator))
    assert len(set(ids)) > 6
    assert run(model, [5, 6], temperature=2.0, top_k=40, top_p=0.9, seed=3, end=-1) == ids[2:]


def test_the_scores_are_the_model_s_whatever_the_sampling(model):
    ids = [5, 6]
    generator = torch.Generator().manual_seed(3)
    for token, scores in generate_with_scores(model, [5, 6], 12, 0.3, 2, 0.5, -1, generator):
        with torch.no_grad():
            expected = model.logits(torch.tensor([ids[-8:]]))[0, -1]
        assert torch.allclose(scores, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        ids.append(token)
    assert len(ids) == 14


def test_among_one_token_there_is_no_choice(model):
    greedy = run(model, [5], temperature=0, end=-1)
    assert run(model, [5], top_k=1, seed=3, end=-1) == greedy
    assert run(model, [5], top_p=1e-9, seed=3, end=-1) == greedy


def test_the_seed_decides(model):
    first = run(model, [5, 6], seed=11, end=-1)
    torch.rand(5)
    assert run(model, [5, 6], seed=11, end=-1) == first
    assert run(model, [5, 6], seed=12, end=-1) != first
    assert len(first) == 12


def test_the_global_generator_is_left_alone(model):
    before = torch.get_rng_state()
    run(model, [5])
    assert torch.equal(torch.get_rng_state(), before)


def test_end_of_text_stops_and_is_cut():
    model = Counting()
    assert run(model, [64], tokens=50) == [65, 66, 67, 68]
    assert len(model.given) == 5
    assert run(Counting(), [68]) == []


def test_an_end_of_text_in_the_prompt_does_not_end_the_text():
    assert run(Counting(), [END], tokens=3) == [0, 1, 2]


def test_each_token_is_computed_once_until_the_block_is_full():
    model = Counting()
    assert run(model, [0, 1, 2, 3, 4], tokens=6) == [5, 6, 7, 8, 9, 10]
    assert model.given == [(5, 0), (1, 5), (1, 6), (1, 7), (8, 0), (8, 0)]


def test_ids_of_the_padding_are_never_sampled(model):
    with torch.no_grad():
        model.wte.weight[70:] = 1e6
    texts = [run(model, [5], tokens=20, temperature=100.0, seed=seed, end=-1) for seed in range(64)]
    assert {id for ids in texts for id in ids} <= set(range(70))


CHOICES = [
    (None, 1.0, 1.0, 4),
    (2, 1.0, 1.0, 2),
    (None, 0.5, 1.0, 4),
    (3, 2.0, 1.0, 3),
    (100, 1.0, 1.0, 4),
    (None, 1.0, 0.6, 1),  # the likeliest has 0.61
    (None, 1.0, 0.62, 2),
    (2, 2.0, 0.7, 2),  # of the two, the first has 0.62
]


@pytest.mark.slow
@pytest.mark.parametrize(("top_k", "temperature", "top_p", "kept"), CHOICES)
def test_samples_have_the_probabilities_of_the_scores(top_k, temperature, top_p, kept):
    """10,000 draws; each share is within 5 deviations of what the formula says."""
    scores = torch.tensor([2.0, 0.5, 1.0, -1.0])
    count, generator = 10_000, torch.Generator().manual_seed(0)
    drawn = torch.tensor([sample(scores, temperature, top_k, top_p, generator) for _ in range(count)])
    weights = torch.exp(scores.double() / temperature)
    weights[scores.argsort(descending=True)[kept:]] = 0
    expected = weights / weights.sum()
    shares = torch.bincount(drawn, minlength=4) / count
    assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()


# The command.


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ENCORE_DEVICE", "cpu")
    return save_small_model(tmp_path)


def call(monkeypatch, capsys, folder, *arguments, stdin=""):
    monkeypatch.setattr(sys, "argv", ["generate", "--model", str(folder), *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    command.main()
    return capsys.readouterr()


def test_the_command_prints_prompt_and_text(monkeypatch, capsys, folder):
    arguments = ["--max-new-tokens", "9", "--temperature", "1.5", "--top-k", "50", "--top-p", "0.9", "--seed", "4"]
    printed = call(monkeypatch, capsys, folder, "--prompt", "ab", *arguments)
    tokenizer = load_tokenizer(folder / RANKS_FILE)
    ids = run(command.load_model(folder), [97, 98], tokens=9, temperature=1.5, top_k=50, top_p=0.9, seed=4, end=299)
    assert printed == ("ab" + tokenizer.decode(ids) + "\n", "")
    assert call(monkeypatch, capsys, folder, *arguments, stdin="ab") == printed
    two, _ = call(monkeypatch, capsys, folder, "--prompt", "ab", "--num-samples", "2", *arguments)
    assert two.startswith(printed.out + "\n" + "-" * 80 + "\nab")


def test_arithmetic_is_set_up_before_a_model_computes_its_rotations(monkeypatch, folder):
    calls, load = [], command.load_model
    monkeypatch.setattr(command, "set_up_numerics", lambda device: calls.append(str(device)))
    monkeypatch.setattr(command, "load_model", lambda path: (calls.append(path), load(path))[1])
    command.open_model(folder)
    assert calls == ["cpu", folder]


def test_the_command_shows_each_token_before_it_computes_the_next(monkeypatch, folder):
    events = []

    class Screen(io.StringIO):
        def flush(self):
            events.append(self.getvalue())

    def open_model(path):
        model, tokenizer = command.load_model(path), load_tokenizer(path / RANKS_FILE)
        compute = model.logits
        model.logits = lambda *how: (events.append("computes"), compute(*how))[1]
        return model, tokenizer

    monkeypatch.setattr(command, "open_model", open_model)
    monkeypatch.setattr(sys, "argv", ["generate", "--model", str(folder), "--prompt", "ab", "--max-new-tokens", "5"])
    monkeypatch.setattr(sys, "stdout", Screen())
    command.main()
    assert events[1::2] == ["computes"] * 5
    shown = events[::2]
    ids = run(command.load_model(folder), [97, 98], tokens=5, temperature=0.8, seed=1337, end=299)
    data = [load_tokenizer(folder / RANKS_FILE).decode_bytes(ids[:count]) for count in range(6)]
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in data]
    assert shown == ["ab" + decoder.decode(each) for decoder, each in zip(decoders, data, strict=True)]
    assert len(set(shown)) > 3


def test_a_long_prompt_is_cut_with_a_note(monkeypatch, capsys, folder):
    text = "abcdefghij" * 3
    out, error = call(monkeypatch, capsys, folder, "--prompt", text, "--temperature", "0", "--max-new-tokens", "5")
    assert error == "encore: note: the prompt has 30 tokens; the model sees the last 16\n"
    last, _ = call(monkeypatch, capsys, folder, "--prompt", text[-16:], "--temperature", "0", "--max-new-tokens", "5")
    assert out.removeprefix(text) == last.removeprefix(text[-16:])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--top-p", "0"], "--top-p: 0.0 will not do; above 0 and up to 1"),
        (["--top-k", "0"], "--top-k: 0 will not do; from 1 on"),
        (["--temperature", "nan"], "--temperature: nan will not do; from 0 on"),
        (["--max-new-tokens", "0"], "--max-new-tokens: 0 will not do; from 1 on"),
        (["--seed", "18446744073709551616"], "--seed: 18446744073709551616 will not do; up to 18446744073709551615"),
    ],
)
def test_wrong_arguments_are_told(monkeypatch, capsys, folder, arguments, said):
    with pytest.raises(SystemExit) as error:
        call(monkeypatch, capsys, folder, *arguments)
    assert error.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {said}\n")


def test_a_missing_model_is_told(monkeypatch, capsys, tmp_path):
    with pytest.raises(EncoreError, match=r"^there is no folder .*/none; `dvc repro train` makes model, --model names"):
        call(monkeypatch, capsys, tmp_path / "none")


@pytest.mark.parametrize("temperature", [1e-40, 1e-50, 1e-300, 5e-324])
def test_next_to_no_temperature_is_none(model, temperature):
    assert run(model, [1, 2], temperature=temperature) == run(model, [1, 2], temperature=0)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_model_that_is_not_finite_writes_nothing(model, temperature):
    with torch.no_grad():
        model.ln_f.weight[0] = float("nan")
    with pytest.raises(EncoreError, match=r"^the model gives a score of nan; take other weights"):
        run(model, [1, 2], temperature=temperature)
