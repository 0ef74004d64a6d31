"""JSON bodies into messages; a bad one becomes one clear refusal."""

from __future__ import annotations

import re
from typing import Final, TypeVar

import msgspec

from bitnet_ext.wire.messages import Message
from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.domain.errors import RefusedError

M = TypeVar("M", bound=Message)

# Where msgspec says which field is meant: `$.tokens`, or field `tokens`.
_FIELD: Final = re.compile(r"`\$\.([A-Za-z0-9_.\[\]]+)`|field `([A-Za-z0-9_]+)`")


def parse(body: bytes, kind: type[M]) -> M:
    """Return the message. Raises RefusedError `bad_request` that names the field."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        found = _FIELD.search(str(error))
        raise RefusedError(
            ErrorCode.BAD_REQUEST,
            str(error),
            field=next(filter(None, found.groups())) if found else "body",
        ) from error
