"""The commit that a result is made from."""

import subprocess

# What a result depends on. DVC's own outputs are left out: it has removed them before a stage can ask.
INPUTS = ("encore", "stages", "dvc.yaml", "params.yaml", "requirements.lock")


def describe_head() -> str:
    """HEAD in 12 digits, with `-dirty` where code or parameters in the working tree differ from it; "none" outside git
    or before the first commit."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return f"{head}-dirty" if _git("status", "--porcelain", "--", *INPUTS) else head
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()
