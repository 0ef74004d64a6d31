"""JSON lines for every log of the fleet: a sentence, an event name, allowed ids.

Fields outside the allow-list never reach a log, so a key or a lease cannot leak.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Final

import msgspec

_IDS: Final = {"worker_id", "task_id", "run_id", "round_id", "shard_id"}
_IDS_TOO: Final = {"submission_id", "version", "base_version", "epoch", "attempt"}
_WORDS: Final = {"event", "state", "verdict", "reason", "phase", "code", "field"}
_WORDS_TOO: Final = {"kind", "codec", "preset", "isa", "signal", "address", "path"}
_NUMBERS: Final = {"tokens", "tokens_per_s", "loss", "bits_per_byte", "num_bytes"}
_NUMBERS_TOO: Final = {"num_steps", "seconds", "lag_ms", "port", "threads", "status"}
_STAGES: Final = {"judge_s", "step_s", "write_s", "commit_s"}

#: The only `extra` fields that a log line may carry.
ALLOWED_FIELDS: Final = frozenset(
    _IDS | _IDS_TOO | _WORDS | _WORDS_TOO | _NUMBERS | _NUMBERS_TOO | _STAGES
)


def _plain(text: str) -> str:
    """Escape control characters, which could forge a line or drive a terminal."""
    return "".join(
        char if char.isprintable() or char == " " else f"\\u{ord(char):04x}"
        for char in text
    )


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        body: dict[str, Any] = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _plain(record.getMessage()),
        }
        for field in sorted(ALLOWED_FIELDS & record.__dict__.keys()):
            value = record.__dict__[field]
            body[field] = _plain(value) if isinstance(value, str) else value
        if record.exc_info:
            body["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(body).decode()


def configure_logging(level: str) -> None:
    """Send every log of this process to standard error as JSON lines.

    Raises ValueError for a level that logging does not know.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(
            f"log level must be debug, info, warning or error, got {level!r}"
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
