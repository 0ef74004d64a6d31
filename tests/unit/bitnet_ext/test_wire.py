"""Messages are strict on the way in and name the field; logs hold allowed fields."""

from __future__ import annotations

import json
import logging
import sys

import msgspec
import pytest

from bitnet_ext.wire import messages
from bitnet_ext.wire.log import ALLOWED_FIELDS, JsonLines, configure_logging
from bitnet_ext.wire.messages import Message

LEASE = "0123456789abcdef" * 2
SHA = "ab" * 32

HYPER = {
    "optimiser": "adamw",
    "momentum": 0.95,
    "lr_start": 1e-3,
    "lr_end": 1e-4,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "clip_norm": 1.0,
}
#: One sound body of each message.
BODIES = {
    "ErrorBody": {"code": "bad_request", "message": "no", "field": "tokens"},
    "RegisterRequest": {
        "protocol_version": 1,
        "worker_id": "w-1",
        "name": "box one",
        "preset": "tiny",
        "package_version": "0.1.0",
        "cpu_model": "a CPU",
        "isa": "avx2",
        "threads": 4,
        "heartbeat_s": 5.0,
        "calibrated_tokens_per_s": 1000.0,
        "target_task_tokens": 4096,
    },
    "RegisterAnswer": {
        "protocol_version": 1,
        "worker_id": "w-1",
        "run_id": "r-1",
        "preset": "tiny",
        "model": {},
        "layout_hash": SHA,
        "tokenizer_hash": SHA,
        "corpus_hash": SHA,
        "heartbeat_s": 5.0,
        "batch_size": 8,
        "optimiser": "muon",
    },
    "ClaimRequest": {"protocol_version": 1, "worker_id": "w-1", "claim_id": "c-1"},
    "HyperParameters": HYPER,
    "Task": {
        "task_id": "t-1",
        "kind": "train",
        "lease_id": LEASE,
        "lease_s": 30.0,
        "run_id": "r-1",
        "base_version": 1,
        "base_sha256": SHA,
        "shard_id": "train-00000",
        "shard_sha256": SHA,
        "byte_offset": 0,
        "byte_length": 4096,
        "shard_bytes": 8192,
        "synthetic": True,
        "eot_id": 0,
        "num_steps": 16,
        "batch_size": 8,
        "seq_len": 128,
        "block_size": 1024,
        "seed": 7,
        "stop_after_s": 75.0,
        "round_kind": "gradient",
        "codec": "int8",
        "broadcast": "ternary",
        "hyper": HYPER,
        "text_bytes": 1000,
    },
    "HeartbeatRequest": {
        "worker_id": "w-1",
        "phase": "training",
        "task_id": "t-1",
        "lease_id": LEASE,
        "tokens_done": 5,
        "bytes_done": 6,
        "cpu_s": 1.5,
        "step_s": 0.5,
    },
    "HeartbeatAnswer": {
        "lease": "held",
        "lease_s": 30.0,
        "heartbeat_s": 5.0,
        "drain": True,
    },
    "SubmissionMeta": {
        "submission_id": "s-1",
        "task_id": "t-1",
        "lease_id": LEASE,
        "worker_id": "w-1",
        "base_version": 1,
        "num_steps": 16,
        "tokens": 1024,
        "loss_first": 8.5,
        "loss_last": 8.0,
        "loss_mean": 8.2,
        "compute_s": 1.0,
        "download_s": 0.1,
        "download_bytes": 4096,
        "cpu_s": 1.0,
    },
    "SubmissionAnswer": {"state": "accepted", "round_id": 3},
    "EvaluationRequest": {
        "worker_id": "w-1",
        "lease_id": LEASE,
        "submission_id": "s-1",
        "version": 2,
        "nats": 100.0,
        "tokens": 50,
        "bytes": 200,
        "compute_s": 1.0,
    },
    "EvaluationAnswer": {"submission_id": "s-1", "task_id": "t-1", "version": 2},
    "ReleaseRequest": {"worker_id": "w-1", "lease_id": LEASE, "reason": "drain"},
    "FailRequest": {
        "worker_id": "w-1",
        "lease_id": LEASE,
        "code": "bad_shard",
        "message": "no",
    },
    "TaskAnswer": {"task_id": "t-1", "state": "pending"},
    "LogRecord": {
        "at": 1.0,
        "level": "info",
        "event": "task.claimed",
        "message": "a line",
        "task_id": "t-1",
    },
    "LogsRequest": {"worker_id": "w-1", "records": []},
}


def decode(name, body):
    return msgspec.json.decode(msgspec.json.encode(body), type=getattr(messages, name))


def test_every_message_has_a_body_here():
    names = {kind.__name__ for kind in Message.__subclasses__()}

    assert names == BODIES.keys()


@pytest.mark.parametrize("name", BODIES)
def test_a_sound_body_comes_back_as_it_was(name):
    message = decode(name, BODIES[name])

    assert msgspec.json.decode(msgspec.json.encode(message)) == BODIES[name]


def test_a_default_is_not_sent_and_is_there_again():
    body = {"lease": "held", "lease_s": 30.0, "heartbeat_s": 5.0}

    message = decode("HeartbeatAnswer", body | {"drain": False})

    assert msgspec.json.decode(msgspec.json.encode(message)) == body
    assert decode("HeartbeatAnswer", body) == message
    assert message.drain is False


