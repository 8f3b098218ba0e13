"""Misuse of each command ends with one line that names the file or the option, and exit status 2."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import qsteer
from qsteer import cli
from qsteer.cli import bench, main
from qsteer.cli.options import TASKS
from qsteer.critics import Critic, CriticConfig
from qsteer.experiments.tasks import RECIPES
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.testing import hosts

COLUMNS = {name: np.zeros((4, 2), np.float32) for name in ("observations", "actions", "qpos", "qvel")}
COLUMNS["terminals"] = np.array([0, 0, 0, 1], np.float32)


@pytest.fixture
def networks(tmp_path: Path) -> Path:
    """A folder with ``policy`` and ``critic``."""
    shape = {"obs_dim": 3, "action_dim": 2, "horizon": 4, "hidden": (8,)}
    FlowPolicy(FlowPolicyConfig(**shape)).save_pretrained(tmp_path / "policy")
    Critic(CriticConfig(**shape)).save_pretrained(tmp_path / "critic")
    return tmp_path


def misuse(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """Return the line with which a command refuses."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in argv])
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("qsteer")
    return lines[0]


def evaluate(
    folder: Path, *more: object, policy: str = "policy", critic: str = "critic"
) -> tuple[object, ...]:
    return "evaluate", "--policy", folder / policy, "--critic", folder / critic, *more


def test_the_lists_of_the_help_are_those_of_the_modules() -> None:
    assert TASKS == tuple(RECIPES)
    assert (bench.HOSTS, bench.SIZES) == (hosts.HOSTS, hosts.SIZES)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_neither_help_nor_version_wait_for_torch(option: str) -> None:
    code = (
        "import sys\nfrom qsteer.cli import main\n"
        f"try: main([{option!r}])\nexcept SystemExit as left: print(left.code, 'torch' in sys.modules)"
    )
    told = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert told.endswith("0 False\n")
    assert option != "--version" or qsteer.__version__ in told


def test_policy_and_critic_swapped(networks: Path, capsys: pytest.CaptureFixture) -> None:
    line = misuse(capsys, *evaluate(networks, critic="policy"))
    assert "policy/config.json: expected the configuration of a Critic, got that of a FlowPolicy" in line
    line = misuse(capsys, *evaluate(networks, policy="critic"))
    assert "critic/config.json: expected the configuration of a FlowPolicy, got that of a Critic" in line


DAMAGES = {
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors: .*an empty one"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:300]),
        "model.safetensors: .*broken file",
    ),
    "pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "model.safetensors: .*git lfs pull",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: .*got none"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: .*got none"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: expected JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: .*got list"),
    "no folder": (shutil.rmtree, "got nothing there"),
    "text": (lambda f: change(f, obs_dim="3"), "config.json: .*obs_dim: expected int, got '3'"),
    "half": (lambda f: change(f, horizon=2.5), "config.json: .*horizon: expected int, got 2.5"),
    "huge": (lambda f: change(f, hidden=[10**6] * 3), "config.json: .*copy or save both"),
    "endless": (lambda f: change(f, obs_dim=10**30), "config.json: .*cannot be"),
    "negative": (lambda f: change(f, horizon=-1), "config.json: .*horizon: expected at least 1"),
    "unknown": (lambda f: change(f, colour=1), "config.json: .*unknown colour"),
    "other size": (lambda f: change(f, hidden=[7]), "model.safetensors: .*got others"),
    "a weight less": (lambda f: drop(f / "model.safetensors"), "model.safetensors: .*got others"),
}


