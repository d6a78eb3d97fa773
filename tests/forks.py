"""Starts Python programs by a fork of a process that has imported torch and DVC already, which takes seconds.

Within `fast_starts()`, `subprocess` starts `python -m MODULE` and `python -c CODE` so. What is started so starts other
programs in the same way: dvc its stages, torchrun its ranks. Such a program is the child of who started it. It has its
own environment, folder, streams and signals, also as /proc shows them. It imports Encore itself, and ends as Python
ends. It shares with the others what Python and the modules below fix when they start, such as the seed of hash().

Any other program is started as ever. So is Python where it is asked for otherwise than here, for example with another
number of threads; and on any other system than Linux.

How: beside each process waits its server, forked before the process has done anything. A server does nothing but fork
twice. The process in between ends at once, so that Linux looks for another parent for the new one: the nearest process
above it that has called itself a subreaper, which is the one that asked.
"""

import atexit
import ctypes
import gc
import json
import os
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

# Imported once. None of Encore, which may be another one in each folder; none that reads settings of HF_ or WANDB_.
MODULES = (
    *("torch", "torch._dynamo", "torch.distributed.run", "torch.distributed.tensor", "torch.distributed.fsdp"),
    *("numpy", "psutil", "pydantic", "ruamel.yaml", "safetensors.torch", "tiktoken", "tqdm"),
    *("dvc.cli", "dvc.cli.parser", "dvc.repo", "dvc.commands.repro"),
)
# Settings that are read where Python or a module starts: a program with others of these is started as ever.
FIXED = ("GOMP_", "LANG", "LC_", "LD_", "MALLOC_", "MKL_", "OMP_", "PYTHON")
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
PR_SET_CHILD_SUBREAPER = 36  # from linux/prctl.h
ROOM = 32_768  # bytes for a program's command line, and for its environment
STREAMS = (0, 1, 2)

exec_as_ever = subprocess._fork_exec


@contextmanager
def fast_starts() -> Iterator[None]:
    """Lets `subprocess` start Python by a fork."""
    if sys.platform == "linux":
        subprocess._fork_exec = Server(first_connection).fork_exec
    try:
        yield
    finally:
        subprocess._fork_exec = exec_as_ever


class Server:
    """The process beside this one that forks, as this one sees it."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self.connect, self.lock = connect, threading.Lock()

    def fork_exec(self, args: Any, executables: Any, *how: Any) -> int:
        """In the place of subprocess._fork_exec: the id of the new process."""
        close_fds, kept, cwd, environment, stdin, _, _, stdout, _, stderr, _, failure = how[:12]
        _, new_session, *others = how[12:20]
        settings = read_settings(environment)
        words = python_arguments([os.fsdecode(word) for word in args], settings.get("PATH"))
        understood = close_fds and list(kept) == [failure] and others == [-1, None, None, None, -1, None]
        if not words or not understood or fixed(settings) != fixed(dict(os.environ)):
            return exec_as_ever(args, executables, *how)
        start = {
            "words": words,
            "folder": os.fsdecode(cwd or os.getcwd()),
            "environment": settings,
            "ignored": [number for number in STOPS if signal.getsignal(number) == signal.SIG_IGN],
            "new_session": bool(new_session),
            "parent": os.getpid(),
        }
        streams = [own if given < 0 else given for own, given in zip(STREAMS, (stdin, stdout, stderr), strict=True)]
        with self.lock:
            connection = self.connect()
            call_subreaper(True)
            socket.send_fds(connection, [json.dumps(start).encode()], streams)
            answer = connection.recv(100)
            call_subreaper(False)
        return int(answer)


@cache
def first_connection() -> socket.socket:
    """To the server beside the tests, which is started when it is first needed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(  # with files to pass on, which is done as ever
        [sys.executable, __file__, str(theirs.fileno()), " " * ROOM],
        env={**environment, "OMP_NUM_THREADS": "1", "ROOM": " " * ROOM},
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def read_settings(environment: list[bytes] | None) -> dict[str, str]:
    if environment is None:
        return dict(os.environ)
    return dict(os.fsdecode(line).split("=", 1) for line in environment)


def fixed(settings: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in settings.items() if name.startswith(FIXED) and name != "PYTHONPATH"}


def python_arguments(command: list[str], path: str | None) -> list[str]:
    """What a command gives to this very Python: -m or -c and what follows. Nothing where it is anything else."""
    if command[-2:-1] == ["-c"] and command[-1].startswith("exec "):  # a shell, that dvc asks to make room
        command = shlex.split(command[-1].removeprefix("exec "))
    if command[1:2] == ["-u"]:  # `become` hands on all that is printed line by line
        command = [command[0], *command[2:]]
    is_python = len(command) > 2 and command[1] in ("-m", "-c") and is_mine(shutil.which(command[0], path=path))
    return command[1:] if is_python else []


def is_mine(program: str | None) -> bool:
    """Whether it is this Python, of this environment, perhaps under another of its names."""
    if program is None or os.path.dirname(program) != os.path.dirname(sys.executable):
        return False
    return os.path.samefile(program, sys.executable)


def call_subreaper(now: bool) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(now))


