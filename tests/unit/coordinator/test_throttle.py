"""Ten tries in fifteen minutes for each address."""

from __future__ import annotations

import pytest

from coordinator.login.throttle import (
    MAX_ADDRESSES,
    MAX_TRIES,
    WINDOW_S,
    LoginThrottle,
)


def use_up(throttle: LoginThrottle, address: str, at: float = 0.0) -> None:
    for _ in range(MAX_TRIES):
        assert throttle.take_try(address, at) == 0


def test_the_eleventh_try_has_to_wait_until_the_first_is_old() -> None:
    throttle = LoginThrottle()
    use_up(throttle, "10.0.0.1", at=100.0)

    assert throttle.take_try("10.0.0.1", 160.0) == WINDOW_S - 60
    assert throttle.take_try("10.0.0.1", 100.0 + WINDOW_S) == 0


def test_a_refused_try_does_not_make_the_wait_longer() -> None:
    throttle = LoginThrottle()
    use_up(throttle, "10.0.0.1")

    for at in range(1, 100):
        assert throttle.take_try("10.0.0.1", float(at)) == WINDOW_S - at

    assert throttle.take_try("10.0.0.1", WINDOW_S) == 0


def test_the_window_slides() -> None:
    throttle = LoginThrottle()
    step = WINDOW_S / MAX_TRIES

    waits = [throttle.take_try("10.0.0.1", turn * step) for turn in range(50)]

    assert waits == [0.0] * 50


def test_other_addresses_are_not_held_up() -> None:
    throttle = LoginThrottle()
    use_up(throttle, "10.0.0.1")

    assert throttle.take_try("10.0.0.2", 1.0) == 0


def test_the_right_password_clears_the_count() -> None:
    throttle = LoginThrottle()
    use_up(throttle, "10.0.0.1")

    throttle.forgive("10.0.0.1")

    use_up(throttle, "10.0.0.1")


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

    assert (throttle.take_try(second, 1.0) > 0) is same


def test_the_memory_for_addresses_is_bounded() -> None:
    throttle = LoginThrottle()
    use_up(throttle, "192.0.2.1")

    for number in range(MAX_ADDRESSES):
        throttle.take_try(f"10.0.{number // 256}.{number % 256}", 1.0)

    assert throttle.take_try("192.0.2.1", 2.0) == 0  # the oldest was let go
