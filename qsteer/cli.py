"""The ``qsteer`` command: parses, calls, prints where things are."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qsteer.experiments.tasks import RECIPES, run_directory


def main(argv: Sequence[str] | None = None) -> None:
    """Run the ``qsteer`` command; errors of usage and of missing files end it with one line."""
    args = _parser().parse_args(argv)
    if args.command != "bench":  # which measures what it finds
        torch.set_num_threads(1)  # small networks; the simulators need the other cores
    try:
        args.run(args)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        sys.exit(f"qsteer {args.command}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"qsteer {args.command}: interrupted; the same command goes on from the last checkpoint")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qsteer",
        description="Steer frozen flow-matching robot policies with a critic, at inference time.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(run=run)
        sub.add_argument(
            "--task", choices=RECIPES, default="cube-single", help="which recipe (qsteer/recipes.py)"
        )
        return sub

    demo = command("demo", _demo, "Compare the frozen policy with steered ones on a simulated robot task.")
    demo.add_argument(
        "--from-scratch", action="store_true", help="make data, policy and critic first (resumes)"
    )
    demo.add_argument("--episodes", type=int, default=100, help="evaluation episodes per arm")
    demo.add_argument("--num-envs", type=int, default=8, help="simulators at once")
    demo.add_argument("--seed", type=int, default=0, help="training seed, with --from-scratch")
    demo.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="where results, plots and videos go"
    )

    generate = command("generate", _generate, "Collect a task's data with OGBench's scripted oracles.")
    generate.add_argument("--data", type=Path, help="the .npz to write; default runs/data/NAME.npz")
    generate.add_argument("--transitions", type=int, help="size of the training split; default: the recipe's")
    generate.add_argument("--seed", type=int, default=0, help="seed of the whole data set")
    generate.add_argument("--workers", type=int, help="processes; default: one per core")

    policy = command(
        "train-policy", _train_policy, "Clone the data's behaviour: the policy that is then frozen."
    )
    policy.add_argument(
        "--residual-layers", type=int, help="of the recipe's width, in place of its plain hidden layers"
    )
    critic = command("train-critic", _train_critic, "Train the critic that steers.")
    critic.add_argument(
        "--target", default="iql", choices=["sarsa", "monte_carlo", "iql"], help="what it regresses on"
    )
    critic.add_argument("--members", type=int, help="size of the ensemble; default: the recipe's")
    critic.add_argument("--rho", type=float, help="pessimism; default: the recipe's")
    distil = command("distill", _distil, "Distil a map of the frozen policy: jumps, or posterior samples.")
    distil.add_argument(
        "--map",
        choices=["meta", "flow"],
        default="meta",
        help="meta: meta flow map (Posterior); flow: flow map (BeamSearch)",
    )
    adapt = command("adapt", _adapt, "Adapt a distilled flow map to the critic, in the environment (FMQ).")
    adapt.add_argument(
        "--env-steps", type=int, help="environment steps; default: the recipe's; 0: on the data alone"
    )
    adapt.add_argument(
        "--critic", type=Path, help="directory of the critic to start from; default runs/TASK/seedN/critic"
    )
    adapt.add_argument("--eta", type=float, help="radius of the trust region; default: the recipe's")
    adapt.add_argument("--fixed-critic", action="store_true", help="the critic stays as it is")
    for sub, kind in (policy, "policy"), (critic, "critic"), (distil, "meta or flow"), (adapt, "fmq"):
        sub.add_argument(
            "--data", type=Path, help="the .npz to read, generated or official; default runs/data/NAME.npz"
        )
        sub.add_argument("--steps", type=int, help="gradient steps; default: the recipe's")
        sub.add_argument("--seed", type=int, default=0, help="training seed")
        sub.add_argument("--device", default="cpu", help="cpu or cuda")
        sub.add_argument("--out", type=Path, help=f"run directory; default runs/TASK/seedN/{kind}")

    online = command(
        "train-online", _train_online, "Train a critic while it steers the frozen policy, in the environment."
    )
    online.add_argument(
        "--arm", default="tweedie=0.2", help="how the critic steers, such as tweedie=0.2 or best-of-8"
    )
    online.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="training seeds, all at once in one process"
    )
    online.add_argument(
        "--policy", type=Path, help="frozen policy of all seeds; default runs/TASK/seedN/policy for each"
    )
    online.add_argument(
        "--target", choices=["sarsa", "td", "monte_carlo", "iql", "fql"], help="default: the recipe's"
    )
    online.add_argument("--env-steps", type=int, help="of each seed; default: the recipe's")
    online.add_argument("--num-envs", type=int, help="simulators of each seed; default: the recipe's")
    online.add_argument("--updates-per-step", type=float, help="default: the recipe's")
    online.add_argument("--warmup", type=int, help="unsteered steps at first; default: the recipe's")
    online.add_argument(
        "--data", type=Path, help="offline data (.npz) to mix in; default: none, the frozen policy alone"
    )
    online.add_argument("--tracker", help="tensorboard, wandb, trackio, ...: gets the metrics too")
    online.add_argument("--device", default="cpu", help="cpu or cuda")
    online.add_argument("--out", type=Path, help="run directory; default runs/TASK/online/ARM-TARGET")

    text = "Run the OGBench offline-to-online protocol on a task, or sum up such runs."
    protocol = commands.add_parser(
        "protocol", help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    protocol.set_defaults(run=_protocol)
    protocol.add_argument("--domain", default="cube-double", help="which domain (qsteer/protocol.py)")
    protocol.add_argument("--task", type=int, default=2, help="number of the task, 1 to 5")
    protocol.add_argument("--data", type=Path, help="the .npz to read; default runs/data/NAME.npz")
    protocol.add_argument("--seeds", type=int, nargs="+", default=list(range(8)), help="all at once")
    protocol.add_argument("--scale", type=float, default=1.0, help="of all numbers of steps; 1: the paper's")
    protocol.add_argument("--device", default="cpu", help="cpu or cuda")
    protocol.add_argument("--out", type=Path, help="run directory; default runs/protocol/DOMAIN-TASK")
    protocol.add_argument(
        "--report",
        type=Path,
        nargs="+",
        metavar="RESULTS",
        help="results.json of runs to sum up; runs nothing",
    )

    evaluate = command("evaluate", _evaluate, "Compare arms on the evaluation seeds.")
    evaluate.add_argument("--policy", type=Path, required=True, help="directory or hub name of the policy")
    evaluate.add_argument("--critic", type=Path, required=True, help="directory or hub name of the critic")
    evaluate.add_argument(
        "--maps", type=Path, help="directory with the learnt maps meta/, flow/, fmq/ that arms ask for"
    )
    evaluate.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="such as base tweedie=0.2 qgf=0.2 best-of-8 random-of-8 random-direction=0.2 negated=0.2 "
        "tweedie=0.2+best-of-8+keep-best; the first is what the others are compared with; default: the "
        "recipe's",
    )
    evaluate.add_argument("--episodes", type=int, default=200, help="per arm; the same ones for every arm")
    evaluate.add_argument("--rho", type=float, help="another pessimism than the critic was saved with")
    evaluate.add_argument(
        "--tuning", action="store_true", help="use the tuning seeds, to choose strengths on"
    )
    evaluate.add_argument("--num-envs", type=int, default=8, help="simulators at once")
    evaluate.add_argument("--out", type=Path, help="JSON to write")
    evaluate.add_argument(
        "--eval-info",
        type=Path,
        help="directory for each arm's episodes, as lerobot's eval info has them",
    )
    _add_bench(commands)
    return parser


def _add_bench(commands: Any) -> None:
    """Add ``bench latency``, whose policies are random: it needs no task and no checkpoint."""
    from qsteer.testing.hosts import HOSTS, SIZES

    text = "Measure what steering costs."
    bench = commands.add_parser("bench", help=text, description=text)
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="KIND")
    text = "Measure what an action costs, steered and not, on a random policy: nothing to download."
    latency = kinds.add_parser(
        "latency", help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    latency.set_defaults(run=_bench_latency)
    latency.add_argument("--host", choices=HOSTS, default="pi05", help="mlp: the demonstration's policy")
    latency.add_argument(
        "--size", choices=SIZES, default="small", help="small: pi05 of 76 M parameters; full: lerobot's own"
    )
    latency.add_argument("--cameras", type=int, choices=[1, 2, 3], default=2, help="images; mlp has none")
    latency.add_argument("--chunk", type=int, default=10, help="actions of a chunk, such as 10 or 50")
    latency.add_argument("--rows", type=int, default=1, help="observations at once")
    latency.add_argument("--views", action="store_true", help="the critic sees the images too")
    latency.add_argument(
        "--arms", nargs="+", metavar="ARM", help="as for evaluate; default: those of QPILOTS' table and more"
    )
    latency.add_argument("--compile", choices=["static", "graph"], help="how the arms are compiled")
    latency.add_argument("--device", default="cpu", help="cpu or cuda")
    latency.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 for full pi0 and pi05 on CUDA"
    )
    latency.add_argument("--threads", type=int, help="torch's threads; default: as torch chooses")
    latency.add_argument("--repeats", type=int, default=100, help="timed rounds of all arms")
    latency.add_argument("--warmup", type=int, default=5, help="rounds before them")
    latency.add_argument(
        "--cpu-time", action="store_true", help="the process's own time, which others do not stretch"
    )
    latency.add_argument("--out", type=Path, help="JSON to write")
    latency.add_argument("--plot", type=Path, help="picture to write")


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options that were given; the recipe has the others."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _demo(args: argparse.Namespace) -> None:
    from qsteer.experiments.demo import demo

    demo(
        args.task,
        out=args.out,
        episodes=args.episodes,
        num_envs=args.num_envs,
        from_scratch=args.from_scratch,
        seed=args.seed,
    )


def _generate(args: argparse.Namespace) -> None:
    from qsteer.envs.ogbench import generate

    recipe = RECIPES[args.task]
    path = args.data or recipe.data_path
    transitions = recipe.transitions if args.transitions is None else args.transitions
    generate(
        recipe.data,
        path,
        transitions=transitions,
        val_transitions=max(1, transitions // 10),
        seed=args.seed,
        workers=args.workers,
    )
    print(f"{transitions} transitions of {recipe.data}: {path}")


def _train_policy(args: argparse.Namespace) -> None:
    from qsteer.data import Episodes
    from qsteer.envs.ogbench import load
    from qsteer.training import train_policy

    recipe = RECIPES[args.task]
    training = replace(recipe.policy, **_given(args, "seed", "steps"))
    if args.residual_layers is not None:
        hidden = tuple(training.hidden[:1]) * (1 + args.residual_layers)
        training = replace(training, hidden=hidden, residual=True)
    out = args.out or run_directory(args.task, args.seed) / "policy"
    train, _ = load(recipe.task, args.data or recipe.data_path)
    train_policy(Episodes.from_ogbench(train), out, training, device=args.device)
    print(f"policy: {out}")


def _train_critic(args: argparse.Namespace) -> None:
    from qsteer.data import Episodes
    from qsteer.envs.ogbench import load
    from qsteer.training import train_critic

    recipe = RECIPES[args.task]
    training = replace(recipe.critic, **_given(args, "seed", "steps", "target", "members", "rho"))
    out = args.out or run_directory(args.task, args.seed) / "critic"
    train, _ = load(recipe.task, args.data or recipe.data_path)
    train_critic(Episodes.from_ogbench(train), out, training, device=args.device)
    print(f"critic: {out}")


def _distil(args: argparse.Namespace) -> None:
    from qsteer.data import Chunks, Episodes
    from qsteer.envs.ogbench import load
    from qsteer.maps import FlowMap, MapConfig, MetaFlowMap, MetaMapConfig
    from qsteer.policies import FlowPolicy
    from qsteer.training.loop import processes
    from qsteer.training.maps import distil, distil_flow_map
    from qsteer.training.teachers import StateTeacher

    state = processes(args.device)
    recipe, run = RECIPES[args.task], run_directory(args.task, args.seed)
    policy = FlowPolicy.from_pretrained(run / "policy").requires_grad_(False).to(args.device)
    shape = policy.config
    teacher, held_out = (
        StateTeacher(policy, Chunks(Episodes.from_ogbench(d).to(args.device), shape.horizon, 1.0, "actions"))
        for d in load(recipe.task, args.data or recipe.data_path)
    )
    out, given = args.out or run / args.map, _given(args, "seed", "steps")
    kind = MetaMapConfig if args.map == "meta" else MapConfig
    config = kind(
        shape.horizon,
        shape.action_dim,
        shape.hidden[0],
        hidden=recipe.map_hidden,
        harmonics=shape.harmonics,
        residual=True,
    )
    torch.manual_seed(args.seed)
    if isinstance(config, MetaMapConfig):
        meta = MetaFlowMap(config).to(args.device)
        distil(meta, teacher, out, replace(recipe.meta, **given), held_out=held_out)
    else:
        distil_flow_map(FlowMap(config).to(args.device), teacher, out, replace(recipe.flow_map, **given))
    if state.is_main_process:
        print(f"{args.map}: {out}")


def _adapt(args: argparse.Namespace) -> None:
    from qsteer.critics import Critic
    from qsteer.data import Episodes
    from qsteer.envs import ogbench
    from qsteer.evaluation.plots import plot_adaptation
    from qsteer.maps import FlowMap
    from qsteer.online.fmq import adapt
    from qsteer.policies import FlowPolicy
    from qsteer.training.loop import METRICS

    recipe, run = RECIPES[args.task], run_directory(args.task, args.seed)
    given = _given(args, "seed", "steps", "env_steps", "eta") | {"learn_critic": not args.fixed_critic}
    if args.env_steps and args.steps is None:
        given["steps"] = args.env_steps  # one update per environment step
    training = replace(recipe.fmq, **given)
    out = args.out or run / "fmq"
    train, _ = ogbench.load(recipe.task, args.data or recipe.data_path)
    adapt(
        FlowMap.from_pretrained(run / "flow").to(args.device),
        Critic.from_pretrained(args.critic or run / "critic").to(args.device),
        FlowPolicy.from_pretrained(run / "policy").requires_grad_(False).to(args.device),
        Episodes.from_ogbench(train),
        out,
        training,
        make_env=partial(ogbench.make, recipe.task) if training.env_steps else None,
    )
    print(
        f"fmq: {out}, distance to the offline map: {plot_adaptation(out / METRICS, out / 'adaptation.png')}"
    )


def _train_online(args: argparse.Namespace) -> None:
    from qsteer.critics import LiveCritic
    from qsteer.data import Chunks, Episodes
    from qsteer.envs import ogbench
    from qsteer.evaluation.arms import parse
    from qsteer.online.actors import StateActor
    from qsteer.online.loop import train_online
    from qsteer.policies import FlowPolicy
    from qsteer.training.critic import ACTING, LEARNERS, fresh_critic

    recipe, arm = RECIPES[args.task], parse(args.arm)
    given = _given(args, "env_steps", "num_envs", "updates_per_step", "warmup")
    critic = replace(recipe.online.critic, seed=args.seeds[0], **_given(args, "target"))
    training = replace(recipe.online, critic=critic, **given)
    paths = [args.policy or run_directory(args.task, seed) / "policy" for seed in args.seeds]
    policies = [FlowPolicy.from_pretrained(path).requires_grad_(False).to(args.device) for path in paths]
    shape = policies[0].config
    live = LiveCritic(
        fresh_critic(critic.critic_config(shape.obs_dim, shape.action_dim), args.seeds).to(args.device)
    )
    actor = StateActor(policies, live)
    offline = None
    if args.data:
        episodes = Episodes.from_ogbench(ogbench.load(recipe.task, args.data)[0]).to(args.device)
        offline = Chunks(episodes, critic.horizon, critic.gamma, LEARNERS[critic.target].need)
    out = args.out or Path("runs") / args.task / "online" / f"{args.arm}-{critic.target}"
    train_online(
        partial(ogbench.make, recipe.task),
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


def _protocol(args: argparse.Namespace) -> None:
    from qsteer.experiments import protocol

    if args.report:
        print(protocol.table(args.report))
        return
    protocol.task_name(args.domain, args.task)
    data = args.data or Path("runs/data") / f"{protocol.DOMAINS[args.domain].data}.npz"
    out = args.out or Path("runs/protocol") / f"{args.domain}-{args.task}"
    results = protocol.run(
        args.domain, args.task, data, out, seeds=args.seeds, scale=args.scale, device=args.device
    )
    print(f"{protocol.table([results])}\nresults: {results}")


def _evaluate(args: argparse.Namespace) -> None:
    from qsteer.critics import Critic
    from qsteer.envs import ogbench
    from qsteer.envs.seeds import EVALUATION_SEED, TUNING_SEED
    from qsteer.evaluation.arms import Maps, parse
    from qsteer.evaluation.compare import compare, table
    from qsteer.files import write_json
    from qsteer.policies import FlowPolicy

    recipe = RECIPES[args.task]
    policy, critic = FlowPolicy.from_pretrained(args.policy), Critic.from_pretrained(args.critic)
    maps = Maps.load(args.maps) if args.maps else Maps()
    if args.rho is not None:
        critic.config = replace(critic.config, rho=args.rho)
    report, runs = compare(
        partial(ogbench.make, recipe.task),
        policy,
        critic,
        [parse(arm, maps) for arm in args.arms or recipe.arms],
        episodes=args.episodes,
        seed=TUNING_SEED if args.tuning else EVALUATION_SEED,
        num_envs=args.num_envs,
    )
    report = {
        "task": recipe.task,
        "policy": str(args.policy),
        "critic": str(args.critic),
        "rho": critic.config.rho,
    } | report
    print(table(report))
    if args.out:
        write_json(report, args.out)
        print(f"results: {args.out}")
    for run in runs if args.eval_info else ():
        print(f"episodes: {run.save(args.eval_info / f'{run.name}.json')}")


def _bench_latency(args: argparse.Namespace) -> None:
    from qsteer.bench.latency import maps, measure, methods, subject
    from qsteer.bench.report import as_json, table
    from qsteer.evaluation.arms import Maps, parse
    from qsteer.evaluation.plots import plot_latency
    from qsteer.files import write_json

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    measured = subject(
        args.host,
        args.size,
        cameras=args.cameras,
        chunk=args.chunk,
        device=args.device,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        views=args.views,
        rows=args.rows,
    )
    if args.arms:
        meta, flow = maps(measured)
        arms = [parse(spec, Maps(meta, flow, flow)) for spec in args.arms]
        chosen = {arm.spec: (arm.rule, arm.sampler) for arm in arms}
    else:
        chosen = methods(measured)
    clock = time.process_time if args.cpu_time else None
    found = measure(
        measured, chosen, mode=args.compile, repeats=args.repeats, warmup=args.warmup, clock=clock
    )
    report = as_json(found)
    print(table(report))
    if args.out:
        write_json(report, args.out)
        print(f"results: {args.out}")
    if args.plot:
        print(f"picture: {plot_latency(report, args.plot)}")


if __name__ == "__main__":
    main()
