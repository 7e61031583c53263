"""The store's settings: prefix TREADLE_STORE_ in the environment, flags on the command line."""

from pathlib import Path

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from treadle_service.settings import ServiceSettings


class StoreSettings(ServiceSettings):
    """Settings of the adapter store."""

    model_config = SettingsConfigDict(env_prefix="TREADLE_STORE_")

    listen: str = Field("127.0.0.1:7630", description="host:port to serve gRPC on; port 0 takes a free one")
    data_dir: Path = Field(Path("treadle-data"), description="folder of all durable state; one store at a time uses it")
    database_url: str = Field("", description="SQLAlchemy URL of a SQLite file; default: data_dir/store.db")
    admin_key_file: Path | None = Field(
        None, description="file that receives the first admin key at first start; default: data_dir/admin.key"
    )
    max_adapter_bytes: int = Field(4 * 2**30, gt=0, description="longest file that PushAdapter takes")
    sweep_period_seconds: float = Field(600.0, gt=0, description="time between two collections of unused blobs")
    sweep_grace_seconds: float = Field(
        3600.0, ge=60, description="time that an unused blob stays; longer than any upload and its record take"
    )
    unnamed_kept: int = Field(4, ge=1, description="newest unnamed revisions of a run that stay as long as the run")
    unnamed_idle_seconds: float = Field(
        600.0, ge=0, description="time since its last use or its save after which another unnamed revision goes"
    )
    unnamed_period_seconds: float = Field(30.0, gt=0, description="time between two collections of unnamed revisions")
    deleted_grace_seconds: float = Field(86_400.0, ge=0, description="time that a deleted adapter's files stay")

    @field_validator("database_url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        try:
            parsed = make_url(url) if url else None
        except ArgumentError as error:
            raise ValueError(f"{url!r} is not a database URL: {error}") from error
        if parsed is not None and (parsed.get_backend_name() != "sqlite" or not parsed.database):
            raise ValueError(f"{url!r} must name a SQLite file, for example sqlite:////var/lib/treadle/store.db")
        return url

    @property
    def database(self) -> str:
        """The URL that is used."""
        return self.database_url or f"sqlite:///{self.data_dir.absolute() / 'store.db'}"

    @property
    def admin_key(self) -> Path:
        """The file that is used for the first admin key."""
        return self.admin_key_file or self.data_dir / "admin.key"