def serve(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Forks for each message, until who sends them has ended. Comes back in the new processes."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)  # what a terminal sends is for the others
    while True:
        message, streams, *_ = socket.recv_fds(connection, 8 * ROOM, len(STREAMS))
        if not message:
            os._exit(0)
        between = os.fork()
        if not between:
            if os.fork():
                os._exit(0)
            return json.loads(message), streams
        for stream in streams:
            os.close(stream)
        os.waitpid(between, 0)


def become(start: dict[str, Any], streams: list[int]) -> None:
    """Makes this process what Python is before it runs a program's first line."""
    for target, stream in zip(STREAMS, streams, strict=True):
        os.dup2(stream, target)
        os.close(stream)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(start["folder"])
    os.environ.clear()
    sys.orig_argv[:] = [sys.executable, *start["words"]]
    show(sys.orig_argv, [f"{name}={value}" for name, value in start["environment"].items()])
    os.environ.update(start["environment"])
    tempfile.tempdir = None  # which depends on the environment
    for number in STOPS:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in start["ignored"] else usual)


def show(arguments: list[str], settings: list[str]) -> None:
    """Writes the command line and the environment where /proc reads them. The latter must not be in use."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    places = map(int, fields[45:49])  # where the one begins and ends, and the other
    for words, begin, end in ((arguments, next(places), next(places)), (settings, next(places), next(places))):
        text = b"".join(os.fsencode(word) + b"\0" for word in words)
        ctypes.memmove(begin, text[: end - begin].ljust(end - begin, b"\0"), end - begin)


def run(words: list[str]) -> None:
    """As `python WORDS` does."""
    option, program, *arguments = words
    sys.argv = [option, *arguments]
    python_path = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.path[:] = [os.getcwd() if option == "-m" else "", *python_path, *sys.path[1:]]
    sys.modules["__main__"] = main = ModuleType("__main__")
    sys.modules.pop("sitecustomize", None)
    with suppress(ModuleNotFoundError):
        import_module("sitecustomize")
    if option == "-m":
        runpy._run_module_as_main(program)
    else:
        exec(compile(program, "<string>", "exec"), main.__dict__)


def end(error: BaseException | None) -> None:
    """As Python does behind a program's last line, but for the clearing of memory, which would copy all of it first."""
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    elif error is not None:
        code = 1
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    os._exit(code & 0xFF)


def main() -> None:
    for name in MODULES:
        import_module(name)
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("a module starts threads where it is imported, which a fork does not copy")
    gc.freeze()  # what never changes need not be looked through, nor copied
    connection = socket.socket(fileno=int(sys.argv[1]))
    while True:
        start, streams = serve(connection)
        if start["new_session"]:
            os.setsid()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork():
            break
        connection.close()  # here goes on the new process's server
        ours.close()
        for stream in streams:
            os.close(stream)
        connection = theirs
    theirs.close()
    become(start, streams)
    while os.getppid() != start["parent"]:
        time.sleep(0.0001)
    connection.send(str(os.getpid()).encode())
    connection.close()
    subprocess._fork_exec = Server(lambda: ours).fork_exec
    try:
        run(start["words"])
    except BaseException as error:
        end(error)
    end(None)


if __name__ == "__main__":
    main()
