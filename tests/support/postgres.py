"""A PostgreSQL server of the tests' own: a fresh cluster in a temporary folder, on a socket and a loopback port.

Uses the server that the system's package manager installed; without one, tests that need it fail and say so. The
server refuses to run as root, so that root runs it as the user `postgres`.
"""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg

from tests.support.cluster import free_port

START_SECONDS = 60.0
# Durable as in production; small, and quick to notice that its clients have gone.
OPTIONS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "shared_buffers": "32MB",
    "max_connections": "60",
    "listen_addresses": "127.0.0.1",
    "max_wal_size": "256MB",
    "deadlock_timeout": "200ms",
}


def find_binaries() -> Path:
    """Returns the folder of initdb and postgres, the newest version's."""
    on_path = shutil.which("initdb")
    candidates = [Path(on_path).resolve().parent] if on_path else []
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parent.name), reverse=True)
    for folder in candidates:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise RuntimeError("these tests need a PostgreSQL server: apt-get install postgresql, or put initdb on the PATH")


class PostgresServer:
    """One server; `new_database` gives each test a database of its own."""

    def __init__(self) -> None:
        self._binaries = find_binaries()
        self._account = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
        # Not under pytest's folder, which only its owner may enter; short, because a socket's path must be.
        self.folder = Path(tempfile.mkdtemp(prefix="treadle-pg-"))
        if self._account is not None:
            os.chown(self.folder, self._account.pw_uid, self._account.pw_gid)
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._num_databases = 0

    def create(self) -> None:
        """Makes the cluster and starts the server."""
        command = [self._binaries / "initdb", "-D", self.folder / "data", "-U", "treadle", "-A", "trust"]
        self._run([*command, "--locale=C", "-E", "UTF8", "--no-instructions"])
        self.start()

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        options = [part for name, value in OPTIONS.items() for part in ("-c", f"{name}={value}")]
        command = [self._binaries / "postgres", "-D", self.folder / "data", "-p", str(self.port), "-k", self.folder]
        with (self.folder / "log").open("ab") as log:
            # Not in root's folder: the account may not read it, and the server looks where it stands.
            self._process = subprocess.Popen(
                self._as_owner([*command, *options]), stdout=log, stderr=log, cwd=self.folder
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, f"PostgreSQL ended:\n{(self.folder / 'log').read_text()[-4000:]}"
            assert time.monotonic() < deadline, "PostgreSQL does not answer"
            time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Ends the server: SIGINT orderly, SIGQUIT without a checkpoint, as a crash would."""
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(30)

    def restart(self, how: signal.Signals = signal.SIGINT) -> None:
        """Ends the server and starts it again at the same place."""
        self.stop(how)
        self.start()

    def close(self) -> None:
        """Ends the server and removes all that it stored."""
        if self._process is not None and self._process.poll() is None:
            # Nothing is kept, so nothing need be written out.
            self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder)

    def new_database(self) -> str:
        """Makes an empty database and returns its URL."""
        self._num_databases += 1
        name = f"treadle_{self._num_databases}"
        self.execute(f"CREATE DATABASE {name}")
        return f"postgresql://treadle@/{name}?host={self.folder}&port={self.port}"

    def execute(self, statement: str) -> None:
        """Runs one statement outside of any transaction."""
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[call-overload]

    @property
    def _conninfo(self) -> str:
        return f"host={self.folder} port={self.port} user=treadle dbname=postgres connect_timeout=5"

    def _answers(self) -> bool:
        try:
            psycopg.connect(self._conninfo).close()
        except psycopg.OperationalError:
            return False
        return True

    def _run(self, command: list[str | Path]) -> None:
        done = subprocess.run(self._as_owner(command), capture_output=True, text=True, check=False, cwd=self.folder)
        assert done.returncode == 0, done.stderr

    def _as_owner(self, command: list[str | Path]) -> list[str | Path]:
        """Returns the command as the server's owner runs it.

        By a program, not by subprocess's `user`: that forks instead of vfork, and gRPC's threads do not survive it.
        """
        if self._account is None:
            return command
        return [
            "setpriv",
            f"--reuid={self._account.pw_uid}",
            f"--regid={self._account.pw_gid}",
            "--clear-groups",
            *command,
        ]
