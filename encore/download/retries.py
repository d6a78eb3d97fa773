"""Trying again: which troubles of a network pass, how long to wait for that, and when to give up.

Nothing of a request leaves this module, since a request holds the token. What goes wrong is told by a `Trouble`, made
of the status of an answer or the name of an exception.

Ours, since a try that brought new bytes starts the count anew, which tenacity has no word for. It would replace 20 of
these lines and none of those that decide what passes.
"""

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib import import_module
from typing import Any, TypeVar

from encore.progress import note
from encore.threads import Stopped

TRIES = 6  # without a new byte between them
FIRST_WAIT_SECONDS = 1.0  # twice as long after each further failure
LONGEST_WAIT_SECONDS = 300.0  # the Hub counts requests over five minutes
Result = TypeVar("Result")


@dataclass(frozen=True)
class Trouble:
    """Why a try failed. status: HTTP's, None where no answer came. again: whether another try can help."""

    reason: str
    status: int | None = None
    again: bool = True
    retry_after_seconds: float = 0.0


class TransferError(Exception):
    """What does not work, or no longer: the caller knows the way out. what: the name of the thing."""

    def __init__(self, what: str, trouble: Trouble) -> None:
        super().__init__(f"{what}: {trouble.reason}")
        self.what, self.trouble = what, trouble


def persist(what: str, attempt: Callable[[], Result | Trouble], stopping: threading.Event) -> Result:
    """What `attempt` returns once it meets no trouble. Raises TransferError where it goes on meeting it."""
    patience = Patience(what, stopping)
    while isinstance(result := try_once(attempt), Trouble):
        patience.wait(result)
    return result


class Patience:
    """Counts failures. The waits between them grow, and at TRIES they have an end."""

    def __init__(self, what: str, stopping: threading.Event) -> None:
        self.what, self.stopping = what, stopping
        self.failures = 0

    def wait(self, trouble: Trouble) -> None:
        """Waits before the next try. Raises TransferError where there is none, and Stopped when the work ends."""
        self.failures += 1
        if self.stopping.is_set():
            raise Stopped
        if not trouble.again or self.failures == TRIES:
            raise TransferError(self.what, trouble)
        seconds = wait_seconds(self.failures, trouble.retry_after_seconds)
        note(f"{self.what}: {trouble.reason}; trying again in {seconds:.3g} s")
        if self.stopping.wait(seconds):
            raise Stopped


def wait_seconds(failures: int, retry_after_seconds: float) -> float:
    """How long to wait after so many failures in a row, and at least as long as the server asks for."""
    return min(max(FIRST_WAIT_SECONDS * 2 ** (failures - 1), retry_after_seconds), LONGEST_WAIT_SECONDS)


def try_once(attempt: Callable[[], Result | Trouble]) -> Result | Trouble:
    """What `attempt` returns. Trouble with the network is returned as well: an exception would hold the request."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    http: Any = import_module(HTTPError.__module__)  # httpx, or its successor, as huggingface_hub has it
    try:
        return attempt()
    except HfHubHTTPError as error:
        return trouble_of(error.response)
    except OfflineModeIsEnabled:
        return Trouble("HF_HUB_OFFLINE is set", again=False)
    except http.TransportError as error:
        return Trouble(type(error).__name__, again=not isinstance(error, http.UnsupportedProtocol))
    except (HTTPError, http.InvalidURL) as error:
        return Trouble(type(error).__name__, again=False)


def trouble_of(response: Any) -> Trouble:
    """Statuses that pass: a time-out, too many requests, and what a server blames on itself."""
    status = response.status_code
    return Trouble(f"status {status}", status, status in (408, 429) or status >= 500, _retry_after(response.headers))


def _retry_after(headers: Any) -> float:
    """The seconds that an answer asks to wait: Retry-After, a number or a date, or the Hub's RateLimit, `...;t=55`."""
    wish = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", wish):
        return float(wish)
    try:
        return max(0.0, parsedate_to_datetime(wish).timestamp() - time.time())
    except ValueError:
        rate_limit = re.search(r";\s*t\s*=\s*(\d{1,9})", headers.get("RateLimit", ""))
        return float(rate_limit[1]) if rate_limit else 0.0
