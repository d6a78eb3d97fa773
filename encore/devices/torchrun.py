"""Starts a process for each device by torchrun, used as a library so that its failures can be told in a sentence.

(nothing)                                      several GPUs: one process for each
ENCORE_TORCHRUN="--standalone --nproc-per-node=2"                   torchrun's own arguments instead
torchrun --nnodes=2 ... -m stages.train        its processes find that they have been started already
"""

import logging
import os
import shlex
import signal
from argparse import Namespace
from contextlib import redirect_stderr
from io import StringIO
from tempfile import TemporaryDirectory

import torch

from encore.errors import EncoreError, Interrupted
from encore.signals import SIGNALS

ARGUMENTS = "ENCORE_TORCHRUN"
ONE_MACHINE = ("1", "1:1")  # torchrun's --nnodes
STOPPED = "all ranks have stopped; run the same command to go on"
# How long after a signal torchrun kills its processes: a step and a checkpoint must fit, and who waits for a rank that
# is lost waits no longer. A spot instance gives two minutes.
SECONDS_TO_SAVE = "110"


def torchrun_arguments(module: str, one_machine: bool = False) -> list[str]:
    """What this process should start torchrun with to run `module`; nothing where it does the work itself.

    one_machine: of several machines that the environment speaks of, take this one alone, with as many processes.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or "RANK" in os.environ:
        return []
    if ARGUMENTS in os.environ:
        try:
            arguments = shlex.split(os.environ[ARGUMENTS])
            parsed = _parse(arguments, module) if arguments and one_machine else None
        except ValueError as error:
            raise _refused(os.environ[ARGUMENTS], error) from None
        if parsed and parsed.nnodes not in ONE_MACHINE:
            return ["--standalone", f"--nproc-per-node={parsed.nproc_per_node}"]
        return arguments
    device = os.environ.get("ENCORE_DEVICE", "cuda")
    if device == "cuda" and torch.cuda.device_count() > 1:
        return ["--standalone", "--nproc-per-node=gpu"]
    return []


def run_under_torchrun(arguments: list[str], module: str) -> None:
    """Runs `python -m module` once for each device, and comes back when all have ended well.

    Raises Interrupted after a signal, which all have been told of, and EncoreError where torchrun does not take the
    arguments, the ranks do not find each other, or one of them fails.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import run

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SECONDS_TO_SAVE)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        parsed = _parse(arguments, module)
        if parsed.nnodes not in ONE_MACHINE:
            # Machines count restarts each for itself: the ranks must meet in a new store, or find old addresses.
            os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup; torchrun would take it as a stop
            parsed.signals_to_handle = "SIGTERM,SIGINT,SIGQUIT"
        # A failure is told below, unless a restart follows it.
        logging.disable(logging.WARNING if parsed.max_restarts else logging.ERROR)
        # Nor who left first, where all have ended well and one machine's goodbye misses the other's store.
        logging.getLogger("torch.distributed.elastic.agent.server.api").addFilter(_is_no_goodbye)
        with TemporaryDirectory(prefix="encore-torchrun-") as logs:  # torchrun would leave a folder behind each run
            parsed.log_dir = parsed.log_dir or logs
            run(parsed)
    except SignalException as stop:
        raise Interrupted(stop.sigval, STOPPED) from None
    except UnboundLocalError as error:
        # A signal that comes while torch's elastic.metrics sets its clock is followed by this error of its own.
        if not isinstance(error.__context__, SignalException):
            raise
        raise Interrupted(error.__context__.sigval, STOPPED) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise _failed(rank, failure.exitcode) from None
    except (RendezvousError, torch.distributed.DistError) as error:
        reason = str(error.__cause__ or error).splitlines() or ["they waited in vain"]
        raise EncoreError(
            f"the ranks did not find each other ({reason[0]}); check that each machine runs the same command, and the "
            f"address and port in {ARGUMENTS}"
        ) from None
    except (AssertionError, RuntimeError, ValueError) as error:
        raise _refused(shlex.join(arguments), error) from None


def _parse(arguments: list[str], module: str) -> Namespace:
    """torchrun's own reading of its arguments. Raises ValueError with what it would have printed."""
    from torch.distributed.run import parse_args

    try:
        with redirect_stderr(StringIO()) as printed:
            parsed = parse_args([*arguments, "-m", module])
    except SystemExit:
        raise ValueError(printed.getvalue().rpartition("error: ")[2].strip()) from None
    if parsed.training_script != module:
        raise ValueError(f"{parsed.training_script} is no option")
    return parsed


def _is_no_goodbye(record: logging.LogRecord) -> bool:
    return "exit barrier" not in record.getMessage()


def _refused(arguments: str, error: Exception) -> EncoreError:
    reason = str(error) or type(error).__name__
    return EncoreError(f"{ARGUMENTS}={arguments!r} is not what torchrun takes ({reason}); see `torchrun --help`")


def _failed(rank: int, exit_code: int) -> Exception:
    """What to raise for the first rank that failed; a negative exit code is the number of the signal that killed it."""
    if exit_code - 128 in (*SIGNALS, signal.SIGHUP):  # another machine's ranks were told to stop
        return Interrupted(exit_code - 128, STOPPED)
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        return EncoreError(f"rank {rank} was killed by {name}; the same command goes on from the last checkpoint")
    return EncoreError(f"rank {rank} ended with exit code {exit_code}; its message is above")
