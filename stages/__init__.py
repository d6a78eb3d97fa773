"""The pipeline's stages: each module is one stage of dvc.yaml, run as `python -m stages.NAME` from the root."""

import os
import sys
import time
from importlib.util import find_spec

STARTED = time.time()  # of the stage, before what it imports
missing = [name for name in ("pyarrow", "pydantic", "safetensors", "tiktoken", "torch") if find_spec(name) is None]
if sys.version_info < (3, 11) or missing:
    sys.exit(
        "encore: {} (Python {}.{}{}) is not the Python that `make setup` prepared; activate it first: "
        ". .venv/bin/activate".format(
            sys.executable, *sys.version_info[:2], ", without " + ", ".join(missing) if missing else ""
        )
    )

# torch's threads on the CPU wait for each other by spinning, ten times as long by default. With another busy program on
# two cores, the default run then did 4,600 tokens/s, and 9,100 so; alone it is as fast. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

# Linux hands out memory in pages of 2 MB where torch asks for them: one page fault instead of 512, and a step of GPT-2
# (4x128) with 50,257 ids takes a fifth less time. Read when torch first needs memory.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Before a stage imports torch, which takes seconds, and only where this is its start: tests import stages as well.
from encore.signals import stop_with_parent  # noqa: E402

if sys.argv[0] == "-m":
    stop_with_parent()
