"""The command `bitnet-worker`: run, calibrate, eval, generate, chat.

Results go to standard output, everything else to standard error; the last line of
`calibrate` and `eval` is JSON. Wrong arguments or settings end the process with
status 2 and one line, a coordinator that makes no sense with status 1; Ctrl-C with 130,
and a reader that has gone with 141.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec
import torch

from bitnet_ext.layout import (
    DEFAULT_VOCAB_SIZE,
    PRESETS,
    UnknownPresetError,
    preset_shape,
)
from bitnet_ext.output import reader_has_gone
from bitnet_ext.ternary import supported_isas
from bitnet_ext.wire.log import configure_logging
from bitnet_ext.wire.verdicts import Optimiser, RoundKind
from worker import offline, process, tune
from worker.calibrate import use_threads
from worker.errors import SettingsError, WorkerError
from worker.model.transformer import BitNetModel
from worker.settings import WorkerSettings, chosen_isa, usable_cpus
from worker.talk import run_chat, run_generate
from worker.train import Hooks
from worker.trainer import DEVICES, TorchTrainer, find_device

PROGRAM: Final = "bitnet-worker"
#: Sequences at a time, where nobody says otherwise.
BATCH_SIZE: Final = 8
#: The end-of-text token of a prepared corpus: a text starts with it.
EOT_ID: Final = "0"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """End with status 2 and the reason."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.command(arguments)
        print(end="", flush=True)  # a reader that has gone is noticed here
    except SettingsError as error:
        return _complain(error, 2)
    except WorkerError as error:
        return _complain(error, 1)
    except BrokenPipeError:
        return reader_has_gone()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _complain(error: WorkerError, status: int) -> int:
    line = " ".join(str(error).split())
    print(f"{PROGRAM}: error: {line}", file=sys.stderr)
    return status


def _run(arguments: argparse.Namespace) -> None:
    settings = WorkerSettings.from_env(os.environ)
    device = find_device(arguments.device)
    configure_logging(settings.log_level)
    use_threads(settings.cpu_threads)
    most = settings.cpu_threads
    threads = (most,) if settings.fixed_threads else tune.halvings(most)
    trainer = TorchTrainer(threads, _variants(device, settings.isa), device)
    process.work(settings, trainer)


def _variants(device: torch.device, isa: str | None) -> tuple[str, ...]:
    """Return how steps may be computed there; `isa` is what the operator set."""
    if device.type != "cpu":
        return (tune.TORCH,)
    return (isa,) if isa else tune.variants(supported_isas())


def _optimiser(arguments: argparse.Namespace) -> Optimiser | None:
    """Return what makes the steps to time; None: gradients, which nobody steps by.

    Raises SettingsError for an optimiser of gradient rounds.
    """
    if arguments.round_kind == RoundKind.DELTA:
        return Optimiser(arguments.optimiser or Optimiser.MUON)
    if arguments.optimiser is not None:
        raise SettingsError(
            f"--optimiser is for --round-kind {RoundKind.DELTA}, got "
            f"{arguments.optimiser!r} with --round-kind {arguments.round_kind}"
        )
    return None


def _calibrate(arguments: argparse.Namespace) -> None:
    optimiser = _optimiser(arguments)
    shape = preset_shape(arguments.preset, vocab_size=arguments.vocab_size)
    device = find_device(arguments.device)
    variants = _variants(device, chosen_isa(os.environ))
    results = []
    print(f"{'threads':>8} {'variant':>12} {'micro-batch':>12} {'tokens/s':>10}")
    for threads in arguments.threads:
        trainer = TorchTrainer((threads,), variants, device)
        hooks = Hooks.quiet(time.monotonic)
        found = trainer.calibrate(shape, arguments.batch_size, optimiser, hooks)
        setup, speed = found.setup, found.tokens_per_s
        print(
            f"{threads:>8} {setup.variant:>12} {setup.micro_batch:>12} {speed:>10.0f}",
            flush=True,
        )
        results.append(
            {
                "threads": threads,
                "isa": setup.variant,
                "micro_batch": setup.micro_batch,
                "tokens_per_s": round(speed, 1),
            }
        )
    _print_json(
        preset=arguments.preset,
        vocab_size=arguments.vocab_size,
        batch_size=arguments.batch_size,
        round_kind=arguments.round_kind,
        results=results,
    )


