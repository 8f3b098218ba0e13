"""``qsteer serve``: a steered policy over openpi's websocket protocol."""

import argparse
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qsteer.cli.options import (
    Commands,
    add_command,
    add_device_option,
    add_plugin_option,
    import_plugins,
    natural_float,
    natural_int,
    positive_float,
    positive_int,
    refuse_given,
    select_given,
    start_run,
)

if TYPE_CHECKING:
    import ssl

    from qsteer.serving import RobotLearning, Served, Server
    from qsteer.training.critic import CriticTraining

KEY = "QSTEER_API_KEY"
"""The environment's variable that may hold the key."""
STOPPING = signal.SIGTERM, signal.SIGINT

LEARNING = (
    "robots",
    "warmup",
    "updates-per-step",
    "learn-share",
    "target",
    "gamma",
    "ema",
    "members",
    "features",
    "capacity",
)
NEEDED = {False: ("policy", "critic", "rule"), True: ("policy", "rule")}
"""What must be given, with a critic that learns and with one that does not."""


def add_parser(commands: Commands) -> None:
    """Add the command with its options."""
    parser = add_command(commands, "serve", run, "Serve a steered policy to openpi's clients.")
    parser.add_argument("--policy", help="directory or hub name of the policy")
    parser.add_argument("--critic", help="directory or hub name of the critic")
    parser.add_argument("--rule", metavar="ARM", help="such as tweedie=0.2, best-of-8 or base, see evaluate")
    parser.add_argument(
        "--maps", type=Path, help="directory with the learnt maps meta/, flow/, fmq/ that the arm asks for"
    )
    parser.add_argument("--steering", help="a saved steering, in place of these")
    parser.add_argument(
        "--rename",
        nargs="+",
        default=[],
        type=name_pair,
        metavar="YOURS=POLICY'S",
        help="names of observations, such as observation/state=observation.state",
    )
    parser.add_argument("--instruction", metavar="TEXT", help="the task, for requests without a prompt")
    parser.add_argument("--seed", type=natural_int, help="of the seeds of requests without one")
    parser.add_argument(
        "--exact", action="store_true", help="the same bits whoever shares a call: each has --max-batch rows"
    )
    parser.add_argument(
        "--no-displacement", action="store_true", help="leave it out, which costs an unsteered chain"
    )
    add_device_option(parser)
    parser.add_argument(
        "--threads", type=positive_int, default=1, help="of torch, for large policies on a CPU"
    )
    add_plugin_option(parser)
    group = parser.add_argument_group("learning from the robots")
    group.add_argument(
        "--learn", type=Path, metavar="DIR", help="learn the critic from the robots; run directory"
    )
    group.add_argument("--robots", type=positive_int, help="most robots that it learns from; default: 16")
    group.add_argument("--warmup", type=natural_int, help="unsteered steps at first; default: 2000")
    group.add_argument("--updates-per-step", type=positive_float, help="gradient steps; default: 1")
    group.add_argument(
        "--learn-share", type=natural_float, help="most of the time in which requests wait; default: 0.5"
    )
    group.add_argument("--target", choices=["sarsa", "iql", "monte_carlo"], help="default: sarsa")
    group.add_argument("--gamma", type=positive_float, help="discount per step; default: 0.99")
    group.add_argument("--ema", type=positive_float, help="of the critic that acts; default: 0.005")
    group.add_argument("--members", type=positive_int, help="of a new critic's ensemble; default: 4")
    group.add_argument("--features", action="store_true", help="a new critic sees the policy's features, too")
    group.add_argument(
        "--capacity", type=positive_int, help="replies kept of each robot, the latest; default: 20000"
    )
    group = parser.add_argument_group("calls")
    group.add_argument("--max-batch", type=positive_int, default=16, help="most requests of a call")
    group.add_argument("--max-wait-ms", type=natural_float, default=5.0, help="for others to share a call")
    group.add_argument("--max-queue", type=positive_int, default=64, help="most requests that wait")
    group.add_argument("--timeout", type=positive_float, default=30.0, help="seconds to a reply")
    group = parser.add_argument_group("network")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at")
    group.add_argument("--port", type=natural_int, default=8000, help="0: any that is free")
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help=f"holds the key; default: ${KEY}")
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key, PEM")
    group.add_argument("--insecure", action="store_true", help="listen beyond this machine without a key")
    group.add_argument("--max-connections", type=positive_int, default=64, help="robots at once")
    group.add_argument("--max-rate", type=positive_float, default=100.0, help="requests a second of each")
    group.add_argument("--max-message-mb", type=positive_float, default=16.0, help="size of a request")
    group.add_argument("--idle", type=positive_float, default=600.0, help="seconds between requests")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    import asyncio

    try:
        import qsteer.serving  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("qsteer"):
            raise
        raise ModuleNotFoundError(
            f'qsteer serve: {error}: pip install "qsteer[serve]"', name=error.name
        ) from None
    from qsteer.serving import BatchLimits, Server, ServerLimits
    from qsteer.serving.codec import CodecLimits

    if args.learn is None:
        refuse_given(args, LEARNING, "without --learn")
    if args.steering is not None:
        refuse_given(args, ("policy", "critic", "rule", "maps", "learn"), "beside --steering")
    elif missing := [name for name in NEEDED[args.learn is not None] if getattr(args, name) is None]:
        raise ValueError(f"--{missing[0]}: expected one, got none; give it, or --steering")
    import torch

    torch.set_num_threads(args.threads)
    limits = ServerLimits(
        message=CodecLimits(bytes=int(args.max_message_mb * 2**20)),
        connections=args.max_connections,
        rate=args.max_rate,
        idle=args.idle,
    )
    batching = BatchLimits(args.max_batch, args.max_wait_ms / 1e3, args.max_queue, args.timeout)
    key, tls = read_key(args.api_key_file), read_tls(args.tls_cert, args.tls_key)
    if args.plugin:
        import_plugins(args)
    served = open_policy(args)
    server = Server(
        served,
        learning=None if args.learn is None else open_learning(args, served),
        host=args.host,
        port=args.port,
        batching=batching,
        limits=limits,
        key=key,
        tls=tls,
        insecure=args.insecure,
        seed=args.seed,
    )
    asyncio.run(listen(server, f"{'ws' if tls is None else 'wss'}://{args.host}"))


