"""Replay plus live, for any order of events: every reader gets each event once, in order, and one end, last.

The hub, its readers and the store's reading half are real. Redis is a script: commands, replies, acknowledgements and
messages each happen when a step says so, and so does the passing of time. Nothing waits and nothing is random but the
steps, so a failure shrinks to the shortest script that shows it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Generator, Sequence
from itertools import product
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from redis.exceptions import ConnectionError as RedisConnectionError

from promptmill import keys
from promptmill.contract import Progress, Restart, Token
from promptmill.errors import NotFound
from promptmill.reading import Frame, Hub, Reader
from promptmill.reading.frame import frame
from promptmill.store import START, EventId, Store
from tests.support.streams import text_of_frames

JOB = "job"
CHANNEL = keys.channel(JOB).encode()
PAGE = 3
QUEUE_MAX = 5
KEEPALIVE_S = 10.0
BACKOFF_MAX_S = 3.0
CLIENTS = 3
END_STATES = {"done": "succeeded", "error": "failed", "cancelled": "cancelled"}

Step = tuple[Any, ...]


@pytest.fixture(scope="module", autouse=True)
def small_bounds() -> Generator[None]:
    """Pages and queues of a few events, so that short scripts pass their bounds; the scripted connection."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("promptmill.store.client._LOG_PAGE", PAGE)
        patch.setattr("promptmill.reading.reader._QUEUE_MAX", QUEUE_MAX)
        patch.setattr("promptmill.reading.subscriber.Link", ScriptedLink)
        yield


class ScriptedLoop(asyncio.SelectorEventLoop):
    """Its clock stands still unless the script moves it."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__()

    def time(self) -> float:
        return self.now


class Job:
    """One job as its scripts would leave it: log, record, and what they publish."""

    def __init__(self, publish: Callable[[bytes], None]) -> None:
        self.publish = publish
        self.events: list[Frame] = []
        """All that was ever in the log."""
        self.log = True
        self.record = True
        self.state = "queued"
        self.epoch, self.n = 1000, 0
        self.end: dict[str, Any] = {}
        self.before_end = START
        self.untold = False
        """Whether the last message was lost: with no successor to show the gap, only the keepalive finds it."""
        self.add(Progress(phase="queued").to_json(), "")

    @property
    def ended(self) -> bool:
        return self.state in END_STATES.values()

    def add(self, event: bytes, fate: str) -> None:
        self.n += 1
        self.untold = fate == "lost"
        event_id = EventId(self.epoch, self.n)
        self.events.append(frame(bytes(event_id), event))
        if fate != "lost":
            self.publish(bytes(event_id) if fate == "large" else b"%b %b" % (bytes(event_id), event))

    def say(self, count: int, fate: str) -> None:
        for _ in range(count if self.state == "running" else 0):
            self.add(Token(text=f"{self.epoch}-{self.n + 1} ").to_json(), fate)

    def void(self, fate: str) -> None:
        """A retry within the attempt."""
        if self.state == "running":
            self.add(Restart(reason="retry").to_json(), fate)

    def attempt(self, jump: int, fate: str) -> None:
        """A claim of a waiting job; a running one goes back to the queue."""
        if self.ended:
            return
        said = any(f.type == b"token" and EventId.read(f.id or b"").epoch == self.epoch for f in self.events)
        self.epoch, self.n = self.epoch + jump, 0
        if self.state == "queued":
            self.state = "running"
            self.add(Progress(phase="started").to_json(), fate)
        else:
            self.state = "queued"
            self.add(Progress(phase="requeued").to_json(), fate)
            if said:
                self.add(Restart(reason="its worker died").to_json(), fate)

    def finish(self, end: str, jump: int, fate: str) -> None:
        if self.ended:
            return
        text = text_of_frames(self.events)
        self.before_end = EventId.read(self.events[-1].id or b"")
        self.epoch, self.n = self.epoch + jump, 0
        self.state = END_STATES[end]
        about = {"text": text, "reason": "asked", "code": "cut", "message": "x", "retryable": False}
        self.end = {"text": text, "reason": "asked", "error": about} if text else {"error": about}
        self.add(orjson.dumps({"type": end, **about}), fate)

    def forget(self, record: bool) -> None:
        """The log is deleted some time after the end, the record with it or later."""
        if self.ended:
            self.log, self.record = False, self.record and not record

    def execute(self, command: Sequence[Any]) -> Any:
        match command:
            case ("XRANGE", _, str(after), "+", "COUNT", int(count)):
                found = [(f.id, [b"e", f.data]) for f in self.since(EventId.parse(after))] if self.log else []
                return found[:count]
            case ("EXISTS", _):
                return int(self.log)
            case ("HMGET", *_):
                return self.row() if self.record else [None] * 5
        raise AssertionError(f"readers have no business with {command}")

    def behind(self, after: EventId) -> list[Frame]:
        return [f for f in self.events if EventId.read(f.id or b"") > after]

    def since(self, first: EventId) -> list[Frame]:
        return [f for f in self.events if EventId.read(f.id or b"") >= first]

    def row(self) -> list[bytes | None]:
        state = {"state": self.state, "epoch": str(self.epoch)}
        if self.ended:
            state |= {"finished": 1, "last": str(self.before_end)}
        end = orjson.dumps(self.end) if self.ended else None
        return [orjson.dumps({"user": "u"}), orjson.dumps(state), None, None, end]


class Call:
    """Commands that went out in one write: executed one by one, answered together."""

    def __init__(self, commands: Sequence[Any]) -> None:
        self.waiting = deque(commands)
        self.replies: list[Any] = []
        self.done: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()


class ScriptedLink:
    """The hub's pub/sub connection: what it sends and what it is sent lie in two queues."""

    @classmethod
    async def connect(cls, world: World, on_reply: Callable[[Any], None]) -> ScriptedLink:
        await asyncio.sleep(0)
        if world.away:
            raise RedisConnectionError("refused")
        link = cls()
        link.on_reply = on_reply
        world.links.append(link)
        return link

    def __init__(self) -> None:
        self.open = True
        self.deaf = False
        """Nothing travels any more, and only one side of it knows."""
        self.lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self.on_reply: Callable[[Any], None]
        self.sent: deque[tuple[bytes, ...]] = deque()
        self.coming: deque[Any] = deque()
        self.subscribed = False

    def send(self, commands: Sequence[tuple[bytes, ...]]) -> None:
        if self.open:
            self.sent += commands

    def fail(self, err: Exception) -> None:
        if self.open:
            self.open = False
            if not self.lost.done():
                self.lost.set_result(err)

    async def aclose(self) -> None:
        self.fail(RedisConnectionError("closed"))

    def serve(self) -> None:
        """The server takes one command."""
        name, *channels = self.sent.popleft()
        if name == b"PING":
            self.coming.append([b"pong", b""] if self.subscribed else b"PONG")
        elif channels:
            self.subscribed = name == b"SUBSCRIBE"
            self.coming.append([name.lower(), CHANNEL, int(self.subscribed)])


