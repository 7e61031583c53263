"""Jobs that were started from the form: each a process beside the gateway that runs `treadle.recipes.sft`.

What lasts is in the store: run, checkpoints, settings, plan. Here are the uploaded file, in a folder that may vanish,
and what the processes say. A gateway that ends takes its jobs along, at a checkpoint if there is time; their runs are
shown as interrupted, and go on from their last checkpoint when their owner gives the same file again (its name here
follows from its content, so the recipe knows it as the same).
"""

import asyncio
import contextlib
import hashlib
import itertools
import json
import re
import shutil
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from treadle.errors import make_error
from treadle_gateway.http.dashboard.door import Viewer
from treadle_gateway.settings import GatewaySettings
from treadle_service.logs import get_logger

JobState = Literal["preparing", "running", "finished", "stopped", "failed"]
_MODULE: Final = "treadle_gateway.http.dashboard.job_process"
# Settings of the recipe that a form must not set: they would read what lies on this machine.
NOT_OPTIONS: Final = frozenset({"data", "eval_data", "split", "subset"})
_KEPT_ENDED: Final = 50
_KEPT_NOTICES: Final = 20
_STOP_SECONDS: Final = 20.0
_MAX_LINE: Final = 2**20
log = get_logger(__name__)


@dataclass(eq=False, slots=True)
class Job:
    """One job, as far as this gateway knows it."""

    number: int
    tenant: str
    file: str
    base: str
    state: JobState = "preparing"
    run: str = ""
    step: int = 0
    steps: int = 0
    error: str = ""
    notices: list[str] = field(default_factory=list)

    @property
    def is_live(self) -> bool:
        """Whether its process still runs."""
        return self.state in ("preparing", "running")

    def hear(self, event: Mapping[str, Any]) -> None:
        """Takes in what the process says."""
        match event["event"]:
            case "started":
                self.state, self.run = "running", event["run"]
                self.step, self.steps = event["step"], event["steps"]
            case "step":
                self.step, self.steps = event["step"], event["steps"]
            case "notice":
                self.notices = [*self.notices, event["text"]][-_KEPT_NOTICES:]
            case "finished":
                self.state, self.step = "finished", self.steps
            case "stopped":
                self.state = "stopped"
            case "failed":
                self.state, self.error = "failed", event["text"]


