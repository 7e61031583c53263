"""An S3 server of the tests' own: moto's, as a process on a loopback port, with any number of buckets."""

import contextlib
import subprocess
import sys
import time
import urllib.request

from tests.support.cluster import free_port

START_SECONDS = 60.0
REGION, ACCESS_KEY_ID, SECRET_ACCESS_KEY = "us-east-1", "testing", "testing"


class S3Server:
    """One server; `new_bucket` gives each test a bucket of its own."""

    def __init__(self) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", self.address[10:]]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._num_buckets = 0

    @property
    def endpoint(self) -> str:
        """Where clients connect."""
        return f"http://{self.address}"

    def wait_ready(self) -> None:
        """Waits until the server answers."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.endpoint}/moto-api/", timeout=5):
                return
            assert self._process.poll() is None, "moto's server ended"
            assert time.monotonic() < deadline, "moto's server does not answer"
            time.sleep(0.05)

    def new_bucket(self) -> str:
        """Makes an empty bucket and returns its name."""
        self._num_buckets += 1
        name = f"treadle-{self._num_buckets}"
        request = urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()
        return name

    def close(self) -> None:
        """Ends the server."""
        self._process.kill()
        self._process.wait()
