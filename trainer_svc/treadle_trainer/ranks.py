"""One trainer on several ranks: rank 0 serves and decides, the others do the same to replicas of the runs' states.

Every call of the Device that changes something goes to all ranks, in the order of the thread that it runs on, and ends
when all have ended it, so that what rank 0 keeps apart is apart everywhere. A rank that is lost ends this process at
once, before anything is answered: torchrun starts the group again, and the journal is replayed. Knows no operations.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from treadle_engine.rank_group import Line, RankGroup
from treadle_engine.shards import GroupLostError
from treadle_service import ranks
from treadle_service.logs import get_logger
from treadle_service.ranks import give_up
from treadle_trainer.device import Device, Stepped

P = ParamSpec("P")
R = TypeVar("R")
Command = tuple[str, tuple[Any, ...], dict[str, Any]]  # a method of Device and its arguments

LOCAL: Final = frozenset(
    method.__name__
    for method in (
        Device.copy_state, Device.copy_weights, Device.export, Device.gradient, Device.join_thread, Device.num_bytes,
        Device.split, Device.warm_up,
    )
)  # fmt: skip
"""Methods that change no run: rank 0 alone is asked."""

log = get_logger(__name__)


class Leader(ranks.Leader[RankGroup]):
    """Rank 0: has its calls of the device made on all ranks."""

    def __init__(self, timeout_seconds: float) -> None:
        """A rank that does not answer for so long is lost; `join` comes first."""
        super().__init__(RankGroup, timeout_seconds)

    def on_passes(
        self, method: Callable[Concatenate[Device, P], R], device: Device, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Makes a call on all ranks, on the thread of the passes."""
        return self._make(self.group.main, device, method, *args, **kwargs)

    def on_side(
        self, method: Callable[Concatenate[Device, P], R], device: Device, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Makes a call on all ranks, on the thread beside the passes."""
        return self._make(self.group.beside, device, method, *args, **kwargs)

    def end_passes(self) -> None:
        """Tells the others that no further call comes on the thread of the passes."""
        if self.has_met:
            ranks.tell_end(self.group.main.share, GroupLostError)

    def end_side(self) -> None:
        """Tells the others that no further call comes on the thread beside the passes."""
        if self.has_met:
            ranks.tell_end(self.group.beside.share, GroupLostError)

    def _make(
        self, line: Line, device: Device, method: Callable[Concatenate[Device, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        if method.__name__ in LOCAL:
            return method(device, *args, **kwargs)
        command: Command = (method.__name__, args, kwargs)
        if not self.group.on_one_host:
            command = (command[0], tuple(without_paths(value) for value in args), without_paths(kwargs))
        try:
            line.share(command)
            return _together(line, device, method, *args, **kwargs)
        except GroupLostError as error:
            give_up(error)


def follow(load: Callable[[], tuple[RankGroup, Device]]) -> None:
    """Does what rank 0 says until it ends."""
    ranks.follow_rank_0(load, _obey_both, GroupLostError)


def _obey_both(group: RankGroup, device: Device) -> None:
    """Makes the calls of both threads."""
    beside = threading.Thread(target=_obey, args=(group.beside, device), name="beside", daemon=True)
    beside.start()
    _obey(group.main, device)
    beside.join()


def _obey(line: Line, device: Device) -> None:
    """Makes the calls that come over a line, until there are no more; ends the process if the group is lost."""
    device.join_thread()
    while True:
        try:
            command: Command | None = line.share()
        except GroupLostError as error:
            give_up(error)
        if command is None:
            return
        name, args, kwargs = command
        try:
            _together(line, device, getattr(Device, name), *args, **kwargs)
        except GroupLostError as error:
            give_up(error)
        except Exception as error:  # noqa: BLE001 - rank 0 has the same one, and answers it
            log.debug("call_failed", method=name, error=str(error))


def _together(
    line: Line, device: Device, method: Callable[Concatenate[Device, P], R], *args: P.args, **kwargs: P.kwargs
) -> R:
    """Makes a call that all ranks make; returns when all have, and GroupLostError if they ended it differently."""
    try:
        if method.__name__ == Device.optim_step.__name__:
            # The replicas of a run stay equal, even where a device adds up in no fixed order.
            line.copy_(device.gradient(str(args[0])))
        result = method(device, *args, **kwargs)
    except GroupLostError:
        raise
    except Exception as error:
        line.agree(f"{type(error).__name__} {getattr(error, 'reason', '')}".encode())
        raise
    line.agree(result.digest if isinstance(result, Stepped) else b"")
    return result


def without_paths(value: Any) -> Any:
    """Returns an argument with the contents of files in place of their paths, for ranks that do not see them."""
    if isinstance(value, Path):
        return value.read_bytes()
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    return value
