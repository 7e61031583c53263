"""`treadle plan`: how many trainers a load needs, how busy they are, what that takes in memory and money."""

from dataclasses import dataclass
from pathlib import Path

import click

from treadle.cli.connect import CALL_SECONDS, Place, open_channel
from treadle.cli.output import print_row
from treadle.cli.settings import DEFAULT_DATA_DIR, admin_key, gateway_address

_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class _Served:
    """What a deployment measured of itself."""

    fixed_seconds: float
    seconds_per_token: float
    num_parameters: int


@click.command()
@click.option("--users", type=click.IntRange(min=1), default=100, show_default=True, help="Users who train at once.")
@click.option("--tokens-per-step", type=click.IntRange(min=1), default=4096, show_default=True)
@click.option("--round-trip-ms", type=click.FloatRange(min=0), default=100.0, show_default=True)
@click.option("--window", type=click.IntRange(min=1), default=1, show_default=True, help="Steps a user has in flight.")
@click.option(
    "--own-ms", type=click.FloatRange(min=0), default=0.0, show_default=True, help="A user's own work a step."
)
@click.option("--trainers", type=click.IntRange(min=1), help="Trainers there are; default: as many as are needed.")
@click.option(
    "--slowdown", type=click.FloatRange(min=1), default=1.5, show_default=True, help="Of a step against alone."
)
@click.option("--fixed-ms", type=click.FloatRange(min=0), help="Cost of any pass.")
@click.option("--tokens-per-second", type=click.FloatRange(min=1), help="Speed of a pass.")
@click.option("--base-parameters", type=click.FloatRange(min=1), help="Parameters of the base, for example 8e9.")
@click.option("--base-bytes", type=float, default=2.0, show_default=True, help="Bytes of a parameter of the base.")
@click.option("--rank", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--adapter-parameters", type=click.IntRange(min=1), help="Default: about what `rank` comes to.")
@click.option(
    "--idle-runs", type=click.IntRange(min=0), default=0, show_default=True, help="Runs beside those at work."
)
@click.option("--price-per-hour", type=click.FloatRange(min=0), default=0.0, help="Of one trainer, in any currency.")
@click.option("-f", "--format", "output_format", type=click.Choice(["table", "json"]), default="table")
@click.option("--address", envvar="TREADLE_ADDRESS", help="Deployment to take speed and base from.")
@click.option("--key", envvar="TREADLE_API_KEY", help="API key with the scope admin.")
@click.option("--data-dir", type=click.Path(path_type=Path), default=DEFAULT_DATA_DIR, show_default=True)
def plan(
    *,
    users: int,
    tokens_per_step: int,
    round_trip_ms: float,
    window: int,
    own_ms: float,
    trainers: int | None,
    slowdown: float,
    fixed_ms: float | None,
    tokens_per_second: float | None,
    base_parameters: float | None,
    base_bytes: float,
    rank: int,
    adapter_parameters: int | None,
    idle_runs: int,
    price_per_hour: float,
    output_format: str,
    address: str | None,
    key: str | None,
    data_dir: Path,
) -> None:
    """Predict utilisation, memory and cost of a load on trainers of one base.

    What is not given of --fixed-ms, --tokens-per-second and --base-parameters is taken from the deployment that runs:
    its trainers measured it at their start.
    """
    from treadle import capacity

    place = Place(
        address or gateway_address(data_dir),
        key or admin_key(data_dir) or "",
        "json" if output_format == "json" else "table",
    )
    if fixed_ms is None or tokens_per_second is None or base_parameters is None:
        served = _served(place)
        fixed_ms = 1e3 * served.fixed_seconds if fixed_ms is None else fixed_ms
        tokens_per_second = tokens_per_second or 1.0 / served.seconds_per_token
        base_parameters = base_parameters or served.num_parameters
    speed = capacity.Speed(fixed_ms / 1e3, 1.0 / tokens_per_second)
    usage = capacity.Usage(tokens_per_step, round_trip_ms / 1e3, window, own_ms / 1e3)
    count = trainers or capacity.trainers_needed(speed, usage, users, slowdown)
    steady = capacity.steady_state(speed, usage, users / count)
    alone = capacity.steady_state(speed, usage, 1)
    size = adapter_parameters or capacity.adapter_parameters(int(base_parameters), rank)
    memory = capacity.memory_of(int(base_parameters), base_bytes, size)
    tokens = min(count, users) * steady.steps_per_second * tokens_per_step
    row = {
        "trainers": count,
        "users per trainer": round(users / count, 2),
        "utilisation": round(steady.utilisation, 3),
        "idle share": round(1.0 - steady.utilisation, 3),
        "idle share with a trainer for each user": round(1.0 - alone.utilisation, 3),
        "runs in a pass": round(steady.runs_per_pass, 2),
        "seconds per step": round(steady.seconds_per_step, 3),
        "seconds per step, alone": round(alone.seconds_per_step, 3),
        "tokens per second, all": round(tokens),
        "base, GiB per worker": _gib(memory.base_bytes),
        "run at work, MiB on the device": _mib(memory.resident_run_bytes),
        "idle run, MiB in host memory": _mib(memory.idle_run_bytes),
        "runs at work, GiB per trainer": _gib(memory.resident_run_bytes * users / count),
        "idle runs, GiB per trainer": _gib(memory.idle_run_bytes * idle_runs / count),
    }  # fmt: skip
    if price_per_hour:
        row["price per hour"] = round(count * price_per_hour, 2)
        row["price per million tokens"] = round(count * price_per_hour / (tokens * _SECONDS_PER_HOUR / 1e6), 4)
    print_row(place, row)


def _served(place: Place) -> _Served:
    """Returns what the deployment's first trainer measured of its base."""
    from treadle.v1 import admin_pb2, admin_pb2_grpc

    with open_channel(place) as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        workers = admin.ListWorkers(
            admin_pb2.ListWorkersRequest(), metadata=place.metadata, timeout=CALL_SECONDS
        ).workers
        bases = admin.GetCapabilities(
            admin_pb2.GetCapabilitiesRequest(), metadata=place.metadata, timeout=CALL_SECONDS
        ).bases
    for worker in workers:
        if worker.pass_cost.seconds_per_token:
            (parameters,) = (base.num_parameters for base in bases if base.name == worker.base)
            return _Served(worker.pass_cost.fixed_seconds, worker.pass_cost.seconds_per_token, parameters)
    raise click.ClickException(
        f"no trainer at {place.address} has measured its passes; give --fixed-ms, --tokens-per-second and "
        "--base-parameters"
    )


def _gib(num_bytes: float) -> float:
    return round(num_bytes / 2**30, 2)


def _mib(num_bytes: float) -> float:
    return round(num_bytes / 2**20, 2)
