"""Everything of a worker process that lives in its event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from concurrent.futures import CancelledError
from typing import Any, Final

from promptmill.enqueue import Enqueuer
from promptmill.errors import StoreUnavailable
from promptmill.heartbeat import WorkerState, beat, leave
from promptmill.live import LiveRegistry
from promptmill.queues import API_FAMILY
from promptmill.settings import FAMILIES, PROGRAM_FAMILIES, ModelConfig, Settings
from promptmill.store import Store
from promptmill.usage import warm
from promptmill.watch import Watcher
from promptmill_workers.claims import Claims
from promptmill_workers.feeding import Feeding
from promptmill_workers.meters import from_zero
from promptmill_workers.pace import Pace
from promptmill_workers.patience import patiently
from promptmill_workers.programs import configure, prepare
from promptmill_workers.quarantine import Quarantine
from promptmill_workers.runner import Runner
from promptmill_workers.turning import Begin, Turning
from promptmill_workers.writer import Writer

logger = logging.getLogger(__name__)

_VERIFY_EVERY_BEATS: Final = 5
_STOP_TIMEOUT_S: Final = 10.0


def new_worker_id(name: str) -> str:
    """An id that no process had before: a counter that starts anew must not look like one that stood still."""
    return f"{name}@{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def _runs_programs(model: ModelConfig) -> bool:
    return model.isolation == "process" or FAMILIES.get(model.type) in PROGRAM_FAMILIES


class Engine:
    """Store, writer, runner, heartbeat, control channel and watcher of one process.

    Call everything from its loop, but :meth:`serve`, which Celery's threads call.
    """

    def __init__(self, settings: Settings, name: str, family: str) -> None:
        self.settings = settings
        self.family = family
        self.worker_id = new_worker_id(name)
        self.state: WorkerState = "starting"
        self.level: str | None = None
        """How programs are kept together; None where the family runs none."""
        self._loop = asyncio.get_running_loop()
        self._tasks: list[asyncio.Task[Any]] = []
        self._count = 0
        self._pace = Pace()
        self.turning = Turning()
        self._beaten_at = 0.0
        self._serving: dict[asyncio.Task[None], tuple[str, str] | None] = {}
        """What is being served, with the message that brought it."""
        self.live = LiveRegistry(settings)
        self._using: set[asyncio.Task[None]] = set()
        self._handing_back: dict[str, str] = {}
        self._sending_back: list[tuple[str, str]] = []

    @classmethod
    async def start(cls, settings: Settings, name: str, family: str = API_FAMILY, *, alone: bool = False) -> Engine:
        """Connect and begin to beat. ``alone``: it runs what lost other workers, and watches nobody.

        Raises
        ------
        StoreUnavailable
            Redis is not there or not usable.
        ConfigError
            ``guard_level`` names a level that this machine does not permit, and the family runs programs.
        """
        engine = cls(settings, name, family)
        engine.store = await Store.connect(settings.store_url, max_connections=16)
        await engine.store.load_scripts()
        engine.enqueuer = Enqueuer(settings.queue_url)
        engine.writer = Writer(engine.store.wire)
        engine.writer.start()
        engine.watcher = Watcher(engine.store, settings, engine.enqueuer)
        engine.runner = Runner(engine.store, engine.writer, settings, engine.worker_id, family, engine.watcher)
        engine.runner.renew = engine._renew_registry
        retry_s = settings.heartbeat_s / 4
        engine.claims = Claims(engine.store, engine.worker_id, engine.runner, engine.watcher, retry_s)
        if alone:
            engine.state = "quarantine"
            engine.runner.alone = True
        else:
            engine.quarantine = Quarantine(settings, name, family, engine._convict)
            engine.runner.quarantine = engine.quarantine.run
        configure(settings.guard_level)
        await engine.live.refresh(engine.store, renew=True)
        engine.runner.registry = engine.watcher.registry = engine.live.registry
        await engine._use_models()
        await engine._beat()
        engine._tasks = [
            asyncio.create_task(engine._heart(), name="heartbeat"),
            asyncio.create_task(engine._follow_registry(), name="registry"),
            asyncio.create_task(engine.claims.follow(), name="control"),
            asyncio.create_task(engine._keep_verifying(), name="claims"),
            asyncio.create_task(engine.runner.traffic.run(), name="traffic"),
        ]
        if not alone:
            engine.turning.start()
            engine._tasks.append(asyncio.create_task(engine.watcher.run(), name="watcher"))
            engine.feeding = Feeding(engine.store, settings, engine.worker_id, family, engine._serve, engine.enqueuer)
            engine._tasks += engine.feeding.start()
        return engine

    store: Store
    enqueuer: Enqueuer
    writer: Writer
    runner: Runner
    watcher: Watcher
    claims: Claims
    quarantine: Quarantine | None = None
    feeding: Feeding

    # -- jobs ---------------------------------------------------------------------------------------------------

    def serve(self, job_id: str, queue: str) -> None:
        """Run a job to its end, from one of Celery's threads, which waits.

        Where a backend holds the event loop up, the message goes back to the queue: see :mod:`.turning`.
        """
        begin = Begin()
        future = asyncio.run_coroutine_threadsafe(self._serve(job_id, queue, begin), self._loop)
        if not self.turning.begins(begin):
            logger.warning(
                "the event loop does not turn: the message of job %s goes back", job_id, extra={"job_id": job_id}
            )
            self.enqueuer.send_from_thread([(job_id, queue)])
            return
        try:
            future.result()
        except CancelledError:
            logger.info("job %s was not begun here: the worker stops", job_id, extra={"job_id": job_id})

    async def _serve(self, job_id: str, queue: str, begin: Begin | None = None) -> None:
        if begin is not None:
            if not begin.decide():
                return  # its message went back
            begin.begun.set()
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - for the type checker
        self._serving[task] = (job_id, queue)
        try:
            await self._alive()
            await self._pace.turn()
            if self.state == "draining":
                # Popped while we were closing: the message goes back, another worker takes it.
                await self.enqueuer.send([(job_id, queue)])
            else:
                await self.runner.run(job_id)
        finally:
            del self._serving[task]

    async def run_alone(self, job_id: str) -> None:
        """Run a job of the quarantine to its end."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - for the type checker
        self._serving[task] = None
        try:
            await self._alive()
            await self.runner.run(job_id)
        finally:
            del self._serving[task]

    async def _convict(self, worker_id: str) -> None:
        """A quarantine process was seen to die with a job in it, whose fault it then is."""
        await patiently(lambda: self.watcher.settle(worker_id, poisoned=True))

    async def _alive(self) -> None:
        """A process that was frozen may have been declared dead: it beats before it claims anything."""
        while self._loop.time() - self._beaten_at > self.settings.dead_after_s / 2 and self.state != "draining":
            try:
                await self._beat()
            except StoreUnavailable:
                await asyncio.sleep(self.settings.heartbeat_s / 4)

    # -- heartbeat ----------------------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Celery consumes: say that jobs can be claimed."""
        if self.state == "starting":
            self.state = "ready"
            await self._beat_now()
            self.feeding.ready()

    async def _heart(self) -> None:
        while True:
            await asyncio.sleep(self.settings.heartbeat_s)
            await self._beat_now()

    async def _keep_verifying(self) -> None:
        """Beside the heartbeat, as the registry: the jobs of a cluster's silent node would keep it back."""
        while True:
            await asyncio.sleep(_VERIFY_EVERY_BEATS * self.settings.heartbeat_s)
            await self.claims.verify()

    async def _beat_now(self) -> None:
        try:
            await self._beat()
        except StoreUnavailable as err:
            logger.warning("no heartbeat: %s", err)

    async def _beat(self) -> None:
        self._count += 1
        await beat(
            self.store,
            self.worker_id,
            self._count,
            self.state,
            self.settings.heartbeat_s,
            running=len(self.runner.running),
            concurrency=self.settings.concurrency,
            pid=os.getpid(),
            family=self.family,
            level=self.level,
            paused=self.runner.pauses.names,
            registry=self.runner.registry.version,
            **self.runner.counts.told(self.writer.pieces),
        )
        self._beaten_at = self._loop.time()

    @property
    def heartbeat_age_s(self) -> float:
        """Since the last heartbeat that the store took."""
        return self._loop.time() - self._beaten_at

    # -- the registry -------------------------------------------------------------------------------------------

    async def _follow_registry(self) -> None:
        """Beside the heartbeat and not in it: a slow answer must not make this worker look dead."""
        while True:
            await asyncio.sleep(self.settings.heartbeat_s)
            before = self.runner.registry
            try:
                await self._renew_registry()
            except StoreUnavailable as err:
                logger.warning("the registry was not read: %s", err)
            if self.runner.registry is not before:
                await self._beat_now()  # says which version holds here

    async def _renew_registry(self) -> None:
        """Take over what operators changed. Raises StoreUnavailable."""
        await self.live.refresh(self.store, renew=True)
        if self.runner.registry is not self.live.registry:
            self.runner.registry = self.watcher.registry = self.live.registry
            logger.info("the registry changed: version %d", self.live.registry.version)
            # Not awaited: a backend's libraries take seconds to import, and heartbeats and jobs go on meanwhile.
            task = asyncio.create_task(self._use_models(), name="models")
            self._using.add(task)
            task.add_done_callback(self._used)

    def _used(self, task: asyncio.Task[None]) -> None:
        self._using.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the changed models were not made ready, each is made for its first job: %s", error)

    async def _use_models(self) -> None:
        models = self.live.registry.models
        from_zero(models, self.family)
        await self.runner.backends.use(models, self.family)
        # Now, in a thread: the first job must not stop the event loop for a second to load the table.
        await asyncio.to_thread(warm, [m for m in models.values() if m.worker_family == self.family])
        if self.level is None and any(m.worker_family == self.family and _runs_programs(m) for m in models.values()):
            self.level = await prepare()
            logger.info("programs are kept together by %s", self.level)

    # -- the end ------------------------------------------------------------------------------------------------

    async def drain(self, limit_s: float) -> None:
        """Claim nothing more; let running jobs finish for up to ``limit_s``; hand the rest back."""
        self.state = "draining"
        await self.feeding.stop()
        # Not waited for: a store that does not answer must not hold up what comes next.
        self._using.add(last := asyncio.create_task(self._beat_now(), name="last beat"))
        last.add_done_callback(self._used)
        if self._serving:
            logger.info("draining: %d jobs here, waiting up to %g s", len(self._serving), limit_s)
            await asyncio.wait(set(self._serving), timeout=limit_s)
        await self.hand_back()

    async def hand_back(self) -> None:
        """Stop every running job here and give it to the queue, to be picked up elsewhere at once.

        Called again after it was cut off, it goes on where it was. What cannot be given back is found by the watchers
        of other processes: this worker's heartbeat then stays, and stands still.
        """
        # The store may have granted those as well: the wire keeps the order, so it has when it is asked for them back.
        self._handing_back.update((job_id, claim) for claim, job_id in self.runner.claiming.items())
        jobs = list(self.runner.running.values())
        for job in jobs:
            self._handing_back[job.job_id] = job.claim
            if not job.ending:
                job.stop("handback")
        for task, message in list(self._serving.items()):
            # Not running yet: still waiting for its turn or for the store. Others can take its message.
            if not any(job.task is task for job in jobs):
                self._sending_back += [message] if message else []
                task.cancel()
        if self._serving:
            await asyncio.wait(set(self._serving), timeout=_STOP_TIMEOUT_S)
        if self._sending_back:
            sending, self._sending_back = self._sending_back, []
            await self.enqueuer.send(sending)
        if not self._handing_back:
            return
        count = len(self._handing_back)
        try:
            for job_id, claim in list(self._handing_back.items()):
                await self.watcher.release([job_id], claims={job_id: claim})
                self.store.forget_claim(job_id, self.worker_id)
                del self._handing_back[job_id]
        except StoreUnavailable as err:
            logger.warning("%d of %d jobs not handed back: %s", len(self._handing_back), count, err)
        else:
            logger.info("handed %d jobs back", count)

    @property
    def broken(self) -> str | None:
        """The name of a part that ended although nobody stopped it; the process is of no use any more."""
        for task in (*self._tasks, *self.writer.tasks):
            if task.done():
                return task.get_name()
        return None

    async def aclose(self) -> None:
        """Stop beating and close everything. Jobs that still run are left to the watchers."""
        self.turning.stop()
        if self.quarantine is not None:
            await self.quarantine.aclose()
        tasks = [*self._tasks, *self._using]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(StoreUnavailable):
            await leave(self.store, self.worker_id)
        await self.runner.aclose()
        await self.writer.aclose()
        await self.enqueuer.aclose()
        await self.store.aclose()
