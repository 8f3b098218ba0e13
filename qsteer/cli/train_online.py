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
    add_env_options,
    add_plugin_option,
    add_ray_options,
    add_task_option,
    import_plugins,
    natural_int,
    positive_float,
    positive_int,
    read_cluster,
    read_task,
    refuse_given,
    select_given,
    start_run,
)


def add_parser(commands: Commands) -> None:
    """Add the command with its options."""
    text = "Train a critic while it steers the frozen policy, in the environment."
    parser = add_command(commands, "train-online", run, text)
    add_task_option(parser, alone=False)
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
    add_ray_options(parser)
    parser.add_argument("--out", type=Path, help="run directory; default runs/TASK/online/ARM-TARGET")
    group = parser.add_argument_group("of a lerobot policy, in one of lerobot's environments")
    add_env_options(group)
    group.add_argument("--features", action="store_true", help="the critic sees the policy's features, too")
    group.add_argument("--members", type=positive_int, help="of the critic's ensemble; default: 4")
    group.add_argument("--evaluate-every", type=natural_int, help="steps; 0: never; default: 5000")
    add_plugin_option(group)


ENV = ("env-task", "env-task-id", "env-options", "features", "members", "evaluate-every", "plugin")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.env is not None:
        run_in_env(args)
        return
    refuse_given(args, ENV, "without --env")
    from qsteer.critics import LiveCritic
    from qsteer.data import Chunks, Episodes
    from qsteer.envs import ogbench
    from qsteer.evaluation.arms import parse
    from qsteer.experiments.tasks import RECIPES, run_directory
    from qsteer.online.actors import StateActor
    from qsteer.online.run import train_online
    from qsteer.policies import FlowPolicy
    from qsteer.training.critic import ACTING, LEARNERS, fresh_critic

    name, cluster = read_task(args), read_cluster(args)
    task, arm = RECIPES[name], parse(args.arm)
    given = select_given(args, "env_steps", "num_envs", "updates_per_step", "warmup")
    critic = replace(task.online.critic, seed=args.seeds[0], **select_given(args, "compile", "target"))
    training = replace(task.online, critic=critic, **given)
    out = start_run(args, args.out or Path("runs") / name / "online" / f"{args.arm}-{critic.target}")
    paths = [args.policy or run_directory(name, seed) / "policy" for seed in args.seeds]
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
        cluster=cluster,
    )
    print(f"critics and metrics: {out}")


def run_in_env(args: argparse.Namespace) -> None:
    """Let a lerobot policy act in one of lerobot's environments, and train its critic."""
    refuse_given(args, ("data",), "beside --env")
    if "task" in args:
        raise ValueError("--task: expected none beside --env; leave it out")
    for name in ("policy", "out"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name}: expected it beside --env, got none; give a folder")
    if args.target in ("td", "fql"):
        raise ValueError(f"--target: expected sarsa, monte_carlo or iql beside --env, got {args.target}")
    import_plugins(args)
    from qsteer.critics import LiveCritic
    from qsteer.data.lerobot import open_policy
    from qsteer.envs.lerobot import env_config
    from qsteer.evaluation.arms import parse
    from qsteer.evaluation.lerobot import place
    from qsteer.online.run import train_online
    from qsteer.online.settings import OnlineTraining
    from qsteer.training.critic import CriticTraining, fresh_critic

    arm, out, cluster = parse(args.arm, clip=None), start_run(args, Path(args.out)), read_cluster(args)
    config = env_config(args.env, args.env_task, args.env_task_id, dict(args.env_options))
    policy, *processors = open_policy(args.policy, args.device)
    make_env, whole, first = place(config, args.env_task_id, policy, tuple(processors))
    batch = whole.batch(first)
    given = select_given(args, "compile", "target", "members")
    base = replace(CriticTraining(target="sarsa", ema=0.005), **given)
    for seed in args.seeds:
        settings = replace(base, horizon=whole.horizon, seed=seed)
        shape = settings.critic_config(batch[settings.observation_key].shape[1], whole.action_dim)
        shape = replace(shape, features=whole.features(batch).shape[1] if args.features else 0)
        critic = LiveCritic(fresh_critic(shape, [seed]).to(args.device))
        training = OnlineTraining(
            critic=settings,
            row=whole.horizon if args.features else 1,  # features are of decisions only
            **select_given(args, "env_steps", "num_envs", "updates_per_step", "warmup", "evaluate_every"),
        )
        actor = whole.actor(critic, first)
        try:
            train_online(
                make_env,
                actor,
                critic,
                out / f"seed{seed}",
                training,
                rule=arm.rule,
                sampler=arm.sampler,
                tracker=args.tracker,
                cluster=cluster,
            )
        finally:
            actor.handle.remove()
    print(f"critics and metrics: {out}")
