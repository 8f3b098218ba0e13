"""``qsteer train-online``: a critic that learns while it steers."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from qsteer.cli.options import (
    Commands,
    add_command,
    add_compile_option,
    add_device_option,
    add_task_option,
    natural_int,
    positive_float,
    positive_int,
    select_given,
    start_run,
)


def add_parser(commands: Commands) -> None:
    """Add the command with its options."""
    text = "Train a critic while it steers the frozen policy, in the environment."
    parser = add_command(commands, "train-online", run, text)
    add_task_option(parser)
    parser.add_argument(
        "--arm", default="tweedie=0.2", help="how the critic steers, such as tweedie=0.2 or best-of-8"
    )
    parser.add_argument(
        "--seeds", type=natural_int, nargs="+", default=[0], help="training seeds, all at once in one process"
    )
    parser.add_argument(
        "--policy", type=Path, help="frozen policy of all seeds; default runs/TASK/seedN/policy for each"
    )
    parser.add_argument(
        "--target", choices=["sarsa", "td", "monte_carlo", "iql", "fql"], help="default: the recipe's"
    )
    parser.add_argument("--env-steps", type=positive_int, help="of each seed; default: the recipe's")
    parser.add_argument(
        "--num-envs", type=positive_int, help="simulators of each seed; default: the recipe's"
    )
    parser.add_argument("--updates-per-step", type=positive_float, help="default: the recipe's")
    parser.add_argument("--warmup", type=natural_int, help="unsteered steps at first; default: the recipe's")
    parser.add_argument(
        "--data", type=Path, help="offline data (.npz) to mix in; default: none, the frozen policy alone"
    )
    parser.add_argument("--tracker", help="tensorboard, wandb, trackio, ...: gets the metrics too")
    add_device_option(parser)
    add_compile_option(parser)
    parser.add_argument("--out", type=Path, help="run directory; default runs/TASK/online/ARM-TARGET")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qsteer.critics import LiveCritic
    from qsteer.data import Chunks, Episodes
    from qsteer.envs import ogbench
    from qsteer.evaluation.arms import parse
    from qsteer.experiments.tasks import RECIPES, run_directory
    from qsteer.online.actors import StateActor
    from qsteer.online.run import train_online
    from qsteer.policies import FlowPolicy
    from qsteer.training.critic import ACTING, LEARNERS, fresh_critic

    task, arm = RECIPES[args.task], parse(args.arm)
    given = select_given(args, "env_steps", "num_envs", "updates_per_step", "warmup")
    critic = replace(task.online.critic, seed=args.seeds[0], **select_given(args, "compile", "target"))
    training = replace(task.online, critic=critic, **given)
    out = start_run(args, args.out or Path("runs") / args.task / "online" / f"{args.arm}-{critic.target}")
    paths = [args.policy or run_directory(args.task, seed) / "policy" for seed in args.seeds]
    policies = [FlowPolicy.from_pretrained(path).requires_grad_(False).to(args.device) for path in paths]
    shape = policies[0].config
    live = LiveCritic(
        fresh_critic(critic.critic_config(shape.obs_dim, shape.action_dim), args.seeds).to(args.device)
    )
    actor = StateActor(policies, live, compile="inductor" if critic.compiles else None)
    offline = None
    if args.data:
        episodes = Episodes.from_ogbench(ogbench.load(task.environment(), args.data)[0]).to(args.device)
        offline = Chunks(episodes, critic.horizon, critic.gamma, LEARNERS[critic.target].need)
    train_online(
        partial(ogbench.make, task.environment()),
        actor,
        live,
        out,
        training,
        rule=arm.rule,
        sampler=arm.sampler,
        offline=offline,
        act=actor.sample_under(arm.rule, arm.sampler) if critic.target in ACTING else None,
        tracker=args.tracker,
    )
    print(f"critics and metrics: {out}")
