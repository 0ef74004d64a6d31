"""A pseudo-gradient on its way in: streamed to disk, checked, then accepted.

Journey: the JSON block is read first, and a submission that cannot be accepted is
refused before its payload arrives; the frame is hashed while it is spooled; header,
length, checksum and numbers are checked off the loop; the payload is made durable;
and only then one transaction accepts it. The answer is stored with it, so that the
same submission always gets the same answer.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec
from sqlalchemy import Connection

from bitnet_ext.codecs import Codec, NonFiniteError, PayloadError, checked
from bitnet_ext.frames import (
    FrameError,
    FrameKind,
    LayoutError,
    LengthError,
    check_header,
    decode_frame,
    frame_bytes,
)
from bitnet_ext.layout import num_params, shape_from_json
from bitnet_ext.wire.messages import SubmissionAnswer, SubmissionMeta
from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.domain.errors import RefusedError
from coordinator.domain.plan import TrainingPlan
from coordinator.service.accepting import Accepted, Arrived, accept, acceptable
from coordinator.service.bodies import parse
from coordinator.service.fleet import Fleet
from coordinator.service.grace import awake
from coordinator.service.late import booking_late
from coordinator.service.roster import plan_from
from coordinator.store import rounds
from coordinator.store.blobs import BlobKind, Kept, Spool
from coordinator.store.rows import RunRow

T = TypeVar("T")

MAX_META_BYTES: Final = 8192
_LENGTH_BYTES: Final = 4
#: Pieces are written together in stretches of about this size.
_WRITE_BYTES: Final = 1 << 20


class Intake:
    """One submission while its body arrives. `close` must be called in the end."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._head = bytearray()
        self._waiting = bytearray()
        self._body_hash = hashlib.sha256()
        self._meta: SubmissionMeta | None = None
        self._expected: _Expected | None = None
        #: None where the same submission is known already: then only its hash counts.
        self._spool: Spool | None = None
        self._kept: Kept | None = None
        self._began_at = fleet.clock.now()
        # A connection may break, and `close` be called, while a piece is written.
        self._busy = asyncio.Lock()

    async def feed(self, piece: bytes) -> None:
        """Take the next bytes of the body. Raises RefusedError at the first fault."""
        async with self._busy:
            await self._feed(piece)

    async def _feed(self, piece: bytes) -> None:
        if self._meta is not None:
            await self._take_frame(piece)
            return
        self._head += piece
        block = _json_block(self._head)
        if block is not None:
            end = _LENGTH_BYTES + len(block)
            self._body_hash.update(self._head[:end])
            self._meta = parse(block, SubmissionMeta)
            await self._begin(self._meta)
            await self._take_frame(bytes(self._head[end:]))

    async def finish(self) -> SubmissionAnswer:
        """Check and accept what has arrived. Raises RefusedError."""
        if self._meta is None:
            raise RefusedError(
                ErrorCode.WRONG_LENGTH,
                f"body must hold a length of four bytes, a JSON block and a frame, "
                f"got {len(self._head)} bytes",
                field="body",
            )
        meta = self._meta
        await self._flush()
        if self._spool is not None and self._expected is not None:
            await self._keep(self._spool, self._expected, meta)
        accepted = await self._accept(meta)
        if accepted.is_new:
            self._kept = None  # a row names it now
            # Who waits for work is woken only where there is some: of a round of
            # hundreds each would ask in vain with each submission.
            self._fleet.changed.ring()
            if accepted.frees_work:
                self._fleet.work.ring()
            if accepted.closes_round:
                self._fleet.round_ready.ring()
        return accepted.answer

    async def close(self) -> None:
        """Remove what no row names."""
        async with self._busy:
            kept, spool, blobs = self._kept, self._spool, self._fleet.blobs
            self._kept = self._spool = None
            if spool is not None:
                await self._fleet.off_loop(spool.discard)
            if kept is not None:
                await self._fleet.off_loop(
                    lambda: blobs.remove(BlobKind.PAYLOAD, [kept.name])
                )

    async def _begin(self, meta: SubmissionMeta) -> None:
        """Refuse before the payload arrives, or open a spool for it."""
        now = await awake(self._fleet)

        def look(connection: Connection) -> _Expected | None:
            if rounds.find_submission(connection, meta.submission_id) is not None:
                return None
            run, task = acceptable(connection, meta, now)
            plan = plan_from(connection, run, task.base_version or 0)
            return _Expected.of(run, plan)

        async with booking_late(self._fleet, meta, now):
            self._expected = await self._fleet.store.read(look)
        if self._expected is not None:
            blobs = self._fleet.blobs
            self._spool = await self._on_disk(lambda: blobs.spool(BlobKind.PAYLOAD))

    async def _take_frame(self, piece: bytes) -> None:
        self._waiting += piece
        if self._spool is not None and self._expected is not None:
            num_bytes = self._spool.num_bytes + len(self._waiting)
            self._expected.check_length(num_bytes, whole=False)
        if len(self._waiting) >= _WRITE_BYTES:
            await self._flush()

    async def _flush(self) -> None:
        """Hash and write what waits, off the loop."""
        piece, self._waiting = bytes(self._waiting), bytearray()

        def work() -> None:
            self._body_hash.update(piece)
            if self._spool is not None:
                self._spool.write(piece)

        if piece:
            await self._on_disk(work)

    async def _on_disk(self, act: Callable[[], T]) -> T:
        """Write off the loop. Raises RefusedError `disk_low` on a full disk."""
        try:
            return await self._fleet.off_loop(act)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise RefusedError(
                ErrorCode.DISK_LOW,
                f"the data folder has no room for this submission: {error.strerror}",
                retry_after_s=30.0,
            ) from error

    async def _keep(
        self, spool: Spool, expected: _Expected, meta: SubmissionMeta
    ) -> None:
        """Check the frame and make it durable under a name of its own."""
        expected.check_length(spool.num_bytes, whole=True)
        blobs = self._fleet.blobs
        # Its own name: a second try of the same submission must not touch this one.
        name = f"{meta.submission_id}-{self._fleet.rng.token(6).hex()}.frame"

        def work() -> Kept:
            expected.check_frame(spool.path.read_bytes(), meta)
            return blobs.keep(spool, BlobKind.PAYLOAD, name)

        self._kept = await self._on_disk(work)

    async def _accept(self, meta: SubmissionMeta) -> Accepted:
        now = await awake(self._fleet)
        kept, expected = self._kept, self._expected
        codec = Codec.FP32 if expected is None else expected.codec
        arrived = Arrived(
            meta=meta,
            kept=kept,
            codec=codec,
            body_sha256=self._body_hash.hexdigest(),
            began_at=self._began_at,
        )
        async with booking_late(self._fleet, meta, now):
            return await self._fleet.store.write(
                lambda connection: accept(connection, self._fleet, arrived, now)
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expected:
    """What the frame of a submission must be."""

    kind: FrameKind
    codec: Codec
    layout_hash: bytes
    num_elements: int

    @classmethod
    def of(cls, run: RunRow, plan: TrainingPlan) -> _Expected:
        shape = shape_from_json(msgspec.json.decode(run.model_json))
        return cls(
            kind=FrameKind(plan.round_kind),
            codec=Codec(plan.codec),
            layout_hash=bytes.fromhex(run.layout_hash),
            num_elements=num_params(shape),
        )

    def check_length(self, num_bytes: int, *, whole: bool) -> None:
        """Refuse a frame that is, or has already become, of another length."""
        due = frame_bytes(self.codec, self.num_elements)
        if num_bytes > due or (whole and num_bytes != due):
            raise RefusedError(
                ErrorCode.WRONG_LENGTH,
                f"frame must have {due} bytes ({self.codec}, {self.num_elements} "
                f"elements), got {num_bytes}{'' if whole else ' or more'}",
                field="frame",
            )

    def check_frame(self, frame: bytes, meta: SubmissionMeta) -> None:
        """Refuse a frame that is damaged, of another model, or not finite."""
        try:
            header, payload = decode_frame(frame)
            check_header(
                header,
                kind=self.kind,
                layout_hash=self.layout_hash,
                num_elements=self.num_elements,
            )
        except LayoutError as error:
            raise _refused(ErrorCode.LAYOUT_MISMATCH, error) from error
        except LengthError as error:
            raise _refused(ErrorCode.WRONG_LENGTH, error) from error
        except FrameError as error:
            raise _refused(ErrorCode.BAD_FRAME, error) from error
        if header.codec != self.codec:
            raise RefusedError(
                ErrorCode.BAD_FRAME,
                f"frame: codec must be {self.codec}, got {header.codec}",
                field="frame",
            )
        if header.version != meta.base_version:
            raise RefusedError(
                ErrorCode.STALE_BASE,
                f"frame: base version must be {meta.base_version} as in the JSON "
                f"block, got {header.version}",
                field="base_version",
            )
        try:
            checked(self.codec, payload, self.num_elements)
        except NonFiniteError as error:
            raise _refused(ErrorCode.NON_FINITE, error) from error
        except PayloadError as error:
            raise _refused(ErrorCode.BAD_FRAME, error) from error


def _refused(code: ErrorCode, error: Exception) -> RefusedError:
    field = "gradient" if code is ErrorCode.NON_FINITE else "frame"
    return RefusedError(code, str(error), field=field)


def _json_block(head: bytearray) -> bytes | None:
    """Return the JSON block once it is there; None while it is not."""
    if len(head) < _LENGTH_BYTES:
        return None
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if not 0 < length <= MAX_META_BYTES:
        raise RefusedError(
            ErrorCode.BAD_REQUEST,
            f"the JSON block must have 1 to {MAX_META_BYTES} bytes, got {length}",
            field="body",
        )
    if len(head) < _LENGTH_BYTES + length:
        return None
    return bytes(head[_LENGTH_BYTES : _LENGTH_BYTES + length])