class Client:
    """A page: shows frames, leaves, comes back with the id it remembers."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.start = START
        self.frames: list[Frame] = []
        self.wanted = self.closed = self.refused = False
        """Whether the page wants (more of) the stream; whether that closed by itself; whether there was none."""
        self.reading = asyncio.Event()
        self.reading.set()
        self.task: asyncio.Task[None] | None = None

    @property
    def last_id(self) -> str | None:
        first = None if self.start == START else str(self.start)
        return next((f.id.decode() for f in reversed(self.frames) if f.id), first)

    def come(self, start: EventId | None) -> None:
        """Open the stream, behind the last event shown, or anew behind ``start``."""
        if self.task is not None:
            return
        if start is not None:
            self.start, self.frames = start, []
        self.wanted, self.closed, self.refused = True, False, False
        self.task = asyncio.create_task(self._follow(self.world.hub))

    async def _follow(self, hub: Hub) -> None:
        try:
            reader = await hub.open(JOB, self.last_id)
        except NotFound:
            assert not self.world.job.record, "there is such a job"
            self._close()
            self.refused = True
            return
        try:
            async for batch in reader:
                self._take(reader, batch)
                await self.reading.wait()
        finally:
            await reader.aclose()
        self.task = None
        # A hub that closes ends its readers without an end: they come back.
        if hub is self.world.hub or (self.frames and self.frames[-1].ends):
            self._close()

    def _close(self) -> None:
        self.task, self.wanted, self.closed = None, False, True

    def _take(self, reader: Reader, batch: list[Frame]) -> None:
        self.frames += batch
        if batch and self.world.job.record:
            assert reader.user == "u", "events go out before it is known whose they are"

    async def leave(self, back: int) -> None:
        """Close the stream and remember an event further ``back`` than the last."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])
            self.raise_failure()
        self.task = None
        self.check()
        if back and self.frames:
            self.wanted, self.closed = True, False
            del self.frames[max(0, len(self.frames) - back) :]

    def raise_failure(self) -> None:
        if self.task is not None and self.task.done() and not self.task.cancelled():
            self.task.result()

    def check(self) -> None:
        """What came so far is right; where the stream closed, it is whole."""
        job = self.world.job
        due = job.behind(self.start)
        got = self._behind_the_unknown()
        same = next((i for i, (a, b) in enumerate(zip(got, due, strict=False)) if a != b), min(len(got), len(due)))
        rest = got[same:]
        if rest:
            self._check_late(rest, max([self.start, *(EventId.read(f.id or b"") for f in got[:same])]))
        if self.closed:
            assert same == len(due) or got[-1:] == rest[-1:] != [] or self.refused, f"closed before {due[same:]}"
            assert not rest or rest[-1].ends, f"closed without an end, behind {got}"
        assert not any(f.ends for f in got[:-1]), "something comes behind the end"
        if got and got[-1].ends and job.record:
            known = [f for f in job.events if EventId.read(f.id or b"") <= self.start]
            if self.start == START or (known and known[-1].id == bytes(self.start)):
                assert text_of_frames(known + got) == text_of_frames(job.events)

    def _behind_the_unknown(self) -> list[Frame]:
        """What came, without the void and the text that stand before it where the log never held our start."""
        got, job = self.frames, self.world.job
        known = [f for f in job.events if EventId.read(f.id or b"") <= self.start]
        if self.start == START or (known and known[-1].id == bytes(self.start)):
            return got
        spoken = {b"restart", b"token"}
        head = next((i for i, f in enumerate(got) if f.id is not None or f.type not in spoken), len(got))
        if 0 < head < len(got) and job.log:
            assert text_of_frames(got[:head]) == text_of_frames(known)
        return got[head:]

    def _check_late(self, rest: list[Frame], known: EventId) -> None:
        """After the log was deleted: the text whole, where it is not known already, and the end."""
        job = self.world.job
        assert not job.log, f"not what the log holds: {rest}"
        assert known < job.before_end or len(rest) == 1, "text comes twice"
        while rest and rest[0].type == b"restart" and rest[0].id is None:
            rest = rest[1:]
        if rest and rest[0].type == b"token":
            assert rest[0].id == b"%d-0" % job.epoch
            rest = rest[1:]
        if rest and rest[-1].id is None and not job.record:
            assert [f.type for f in rest] == [b"error"]
        elif rest:
            assert [(f.id, f.type) for f in rest] == [(job.events[-1].id, job.events[-1].type)]


