"""`bitnet-coordinator`: serve, maintenance and the demo.

Settings come from the environment (`BITNET_COORD_<FIELD>`); an option of the same
name wins over it. Every wrong value is one line on standard error and exit status 2;
a command that is interrupted ends with 130 without a word, one whose reader has gone
with 141.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec.structs import fields

from bitnet_ext.exports.provenance import VARIANTS, Format, Variant
from bitnet_ext.output import reader_has_gone
from bitnet_ext.wire.log import configure_logging
from bitnet_ext.wire.verdicts import RoundKind
from coordinator import verbs
from coordinator.app import KEY_NAME, Listening, serve
from coordinator.control import (
    AcknowledgeReset,
    Command,
    DrainWorker,
    GoBack,
    KickStuck,
    MarkGone,
    ReadmitWorker,
    RequeueFailed,
    ResetPassword,
    ResumeWorker,
    Seed,
    SetPlan,
    TrainFor,
)
from coordinator.demo.story import DemoOptions, run_demo
from coordinator.domain.errors import FleetError, StartError
from coordinator.login.handlers import HOME_PATH
from coordinator.service.corpus import Recipe
from coordinator.service.exporting import Pick, parse_version
from coordinator.settings import EVERY_ADDRESS, PREFIX, CoordinatorSettings
from coordinator.terminal import moment, status_text

#: Options that stand for a setting of the same name.
_SETTINGS: Final = {
    "data": "folder of database, weights and keys",
    "corpus": "folder of text",
    "host": "address to listen on",
    "port": "port to listen on, 0 for any",
    "preset": "size of the model; another than the run's replaces the run",
    "seed": "seed of a new run",
    "aggregation": "what makes a version: rounds, or per-arrival",
}


#: Commands that are passed on as they are; tag and docstring are name and help.
_ORDERS: Final[tuple[type[Command], ...]] = (
    GoBack,
    AcknowledgeReset,
    DrainWorker,
    ResumeWorker,
    MarkGone,
    KickStuck,
    RequeueFailed,
    ReadmitWorker,
    ResetPassword,
)
#: Exit status of `status` where nothing runs and the data folder was read.
NOT_RUNNING: Final = 3
_STATUS_ABOUT: Final = (
    f"show run, round and workers; exit status {NOT_RUNNING} where no coordinator "
    "runs: as it was when one last did"
)
#: The option that chooses a variant, of a format that has several.
_VARIANT_OPTIONS: Final = {"layout": Format.HF, "type": Format.GGUF}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    options = _parser().parse_args(arguments)
    os.umask(0o077)  # whatever is made here is for its owner alone
    act: Callable[[argparse.Namespace], int] = options.act
    try:
        status = act(options)
        print(end="", flush=True)  # a reader that has gone is noticed here
        return status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return reader_has_gone()
    except StartError as error:
        print(f"bitnet-coordinator: {error}", file=sys.stderr)
        return error.exit_code
    except (FleetError, ValueError, OSError) as error:
        print(f"bitnet-coordinator: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bitnet-coordinator", description=__doc__, allow_abbrev=False
    )
    verb = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, act: Callable[[argparse.Namespace], int], about: str
    ) -> argparse.ArgumentParser:
        found = verb.add_parser(name, help=about, description=about, allow_abbrev=False)
        found.set_defaults(act=act)
        for setting in ("data", "corpus"):
            found.add_argument(f"--{setting}", help=_SETTINGS[setting])
        return found

    _add_serve(add("serve", _serve, "run the coordinator"))
    _add_tokenize(add("tokenize-corpus", _tokenize, "turn text into shards"))
    seed = add("seed-real-tasks", _seed, "add one epoch of training")
    seed.add_argument(
        "tokens",
        nargs="?",
        default="auto",
        help="tokens of each task, or auto (default): cut to each worker's speed",
    )
    stop = add("train-for", _train_for, "stop giving out training after a while")
    stop.add_argument("seconds", help="seconds from now, or `ever`")
    change = add("set-plan", _set_plan, "change what the run trains by")
    change.add_argument(
        "words",
        nargs="+",
        metavar="NAME=VALUE",
        help="a setting of the plan, in lower case and without its prefix, or "
        "token_budget: learning_rate=0.001",
    )
    for order in _ORDERS:
        about = (order.__doc__ or "").rstrip(".")
        name = str(order.__struct_config__.tag)
        _add_fields(add(name, _pass_on(order), about[0].lower() + about[1:]), order)
    add("status", _status, _STATUS_ABOUT)
    add("dump-telemetry", _dump, "print all that an expert may need, as JSON")
    add("worker-key", _worker_key, "print the key that workers need")
    _add_export(add("export", _export, "write a version for other software"))
    _add_eval(add("eval", _eval, "score a version or an exported folder"))
    _add_demo(verb.add_parser("demo", help="train on this machine for some minutes"))
    return parser


def _add_fields(parser: argparse.ArgumentParser, order: type[Command]) -> None:
    """Add an argument for each field; one with a default may be left out."""
    for field in fields(order):
        left_out = "" if field.required else "; without it, all"
        parser.add_argument(
            field.name,
            nargs=None if field.required else "?",
            help=f"as the page shows it{left_out}",
        )


def _add_serve(parser: argparse.ArgumentParser) -> None:
    for name in ("host", "port", "preset", "seed", "aggregation"):
        parser.add_argument(f"--{name}", help=_SETTINGS[name])
    parser.add_argument(
        "--insecure-http",
        action="store_true",
        help="allow an address beyond this machine although HTTPS is not available yet",
    )


def _add_tokenize(parser: argparse.ArgumentParser) -> None:
    defaults = Recipe()
    for name in ("vocab_size", "held_out_bytes", "shard_tokens"):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name)
        )
    parser.add_argument(
        "--split-seed",
        type=int,
        default=defaults.seed,
        help="decides what is held out, and the order of the rest",
    )
    parser.add_argument(
        "--synthetic", action="store_true", help="mark the text as generated"
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", required=True, choices=list(Format))
    parser.add_argument(
        "--version", default=Pick.LATEST, help="a number, latest (default) or best"
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="the folder to make; must not exist"
    )
    for option, form in _VARIANT_OPTIONS.items():
        names = [str(variant) for variant in VARIANTS[form]]
        parser.add_argument(
            f"--{option}",
            choices=names,
            help=f"of {form}: {', '.join(names)} (default: {names[0]})",
        )


def _add_eval(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--version", default=Pick.LATEST, help="a number, latest (default) or best"
    )
    what.add_argument("--model", type=Path, help="an exported folder instead")
    parser.add_argument(
        "--text", type=Path, help="a file of text (default: the held-out text)"
    )
    cpus = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cpus, help="default: all CPUs")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(act=_demo)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--state", type=Path, default=Path("demo-state"))
    parser.add_argument("--corpus", type=Path, default=None)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument(
        "--kill", action="store_true", help="kill one worker with -9 in mid-task"
    )
    parser.add_argument(
        "--round-kind",
        choices=[kind.value for kind in RoundKind],
        default=RoundKind.DELTA.value,
        help="what workers hand in: trained weights, or mean gradients",
    )


def _settings(options: argparse.Namespace) -> CoordinatorSettings:
    """Return the settings of the environment, overridden by the options given."""
    env = dict(os.environ)
    for name in _SETTINGS:
        value = getattr(options, name, None)
        if value is not None:
            env[PREFIX + name.upper()] = str(value)
    if getattr(options, "insecure_http", False):
        env[PREFIX + "INSECURE_HTTP"] = "true"
    return CoordinatorSettings.from_env(env)


def _serve(options: argparse.Namespace) -> int:
    settings = _settings(options)
    configure_logging(settings.log_level)

    def ready(listening: Listening) -> None:
        print(f"Dashboard: http://{_own_name(settings)}:{listening.port}{HOME_PATH}")
        if listening.first_password is not None:
            print(f"Admin password, shown this once: {listening.first_password}")
        if settings.worker_api_key is None:
            print(f"Worker key: {settings.data / KEY_NAME}")
        if not settings.is_loopback:
            print("WARNING: plain HTTP beyond this machine: keys can be read.")
        sys.stdout.flush()

    asyncio.run(serve(settings, ready))
    return 0


def _own_name(settings: CoordinatorSettings) -> str:
    """Return a name under which the page answers, for use in its address."""
    host = settings.host
    if host in EVERY_ADDRESS:
        host = min(settings.allowed_hosts, default="127.0.0.1")
    return f"[{host}]" if ":" in host else host


def _tokenize(options: argparse.Namespace) -> int:
    recipe = Recipe(
        vocab_size=options.vocab_size,
        held_out_bytes=options.held_out_bytes,
        shard_tokens=options.shard_tokens,
        seed=options.split_seed,
        synthetic=options.synthetic,
    )
    print(verbs.tokenize_corpus(_settings(options), recipe))
    return 0


def _seed(options: argparse.Namespace) -> int:
    tokens = None
    if options.tokens != "auto":
        if not options.tokens.isascii() or not options.tokens.isdecimal():
            raise StartError(
                f"tokens must be a whole number or auto, got {options.tokens!r}"
            )
        tokens = int(options.tokens)
    print(verbs.command(_settings(options), Seed(tokens=tokens)))
    return 0


def _train_for(options: argparse.Namespace) -> int:
    seconds = _seconds(options.seconds)
    print(verbs.command(_settings(options), TrainFor(seconds=seconds)))
    return 0


def _set_plan(options: argparse.Namespace) -> int:
    words: dict[str, str] = {}
    for word in options.words:
        name, is_one, value = word.partition("=")
        if not (name and is_one):
            raise StartError(f"words must be NAME=VALUE, got {word!r}")
        if name in words:
            raise StartError(f"{name} must be named once, got {word!r} too")
        words[name] = value
    print(verbs.command(_settings(options), SetPlan(words=words)))
    return 0


def _seconds(text: str) -> float | None:
    """Return a number of seconds; None for ever."""
    if text == "ever":
        return None
    try:
        return float(text)
    except ValueError:
        raise StartError(f"seconds must be a number or ever, got {text!r}") from None


def _pass_on(order: type[Command]) -> Callable[[argparse.Namespace], int]:
    """Return what passes an order on whose fields are the arguments."""

    def act(options: argparse.Namespace) -> int:
        given = {field: getattr(options, field) for field in order.__struct_fields__}
        print(verbs.command(_settings(options), order(**given)))
        return 0

    return act


def _status(options: argparse.Namespace) -> int:
    settings = _settings(options)
    view, ran_until = verbs.status(settings)
    if ran_until is not None:
        when = moment(ran_until)
        print(
            f"No coordinator runs on {settings.data}. As of {when}, from its database:"
        )
    print(status_text(view))
    return 0 if ran_until is None else NOT_RUNNING


def _dump(options: argparse.Namespace) -> int:
    found = msgspec.json.encode(verbs.telemetry(_settings(options)))
    print(msgspec.json.format(found).decode())
    return 0


def _worker_key(options: argparse.Namespace) -> int:
    print(verbs.worker_key(_settings(options)))
    return 0


def _export(options: argparse.Namespace) -> int:
    form = Format(options.format)
    with _ended_by_sigterm():
        said = verbs.export(
            _settings(options),
            parse_version(options.version),
            (form, _variant(options, form)),
            options.out,
        )
    print(said)
    return 0


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the block, so that nothing half done is left, and exit."""

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _eval(options: argparse.Namespace) -> int:
    score = verbs.score(
        _settings(options),
        options.model or parse_version(options.version),
        options.text,
        options.threads,
    )
    print(f"loss           {score.loss:.4f} nats a token")
    print(f"perplexity     {score.perplexity:.2f}")
    print(f"bits per byte  {score.bits_per_byte:.4f}")
    print(f"of             {score.tokens} tokens, {score.num_bytes} bytes")
    return 0


def _variant(options: argparse.Namespace, form: Format) -> Variant:
    for option, of in _VARIANT_OPTIONS.items():
        given = getattr(options, option)
        if given is None:
            continue
        if of is not form:
            raise StartError(f"--{option} is for --format {of}, got --format {form}")
        return Variant(given)
    return VARIANTS[form][0]


def _demo(options: argparse.Namespace) -> int:
    return run_demo(
        DemoOptions(
            minutes=options.minutes,
            state=options.state,
            corpus=options.corpus,
            port=options.port,
            kill=options.kill,
            round_kind=RoundKind(options.round_kind),
        )
    )
