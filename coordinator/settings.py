"""What an operator can set on a coordinator: the only reader of the environment.

Every value is checked here, once. A wrong one ends the process with one line that
names the variable and shows the value; keys are never shown.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bitnet_ext.layout import UnknownPresetError, preset_shape
from bitnet_ext.wire.messages import MAX_HEARTBEAT_S
from bitnet_ext.wire.verdicts import RoundKind
from coordinator.domain.errors import StartError
from coordinator.domain.plan import USUAL_RATES, Aggregation, TrainingPlan
from coordinator.domain.plan_words import (
    WordError,
    must_be,
    plan_in_words,
    token_budget,
    whole_number,
)
from coordinator.domain.rollback import RollBack

PREFIX: Final = "BITNET_COORD_"
KEY_RULE: Final = "at least 32 printable ASCII characters without spaces"
_LEVELS: Final = ("debug", "info", "warning", "error")
_HOST_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,253}", re.ASCII)
#: Hosts that stand for all addresses of the machine.
EVERY_ADDRESS: Final = ("0.0.0.0", "::")  # noqa: S104


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSettings:
    """The settings of one coordinator; `from_env` checks them."""

    #: Database, weights and keys: everything that has to be kept.
    data: Path
    #: Folder of text; the prepared shards lie in `tokenized` inside.
    corpus: Path
    #: Address to listen on; others than loopback need `insecure_http`.
    host: str
    port: int
    #: Names by which browsers may ask for this server besides loopback, `host` too.
    allowed_hosts: frozenset[str]
    #: Serve plain HTTP beyond loopback: keys and passwords can be read on the way.
    insecure_http: bool
    #: None: made at the first start and kept in the data folder.
    worker_api_key: str | None = field(repr=False)
    #: Valid as well, during a change of keys.
    worker_api_key_next: str | None = field(repr=False)
    #: Opens /metrics, /status and /ready.
    metrics_token: str | None = field(repr=False)
    #: None: that of the run there is; `small` for the first.
    preset: str | None
    #: Decides the first weights and the order of the training text.
    seed: int
    #: Tokens to train; None: 20 for each parameter; 0: no end by tokens.
    token_budget: int | None
    #: Heartbeat interval of workers that set none.
    heartbeat_s: float
    #: Newest versions that keep their blobs.
    keep_versions: int
    #: When a run goes back to its best version by itself.
    roll_back: RollBack
    log_level: str
    plan: TrainingPlan

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> CoordinatorSettings:
        """Read the settings; an empty variable counts as not set.

        Raises StartError, naming variable and value, at the first bad one.
        """
        given = {
            name.removeprefix(PREFIX): value
            for name, value in env.items()
            if name.startswith(PREFIX) and value.strip()
        }
        settings = cls(
            data=Path(given.get("DATA", "data")),
            corpus=Path(given.get("CORPUS", "corpus")),
            host=given.get("HOST", "127.0.0.1"),
            port=_whole(given, "PORT", 5000, 0, 65535),
            allowed_hosts=_hosts(given) | _own_host(given),
            insecure_http=_flag(given, "INSECURE_HTTP"),
            worker_api_key=_key(given, "WORKER_API_KEY"),
            worker_api_key_next=_key(given, "WORKER_API_KEY_NEXT"),
            metrics_token=_key(given, "METRICS_TOKEN"),
            preset=_preset(given),
            seed=_whole(given, "SEED", 1, 0, 2**62),
            token_budget=_budget(given),
            heartbeat_s=_seconds(given, "HEARTBEAT_S", 5.0),
            keep_versions=_whole(given, "KEEP_VERSIONS", 20, 1, 10**9),
            roll_back=_roll_back(given),
            log_level=_level(given),
            plan=_plan(given),
        )
        _refuse_unknown(given)
        return settings

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the coordinator."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check_reach(self) -> None:
        """Raise StartError for an address beyond loopback that nobody has allowed."""
        if not self.is_loopback and not self.insecure_http:
            raise StartError(
                f"{PREFIX}HOST is {self.host!r}, beyond this machine, and HTTPS is "
                "not available yet: reach it through an ssh tunnel, or accept that "
                "keys can be read on the way with --insecure-http"
            )


_FIELDS: Final = frozenset(
    name.upper()
    for name in (*CoordinatorSettings.__slots__, *TrainingPlan.__struct_fields__)
    if name != "plan"
)


def _refuse_unknown(given: Mapping[str, str]) -> None:
    unknown = sorted(given.keys() - _FIELDS)
    if unknown:
        raise StartError(
            f"{PREFIX}{unknown[0]} is not a setting; there are "
            f"{', '.join(sorted(_FIELDS))}"
        )


def _wrong(name: str, rule: str, value: object) -> StartError:
    return _refused(must_be(name, rule, value))


def _refused(error: WordError) -> StartError:
    """Return an error of a word as one of the setting of that name."""
    return StartError(f"{PREFIX}{error.name.upper()}{error.fault}")


def _whole(
    env: Mapping[str, str], name: str, default: int, least: int, most: int
) -> int:
    value = env.get(name)
    if value is None:
        return default
    try:
        return whole_number(name, value, least, most)
    except WordError as error:
        raise _refused(error) from None


def _budget(env: Mapping[str, str]) -> int | None:
    value = env.get("TOKEN_BUDGET")
    try:
        return None if value is None else token_budget(value)
    except WordError as error:
        raise _refused(error) from None


def _seconds(env: Mapping[str, str], name: str, default: float) -> float:
    value = env.get(name)
    if value is None:
        return default
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds <= MAX_HEARTBEAT_S:
        rule = f"a number of seconds above 0, at most {MAX_HEARTBEAT_S:.0f}"
        raise _wrong(name, rule, value)
    return seconds


def _flag(env: Mapping[str, str], name: str) -> bool:
    value = env.get(name, "false")
    if value not in ("true", "false"):
        raise _wrong(name, "true or false", value)
    return value == "true"


def _key(env: Mapping[str, str], name: str) -> str | None:
    value = env.get(name)
    if value is not None and not is_key(value):
        raise StartError(f"{PREFIX}{name} must have {KEY_RULE}; it is not shown here")
    return value


def is_key(value: str) -> bool:
    """Return whether this can be a key or token; see KEY_RULE."""
    return re.fullmatch(r"[\x21-\x7e]{32,}", value) is not None


def _hosts(env: Mapping[str, str]) -> frozenset[str]:
    names = [name.strip() for name in env.get("ALLOWED_HOSTS", "").split(",")]
    for name in filter(None, names):
        if not _is_host(name):
            rule = "host names separated by commas, without ports"
            raise _wrong("ALLOWED_HOSTS", rule, name)
    return frozenset(name.lower() for name in names if name)


def _own_host(env: Mapping[str, str]) -> frozenset[str]:
    """Return the address listened on, unless that is every one."""
    host = env.get("HOST", "").lower()
    return frozenset() if host in ("", *EVERY_ADDRESS) else frozenset([host])


def _is_host(name: str) -> bool:
    if ":" in name:
        try:
            return ipaddress.ip_address(name).version == 6
        except ValueError:
            return False
    return _HOST_NAME.fullmatch(name) is not None


def _preset(env: Mapping[str, str]) -> str | None:
    value = env.get("PRESET")
    if value is None:
        return None
    try:
        preset_shape(value)
    except UnknownPresetError as error:
        raise StartError(f"{PREFIX}PRESET: {error}") from None
    return value


def _roll_back(env: Mapping[str, str]) -> RollBack:
    value = env.get("ROLL_BACK", RollBack.NEVER)
    if value not in tuple(RollBack):
        raise _wrong("ROLL_BACK", f"one of {', '.join(RollBack)}", value)
    return RollBack(value)


def _level(env: Mapping[str, str]) -> str:
    value = env.get("LOG_LEVEL", "info").lower()
    if value not in _LEVELS:
        raise _wrong("LOG_LEVEL", f"one of {', '.join(_LEVELS)}", env["LOG_LEVEL"])
    return value


def _plan(env: Mapping[str, str]) -> TrainingPlan:
    given = {
        name: env[name.upper()]
        for name in TrainingPlan.__struct_fields__
        if name.upper() in env
    }
    if given.get("aggregation") == Aggregation.PER_ARRIVAL:
        given.setdefault("outer_momentum", "0")
    if given.get("round_kind") == RoundKind.GRADIENT:
        given.setdefault("learning_rate", str(USUAL_RATES[RoundKind.GRADIENT]))
    try:
        return plan_in_words(given, TrainingPlan())
    except WordError as error:
        raise _refused(error) from None
