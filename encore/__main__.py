"""`encore COMMAND`, or `python -m encore COMMAND`: what is done by hand. The pipeline itself is run by `dvc repro`."""

import difflib
import sys
from importlib import import_module

from encore.errors import EncoreError, run_stage

COMMANDS = {
    "generate": ("encore.evaluation.generate", "print what a model writes"),
    "play": ("encore.playground.page", "try a model in the browser"),
    "report": ("encore.report.page", "put one run, or several side by side, on a page"),
    "sources": ("encore.download.sources", "print the revision that pins a data set"),
    "upload": ("encore.pretrained.upload", "put a model, or the tokens, on the Hugging Face Hub"),
    "verify": ("encore.pipeline.verify", "read all data and results, and tell what is damaged"),
    "mend": ("encore.pipeline.mend", "repair what a killed dvc has left behind"),
    "summary": ("encore.report.summary", "print the run in a table"),
    "cluster": ("encore.tokens.cluster", "tokenize on many machines"),
}
WITHOUT_OPTIONS = ("mend", "summary", "verify")
USAGE = "\n".join(
    [
        "usage: encore COMMAND ...",
        "",
        *(f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items()),
        "",
        "`encore COMMAND --help` tells more of one. `dvc repro` runs the pipeline.",
    ]
)


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE)
        return
    run_stage(lambda: run_command(name, arguments))


def run_command(name: str, arguments: list[str]) -> None:
    """Runs the command's main. Raises EncoreError where there is no such command."""
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        raise EncoreError(
            f"no command {name}" + (f"; did you mean {nearest[0]}?" if nearest else "; `encore --help` lists them")
        )
    module = import_module(COMMANDS[name][0])
    if name in WITHOUT_OPTIONS and arguments in (["-h"], ["--help"]):
        print(f"usage: encore {name}\n\n{module.__doc__}", end="")
        return
    if name in WITHOUT_OPTIONS and arguments:
        raise EncoreError(f"{name} takes no arguments, and got {' '.join(arguments)}")
    sys.argv = [f"encore {name}", *arguments]
    module.main()


if __name__ == "__main__":
    main()
