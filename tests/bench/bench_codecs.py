"""`make bench-codecs`: packing, codecs and the outer step, next to memcpy.

A codec that keeps up with memcpy, byte for byte of what it reads and writes, is
done: only fewer passes could help. Ours go through their public functions and write
to memory that they are given, as memcpy does. Beside them stands what merely reading
memory costs: no codec that mostly reads can be faster.

Prints tables and, as its last line, the figures that docs/performance.md explains.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext import codecs, packing
from bitnet_ext.codecs import Codec, Vector
from bitnet_ext.half import Half, from_half, to_half
from bitnet_ext.memory import aligned
from bitnet_ext.outer import Part, Step, outer_step
from tests.bench.probes import Probes
from tests.bench.report import Figures, print_machine, print_table
from tests.bench.timing import interleave, timed

KEYS = (
    "vs_memcpy_min",
    "pack2_vs_memcpy_l2",
    "pack3_vs_memcpy_l2",
    "outer_step_vs_memcpy",
)
#: Numbers of the vector of the outer step: about the largest preset.
_OUTER_SIZE: Final = 121_000_000
#: Share of the L2 cache that one call reads and writes.
_L2_SHARE: Final = 0.6
#: Seconds that a turn in L2 takes at least.
_TURN_S: Final = 2e-3


@dataclass(frozen=True, slots=True)
class Operation:
    """One codec, for any number of elements."""

    name: str
    #: Read and written for each element, at least.
    bytes_per_element: float
    #: Makes the call for so many elements.
    make: Callable[[int], Callable[[], object]]


def main() -> None:
    """Measure in L2 and in memory, then the outer step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    quick = parser.parse_args().quick
    print_machine("bench-codecs", threads="1 thread", quick=quick)
    figures, probes = Figures(KEYS), Probes()
    l2_bytes = _cache_bytes(2, default=1 << 20)
    hot = _compare(probes, _L2_SHARE * l2_bytes, rounds=10, least_s=_TURN_S)
    _print(f"in L2 ({_L2_SHARE:.0%} of {l2_bytes >> 10} KiB)", hot)
    cold_bytes = _memory_bytes()
    cold = _compare(probes, cold_bytes, rounds=2 if quick else 6, least_s=0.0)
    _print(f"in memory ({cold_bytes >> 20} MiB)", cold)
    figures.put("pack2_vs_memcpy_l2", min(hot["pack2"].share, hot["unpack2"].share))
    figures.put("pack3_vs_memcpy_l2", min(hot["pack3"].share, hot["unpack3"].share))
    figures.put("vs_memcpy_min", min(row.share for row in cold.values()))
    _measure_outer_step(figures, probes, rounds=2 if quick else 5)
    figures.finish()


@dataclass(frozen=True, slots=True)
class Row:
    """One codec next to a memcpy of as many bytes, read and written together."""

    moved: float
    best_s: float
    median_s: float
    memcpy_s: float

    @property
    def share(self) -> float:
        """The codec's speed, of memcpy's."""
        return self.memcpy_s / self.best_s


def operations() -> Iterator[Operation]:
    """Yield every codec that there is."""
    yield Operation("pack2", 1.25, _pack)
    yield Operation("unpack2", 1.25, _unpack)
    yield Operation("pack3", 1.2, _pack3)
    yield Operation("unpack3", 1.2, _unpack3)
    scale = 4 / codecs.BLOCK
    yield Operation("encode int8", 5 + scale, _encode)
    yield Operation("encode int8 + feedback", 13 + scale, _encode_with_feedback)
    yield Operation("same, of a difference", 17 + scale, _encode_difference)
    yield Operation("decode int8", 5 + scale, _decode)
    yield Operation("decode-add int8", 9 + scale, _decode_add)
    for kind in Half:
        yield Operation(f"fp32 to {kind}", 6, partial(_to_half, kind))
        yield Operation(f"{kind} to fp32", 6, partial(_from_half, kind))
    yield Operation("is finite", 4, _is_finite)


def _compare(
    probes: Probes, size: float, *, rounds: int, least_s: float
) -> dict[str, Row]:
    """Return a row for each codec, moving about `size` bytes a call."""
    rows = {}
    for operation in operations():
        count = int(size / operation.bytes_per_element) // 1024 * 1024
        moved = count * operation.bytes_per_element
        contenders = {
            "ours": timed(operation.make(count), least_s=least_s),
            "memcpy": probes.memcpy(int(moved / 2), least_s=least_s),
        }
        times = interleave(contenders, rounds=rounds)
        rows[operation.name] = Row(
            moved, times["ours"].best, times["ours"].median, times["memcpy"].best
        )
    return rows


