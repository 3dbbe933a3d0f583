"""Warnings about expiring results: in time, once, and never if the target keeps everything."""

from __future__ import annotations

import pytest

from batch.run.expiry import (
    FILE_SECONDS,
    LARGE_RESULT_BYTES,
    LARGE_RESULT_SECONDS,
    RESULT_SECONDS,
    Expiry,
    result_seconds,
)

HOUR, DAY = 3600.0, 86400.0


@pytest.mark.parametrize(("size", "seconds"), [(0, 3600.0), (9_999, 3600.0), (10_000, 360.0), (10**7, 360.0)])
def test_a_result_is_certain_to_be_kept_for_an_hour_a_large_one_for_six_minutes(size, seconds):
    """The guaranteed minimum of fal by size; files are kept for seven days."""
    assert result_seconds(size) == seconds
    assert (RESULT_SECONDS, LARGE_RESULT_SECONDS, LARGE_RESULT_BYTES, FILE_SECONDS) == (3600, 360, 10_000, 7 * DAY)


def test_a_resumed_request_is_late_after_the_floor_and_its_images_after_a_week():
    """One warning of each kind, with the age of the first job, which is the oldest."""
    clock = Expiry()
    assert clock.resumed(0.0, HOUR, answered=False) is None
    warning = clock.resumed(0.0, 3 * HOUR, answered=False)
    assert warning is not None
    assert "3.0 h old" in warning
    assert "only 60 min" in warning
    assert clock.resumed(0.0, 4 * HOUR, answered=False) is None
    assert clock.resumed(0.0, 6 * DAY, answered=True) is None
    images = clock.resumed(0.0, 8 * DAY, answered=True)
    assert images is not None
    assert "8 days old" in images


def test_an_outage_is_told_at_half_of_the_floor_and_anew_after_it_ended():
    """Counted from its first failed read: a quiet hour before it does not count."""
    clock = Expiry()
    clock.read()
    assert clock.unread(10 * HOUR) is None
    assert clock.unread(10.4 * HOUR) is None
    assert "30 min" in str(clock.unread(10.5 * HOUR))
    assert clock.unread(11 * HOUR) is None
    clock.read()
    assert clock.unread(12 * HOUR) is None
    assert clock.unread(12.5 * HOUR) is not None


def test_large_results_make_an_outage_urgent():
    """After a result of 10 kB, three minutes are half of the guaranteed time."""
    clock = Expiry()
    assert clock.collected(1.0, 20_000) is None
    assert clock.unread(0.0) is None
    assert clock.unread(180.0) is not None


def test_a_result_that_waited_too_long_is_told_once():
    """Half an hour for a small one, three minutes for a large one."""
    clock = Expiry()
    assert clock.collected(1799.0, 500) is None
    assert "--max-in-flight" in str(clock.collected(1800.0, 500))
    assert clock.collected(1900.0, 500) is None
    assert Expiry().collected(180.0, 10_000) is not None


def test_a_download_that_fails_for_days_is_told():
    """After half of the week that files are kept."""
    clock = Expiry()
    assert clock.undownloaded(0.0, 3 * DAY) is None
    assert "4 days" in str(clock.undownloaded(0.0, 3.5 * DAY))


def test_a_target_that_keeps_everything_has_no_clock():
    """With our own server nothing is ever late."""
    clock = Expiry(for_good=True)
    clock.unread(0.0)
    warnings = [
        clock.resumed(0.0, 99 * DAY, answered=True),
        clock.unread(99 * DAY),
        clock.collected(99 * DAY, 10**6),
        clock.undownloaded(0.0, 99 * DAY),
    ]
    assert warnings == [None] * 4


def test_a_lifetime_that_was_asked_for_takes_the_place_of_the_week():
    """A shorter lifetime warns sooner, a longer one later; also at a server that keeps results for good."""
    short, long = Expiry(for_good=True, file_seconds=DAY), Expiry(file_seconds=30 * DAY)
    assert short.resumed(0.0, 3 * DAY, answered=False) is None
    warning = short.resumed(0.0, 3 * DAY, answered=True)
    assert warning is not None
    assert "only 24.0 h" in warning
    assert short.undownloaded(0.0, 0.6 * DAY) is not None
    assert long.resumed(0.0, 8 * DAY, answered=True) is None
    assert long.undownloaded(0.0, 4 * DAY) is None
    assert long.undownloaded(0.0, 15 * DAY) is not None