class World:
    """Redis, the hub and the pages. Each public method below ``flow`` is a step of a script."""

    def __init__(self, loop: ScriptedLoop) -> None:
        self.loop = loop
        self.away = False
        self.back_at = 0.0
        self.links: list[ScriptedLink] = []
        self.calls: deque[Call] = deque()
        self.job = Job(self._publish)
        self.store = Store(self)
        self.store.wire = self  # type: ignore[assignment]
        self.hub = Hub(self.store, keepalive_s=KEEPALIVE_S)
        self.clients = [Client(self) for _ in range(CLIENTS)]

    @property
    def live(self) -> list[ScriptedLink]:
        return [link for link in self.links if link.open and not link.deaf]

    async def many(self, commands: Sequence[Any], *, first: int = 0) -> list[Any]:
        """In the place of the store's shared connection."""
        if self.away:
            raise RedisConnectionError("refused")
        call = Call(commands)
        self.calls.append(call)
        return await call.done

    def _publish(self, message: bytes) -> None:
        for link in self.live:
            if link.subscribed:
                link.coming.append([b"message", CHANNEL, message])

    async def run(self, script: Sequence[Step]) -> None:
        try:
            for name, *args, turns in script:
                result = getattr(self, name)(*args)
                if result is not None:
                    await result
                await self.turn(turns)
                for client in self.clients:
                    client.raise_failure()
                assert all(len(r._queue) <= QUEUE_MAX for c in self.hub._channels.values() for r in c.readers)
            await self._finish()
        finally:
            for client in self.clients:
                if client.task is not None:
                    client.task.cancel()
            await self.hub.aclose()
            await self.turn(3)

    async def turn(self, turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)

    async def _finish(self) -> None:
        """All is well again: the job ends and everyone reads on. Time passes, for keepalives and for backoff."""
        await self.redis(False)
        self.wait(BACKOFF_MAX_S)
        await self.flow()
        self.job.finish("done", 1, "")
        for _ in range(200):
            for client in self.clients:
                client.reading.set()
                if client.wanted:
                    client.come(None)
            await self.flow()
            if not any(client.wanted for client in self.clients):
                break
            self.loop.now += 0.5
        for client in self.clients:
            client.raise_failure()
            assert not client.wanted, f"no end came behind {client.frames}"
            client.check()

    async def flow(self) -> None:
        """Everything under way arrives, and readers have all that the channel told them of, without time passing."""
        await self.turn(6)
        for _ in range(200):
            if not self.calls and not any(link.sent or link.coming for link in self.live):
                self._check_prompt()
                return
            self.serve(100)
            self.reply(100)
            self.hear(100)
            self.deliver(100)
            await self.turn(6)
        raise AssertionError("the readers never come to rest")

    def _check_prompt(self) -> None:
        deaf = any(link.open and link.deaf for link in self.links)
        if self.away or deaf or self.loop.now < self.back_at + BACKOFF_MAX_S or self.job.untold:
            return
        for client in self.clients:
            if client.task is not None and client.reading.is_set() and client.start == START:
                assert client.frames == self.job.events, "something waits for the keepalive"
                assert not self.job.ended, "the stream stays open behind the end"

    def serve(self, count: int) -> None:
        """The store's connection: the server executes some commands."""
        for call in self.calls:
            while call.waiting and count:
                call.replies.append(self.job.execute(call.waiting.popleft()))
                count -= 1

    def reply(self, count: int) -> None:
        """The store's connection: some replies arrive."""
        while count and self.calls and not self.calls[0].waiting:
            call = self.calls.popleft()
            if not call.done.done():
                call.done.set_result(call.replies)
            count -= 1

    def hear(self, count: int) -> None:
        """The channel's connection: the server takes some commands."""
        for link in self.live:
            for _ in range(min(count, len(link.sent))):
                link.serve()

    def deliver(self, count: int) -> None:
        """The channel's connection: some acknowledgements and messages arrive."""
        for link in self.live:
            while count and link.coming and link.open:
                link.on_reply(link.coming.popleft())
                count -= 1

    async def overtake(self, count: int, fate: str) -> None:
        """Readers look at their log; more events come between the execution of that and its reply."""
        self.say(1, "large")
        self.deliver(100)
        await self.turn(2)
        self.serve(100)
        self.say(count, fate)
        self.deliver(100)

    def cut(self, silently: bool) -> None:
        """The channel's connection breaks; what was under way on it is gone."""
        for link in self.links:
            link.deaf = True
            if not silently:
                link.fail(RedisConnectionError("cut"))

    async def cut_store(self) -> None:
        """The store's connection breaks; the next call makes a new one."""
        self.back_at = self.loop.now
        for call in self.calls:
            if not call.done.done():
                call.done.set_exception(RedisConnectionError("cut"))
        self.calls.clear()
        await self.turn(6)

    async def redis(self, away: bool) -> None:
        """Redis goes away, with both connections, or is back."""
        if self.away and not away:
            self.back_at = self.loop.now
        self.away = away
        if away:
            self.cut(False)
            await self.cut_store()

    def wait(self, seconds: float) -> None:
        self.loop.now += seconds

    def come(self, who: int) -> None:
        self.clients[who].come(None)

    def come_at(self, who: int, place: int, off: tuple[int, int]) -> None:
        """A page with an id from elsewhere: of some event, or beside it, or of the future."""
        near = EventId.read(self.job.events[place % len(self.job.events)].id or b"")
        self.clients[who].come(EventId(near.epoch + off[0], near.n + off[1]))

    async def leave(self, who: int, back: int) -> None:
        await self.clients[who].leave(back)

    def slow(self, who: int) -> None:
        """A page stops taking batches, or takes them again."""
        reading = self.clients[who].reading
        (reading.clear if reading.is_set() else reading.set)()

    async def new_hub(self) -> None:
        """The process closes and starts again."""
        old, self.hub = self.hub, Hub(self.store, keepalive_s=KEEPALIVE_S)
        await old.aclose()

    def say(self, count: int, fate: str) -> None:
        self.job.say(count, fate)

    def void(self, fate: str) -> None:
        self.job.void(fate)

    def attempt(self, jump: int, fate: str) -> None:
        self.job.attempt(jump, fate)

    def finish(self, end: str, jump: int, fate: str) -> None:
        self.job.finish(end, jump, fate)

    def forget(self, record: bool) -> None:
        self.job.forget(record)


