"""A tiny distillation, in this process or as a script: killed in the middle, or by several processes.

``python distilling.py DIRECTORY kill`` kills itself with SIGKILL in the middle of every kind of run;
``torchrun ... distilling.py DIRECTORY`` finishes them, and each process leaves its number.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from play_data import A, H, episodes
from safetensors.torch import load_file
from torch import Tensor

from qsteer.data import Chunks
from qsteer.maps import FlowMap, MapConfig, MetaFlowMap, MetaMapConfig
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.training import FlowMapTraining, MetaTraining, StateTeacher, distil, distil_flow_map
from qsteer.training.loop import Learner, processes
from qsteer.training.maps import FlowMapDistillation, MetaDistillation

META = MetaTraining(
    steps=14, batch_size=8, log_every=2, checkpoint_every=5, evaluate_every=4, warmup=3, learning_rate=1e-2
)
FLOW = FlowMapTraining(
    steps=14,
    batch_size=8,
    log_every=2,
    checkpoint_every=5,
    distillation="eulerian",
    diagonal_steps=3,
    anneal_steps=6,
    zero_share=0.0,
    one_share=0.0,
)
KINDS: dict[str, type[Learner]] = {"meta": MetaDistillation, "flow": FlowMapDistillation}


def teacher(seed: int = 0) -> StateTeacher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = FlowPolicy(FlowPolicyConfig(3, A, H, (8,)))
    return StateTeacher(policy, Chunks(episodes(seed), H, 1.0, "actions"))


def untrained(kind: str) -> MetaFlowMap | FlowMap:
    torch.manual_seed(1)
    if kind == "flow":
        return FlowMap(MapConfig(*teacher().sizes(), hidden=(8,), harmonics=2))
    return MetaFlowMap(MetaMapConfig(*teacher().sizes(), hidden=(8,), harmonics=2))


def train(kind: str, out: Path) -> MetaFlowMap | FlowMap:
    model = untrained(kind)
    if isinstance(model, FlowMap):
        return distil_flow_map(model, teacher(), out, FLOW, progress=False)
    return distil(model, teacher(), out, META, held_out=teacher(1), progress=False)


def kill_at(step: int, kind: str) -> None:
    """Make the process end in the ``step``-th loss as a power failure would end it."""
    learner, count = KINDS[kind], 0
    loss = learner.loss

    def counted(self: Learner, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(self, generator)

    learner.loss = counted


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "checkpoint.safetensors")


def run_python(*arguments: str | Path) -> None:
    found = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(found)}
    subprocess.run([sys.executable, *arguments], env=environment, check=True, timeout=280)


def make_learner(kind: str, residual: bool = True) -> Learner:
    torch.manual_seed(1)
    sizes = teacher().sizes()
    if kind == "meta":
        config = MetaMapConfig(*sizes, hidden=(8,), harmonics=2, residual=residual)
        return MetaDistillation(MetaFlowMap(config), teacher(), META)
    config = MapConfig(*sizes, hidden=(8,), residual=residual)
    flow = FlowMapDistillation(FlowMap(config), teacher(), FLOW)
    flow.step += 8
    return flow


def main(out: Path, kill: bool) -> None:
    torch.set_num_threads(1)
    for kind in KINDS:
        if kill and os.fork() == 0:
            kill_at(13, kind)  # past a checkpoint, and past metrics after it
        elif kill:
            assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL
            continue
        train(kind, out / kind)
    if not kill:
        state = processes("cpu")
        (out / f"process {state.process_index} of {state.num_processes}").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), "kill" in sys.argv)
