"""Five quick tries, then one every three seconds for each address; no lockout."""

from __future__ import annotations

import pytest

from coordinator.login.throttle import (
    FREE_TRIES,
    INTERVAL_S,
    MAX_ADDRESSES,
    MAX_WAIT_S,
    LoginThrottle,
)

#: Tries that come at once and are looked at, sooner or later.
TAKEN = FREE_TRIES + int(MAX_WAIT_S / INTERVAL_S)


def use_up(throttle: LoginThrottle, address: str, at: float = 0.0) -> None:
    for _ in range(TAKEN):
        assert throttle.take_turn(address, at) is not None


def test_tries_at_once_are_looked_at_three_seconds_apart() -> None:
    throttle = LoginThrottle()

    waits = [throttle.take_turn("10.0.0.1", 100.0) for _ in range(TAKEN + 1)]

    assert waits == [0.0] * 5 + [3.0, 6.0, 9.0, 12.0, 15.0] + [None]


def test_one_guess_after_another_is_a_guess_every_three_seconds() -> None:
    throttle = LoginThrottle()
    at = 0.0

    for _ in range(1000):
        at += throttle.take_turn("10.0.0.1", at) or 0.0

    assert at == (1000 - FREE_TRIES) * INTERVAL_S


def test_beside_one_who_guesses_nobody_waits_longer_than_two_turns() -> None:
    throttle = LoginThrottle()
    at = 0.0
    for _ in range(100):
        wait_s = throttle.take_turn("127.0.0.1", at)
        assert wait_s is not None
        at += wait_s

    operator_s = throttle.take_turn("127.0.0.1", at)

    assert operator_s is not None
    assert operator_s <= 2 * INTERVAL_S


def test_a_refused_try_does_not_make_the_wait_longer() -> None:
    throttle = LoginThrottle()
    use_up(throttle, "10.0.0.1")

    for _ in range(100):
        assert throttle.take_turn("10.0.0.1", 0.0) is None

    assert throttle.take_turn("10.0.0.1", INTERVAL_S) == MAX_WAIT_S


def test_after_some_quiet_the_free_tries_are_back_and_no_more() -> None:
    throttle = LoginThrottle()
    use_up(throttle, "10.0.0.1")

    waits = [throttle.take_turn("10.0.0.1", 1e6) for _ in range(6)]

    assert waits == [0.0] * 5 + [3.0]


def test_other_addresses_are_not_held_up() -> None:
    throttle = LoginThrottle()
    use_up(throttle, "10.0.0.1")

    assert throttle.take_turn("10.0.0.2", 0.0) == 0


def test_the_right_password_clears_the_count() -> None:
    throttle = LoginThrottle()
    use_up(throttle, "10.0.0.1")

    throttle.forgive("10.0.0.1")

    assert throttle.take_turn("10.0.0.1", 0.0) == 0


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
    ],
)
def test_addresses_of_one_household_count_together(
    first: str, second: str, same: bool
) -> None:
    throttle = LoginThrottle()
    use_up(throttle, first)

    assert (throttle.take_turn(second, 0.0) is None) is same


def test_the_memory_for_addresses_is_bounded() -> None:
    throttle = LoginThrottle()
    use_up(throttle, "192.0.2.1")

    for number in range(MAX_ADDRESSES):
        throttle.take_turn(f"10.0.{number // 256}.{number % 256}", 0.0)

    assert throttle.take_turn("192.0.2.1", 0.0) == 0  # the oldest was let go