WHO = range(CLIENTS)
FEW = (1, 2, 4)
JUMP = (1, 7)
FATE = ("", "", "", "large", "lost")
BESIDE = ((0, 0), (0, 0), (0, 1), (0, 3), (1, -1), (1, 0), (9, 9))
STEPS: dict[str, tuple[Sequence[Any], ...]] = {
    "turn": ((0, 1, 5),),
    "flow": (),
    "serve": (FEW,),
    "reply": (FEW,),
    "hear": (FEW,),
    "deliver": (FEW,),
    "come": (WHO,),
    "leave": (WHO, range(7)),
    "say": (range(1, 9), FATE),
    "overtake": (range(1, 9), FATE),
    "attempt": (JUMP, FATE),
    "cut": ((False, False, False, True),),
    "cut_store": (),
    "redis": ((False, False, True),),
    "wait": ((0.2, 1.0, BACKOFF_MAX_S, KEEPALIVE_S, 30.0),),
    "come_at": (WHO, range(0, 30, 3), BESIDE),
    "slow": (WHO,),
    "new_hub": (),
    "void": (FATE,),
    "finish": (tuple(END_STATES), JUMP, FATE),
    "forget": ((False, False, True),),
}
OFTEN = ["turn", "flow", "serve", "reply", "hear", "deliver", "come", "say", "overtake", "attempt"]
LIFE = [name for name in [*OFTEN, *OFTEN, *OFTEN, *STEPS] if name not in {"finish", "forget"}]
TURNS = (0, 1, 2, 6)
"""How often the readers' tasks may run before the next step."""


