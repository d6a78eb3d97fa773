"""wandb for real, against a server of its protocol on loopback: a run that is interrupted is one curve there."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stages import evaluate, train
from tests.conftest import TINY, pipeline_environment, write_page
from tests.wandb_server import ENTITY, serving

pytest.importorskip("wandb")
pytestmark = pytest.mark.slow

CHANGES = {**TINY, "max_iters": 8, "log_interval": 1, "eval_interval": 4, "checkpoint_interval": 4, "start": "ab"}
