"""A clone of what is committed here, on a page and a corpus that take seconds."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from encore.download.local_files import hash_files, hash_names_and_contents, list_files

ROOT = Path(__file__).parent.parent
PAGE = {
    "dataset": "files:corpus/*.txt",
    "token_cap": 60_000,
    "val_fraction": 0.1,
    "vocab_size": 512,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_iters": 60,
    "warmup_iters": 5,
    "checkpoint_interval": 5,
    "eval_interval": 20,
    "eval_iters": 2,
    "log_interval": 5,
    "num_samples": 1,
    "max_new_tokens": 10,
    "compile": False,
}


def make_repository(folder: Path, **changes: Any) -> Path:
    """Makes the clone and commits the page. changes: of its values."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    (folder / "corpus").mkdir()
    for path in sorted((ROOT / "encore").glob("*.py")):
        shutil.copy(path, folder / "corpus" / f"{path.stem}.txt")
    yaml = YAML()
    page = yaml.load((folder / "params.yaml").read_text())
    page.update({**PAGE, **changes})
    page["dataset_revision"] = hash_names_and_contents(hash_files(list_files(f"{folder}/corpus/*.txt")))
    yaml.dump(page, folder / "params.yaml")
    for command in ("git add -A", "git -c user.name=x -c user.email=x@localhost commit -qm tiny"):
        subprocess.run(command.split(), cwd=folder, check=True)
    return folder
