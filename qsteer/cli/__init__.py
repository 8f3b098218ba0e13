"""The ``qsteer`` command: each module of this package holds one command, its options beside what it does."""

import argparse
import dis
import logging
import sys
from collections.abc import Sequence

import qsteer
from qsteer.cli import (
    adapt,
    audit,
    bench,
    demo,
    distill,
    evaluate,
    generate,
    libero,
    protocol,
    serve,
    train_critic,
    train_online,
    train_policy,
)
from qsteer.cli.options import Parser

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
    libero,
    audit,
    evaluate,
    serve,
    bench,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the ``qsteer`` command.

    Misuse (:func:`is_misuse`) ends it with one line and exit status 2; a bug shows its traceback.
    """
    args = _make_parser().parse_args(argv)
    import torch  # only here: the help must not wait for it

    logging.basicConfig(format="%(message)s")
    logging.getLogger("qsteer").setLevel(logging.INFO)  # what a command waits for
    if args.command != "bench":  # which measures torch's threads as it finds them
        torch.set_num_threads(1)  # the networks are small, and the simulators need the other cores
    try:
        args.run(args)
    except Exception as error:
        if not is_misuse(error):
            raise
        text = error.args[0] if isinstance(error, KeyError) else error  # whose text is the repr
        _leave(2, f"qsteer {args.command}: {' '.join(str(text).split())}")
    except KeyboardInterrupt:
        _leave(130, f"qsteer {args.command}: interrupted; {_say_what_is_left(args)}")


def is_misuse(error: Exception) -> bool:
    """Return whether an error is the user's to mend, and not a bug.

    It is if qsteer raised it by a ``raise`` statement of its own (a check), if the system names the file that
    it refuses, or if an extra is not installed. The same kinds of error from anywhere else are bugs.
    """
    if isinstance(error, ModuleNotFoundError):
        return not (error.name or "").startswith("qsteer")
    if isinstance(error, OSError) and error.filename is not None:
        return True
    if not isinstance(error, ValueError | KeyError | RuntimeError | OSError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code, module = trace.tb_frame.f_code, trace.tb_frame.f_globals.get("__name__", "")
    raised = code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raised and module.partition(".")[0] == "qsteer"


def _say_what_is_left(args: argparse.Namespace) -> str:
    """Promise a checkpoint only where there is one."""
    directory = getattr(args, "run_directory", None)
    if directory is not None and any(directory.rglob("checkpoint.safetensors")):
        return f"the same command goes on from the last checkpoint in {directory}"
    return "there is no checkpoint yet, the same command starts from the beginning"


def _leave(status: int, line: str) -> None:
    print(line, file=sys.stderr)
    sys.exit(status)


def _make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qsteer",
        description="Steer frozen flow-matching robot policies with a critic, at inference time.",
    )
    parser.add_argument("--version", action="version", version=f"qsteer {qsteer.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