def _measure_outer_step(figures: Figures, probes: Probes, *, rounds: int) -> None:
    """Time one submission, from its payload to weights that are known to be finite."""
    count = _OUTER_SIZE
    before = _numbers(count), np.zeros(count, dtype=np.float32)
    after = aligned(count, np.float32), aligned(count, np.float32)
    payload = codecs.encode(Codec.INT8, _numbers(count))
    parts, how = [Part(Codec.INT8, payload, 1.0)], Step(rate=0.9, decay=0.8)

    def step() -> bool:
        return outer_step(before, parts, how, after=after)

    # One pass reads payload, weights and momentum, and writes the last two.
    moved = len(payload) + 4 * 4 * count
    copied = 4 * count
    contenders = {"ours": timed(step), "memcpy": probes.memcpy(copied)}
    times = interleave(contenders, rounds=rounds)
    needed_s = times["memcpy"].best * moved / (2 * copied)
    ratio = times["ours"].best / needed_s
    numbers = [f"{1e3 * s:.0f}" for s in (times["ours"].best, times["ours"].median)]
    print_table(
        f"outer step on {count / 1e6:.0f}M numbers, 1 thread",
        ["", "ms best", "median", "ms at memcpy speed", "ratio"],
        [["one int8 submission", *numbers, f"{1e3 * needed_s:.0f}", f"{ratio:.2f}"]],
    )
    figures.put("outer_step_vs_memcpy", ratio)


def _print(where: str, rows: dict[str, Row]) -> None:
    lines = [
        [
            name,
            f"{row.moved / row.best_s / 1e9:.1f}",
            f"{row.moved / row.median_s / 1e9:.1f}",
            f"{row.moved / row.memcpy_s / 1e9:.1f}",
            f"{row.share:.2f}",
        ]
        for name, row in rows.items()
    ]
    header = ["codec", "GB/s best", "median", "memcpy", "share"]
    print_table(f"{where}, bytes read and written, 1 thread", header, lines)


def _memory_bytes() -> int:
    """Return twice the last cache, within 256 MiB and an eighth of the memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(max(2 * _cache_bytes(3, default=0), 256 << 20), memory // 8)


def _cache_bytes(level: int, *, default: int) -> int:
    """Return the size of the data cache of a level; the default where none is told."""
    for cache in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        here, kind, size = (
            (cache / name).read_text().strip() for name in ("level", "type", "size")
        )
        if int(here) == level and kind != "Instruction" and size.endswith("K"):
            return 1024 * int(size[:-1])
    return default


def _numbers(count: int) -> Vector:
    """Return normal numbers; a short piece repeated, which codecs can't notice."""
    piece = np.random.default_rng(0).standard_normal(1 << 16, dtype=np.float32)
    return np.resize(piece, count)


def _ternary(count: int) -> NDArray[np.int8]:
    values = np.random.default_rng(0).integers(-1, 2, 1 << 16, dtype=np.int8)
    return np.resize(values, count).reshape(-1, 1024)


def _pack(count: int) -> Callable[[], object]:
    values = _ternary(count)
    out = packing.pack(values)
    return lambda: packing.pack(values, out=out)


def _unpack(count: int) -> Callable[[], object]:
    packed = packing.pack(_ternary(count))
    out = packing.unpack(packed, 1024)
    return lambda: packing.unpack(packed, 1024, out=out)


def _pack3(count: int) -> Callable[[], object]:
    values = _ternary(count).reshape(-1)
    out = packing.pack3(values)
    return lambda: packing.pack3(values, out=out)


def _unpack3(count: int) -> Callable[[], object]:
    packed = packing.pack3(_ternary(count).reshape(-1))
    out = packing.unpack3(packed, count)
    return lambda: packing.unpack3(packed, count, out=out)


def _encode(count: int) -> Callable[[], object]:
    vector, payload = _numbers(count), _payload(count)
    return lambda: codecs.encode_into(Codec.INT8, vector, payload)


def _encode_with_feedback(count: int) -> Callable[[], object]:
    vector, payload = _numbers(count), _payload(count)
    residual, lost = 0.01 * vector, aligned(count, np.float32)
    return lambda: codecs.encode_into(
        Codec.INT8, vector, payload, residual=residual, lost=lost
    )


def _encode_difference(count: int) -> Callable[[], object]:
    vector, payload = _numbers(count), _payload(count)
    trained, residual, lost = 0.9 * vector, 0.01 * vector, aligned(count, np.float32)
    return lambda: codecs.encode_into(
        Codec.INT8, vector, payload, minus=trained, residual=residual, lost=lost
    )


def _payload(count: int) -> NDArray[np.uint8]:
    return aligned(codecs.payload_bytes(Codec.INT8, count), np.uint8)


def _decode(count: int) -> Callable[[], object]:
    payload = codecs.encode(Codec.INT8, _numbers(count))
    out = codecs.decode(Codec.INT8, payload, count)
    return lambda: codecs.decode(Codec.INT8, payload, count, out=out)


def _decode_add(count: int) -> Callable[[], object]:
    payload = codecs.encode(Codec.INT8, _numbers(count))
    into = np.zeros(count, dtype=np.float32)
    return lambda: codecs.decode_add(Codec.INT8, payload, into, 1e-3)


def _from_half(kind: Half, count: int) -> Callable[[], object]:
    bits = to_half(kind, _numbers(count))
    out = from_half(kind, bits)
    return lambda: from_half(kind, bits, out=out, finite=True)


def _to_half(kind: Half, count: int) -> Callable[[], object]:
    numbers = _numbers(count)
    bits = to_half(kind, numbers)
    return lambda: to_half(kind, numbers, out=bits, finite=True)


def _is_finite(count: int) -> Callable[[], object]:
    vector = _numbers(count)
    return lambda: codecs.is_finite(vector)


if __name__ == "__main__":
    main()