def change(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def drop(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)


@pytest.mark.parametrize("kind", ["policy", "critic"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_network_is_named(
    damage: str, kind: str, networks: Path, capsys: pytest.CaptureFixture
) -> None:
    harm, text = DAMAGES[damage]
    harm(networks / kind)
    line = misuse(capsys, *evaluate(networks))
    assert str(networks / kind) in line
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        {"policy": FlowPolicy, "critic": Critic}[kind].from_pretrained(networks / kind)


@pytest.mark.parametrize("command", ["train-policy", "train-critic"])
@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({}, "got no observations"),
        ({name: COLUMNS[name] for name in COLUMNS if name != "actions"}, "got no actions among observations"),
        (COLUMNS | {"actions": np.zeros((3, 2))}, "'actions': 3"),
        ({name: column[:0] for name, column in COLUMNS.items()}, "at least one"),
        (COLUMNS | {"actions": np.full((4, 2), "a")}, "expected numbers"),
        (b"", "an empty one"),
        (b"PK\x03\x04 and no more", "expected a whole .npz"),
        (None, "generate"),
    ],
)
def test_broken_data_is_named(
    command: str, columns: object, text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("ogbench")
    for file in (tmp_path / "d.npz", tmp_path / "d-val.npz") if columns is not None else ():
        file.write_bytes(columns) if isinstance(columns, bytes) else np.savez(file, **columns)
    line = misuse(capsys, command, "--data", tmp_path / "d.npz", "--out", tmp_path / "run")
    assert "d.npz" in line and text in line


COMMANDS = (
    "train-policy",
    "train-critic",
    "distill",
    "adapt",
    "train-online",
    "protocol",
    "demo",
    "evaluate",
)


@pytest.mark.parametrize("command", [*COMMANDS, "generate"])
def test_an_output_is_checked_before_the_work(
    command: str, networks: Path, capsys: pytest.CaptureFixture
) -> None:
    file = networks / "file"
    file.touch()
    argv: tuple[object, ...] = (command, "--out", file / "run")
    if command == "generate":
        argv = (command, "--data", file / "a.npz")
    elif command == "evaluate":
        argv = evaluate(networks, "--out", file / "a.json")
    assert f"got the file {file}" in misuse(capsys, *argv)


def test_a_directory_or_a_strange_suffix_is_no_output(networks: Path, capsys: pytest.CaptureFixture) -> None:
    assert f"{networks}: expected a file" in misuse(capsys, *evaluate(networks, "--out", networks))
    latency = "bench", "latency", "--host", "mlp", "--size", "tiny"
    assert f"{networks}: expected a file" in misuse(capsys, *latency, "--out", networks)
    assert "expected a file that ends in" in misuse(capsys, *latency, "--plot", networks / "a.xyz")
    assert "expected a file that ends in .npz" in misuse(capsys, "generate", "--data", networks / "a.txt")


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (("demo", "--episodes", "-1"), "--episodes"),
        (("demo", "--num-envs", "0"), "--num-envs"),
        (("generate", "--transitions", "-5"), "--transitions"),
        (("train-policy", "--steps", "-5"), "--steps"),
        (("train-policy", "--seed", "-5"), "--seed"),
        (("train-critic", "--rho", "-0.5"), "--rho"),
        (("train-critic", "--rho", "nan"), "--rho"),
        (("adapt", "--env-steps", "-1"), "--env-steps"),
        (("train-online", "--warmup", "x"), "--warmup"),
        (("protocol", "--scale", "0"), "--scale"),
        (("bench", "latency", "--repeats", "-2"), "--repeats"),
        (("train-policy", "--device", "cuda:99"), "--device"),
        (("train-critic", "--device", "toaster"), "--device"),
        (("demo", "--task", "cube"), "--task"),
        (("train-online", "--env-options", "camera"), "--env-options"),
    ],
)
def test_a_wrong_value_names_its_option(
    argv: tuple[str, ...], option: str, capsys: pytest.CaptureFixture
) -> None:
    assert f"argument {option}: " in misuse(capsys, *argv)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("demo", "--host", "smolvla", "--task", "cube-single"), "for --host smolvla, got 'cube-single'"),
        (("demo", "--task", "push-v3"), "for --host mlp, got 'push-v3'"),
        (("distill", "--depth", "8"), "--depth: expected none without --dataset"),
        (("distill", "--dataset", "d", "--task", "scene"), "--task: expected none beside --dataset"),
        (("distill", "--dataset", "d", "--policy", "p"), "--out: expected it beside --dataset"),
        (("train-online", "--features"), "--features: expected none without --env"),
        (("train-online", "--envs-per-actor", "2"), "--envs-per-actor: expected none without --ray"),
        (("train-online", "--ray", "here"), "expected auto, local or HOST:PORT, got 'here'"),
        (("train-online", "--env", "pusht", "--policy", "p"), "--out: expected it beside --env"),
        (("train-online", "--env", "pusht", "--task", "scene"), "--task: expected none beside --env"),
    ],
)
def test_options_that_do_not_go_together_are_named(
    argv: tuple[str, ...], told: str, capsys: pytest.CaptureFixture
) -> None:
    assert told in misuse(capsys, *argv)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"domain": 1, "task": 1, "seeds": []}', "[[[1"])
def test_a_strange_report_is_named(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "results.json").write_text(text)
    assert f"{tmp_path / 'results.json'}: expected" in misuse(
        capsys, "protocol", "--report", tmp_path / "results.json"
    )
    assert "none.json: expected" in misuse(capsys, "protocol", "--report", tmp_path / "none.json")


def test_an_unknown_arm_has_a_nearest(networks: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("ogbench")
    line = misuse(capsys, *evaluate(networks, "--arms", "tweedy=0.2"))
    assert "got 'tweedy=0.2'" in line and "the nearest name is 'tweedie'" in line


@pytest.mark.parametrize("checkpoint", [False, True])
def test_an_interrupt_promises_a_checkpoint_only_where_there_is_one(
    checkpoint: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qsteer.envs.ogbench.load", interrupt)
    if checkpoint:
        (tmp_path / "checkpoint.safetensors").touch()
    with pytest.raises(SystemExit, match="130"):
        main(["train-policy", "--out", str(tmp_path)])
    told = capsys.readouterr().err
    assert (f"goes on from the last checkpoint in {tmp_path}" in told) is checkpoint
    assert ("no checkpoint yet" in told) is not checkpoint


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for bug in (
        lambda *_, **__: int("x"),
        lambda *_, **__: {}["x"],
        lambda *_, **__: np.zeros((2, 3)).reshape(5),
    ):
        monkeypatch.setattr("qsteer.envs.ogbench.load", bug)
        with pytest.raises((ValueError, KeyError)):
            main(["train-policy"])
    assert not cli.is_misuse(ValueError("never raised"))
