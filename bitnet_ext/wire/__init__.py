"""What coordinator and worker say to each other; both import it, it imports neither.

- `messages`: JSON bodies of the worker API, checked when they are decoded
- `verdicts`: the words for states, phases and errors
- `log`: one JSON line for each log record, with an allow-list of fields
"""

from __future__ import annotations

from typing import Final

#: Raised whenever a golden message or frame changes.
PROTOCOL_VERSION: Final = 5