def _eval(arguments: argparse.Namespace) -> None:
    device = find_device(arguments.device)
    use_threads(arguments.threads)
    weights = offline.load_weights(arguments.weights, arguments.preset)
    text = offline.load_text(arguments.corpus, arguments.shard)
    model = BitNetModel(weights.shape, threads=arguments.threads, device=device)
    score = offline.score(model, weights, text, batch_size=arguments.batch_size)
    bits = offline.bits_per_byte(score.nats, text.text_bytes)
    print(f"shard          {text.shard_id}")
    print(f"tokens         {score.tokens}")
    print(f"nats           {score.nats:.3f}")
    print(f"bits per byte  {bits:.4f}")
    _print_json(
        shard_id=text.shard_id,
        nats=score.nats,
        tokens=score.tokens,
        text_bytes=text.text_bytes,
        bits_per_byte=bits,
        seconds=round(score.compute_s, 3),
    )


def _print_json(**fields: Any) -> None:
    print(msgspec.json.encode(fields).decode())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_device(_add(commands, "run", _run, "train for a coordinator; set by BITNET_*"))
    _describe_calibrate(
        _add(commands, "calibrate", _calibrate, "measure training speed")
    )
    _describe_eval(
        _add(commands, "eval", _eval, "score a frame of weights on a prepared corpus")
    )
    writes = _add(commands, "generate", run_generate, "continue a text with a model")
    _describe_sampling(writes)
    writes.add_argument(
        "--prompt", help="text to continue, after the ids; needs --tokenizer"
    )
    talks = _add(commands, "chat", run_chat, "continue a text in turn with a model")
    _describe_sampling(talks)
    return parser


def _add(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], about: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about
    )
    parser.set_defaults(command=run)
    return parser


def _describe_calibrate(parser: argparse.ArgumentParser) -> None:
    _add_preset(parser)
    _add_device(parser)
    parser.add_argument(
        "--threads",
        type=_list_of_threads,
        default=[usable_cpus()],
        help="numbers of threads to try, e.g. 1,2,4 (default: usable CPUs)",
    )
    parser.add_argument("--batch-size", type=_size, default=BATCH_SIZE)
    parser.add_argument("--vocab-size", type=_size, default=DEFAULT_VOCAB_SIZE)
    parser.add_argument(
        "--round-kind",
        choices=tuple(RoundKind),
        default=RoundKind.DELTA,
        help="gradient: steps that only add to a mean gradient (default: delta)",
    )
    parser.add_argument(
        "--optimiser",
        choices=tuple(Optimiser),
        help=f"of delta rounds (default: {Optimiser.MUON})",
    )


def _describe_eval(parser: argparse.ArgumentParser) -> None:
    _add_weights(parser)
    _add_device(parser)
    parser.add_argument(
        "--corpus", type=Path, required=True, help="folder of a prepared corpus"
    )
    parser.add_argument("--shard", help="id of the shard (default: the held-out one)")
    parser.add_argument("--batch-size", type=_size, default=BATCH_SIZE)


def _describe_sampling(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", type=Path, help="a published frame; with --preset")
    source.add_argument("--model", type=Path, help="an exported folder")
    _add_preset(parser, required=False)
    parser.add_argument("--threads", type=_threads, default=usable_cpus())
    parser.add_argument(
        "--prompt-ids",
        type=_ids,
        default=EOT_ID,
        help="ids to continue, e.g. 0,17,4 (default: a text starts)",
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json: print text instead of ids"
    )
    parser.add_argument("--num-tokens", type=_size, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument(
        "--top-k", type=_size, help="draw among so many of the likeliest"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw among the likeliest that have this probability together",
    )
    parser.add_argument("--seed", type=_seed, default=0)
    parser.add_argument("--stop-id", type=int, help="stop after this id")


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=Path, required=True, help="a published frame")
    _add_preset(parser)
    parser.add_argument("--threads", type=_threads, default=usable_cpus())


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="cpu",
        help="cuda trains in plain PyTorch, without our kernels (default: cpu)",
    )


def _add_preset(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument(
        "--preset", required=required, type=_preset, help="|".join(PRESETS)
    )


def _preset(value: str) -> str:
    try:
        preset_shape(value)
    except UnknownPresetError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def _whole(value: str, least: int, most: int) -> int:
    if re.fullmatch(r"[0-9]{1,19}", value) and least <= int(value) <= most:
        return int(value)
    raise argparse.ArgumentTypeError(
        f"must be a whole number from {least} to {most}, got {value!r}"
    )


_threads = partial(_whole, least=1, most=4096)
_size = partial(_whole, least=1, most=2**20)
_seed = partial(_whole, least=0, most=2**63 - 1)


def _list_of_threads(value: str) -> list[int]:
    return [_threads(part) for part in value.split(",")]


def _ids(value: str) -> list[int]:
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be ids with commas between, got {value!r}"
        ) from None
