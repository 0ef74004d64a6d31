"""bf16 and fp16: every kind of number, both ways, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_ext import reference
from bitnet_ext.codecs import NonFiniteError
from bitnet_ext.half import Half, from_half, to_half

TO = {Half.BF16: reference.to_bf16, Half.FP16: reference.to_fp16}
FROM = {Half.BF16: reference.from_bf16, Half.FP16: reference.from_fp16}
#: The largest numbers that do not round to infinity.
LARGEST = {Half.BF16: 0x7F7F7FFF, Half.FP16: 0x477FEFFF}


def floats(*bits):
    return np.array(bits, dtype=np.uint32).view(np.float32)


def every_kind():
    """Return numbers of all exponents, near all the halves, and what is no number."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 20_011, dtype=np.uint32)
    halves = [
        (rng.integers(0, 1 << 32, 3001, dtype=np.uint32) & mask) + off
        for mask in (0xFFFF0000, 0xFFFFE000)
        for off in (0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)
    ]
    # fp16 is subnormal from 2^-24 to 2^-14.
    small = (rng.standard_normal(4001) * 2.0**-16).astype(np.float32)
    special = floats(
        0, 0x80000000, 1, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x7F80FFFF
    )
    near = floats(*(edge + off for edge in LARGEST.values() for off in range(-2, 3)))
    parts = [bits, *halves]
    return np.concatenate(
        [*(part.view(np.float32) for part in parts), small, special, near]
    )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", Half)
def test_numbers_become_the_bits_of_the_twin(kind):
    vector = every_kind()

    np.testing.assert_array_equal(to_half(kind, vector), TO[kind](vector))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", Half)
def test_all_bits_become_the_numbers_of_the_twin(kind):
    bits = np.arange(1 << 16, dtype=np.uint16)

    numbers = from_half(kind, bits)

    assert numbers.tobytes() == FROM[kind](bits).tobytes()
    plain = ~np.isnan(numbers)
    np.testing.assert_array_equal(to_half(kind, numbers)[plain], bits[plain])
    assert np.isnan(from_half(kind, to_half(kind, numbers))).tolist() == (
        np.isnan(numbers).tolist()
    )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", Half)
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 255, 256, 257, 1000])
def test_any_length_at_any_address_and_not_a_byte_more(kind, size):
    vector = np.random.default_rng(0).standard_normal(size + 3, dtype=np.float32)[3:]
    wide, narrow = np.full(size + 9, 7, np.float32), np.full(size + 9, 7, np.uint16)

    to_half(kind, vector, out=narrow[5 : 5 + size], finite=True)
    from_half(kind, narrow[5 : 5 + size], out=wide[3 : 3 + size], finite=True)

    np.testing.assert_array_equal(narrow[5 : 5 + size], TO[kind](vector))
    np.testing.assert_array_equal(wide[3 : 3 + size], FROM[kind](TO[kind](vector)))
    assert (narrow[:5] == 7).all()
    assert (narrow[5 + size :] == 7).all()
    assert (wide[:3] == 7).all()
    assert (wide[3 + size :] == 7).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", Half)
def test_a_large_vector_is_written_past_the_caches_and_nowhere_else(kind):
    size = (5 << 20) + 77
    bits = (np.arange(size) % 0x3C00).astype(np.uint16)
    wide, narrow = np.full(size + 9, 7, np.float32), np.full(size + 9, 7, np.uint16)

    from_half(kind, bits, out=wide[3 : 3 + size])
    to_half(kind, wide[3 : 3 + size], out=narrow[1 : 1 + size])

    np.testing.assert_array_equal(wide[3 : 3 + size], FROM[kind](bits))
    np.testing.assert_array_equal(narrow[1 : 1 + size], bits)
    assert (narrow[:1] == 7).all()
    assert (narrow[1 + size :] == 7).all()
    assert (wide[:3] == 7).all()
    assert (wide[3 + size :] == 7).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", Half)
@pytest.mark.parametrize("place", [0, 130, 299])
def test_what_is_not_finite_is_refused_where_that_is_asked_for(kind, place):
    largest = floats(LARGEST[kind])[0]
    vector = np.full(300, largest, dtype=np.float32)
    to_half(kind, vector, finite=True)

    for bad in (np.nan, np.inf, -np.inf, floats(LARGEST[kind] + 1)[0]):
        vector[place] = bad
        bits = to_half(kind, vector)
        with pytest.raises(NonFiniteError, match=f"finite numbers that {kind}"):
            to_half(kind, vector, finite=True)
        assert not np.isfinite(from_half(kind, bits)[place])
        with pytest.raises(NonFiniteError, match=f"finite numbers of {kind}"):
            from_half(kind, bits, finite=True)


def test_halves_go_to_even():
    bits = floats(0x3F808000, 0x3F818000, 0x3F808001)
    assert to_half(Half.BF16, bits).tolist() == [0x3F80, 0x3F82, 0x3F81]

    numbers = np.array([1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 3 * 2**-25], np.float32)
    assert to_half(Half.FP16, numbers).tolist() == [0x3C00, 0x3C02, 0, 2]


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="float32 vector, got float64"):
        to_half(Half.BF16, np.zeros(3))
    with pytest.raises(ValueError, match="uint16 vector, got int16"):
        from_half(Half.FP16, np.zeros(3, dtype=np.int16))
    with pytest.raises(ValueError, match=r"out must be contiguous uint16 \(3,\)"):
        to_half(Half.BF16, np.zeros(3, np.float32), out=np.zeros(4, np.uint16))