def step(*names: str) -> st.SearchStrategy[Step]:
    ready = {name: st.sampled_from(list(product([name], *STEPS[name], TURNS))) for name in names}
    return st.sampled_from(names).flatmap(lambda name: ready[name])


def steps(names: list[str], least: int, most: int) -> st.SearchStrategy[list[Step]]:
    return st.lists(step(*names), min_size=least, max_size=most)


FOLLOWED: list[Step] = [("come", 0, 1), ("come", 1, 1), ("attempt", 1, "", 1), ("say", 2, "", 0), ("flow", 1)]
# Long enough for a job to live through several attempts and to end before its readers come.
scripts = st.tuples(
    st.sampled_from([[], FOLLOWED]),
    steps(LIFE, 20, 50),
    steps(["turn", "finish"], 0, 1),
    steps(["turn", "forget"], 0, 1),
    steps([*LIFE, "forget"], 0, 10),
).map(lambda parts: [one for part in parts for one in part])


@settings(max_examples=300, deadline=None)
@given(scripts)
# A job that lost its worker is cancelled before the next claim: its text is empty, a page that left shows the old one.
@example(
    [*FOLLOWED, ("leave", 0, 0, 1), ("attempt", 1, "", 0), ("finish", "cancelled", 1, "", 0), ("forget", False, 0)]
)
# The end comes between a reader's look at the log and its look at the record, and its message is lost.
@example([*FOLLOWED, ("wait", KEEPALIVE_S, 6), ("serve", 4, 0), ("finish", "error", 1, "lost", 0), ("flow", 1)])
# The read that a large event asks for fails.
@example([*FOLLOWED, ("say", 1, "large", 0), ("deliver", 1, 2), ("cut_store", 0)])
# The hub closes while a reader is being opened.
@example([("come", 0, 1), ("new_hub", 1)])
def test_every_reader_gets_each_event_once_in_order_and_one_end_last(script: list[Step]) -> None:
    with asyncio.Runner(loop_factory=ScriptedLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, ScriptedLoop)

        async def play() -> None:
            await World(loop).run(script)

        runner.run(play())
