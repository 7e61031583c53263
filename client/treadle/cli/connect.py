"""What the commands share: the options that say where and who, stubs with a key, errors as one line.

Imported by commands when they run, never for help.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from treadle.cli.settings import DEFAULT_DATA_DIR, admin_key, gateway_address

if TYPE_CHECKING:
    from treadle.client import ServiceClient

Format = Literal["table", "json"]
Metadata = tuple[tuple[str, str], ...]
F = TypeVar("F", bound=Callable[..., Any])

CALL_SECONDS = 30.0


@dataclass(frozen=True)
class Place:
    """Which Treadle, with which key, and how to print."""

    address: str
    key: str
    format: Format
    ca: Path | None = None

    @property
    def metadata(self) -> Metadata:
        """The metadata of every call."""
        return (("authorization", f"Bearer {self.key}"),)


def place_options(command: F) -> F:
    """Adds the options --address, --ca, --key, --data-dir and -f; the command takes them as `place`."""

    def make_place(
        address: str | None, key: str | None, ca: Path | None, data_dir: Path, output_format: Format
    ) -> Place:
        folder = data_dir.expanduser()
        found = key or admin_key(folder)
        if not found:
            raise click.UsageError(
                f"there is no key: give --key, set TREADLE_API_KEY, or start `treadle up` ({folder})"
            )
        return Place(address or gateway_address(folder), found, output_format, ca)

    def wrapper(
        address: str | None,
        key: str | None,
        ca: Path | None,
        data_dir: Path,
        output_format: Format,
        **others: object,
    ) -> None:
        command(make_place(address, key, ca, data_dir, output_format), **others)

    wrapper.__doc__, wrapper.__name__ = command.__doc__, command.__name__
    wrapper.__click_params__ = list(getattr(command, "__click_params__", []))  # type: ignore[attr-defined]
    for option in (
        click.option("-f", "--format", "output_format", type=click.Choice(["table", "json"]), default="table"),
        click.option("--data-dir", type=click.Path(path_type=Path), default=DEFAULT_DATA_DIR, show_default=True),
        click.option("--key", envvar="TREADLE_API_KEY", help="API key; default: the data folder's admin key."),
        click.option(
            "--ca",
            envvar="TREADLE_CA",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="PEM authority of an https address; default: the system's.",
        ),
        click.option(
            "--address",
            envvar="TREADLE_ADDRESS",
            help="host:port, or https://host:port; default: what runs on this machine.",
        ),
    ):
        wrapper = option(wrapper)
    return wrapper  # type: ignore[return-value]


@contextmanager
def report_errors(place: Place) -> Iterator[None]:
    """Turns a failed call into one line and exit code 1."""
    import grpc

    from treadle.errors import TreadleError, from_rpc_error

    try:
        yield
    except (grpc.RpcError, TreadleError) as error:
        raised = error if isinstance(error, TreadleError) else from_rpc_error(error)
        where = f" (at {place.address})" if raised.reason == "UNAVAILABLE" else ""
        raise click.ClickException(f"{raised}{where}") from error


@contextmanager
def open_service(place: Place) -> Iterator["ServiceClient"]:
    """Gives a service client, and reports errors of the service, of data and of settings as one line."""
    from treadle.client import ServiceClient
    from treadle.recipes.rows import DataError
    from treadle.settings import client_settings

    with report_errors(place), ServiceClient(settings=client_settings(place.address, place.key, place.ca)) as client:
        try:
            yield client
        except DataError as error:
            raise click.ClickException(str(error)) from error


@contextmanager
def open_channel(place: Place) -> Iterator[Any]:  # Any: grpc.Channel, which is imported late.
    """Gives a channel to the gateway, and reports errors of calls on it."""
    import grpc

    scheme, _, target = place.address.rpartition("://")
    if scheme == "https":
        made = grpc.secure_channel(target, grpc.ssl_channel_credentials(place.ca.read_bytes() if place.ca else None))
    else:
        made = grpc.insecure_channel(target)
    with report_errors(place), made as channel:
        yield channel
