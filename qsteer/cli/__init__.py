"""The ``qsteer`` command: each module of this package holds one command, its options beside what it does."""

import argparse
import sys
from collections.abc import Sequence

import torch

from qsteer.cli import (
    adapt,
    bench,
    demo,
    distill,
    evaluate,
    generate,
    protocol,
    train_critic,
    train_online,
    train_policy,
)

__all__ = ["main"]

COMMANDS = (
    demo,
    generate,
    train_policy,
    train_critic,
    distill,
    adapt,
    train_online,
    protocol,
    evaluate,
    bench,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the ``qsteer`` command; a wrong argument, a missing file or extra ends it with one line."""
    args = _make_parser().parse_args(argv)
    if args.command != "bench":  # which measures torch's threads as it finds them
        torch.set_num_threads(1)  # the networks are small, and the simulators need the other cores
    try:
        args.run(args)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        sys.exit(f"qsteer {args.command}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"qsteer {args.command}: interrupted; the same command goes on from the last checkpoint")


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qsteer",
        description="Steer frozen flow-matching robot policies with a critic, at inference time.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
