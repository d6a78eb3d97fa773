"""initial_vocabulary.py: the same ids in every form that the `tokenizers` library writes, and other ones."""

import json
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from encore.errors import EncoreError
from encore.pretrained.initial_vocabulary import is_other_vocabulary
from encore.tokens.ranks import write_ranks
from encore.tokens.token_files import RANKS_FILE

TEXT = ["the weather of the north, and the other weather", "naïve Ærøskøbing, 日本語, тест"] * 3
FORMS = ["tokenizer.json", "vocab.json", RANKS_FILE]


@pytest.fixture(scope="module")
def learned() -> tuple[Tokenizer, bytes]:
    """A tokenizer of the library, and the ranks file of the same ids: end-of-text is the last one."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(TEXT, vocab_size=290, show_progress=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    ranks = {bytes(byte_of[character] for character in token): id for token, id in vocabulary.items()}
    return tokenizer, write_ranks(ranks)


def save(tokenizer: Tokenizer, ranks: bytes, folder: Path, forms: list[str]) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.save_model(str(folder))  # vocab.json and merges.txt
    (folder / RANKS_FILE).write_bytes(ranks)
    for path in folder.iterdir():
        if path.name not in forms:
            path.unlink()


@pytest.mark.parametrize("forms", [[form] for form in FORMS] + [FORMS, []])
def test_the_same_ids(learned: tuple[Tokenizer, bytes], forms: list[str], tmp_path: Path) -> None:
    save(*learned, tmp_path, forms)
    assert not is_other_vocabulary(tmp_path, learned[1])


def swap(path: Path) -> None:
    """Two tokens change their ids."""
    content = json.loads(path.read_text())
    ids = content["model"]["vocab"] if path.name == "tokenizer.json" else content
    first, second = list(ids)[260:262]
    ids[first], ids[second] = ids[second], ids[first]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("others", [[], [RANKS_FILE]])
def test_two_ids_that_have_changed_places(
    learned: tuple[Tokenizer, bytes], form: str, others: list[str], tmp_path: Path
) -> None:
    save(*learned, tmp_path, [form, *others])
    swap(tmp_path / form)
    assert is_other_vocabulary(tmp_path, learned[1])


@pytest.mark.parametrize("form", FORMS)
def test_pairs_of_another_text(learned: tuple[Tokenizer, bytes], form: str, tmp_path: Path) -> None:
    other = ByteLevelBPETokenizer()
    other.train_from_iterator(["zzz yyy xxx " * 5, "qqq jjj kkk"] * 3, vocab_size=290, show_progress=False)
    save(other, b"IQ== 0\n", tmp_path, [form])
    assert is_other_vocabulary(tmp_path, learned[1])


def test_another_kind_of_model_has_other_ids(learned: tuple[Tokenizer, bytes], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}')
    assert is_other_vocabulary(tmp_path, learned[1])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": null}'])
def test_a_damaged_file_is_a_sentence(learned: tuple[Tokenizer, bytes], text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(EncoreError, match=rf"^{tmp_path}/tokenizer\.json is no tokenizer of Hugging Face's \("):
        is_other_vocabulary(tmp_path, learned[1])
