"""Running programs that do not want to end: after every test, none of their processes is there, and no directory.

Each behaviour at each level that the machine permits; what a level does not promise is left out by name, and stands in
the docstring of ``promptmill_workers.programs.levels``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import tempfile
import time
import tracemalloc
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import uvloop
from ops.bench.programs import main as benchmark

from promptmill.errors import BackendError
from promptmill_workers.programs import Program, ProgramLimits, open_sandbox
from promptmill_workers.programs.levels import prepare
from tests.support.hostile import command
from tests.support.processes import PATIENCE_S, processes_of, wait_until

uvloop.new_event_loop().close()  # libuv keeps a pipe of its own for ever, from the first loop on
QUICK = ProgramLimits(grace_s=0.2)
NEEDS_MORE_THAN_A_GROUP = "the level group finds nothing that left the process group"


def own_descendants() -> set[psutil.Process]:
    """The processes below this one, zombies included."""
    return set(psutil.Process().children(recursive=True))


def descriptors() -> set[str]:
    found: set[str] = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name} {entry.readlink()}")
        except FileNotFoundError:
            continue  # the listing's own
    return found


def names_in(path: str) -> list[str]:
    return sorted(entry.name for entry in Path(path).iterdir())


@pytest.fixture
def tag() -> str:
    return f"hostile-{uuid.uuid4().hex}"


@pytest.fixture(autouse=True)
async def nothing_is_left(tag: str, permitted_levels: dict[str, str]) -> AsyncIterator[None]:
    await prepare()
    before, ours = descriptors(), own_descendants()  # the warden's, and the run's store
    yield
    assert processes_of(tag) == []
    assert [process for process in own_descendants() - ours if process.name() != "pm-warden"] == []
    assert descriptors() - before == set()


@asynccontextmanager
async def running(
    tag: str, level: str, *what: str, limits: ProgramLimits = QUICK, stdin: bytes = b""
) -> AsyncGenerator[Program]:
    async with open_sandbox("hostile") as box:
        async with box.run(command(tag, *what), environment={}, limits=limits, stdin=stdin, level=level) as program:
            yield program
        assert processes_of(tag) == []
    assert not box.root.exists()


async def until_ready(program: Program) -> None:
    async with asyncio.timeout(PATIENCE_S):
        async for line in program.lines():
            assert line == b"ready"
            return
    raise AssertionError("it never said so")


async def said(program: Program) -> list[bytes]:
    async with asyncio.timeout(PATIENCE_S):
        return [line async for line in program.lines()]


ANYWHERE = ["polite", "ignore_term", "zombie"]
ESCAPES = ["setsid", "double_fork", "stop", "generations 200", "generations_below 200", "bomb 50"]


@pytest.mark.parametrize("what", [*ANYWHERE, *ESCAPES])
async def test_leaving_the_run_ends_everything(tag: str, level: str, what: str) -> None:
    if level == "group" and what in ESCAPES:
        pytest.skip(NEEDS_MORE_THAN_A_GROUP)
    async with running(tag, level, *what.split()) as program:
        await until_ready(program)
        started = time.monotonic()
    assert time.monotonic() - started < PATIENCE_S, "not the five minutes for which they all sleep"


async def test_what_a_program_leaves_when_it_ends_by_itself_is_ended_too(tag: str, level: str) -> None:
    if level == "group":
        pytest.skip(NEEDS_MORE_THAN_A_GROUP)
    async with running(tag, level, "hold_stdout") as program:
        # Within less than the child's five minutes: its end is the leader's.
        assert await said(program) == [b"the child holds it"]
        assert program.status == 3


async def test_a_polite_program_gets_term_and_its_grace(tag: str, level: str) -> None:
    script = "trap 'echo bye; exit 4' TERM; echo ready; while :; do sleep 0.05; done"
    async with open_sandbox("polite") as box:
        limits = ProgramLimits(grace_s=300)
        async with box.run(["/bin/sh", "-c", script, tag], environment={}, limits=limits, level=level) as program:
            await until_ready(program)
            started = time.monotonic()
        assert time.monotonic() - started < PATIENCE_S, "it ends by itself, before its grace is over"
        assert program.status == 4


async def test_a_program_out_of_its_run_time_is_ended_by_the_guard(tag: str, level: str) -> None:
    limits = ProgramLimits(run_s=6, grace_s=0.2)  # for a start on a busy machine
    async with running(tag, level, "ignore_term", limits=limits) as program:
        assert await said(program) == [b"ready"]
        assert program.status == -signal.SIGKILL


async def test_a_line_without_an_end_is_cut_off_at_its_bound(tag: str, level: str) -> None:
    limits = ProgramLimits(line_bytes=1 << 20, grace_s=0.2)
    async with running(tag, level, "flood", str(1 << 30), limits=limits) as program:
        tracemalloc.start()
        try:
            with pytest.raises(BackendError) as caught:
                await said(program)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert caught.value.code == "malformed"
    assert peak < 4 << 20


async def test_output_over_its_bound_is_cut_off(tag: str) -> None:
    limits = ProgramLimits(output_bytes=1 << 20, grace_s=0.2)
    async with running(tag, "subreaper", "flood", str(1 << 30), limits=limits) as program:
        with pytest.raises(BackendError, match="more than 1048576 bytes") as caught:
            await said(program)
    assert caught.value.code == "malformed"


async def test_a_gigabyte_on_one_line_is_not_read_as_long_as_nobody_takes_it(tag: str) -> None:
    async with running(tag, "subreaper", "flood", str(1 << 30)) as program:
        [process] = await _found(tag, 1)
        lines = program.lines()
        first = asyncio.ensure_future(anext(lines))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first

        async def stands_still() -> bool:
            written = process.io_counters().write_chars
            await asyncio.sleep(0.2)  # nothing is to happen in it
            # One that only has no turn does not sleep.
            still = 0 < written == process.io_counters().write_chars
            return still and process.status() == psutil.STATUS_SLEEPING

        await wait_until(stands_still, "the kernel's pipe is full, and the program waits in its write")
        assert process.io_counters().write_chars < 4 << 20


async def _found(tag: str, count: int) -> list[psutil.Process]:
    await wait_until(lambda: len(processes_of(tag)) == count, f"{count} processes run")
    return processes_of(tag)


async def test_standard_error_is_drained_and_its_tail_kept(tag: str, level: str) -> None:
    async with running(tag, level, "flood_stderr", str(4 << 20)) as program:
        assert await said(program) == []
        assert program.status == 0
        assert program.stderr_tail == b"e" * (65536 - 7) + b"the end"


async def test_bytes_that_are_no_text_come_as_they_are_and_lines_end_at_newlines_only(tag: str, level: str) -> None:
    async with running(tag, level, "not_utf8") as program:
        assert await said(program) == [b"\xff\xfe\xc3", b"\xe2\x80\xa8 and \x0b\x0c\x85 are no line ends"]


async def test_half_a_line_before_a_crash_is_delivered_with_the_signal(tag: str, level: str) -> None:
    async with running(tag, level, "half_a_line") as program:
        assert await said(program) == [b'{"whole":1}', b'{"half":']
        assert program.status == -signal.SIGKILL


async def test_directories_that_a_program_spoiled_are_removed(tag: str, level: str) -> None:
    etc = names_in("/etc")
    async with running(tag, level, "spoil") as program:
        await until_ready(program)
    assert names_in("/etc") == etc


async def test_memory_is_bounded(tag: str, level: str) -> None:
    limits = ProgramLimits(memory_bytes=200 << 20, grace_s=0.2)
    async with running(tag, level, "memory", str(400 << 20), limits=limits) as program:
        assert await said(program) == []
        assert program.status == 1
        assert b"MemoryError" in program.stderr_tail
    async with running(tag, level, "memory", str(50 << 20), limits=limits) as program:
        assert await said(program) == [b"got it"]


async def test_open_files_are_bounded_and_none_but_its_own_are_open(tag: str, level: str) -> None:
    async with running(tag, level, "open_files", limits=ProgramLimits(open_files=40)) as program:
        assert await said(program) == [b"37"]


async def test_a_megabyte_of_prompt_reaches_the_program(level: str) -> None:
    async with open_sandbox("cat") as box:
        prompt = os.urandom(1 << 20).replace(b"\n", b" ")
        async with box.run(["/bin/cat"], environment={}, stdin=prompt, level=level) as program:
            assert await said(program) == [prompt]
            assert program.status == 0


async def test_a_program_that_does_not_read_its_prompt_is_no_error(level: str) -> None:
    async with open_sandbox("true") as box:
        command = ["/bin/sh", "-c", "exit 5"]
        async with box.run(command, environment={}, stdin=b"x" * (4 << 20), level=level) as program:
            assert await said(program) == []
            assert program.status == 5


async def test_the_loop_turns_while_a_program_does_not_read_its_prompt(tag: str, level: str) -> None:
    async with running(tag, level, "polite", stdin=b"x" * (8 << 20)) as program:
        await until_ready(program)
        started = time.monotonic()
        await asyncio.sleep(0)
        assert time.monotonic() - started < PATIENCE_S, "not until it reads, which it never does"


async def test_secrets_are_read_from_descriptors_and_stand_in_no_list(level: str) -> None:
    secrets = {3: b"the third", 7: b"the seventh" * 20_000}
    async with open_sandbox("cat") as box:
        script = "cat <&3; echo; cat <&7 | wc -c"
        async with box.run(["/bin/sh", "-c", script], environment={}, secrets=secrets, level=level) as program:
            assert await said(program) == [b"the third", b"220000"]


async def test_the_environment_is_an_allow_list_and_private_places(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "a secret of the worker")
    monkeypatch.setenv("LD_PRELOAD_OF_OURS", "x")
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    async with open_sandbox("env") as box:
        async with box.run(["/usr/bin/env"], environment={"GIVEN": "1"}, level=level) as program:
            found = dict(line.decode().split("=", 1) for line in await said(program))
        for path in (box.root, box.home, box.tmp, box.work):
            assert path.stat().st_mode & 0o777 == 0o700
        assert list(box.work.iterdir()) == []
    assert {"PATH", "LC_ALL", "https_proxy", "GIVEN", "TERM", "XDG_CONFIG_HOME", "TMP", "TEMP"} <= set(found)
    assert (found["HOME"], found["TMPDIR"]) == (str(box.home), str(box.tmp))
    assert not {"ANTHROPIC_API_KEY", "LD_PRELOAD_OF_OURS", "VIRTUAL_ENV", "USER"} & set(found)


async def test_no_process_on_the_way_shows_the_workers_environment(tag: str, level: str) -> None:
    async with running(tag, level, "polite") as program:
        await until_ready(program)
        chain = psutil.Process(processes_of(tag)[0].pid).parents()
        ours = chain[: [process.pid for process in chain].index(os.getpid())]
        assert [process.name() for process in ours][-2:] == ["pm-guard", "pm-warden"]
        for process in ours:
            assert set(process.environ()) <= {"LD_LIBRARY_PATH", "LC_CTYPE"}


async def test_a_program_that_cannot_be_started_is_crashed_and_says_why(level: str) -> None:
    async with open_sandbox("nothing") as box:
        with pytest.raises(BackendError, match="No such file") as caught:
            async with box.run(["/does/not/exist"], environment={}, level=level):
                raise AssertionError("it runs")
        assert caught.value.code == "crashed"
        with pytest.raises(BackendError, match="Permission denied"):
            async with box.run(["/etc"], environment={}, level=level):
                raise AssertionError("it runs")


async def test_running_out_of_descriptors_leaks_none_and_leaves_no_directory(
    level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def descriptors() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where no other test makes directories
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with open_sandbox("before") as box, box.run(["/bin/true"], environment={}, level=level) as program:
        await said(program)  # the warden, and what the loop itself needs, are there
    jobs = box.root.parent
    open_before = descriptors()
    for spare in range(1, 12):
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_before + spare, hard))
        # Soon there are some again: what could not be removed before is removed then.
        asyncio.get_running_loop().call_later(0.05, resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        try:
            with contextlib.suppress(BackendError):
                async with open_sandbox("short") as box, box.run(["/bin/true"], environment={}, level=level):
                    pass
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert descriptors() <= open_before, f"with {spare} to spare"
        assert not list(jobs.iterdir()), f"with {spare} to spare"


async def test_a_sandbox_runs_programs_one_after_the_other(level: str) -> None:
    async with open_sandbox("sh") as box:
        async with box.run(["/bin/sh", "-c", "echo kept > $HOME/file"], environment={}, level=level) as program:
            await said(program)
        async with box.run(["/bin/sh", "-c", "cat $HOME/file"], environment={}, level=level) as program:
            assert await said(program) == [b"kept"]


@pytest.mark.parametrize("after_ms", [0, 1, 2, 4, 8, 16, 32, 64])
async def test_a_cancellation_at_any_moment_leaves_nothing(tag: str, level: str, after_ms: int) -> None:
    async def job() -> None:
        async with running(tag, level, "ignore_term") as program:
            await said(program)

    task = asyncio.create_task(job())
    await asyncio.sleep(after_ms / 1000)
    task.cancel()
    await asyncio.sleep(0.01)
    task.cancel()  # and once more, while it is being ended
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_generator_that_is_closed_early_ends_its_program(tag: str, level: str) -> None:
    async def tokens() -> AsyncGenerator[bytes]:
        async with running(tag, level, "double_fork" if level != "group" else "polite") as program:
            async for line in program.lines():
                yield line

    generator = tokens()
    assert await anext(generator) == b"ready"
    await generator.aclose()
    assert processes_of(tag) == []


async def test_fifty_programs_at_once_and_fifty_kills_in_a_row_leave_nothing(tag: str, level: str) -> None:
    async def one(number: int) -> None:
        async with running(f"{tag}-{number}", level, "polite") as program:
            await until_ready(program)

    async with asyncio.timeout(200):
        await asyncio.gather(*(one(number) for number in range(50)))
        for _ in range(50):
            async with open_sandbox("sleep") as box, box.run(["/bin/sleep", "300"], environment={}, level=level):
                pass


async def test_a_held_standard_input_ends_on_the_way_out_only(level: str) -> None:
    script = "read line; echo $line; cat; trap '' TERM; echo ended > $HOME/seen"
    async with open_sandbox("sh") as box:
        command = ["/bin/sh", "-c", script]
        async with box.run(command, environment={}, stdin=b"one\ntwo\n", hold_stdin=True, level=level) as program:
            lines = program.lines()
            assert [await anext(lines), await anext(lines)] == [b"one", b"two"]
            assert program.status is None
        assert not (box.home / "seen").exists(), "TERM came before the end of the input"


def test_the_benchmark_of_programs_finds_nothing_left(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark(["--rounds", "2", "--together", "3", "--kills", "3", "--levels", "subreaper"]) == 0
    said = capsys.readouterr().out
    assert "3 at a time: 150 of 150 lines" in said
    assert said.count("nothing left") == 2


def test_uvloop_runs_programs_too(tag: str, level: str) -> None:
    async def one() -> list[bytes]:
        async with open_sandbox("cat") as box:
            prompt = b"a line\n" * 100_000
            async with box.run(["/bin/cat"], environment={}, stdin=prompt, level=level) as program:
                return await said(program)

    assert uvloop.run(one()) == [b"a line"] * 100_000