def test_an_answer_that_was_stored_by_an_earlier_version_is_understood():
    stored = BODIES["SubmissionAnswer"] | {"submission_id": "s-1", "task_id": "t-1"}

    message = decode("SubmissionAnswer", stored)

    assert msgspec.to_builtins(message) == BODIES["SubmissionAnswer"]


@pytest.mark.parametrize("name", sorted(BODIES.keys() - {"SubmissionAnswer"}))
def test_an_unknown_field_is_refused_by_name(name):
    with pytest.raises(msgspec.ValidationError, match="unknown field `colour`"):
        decode(name, BODIES[name] | {"colour": "blue"})


@pytest.mark.parametrize("name", BODIES)
def test_a_missing_field_is_refused_by_name(name):
    required = msgspec.structs.fields(getattr(messages, name))
    for field in required:
        if not field.required:
            continue
        body = {k: v for k, v in BODIES[name].items() if k != field.name}
        with pytest.raises(
            msgspec.ValidationError, match=f"missing required field `{field.name}`"
        ):
            decode(name, body)


@pytest.mark.parametrize("name", BODIES)
def test_a_message_cannot_be_changed(name):
    message = decode(name, BODIES[name])

    with pytest.raises(AttributeError):
        setattr(message, next(iter(BODIES[name])), None)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("ClaimRequest", "worker_id", ""),
        ("ClaimRequest", "worker_id", "../etc"),
        ("ClaimRequest", "worker_id", ".hidden"),
        ("ClaimRequest", "claim_id", "x" * 65),
        ("ClaimRequest", "claim_id", "a\n"),
        ("RegisterRequest", "name", "line\nbreak"),
        ("RegisterRequest", "name", "name\n"),
        ("SubmissionMeta", "lease_id", LEASE + "\n"),
        ("RegisterRequest", "name", "n" * 65),
        ("RegisterRequest", "cpu_model", "c" * 2001),
        ("RegisterRequest", "threads", 0),
        ("RegisterRequest", "threads", 4097),
        ("RegisterRequest", "threads", 1.5),
        ("RegisterRequest", "heartbeat_s", 0.0),
        ("RegisterRequest", "heartbeat_s", 60.1),
        ("RegisterRequest", "calibrated_tokens_per_s", 0.0),
        ("RegisterRequest", "target_task_tokens", 0),
        ("HeartbeatRequest", "phase", "dancing"),
        ("HeartbeatRequest", "tokens_done", -1),
        ("HeartbeatRequest", "tokens_done", 2**63),
        ("HeartbeatRequest", "cpu_s", -0.1),
        ("HeartbeatRequest", "step_s", 1e10),
        ("SubmissionMeta", "lease_id", LEASE.upper()),
        ("SubmissionMeta", "lease_id", LEASE + "0"),
        ("SubmissionMeta", "tokens", 0),
        ("SubmissionMeta", "loss_last", -1.0),
        ("SubmissionMeta", "loss_mean", 1e7),
        ("SubmissionMeta", "loss_first", "8.5"),
        ("EvaluationRequest", "nats", 1e16),
        ("EvaluationRequest", "version", 0),
        ("FailRequest", "code", "bored"),
        ("LogRecord", "level", "loud"),
        ("LogRecord", "message", "m" * 8001),
        ("Task", "base_sha256", SHA[:-1]),
        ("Task", "byte_length", 0),
        ("Task", "round_kind", "gradients"),
    ],
)
def test_a_value_out_of_range_is_refused_at_its_field(name, field, value):
    with pytest.raises(msgspec.ValidationError, match=rf"at `\$\.{field}`"):
        decode(name, BODIES[name] | {field: value})


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999"])
def test_a_loss_that_is_no_number_is_refused(number):
    body = msgspec.json.encode(BODIES["SubmissionMeta"]).replace(b"8.2", number)

    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(body, type=messages.SubmissionMeta)


def test_a_batch_of_logs_has_a_limit():
    record = BODIES["LogRecord"]
    decode("LogsRequest", {"worker_id": "w-1", "records": [record] * 200})

    with pytest.raises(msgspec.ValidationError, match=r"at `\$\.records`"):
        decode("LogsRequest", {"worker_id": "w-1", "records": [record] * 201})


def line_of(message="a sentence", **extra):
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, message, None, None)
    record.__dict__.update(extra)
    return JsonLines().format(record)


def test_only_allowed_fields_reach_the_log():
    line = json.loads(line_of(task_id="t-1", api_key="secret", lease_id=LEASE))

    assert line["task_id"] == "t-1"
    assert set(line) == {"at", "level", "logger", "message", "task_id"}
    assert not ALLOWED_FIELDS & {"api_key", "lease_id", "token", "password", "cookie"}


def test_a_log_line_cannot_be_forged_or_drive_a_terminal():
    line = line_of("one\ntwo\x1b[31m", reason="a\rb")

    assert "\n" not in line
    assert json.loads(line)["message"] == "one\\u000atwo\\u001b[31m"
    assert json.loads(line)["reason"] == "a\\u000db"


def test_an_exception_is_part_of_its_line():
    try:
        raise ValueError("broken")
    except ValueError:
        record = logging.LogRecord(
            "x", logging.ERROR, "x.py", 1, "oops", None, sys.exc_info()
        )

    line = json.loads(JsonLines().format(record))

    assert line["level"] == "error"
    assert "ValueError: broken" in line["traceback"]


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="got 'loud'"):
        configure_logging("loud")
