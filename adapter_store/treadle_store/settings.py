"""The store's settings: prefix TREADLE_STORE_ in the environment, flags on the command line."""

from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from treadle_service.settings import ServiceSettings
from treadle_store.engines import check_url, sqlite_file


class StoreSettings(ServiceSettings):
    """Settings of the adapter store."""

    model_config = SettingsConfigDict(env_prefix="TREADLE_STORE_")

    listen: str = Field("127.0.0.1:7630", description="host:port to serve gRPC on; port 0 takes a free one")
    data_dir: Path = Field(Path("treadle-data"), description="folder of all durable state; one store at a time uses it")
    database_url: str = Field(
        "", description="postgresql://user@host/database, or sqlite:////a/file; default: data_dir/store.db"
    )
    blobs_url: str = Field("", description="s3://bucket/prefix of the blobs; default: the folder data_dir/blobs")
    s3_endpoint: str = Field("", description="URL of another S3 than Amazon's; default: AWS_ENDPOINT_URL or Amazon's")
    s3_region: str = Field("", description="the bucket's region; default: AWS_REGION")
    s3_access_key_id: str = Field("", description="default: the usual AWS variables, files and instance roles")
    s3_secret_access_key: SecretStr = Field(SecretStr(""), description="goes with s3_access_key_id")
    replicas: int = Field(
        1, ge=1, description="how many stores share database and blobs; more than one needs PostgreSQL and S3"
    )
    admin_key_file: Path | None = Field(
        None, description="file that receives the first admin key at first start; default: data_dir/admin.key"
    )
    max_adapter_bytes: int = Field(4 * 2**30, gt=0, description="longest file that PushAdapter takes")
    max_completion_bytes: int = Field(
        2**30, ge=0, description="most bytes of kept completions of one tenant, whatever its quota"
    )
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
        if url:
            check_url(url)
        return url

    @field_validator("blobs_url")
    @classmethod
    def _check_blobs_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if url and (parts.scheme != "s3" or not parts.netloc or parts.query or parts.fragment):
            raise ValueError(f"{url!r} does not look like s3://bucket/prefix")
        return url

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.replicas > 1 and sqlite_file(self.database):
            raise ValueError(
                f"{self.replicas} replicas cannot share a SQLite file; set database_url to a PostgreSQL database"
            )
        if self.replicas > 1 and not self.blobs_url:
            raise ValueError(f"{self.replicas} replicas cannot share a folder; set blobs_url to an S3 bucket")
        return self

    @property
    def database(self) -> str:
        """The URL that is used."""
        return self.database_url or f"sqlite:///{self.data_dir.absolute() / 'store.db'}"

    @property
    def admin_key(self) -> Path:
        """The file that is used for the first admin key."""
        return self.admin_key_file or self.data_dir / "admin.key"