class Jobs:
    """The managed jobs of one gateway."""

    def __init__(self, settings: GatewaySettings, address: Callable[[], str]) -> None:
        """`address` gives where jobs reach the public API, once it is served."""
        self._settings = settings
        self._address = address
        self._folder: Path | None = None
        self._starting = asyncio.Lock()
        self._jobs: list[Job] = []
        self._processes: dict[Job, Process] = {}
        self._watching: dict[Job, asyncio.Task[None]] = {}
        self._numbers = itertools.count(1)

    def of(self, viewer: Viewer) -> list[Job]:
        """Returns the viewer's jobs, newest first; an administrator's are everybody's."""
        return [job for job in reversed(self._jobs) if viewer.is_admin or job.tenant == viewer.tenant]

    def of_run(self, run: str) -> Job | None:
        """Returns the newest job of a run, if this gateway has one."""
        return next((job for job in reversed(self._jobs) if job.run == run), None)

    async def start(self, viewer: Viewer, file_name: str, content: bytes, options: Mapping[str, Any]) -> Job:
        """Starts a job on an uploaded file. Raises BAD_VALUE or QUEUE_FULL."""
        if not viewer.principal.scopes >= {"train", "sample"}:
            raise make_error("PERMISSION_DENIED", "a job needs a key with the scopes 'train' and 'sample'")
        live = [job for job in self._jobs if job.is_live]
        if sum(job.tenant == viewer.tenant for job in live) >= self._settings.max_jobs_per_tenant:
            raise make_error("QUEUE_FULL", f"{self._settings.max_jobs_per_tenant} jobs of yours are running; wait")
        if len(live) >= self._settings.max_jobs:
            raise make_error("QUEUE_FULL", f"{self._settings.max_jobs} jobs are running at this gateway; wait")
        job = Job(next(self._numbers), viewer.tenant, Path(file_name).name, str(options.get("base", "")))
        async with self._starting:
            in_use = {job.tenant, *(other.tenant for other in live)}
            folder, data = await asyncio.to_thread(self._keep, job, content, in_use)
        self._jobs.append(job)
        self._forget_old()
        config = {name: value for name, value in options.items() if name not in NOT_OPTIONS}
        task = {"address": self._address(), "key": viewer.secret, "config": {**config, "data": str(data)}}
        self._watching[job] = asyncio.create_task(self._run(job, task, folder))
        log.info("job_started", job=job.number, tenant=job.tenant)
        return job

    async def stop(self, job: Job) -> None:
        """Asks a job to stop at a checkpoint."""
        process = self._processes.get(job)
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()

    async def close(self) -> None:
        """Stops all jobs at a checkpoint; those that need longer are ended."""
        await asyncio.gather(*(self.stop(job) for job in self._processes))
        watching = list(self._watching.values())
        if watching:
            _, late = await asyncio.wait(watching, timeout=min(_STOP_SECONDS, self._settings.drain_grace_seconds))
            for task in late:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
        if self._folder is not None and self._settings.jobs_dir is None:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def _run(self, job: Job, task: Mapping[str, Any], folder: Path) -> None:
        try:
            code, said = await self._listen(job, task, folder)
        except asyncio.CancelledError:
            if job.is_live:
                job.state = "stopped"
            raise
        finally:
            self._watching.pop(job, None)
        if job.is_live:
            job.state = "failed"
            job.error = f"the job's process ended with {code}" + (f": {said.splitlines()[-1][:500]}" if said else "")
        log.info("job_ended", job=job.number, tenant=job.tenant, state=job.state, run=job.run)

    async def _listen(self, job: Job, task: Mapping[str, Any], folder: Path) -> tuple[int, str]:
        """Runs a job's process to its end; returns its exit code and what it wrote as errors."""
        async with self._process(job, folder) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdin.write(json.dumps(task).encode())
            process.stdin.close()
            errors = asyncio.create_task(process.stderr.read())
            async for line in process.stdout:
                with contextlib.suppress(ValueError, KeyError):
                    job.hear(json.loads(line))
            return await process.wait(), (await errors).decode(errors="replace").strip()

    @contextlib.asynccontextmanager
    async def _process(self, job: Job, folder: Path) -> AsyncIterator[Process]:
        arguments = (sys.executable, "-m", _MODULE)
        # Relative paths of data files are the same whichever gateway a job runs at.
        process = await asyncio.create_subprocess_exec(
            *arguments, stdin=PIPE, stdout=PIPE, stderr=PIPE, cwd=folder, limit=_MAX_LINE
        )
        self._processes[job] = process
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            del self._processes[job]

    def _keep(self, job: Job, content: bytes, in_use: Set[str]) -> tuple[Path, Path]:
        """Writes an upload; returns the tenant's folder and the file's path from there, which follows from its content.

        Files of tenants of whom nothing runs go: who resumes gives the file again.
        """
        if not content:
            raise make_error("BAD_VALUE", f"{job.file} is empty")
        if self._folder is None:
            self._folder = self._settings.jobs_dir or Path(tempfile.mkdtemp(prefix="treadle-jobs-"))
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in self._folder.iterdir():
            if folder.name not in in_use:
                shutil.rmtree(folder, ignore_errors=True)
        name = re.sub(r"[^A-Za-z0-9._-]", "_", job.file)[-80:].lstrip(".") or "data.jsonl"
        path = Path(hashlib.sha256(content).hexdigest()[:16]) / name
        target = self._folder / job.tenant / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return self._folder / job.tenant, path

    def _forget_old(self) -> None:
        ended = [job for job in self._jobs if not job.is_live]
        for job in ended[: max(0, len(ended) - _KEPT_ENDED)]:
            self._jobs.remove(job)
