"""The command `encore`: what it offers, and what it says to a wrong one."""

import subprocess
import sys
import textwrap
from contextlib import nullcontext
from importlib import import_module

import pytest

from encore.__main__ import COMMANDS, USAGE, WITHOUT_OPTIONS, main
from tests.conftest import ROOT


def test_every_command_has_a_main_and_a_line_in_the_help(monkeypatch, capsys):
    for module, what in COMMANDS.values():
        assert callable(import_module(module).main)
        assert what in USAGE
    for arguments in ([], ["-h"], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["encore", *arguments])
        main()
        assert capsys.readouterr().out == USAGE + "\n"


def test_the_help_is_in_the_docs():
    assert textwrap.indent(USAGE, "    ") in (ROOT / "docs/everyday.md").read_text()


@pytest.mark.parametrize(
    ("word", "hint"), [("generat", "did you mean generate?"), ("--version", "`encore --help` lists them")]
)
def test_a_wrong_command_is_a_sentence(word, hint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["encore", word])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"encore: no command {word}; {hint}\n"


@pytest.mark.slow
@pytest.mark.usefixtures("forking")
@pytest.mark.parametrize("how", [["-m", "encore"], ["-c", "from encore.__main__ import main; main()"]])
def test_a_command_tells_its_own_options(how):
    done = subprocess.run([sys.executable, *how, "generate", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: encore generate [-h] [--model DIR] [--prompt PROMPT]")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["encore", name, "--help"])
    with pytest.raises(SystemExit) if name not in WITHOUT_OPTIONS else nullcontext():
        main()
    assert capsys.readouterr().out.startswith(f"usage: encore {name}")


def test_a_command_without_options_refuses_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["encore", "verify", "data/raw"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == "encore: verify takes no arguments, and got data/raw\n"
