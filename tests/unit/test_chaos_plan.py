"""The chaos suite's plans: drawn from the seed alone, and with everything in them that was asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from ops.chaos.options import PRESETS, Options, read_arguments
from ops.chaos.plan import CUTS, MODELS, ROLES, draw_faults, draw_jobs
from ops.chaos.system import configuration

from promptmill.settings import load_settings


@pytest.mark.parametrize("preset", PRESETS)
def test_a_seed_draws_the_same_jobs_and_faults_again(preset: str) -> None:
    options = PRESETS[preset]
    other = replace(options, seed=options.seed + 1)
    assert draw_jobs(options) == draw_jobs(options)
    assert draw_faults(options) == draw_faults(options)
    assert draw_jobs(options) != draw_jobs(other)
    assert draw_faults(options) != draw_faults(other)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_plan_has_what_was_asked_for(preset: str) -> None:
    options = PRESETS[preset]
    jobs, faults = draw_jobs(options), draw_faults(options)
    assert len({job.key for job in jobs}) == len({job.prompt for job in jobs}) == options.jobs
    assert [job.at_s for job in jobs] == sorted(job.at_s for job in jobs)
    assert all(0 <= job.at_s <= options.seconds for job in jobs)
    assert all(len(job.readings) == options.readers_per_job for job in jobs)
    assert sum(job.cancel_after_s is not None for job in jobs) == options.cancels
    fates = Counter(job.message for job in jobs)
    assert (fates["lost"], fates["doubled"]) == (options.lost_messages, options.doubled_messages)
    assert {job.asked for job in jobs} <= MODELS.keys() | ROLES.keys()
    assert [fault.at_s for fault in faults] == sorted(fault.at_s for fault in faults)
    kinds = Counter(fault.kind for fault in faults)
    assert kinds["freeze"] == options.freezes
    assert kinds["store_restart"] == options.store_restarts
    assert kinds["store_kill"] == options.store_kills
    assert kinds["store_outage"] == options.store_outages
    assert kinds["relay_restart"] == options.relay_restarts
    assert sum(kinds[how] for how in CUTS) == options.cuts
    if options.kill_every_s:
        assert kinds["kill"] >= 0.8 * 0.9 * options.seconds / options.kill_every_s
    else:
        assert kinds["kill"] == 0


def test_frozen_workers_stay_so_for_longer_than_it_takes_to_give_them_up() -> None:
    options = replace(PRESETS["storm"], freezes=50)
    assert all(f.lasts_s > options.dead_after_s for f in draw_faults(options) if f.kind == "freeze")


def test_the_acceptance_run_is_what_was_promised() -> None:
    options = PRESETS["acceptance"]
    assert (options.jobs, options.workers, options.kill_every_s) == (2000, 4, 3)
    assert (options.store_restarts, options.relay_restarts, options.pickup_p99_max_s) == (2, 1, 12)
    assert (options.heartbeat_s, options.dead_after_s) == (2, 10)


def test_what_is_given_wins_over_the_preset_and_is_shown_to_repeat_the_run() -> None:
    command = read_arguments(["--preset", "acceptance", "--seed", "7", "--jobs", "30", "--kill-every-s", "0.5"])
    assert command.options == replace(PRESETS["acceptance"], seed=7, jobs=30, kill_every_s=0.5)
    assert command.shown == "python -m ops.chaos --preset acceptance --seed 7 --jobs 30 --kill-every-s 0.5"
    assert read_arguments(command.shown.split()[3:]) == command


def test_every_option_is_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_arguments(["--help"])
    said = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')} " in said for name in Options.__dataclass_fields__)


def test_a_broker_that_is_the_store_cannot_be_killed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_arguments(["--broker-kills", "1"])
    assert "--broker amqp" in capsys.readouterr().err


def test_the_configuration_is_one_that_the_parts_accept(tmp_path: Path) -> None:
    path = tmp_path / "chaos.toml"
    path.write_text(configuration(PRESETS["short"], "http://127.0.0.1:1"))
    settings = load_settings(path)
    assert settings.models.keys() == MODELS.keys()
    assert settings.roles.keys() == ROLES.keys()
    assert settings.dead_after_s == PRESETS["short"].dead_after_s
