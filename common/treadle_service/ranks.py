"""What services have in common as ranks of a group that torchrun started. Knows nothing of what the ranks compute."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from treadle_service.logs import get_logger

log = get_logger(__name__)


def leave_signals_to_rank_0() -> None:
    """Ignores what torchrun sends to all ranks at once: rank 0 needs the others while it drains, and then ends them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def give_up(error: BaseException) -> NoReturn:
    """Ends this process as a crash would, without another answer, so that torchrun starts all ranks again."""
    log.error("group_lost", error=f"{type(error).__name__}: {error}", exc_info=error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