def open_policy(args: argparse.Namespace) -> "Served":
    """Return what is to be served."""
    from qsteer.evaluation.arms import Maps
    from qsteer.serving import open_served, open_steering

    exact, displacement = args.max_batch if args.exact else None, not args.no_displacement
    if args.steering is not None:
        return open_steering(
            args.steering,
            device=args.device,
            rename=dict(args.rename),
            instruction=args.instruction,
            exact=exact,
            displacement=displacement,
        )
    return open_served(
        args.policy,
        args.critic,
        args.rule,
        learns=None if args.learn is None else read_training(args),
        features=args.features,
        maps=Maps.load(args.maps).to(args.device) if args.maps else None,
        device=args.device,
        rename=dict(args.rename),
        instruction=args.instruction,
        exact=exact,
        displacement=displacement,
    )


def read_training(args: argparse.Namespace) -> "CriticTraining":
    """Return how the critic learns."""
    from qsteer.training.critic import CriticTraining

    given = select_given(args, "target", "gamma", "ema", "members", "seed")
    return replace(CriticTraining(target="sarsa", ema=0.005), **given)


def open_learning(args: argparse.Namespace, served: "Served") -> "RobotLearning":
    """Return what learns from the robots, as the run directory has it."""
    from qsteer.online.settings import OnlineTraining
    from qsteer.serving import RobotLearning
    from qsteer.serving.learning import ENDLESS

    steps = served.interface.horizon
    training = OnlineTraining(
        critic=replace(read_training(args), horizon=steps),
        env_steps=ENDLESS,
        num_envs=args.robots or 16,
        row=steps,
        capacity=args.capacity or 20_000,
        evaluate_every=0,
        **select_given(args, "warmup", "updates_per_step"),
    )
    share = {} if args.learn_share is None else {"share": args.learn_share}
    return RobotLearning(served, start_run(args, args.learn), training, **share)


async def listen(server: "Server", address: str) -> None:
    """Serve until the process is told to stop, by SIGTERM or an interrupt; then finish what was taken."""
    import asyncio

    stop = asyncio.Event()
    for number in STOPPING:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with server:
        told = server.metadata
        for name, each in told["observations"].items():
            print(f"observation: {name}: {each['kind']} {tuple(each['shape'])}")
        print(f"actions: ({told['horizon']}, {told['action_dim']})")
        if server.learning is not None:
            learnt = server.learning.state()
            print(f"learning: {server.learning.out}, {learnt['rows']} rows, {learnt['updates']} updates")
        print(f"page: {address.replace('ws', 'http', 1)}:{server.port}/")
        print(f"listening: {address}:{server.port}", flush=True)
        await stop.wait()
        for number in STOPPING:  # a second one does not wait
            asyncio.get_running_loop().remove_signal_handler(number)
        print("stopping: no more requests are taken", flush=True)


def read_key(path: Path | None) -> str | None:
    """Return the key in a file, or in the environment; None: there is none.

    Raises:
        ValueError: the file is empty.
        OSError: it cannot be read.
    """
    if path is None:
        return os.environ.get(KEY) or None
    if not (key := path.read_text().strip()):
        raise ValueError(f"--api-key-file {path}: expected a key, got an empty file; write one into it")
    return key


def read_tls(certificate: Path | None, key: Path | None) -> "ssl.SSLContext | None":
    """Return what a server's encryption needs; None: no file was named.

    Raises:
        ValueError: one of the two is missing, or they are no certificate and its key.
        OSError: a file cannot be read.
    """
    import ssl

    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ValueError("--tls-cert, --tls-key: expected both or none, got one; give the other, too")
    for path in (certificate, key):
        path.open().close()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise ValueError(
            f"--tls-cert {certificate}, --tls-key {key}: expected a certificate and its key in PEM, got "
            f"{error.reason}"
        ) from None
    return context


def name_pair(text: str) -> tuple[str, str]:
    """Read YOURS=POLICY'S."""
    yours, _, own = text.partition("=")
    if not (yours and own):
        raise argparse.ArgumentTypeError(f"expected YOURS=POLICY'S, got {text!r}")
    return yours, own
