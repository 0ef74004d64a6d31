"""What a worker says of itself when it registers, and what it takes from the answer."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from bitnet_ext.layout import ModelShape, layout_hash, shape_from_json
from bitnet_ext.ternary import active_isa
from bitnet_ext.wire import PROTOCOL_VERSION
from bitnet_ext.wire.messages import RegisterAnswer, RegisterRequest
from bitnet_ext.wire.verdicts import ErrorCode, Optimiser
from worker.calibrate import Calibration
from worker.errors import ProtocolError, RefusedError, SettingsError
from worker.settings import WorkerSettings

#: The longest that a task should take, in seconds.
TARGET_TASK_S: Final = 600.0
_CPU_INFO: Final = Path("/proc/cpuinfo")
# Refusals that only another configuration of this worker can end.
_OURS_TO_FIX: Final = frozenset(
    {
        ErrorCode.UNAUTHORIZED,
        ErrorCode.BAD_REQUEST,
        ErrorCode.PRESET_MISMATCH,
        ErrorCode.UNKNOWN_PRESET,
        ErrorCode.PROTOCOL_MISMATCH,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a worker needs to know of the run that it trains."""

    run_id: str
    shape: ModelShape
    layout_hash: bytes
    batch_size: int
    #: What makes local steps; None where mean gradients are sent.
    optimiser: Optimiser | None
    heartbeat_s: float


def register_request(
    settings: WorkerSettings, calibration: Calibration | None = None
) -> RegisterRequest:
    """Return the request; once calibrated, with the speed and what was chosen."""
    tokens_per_s = calibration.tokens_per_s if calibration else None
    return RegisterRequest(
        protocol_version=PROTOCOL_VERSION,
        worker_id=settings.worker_id,
        name=settings.name,
        preset=settings.preset,
        package_version=version("bitnet-fleet"),
        cpu_model=cpu_model(),
        isa=calibration.setup.variant if calibration else active_isa(),
        threads=calibration.setup.threads if calibration else settings.cpu_threads,
        heartbeat_s=settings.heartbeat_s,
        calibrated_tokens_per_s=tokens_per_s,
        target_task_tokens=(
            None if tokens_per_s is None else max(1, int(tokens_per_s * TARGET_TASK_S))
        ),
    )


def read_run(answer: RegisterAnswer, preset: str | None) -> Run:
    """Return the run of an answer.

    Raises SettingsError, naming both, when `preset` is set and differs;
    ProtocolError when both sides do not mean the same layout.
    """
    if preset is not None and preset != answer.preset:
        raise SettingsError(
            f"BITNET_MODEL_PRESET is {preset!r}, the coordinator trains "
            f"{answer.preset!r}"
        )
    try:
        shape = shape_from_json(answer.model)
    except ValueError as error:
        raise ProtocolError(f"/register answered a bad model: {error}") from error
    ours = layout_hash(shape)
    if ours.hex() != answer.layout_hash:
        raise ProtocolError(
            f"/register: layout_hash must be {ours.hex()} for this model, got "
            f"{answer.layout_hash}; worker and coordinator differ in version"
        )
    return Run(
        run_id=answer.run_id,
        shape=shape,
        layout_hash=ours,
        batch_size=answer.batch_size,
        optimiser=answer.optimiser,
        heartbeat_s=answer.heartbeat_s,
    )


def refusal(error: RefusedError, url: str) -> Exception:
    """Return what a refused registration means: mostly a setting to put right."""
    if error.code is ErrorCode.NOT_FOUND:
        return SettingsError(
            "BITNET_COORDINATOR_URL must be the address of a coordinator, mostly "
            f"without a path, got {url!r}: {error}"
        )
    if error.code in _OURS_TO_FIX:
        return SettingsError(f"the coordinator refused to register us: {error}")
    return error


def cpu_model() -> str:
    """Return the name of the processor, or of its architecture."""
    try:
        lines = _CPU_INFO.read_text(errors="replace").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.machine()).strip()
