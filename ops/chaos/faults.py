"""Doing the faults of a run, each at its time, and noting what each of them hit."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from typing import Any, Final

import psutil
from ops.chaos.ledger import Ledger, now_ms
from ops.chaos.load import Load, patiently
from ops.chaos.parts import Part
from ops.chaos.plan import CUTS, Fault
from ops.chaos.system import System

from promptmill import keys
from promptmill.enqueue import Enqueuer
from promptmill.heartbeat import read_beats
from promptmill.store.connection import store_errors

_SHUTDOWN_S: Final = 20.0
_PATIENCE_S: Final = 5.0
_LOOK_S: Final = 0.2


class Faults:
    """Hurts a system. Faults run side by side: one that lasts does not hold up the next."""

    def __init__(self, system: System, load: Load, ledger: Ledger) -> None:
        self._system = system
        self._load = load
        self._ledger = ledger
        self._enqueuer = Enqueuer(system.broker_url)
        self._killing = asyncio.Lock()
        # Started and ended by one at a time: the second would find no process.
        self._store = asyncio.Lock()
        self._broker = asyncio.Lock()

    async def run(self, faults: Sequence[Fault]) -> None:
        """Do them all; returns when the last is over."""
        begin = asyncio.get_running_loop().time()
        try:
            async with asyncio.TaskGroup() as group:
                for fault in faults:
                    group.create_task(self._at(begin + fault.at_s, fault))
        finally:
            await self._enqueuer.aclose()

    async def _at(self, at_s: float, fault: Fault) -> None:
        await asyncio.sleep(at_s - asyncio.get_running_loop().time())
        part, _, how = fault.kind.rpartition("_")
        if fault.kind in CUTS:
            await self._network(fault)
        elif part == "store":
            await self._restart_store(fault, gently=how == "restart")
        elif part == "broker":
            await self._kill_broker(fault)
        elif part in {"relay", "gateway"}:
            self._hit(fault, getattr(self._system, part), signal.SIGTERM if how == "restart" else signal.SIGKILL)
        else:
            await getattr(self, f"_{fault.kind}")(fault)

    def _note(self, fault: Fault, target: str, **more: Any) -> None:
        self._ledger.write("fault", fault=fault.kind, target=target, lasts_s=fault.lasts_s, **more)

    def _hit(self, fault: Fault, part: Part, number: signal.Signals) -> None:
        self._note(fault, part.name, pid=part.send(number))

    # -- workers --------------------------------------------------------------------------------------------------

    async def _worker(self, fault: Fault) -> tuple[Part, str] | None:
        """A worker that can claim jobs, and its id. One that is just being started again has nothing to lose.

        None where there was none for ``_PATIENCE_S``, as on a machine where a start takes longer than a fault's turn.
        """
        deadline = asyncio.get_running_loop().time() + _PATIENCE_S
        while asyncio.get_running_loop().time() < deadline:
            beats, _ = (await patiently(lambda: read_beats(self._system.direct)))[0]
            ready = [b.worker for b in beats if b.state == "ready"]
            whole = [w for w in self._system.workers if w.pid is not None and not w.doomed and not w.frozen]
            if able := [(worker, name) for worker in whole for name in ready if _is(name, worker)]:
                return able[fault.target % len(able)]
            await asyncio.sleep(_LOOK_S)
        return None

    async def _kill(self, fault: Fault) -> None:
        if self._killing.locked():
            return  # the one before found nobody yet: on a slow machine kills must not pile up
        async with self._killing:
            found = await self._worker(fault)
            if found is None:
                return
            worker, worker_id = found
            # Jobs in quarantine run in children of the worker, which die with it.
            children = _children(worker)
            pid, killed_ms = worker.send(signal.SIGKILL), now_ms()
        held, _ = await patiently(lambda: self._held_by(worker_id, children))
        self._note(fault, worker.name, pid=pid, killed_ms=killed_ms, held=held)

    async def _held_by(self, worker_id: str, children: Sequence[int]) -> list[tuple[str, int]]:
        """The jobs, and their claims' epochs, that a worker holds. It is dead: nobody changes that for some seconds."""
        store = self._system.direct
        beats, _ = await read_beats(store)
        ids = [worker_id, *(b.worker for b in beats for pid in children if f"-{pid}-" in b.worker)]
        held: list[tuple[str, int]] = []
        for name in ids:
            with store_errors(store.address):
                claims: set[bytes] = await store.redis.smembers(keys.claims(name))
            records = [r for r in await store.find_many(raw.decode() for raw in claims) if r and r.state == "running"]
            held += [(r.job_id, int(r.st["epoch"])) for r in records if r.st.get("worker") == name]
        return held

    async def _freeze(self, fault: Fault) -> None:
        async with self._killing:
            found = await self._worker(fault)
            if found is None:
                return
            freezing = asyncio.create_task(found[0].freeze(fault.lasts_s))
            self._note(fault, found[0].name, pid=found[0].pid)
            await asyncio.sleep(0)
        await freezing

    # -- the store and the broker ---------------------------------------------------------------------------------

    async def _restart_store(self, fault: Fault, *, gently: bool) -> None:
        async with self._store:
            server, began_ms = self._system.store, now_ms()
            await asyncio.to_thread(self._shut_down if gently else server.kill)
            await asyncio.sleep(fault.lasts_s)
            await asyncio.to_thread(server.start)
            self._note(fault, "store", began_ms=began_ms, over_ms=now_ms())

    def _shut_down(self) -> None:
        server = self._system.store
        assert server.process is not None
        server.process.terminate()  # to the server that is SHUTDOWN
        server.process.wait(_SHUTDOWN_S)
        server.process = None

    async def _kill_broker(self, fault: Fault) -> None:
        async with self._broker:
            broker, began_ms = self._system.broker, now_ms()
            assert broker is not None
            await asyncio.to_thread(broker.kill)
            await asyncio.sleep(fault.lasts_s)
            await asyncio.to_thread(broker.start)
            self._note(fault, "broker", began_ms=began_ms, over_ms=now_ms())

    # -- the network and messages ---------------------------------------------------------------------------------

    async def _network(self, fault: Fault) -> None:
        proxies = self._system.proxies
        proxy = proxies[fault.target % len(proxies)]
        met = await proxy.disturb(fault.kind, fault.lasts_s)
        self._note(fault, proxy.name, connections=met)

    async def _double(self, fault: Fault) -> None:
        """Send a message again: of a job that waits, runs or has ended."""
        known = self._load.submitted
        if not known:
            return
        job_id = known[-1 - fault.target % min(len(known), 50)]
        record, _ = await patiently(lambda: self._system.direct.find(job_id))
        if record is not None:
            await self._enqueuer.send([(job_id, record.queue)])
            self._note(fault, job_id, state=record.state)


def _children(part: Part) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(part.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _is(worker_id: str, part: Part) -> bool:
    return worker_id.startswith(f"{part.name}@") and f"-{part.pid}-" in worker_id
