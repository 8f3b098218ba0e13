"""EO1, X-VLA, MolmoAct2 and Wall-X beyond the laws: candidates, features, every rule, grippers."""

import hosts
import pytest
import torch
from torch import Tensor, nn

import qsteer
from qsteer.adapters.closures import read_closure, with_closure
from qsteer.hosts import HostField
from qsteer.testing import vlas


def opened(policy: nn.Module, rows: int = 2, seed: int = 0) -> tuple[HostField, Tensor]:
    """The field of a host, and its noise."""
    field, _, noise = qsteer.open_action(policy, hosts.observe(policy, rows, seed))
    assert isinstance(field, HostField)
    return field, noise


@pytest.mark.parametrize("name", hosts.VLAS)
def test_candidates_on_one_prefix_are_what_they_would_be_alone(name: str):
    """In any order, as often as one likes: no call changes what the next sees. Wall-X is in bfloat16."""
    policy, near = hosts.shared(name), {"rtol": 0.05, "atol": 0.02} if name == "wall_x" else {}
    field, noise = opened(policy)
    torch.manual_seed(0)
    x = field.draws(noise, 3).flatten(0, 1)
    alone = torch.stack([field(x.unflatten(0, (2, 3))[:, i], 0.3) for i in range(3)], 1).flatten(0, 1)
    for _ in range(2):
        torch.testing.assert_close(field.repeat(3)(x, 0.3), alone, **near)
        torch.testing.assert_close(field.repeat(3)(x, torch.full((6,), 0.3)), alone, **near)
    mixed = torch.tensor([0.3, 0.6])
    apart = torch.stack([field(noise, t.item())[i] for i, t in enumerate(mixed)])
    torch.testing.assert_close(field(noise, mixed), apart, **near)
    assert not torch.allclose(alone[0], alone[1], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", hosts.VLAS)
def test_features_are_of_the_observations(name: str):
    policy = hosts.shared(name)
    first, again, other = (qsteer.critics.pooled(opened(policy, seed=seed)[0].features) for seed in (0, 0, 1))
    assert first.shape[0] == 2 and torch.equal(first, again)
    assert (first - other).abs().amax(1).min() > 1e-3


def loop(scale: Tensor, shift: float):
    def inside(x: Tensor, t: float, *, sign: int = 1) -> Tensor:
        return sign * (scale * x + shift + t)

    return inside


def test_a_function_on_other_variables_is_the_same_function():
    scale, x = torch.tensor(2.0), torch.ones(2)
    function = loop(scale, 0.5)
    variables = read_closure(function)
    assert variables == {"scale": scale, "shift": 0.5}
    other = with_closure(function, variables | {"scale": torch.tensor(3.0), "beside": 1})
    assert torch.equal(other(x, 1.0), torch.full((2,), 4.5))
    assert torch.equal(other(x, 1.0, sign=-1), torch.full((2,), -4.5))
    assert torch.equal(function(x, 1.0), torch.full((2,), 3.5)), "its own variables are as they were"


def test_what_is_no_function_of_a_loop_is_refused():
    def early():
        function = lambda x: x + later  # noqa: E731
        read_closure(function)
        later = 1
        return later

    with pytest.raises(RuntimeError, match=r"local: expected a function inside the host's loop"):
        early()
    with pytest.raises(RuntimeError, match=r"expected a function inside the host's loop.*got <built-in"):
        read_closure(torch.neg)


RULES = (
    qsteer.Tweedie(0.3),
    qsteer.Tweedie(0.3, layers=1),
    qsteer.ForwardTweedie(0.3),
    qsteer.QGF(0.3, scaling="match_norm"),
    qsteer.ThroughTime(0.3),
    qsteer.Posterior(qsteer.maps.GlassPosterior(steps=2), 0.3, 2),
)


@pytest.mark.parametrize("name", hosts.VLAS)
def test_every_rule_runs_and_finds_better_actions(name: str):
    """X-VLA's random weights have no covariance for a Jacobian: there only QGF is sure to go uphill."""
    policy, critic = hosts.shared(name), hosts.Target()
    hosts.set_steps(policy, 4)
    value = critic.bind(hosts.observe(policy, 2))
    base = hosts.chunk(policy)[:, :4]
    found = {}
    layers = hosts.host_of(policy).layers
    rules = [rule for rule in RULES if layers or getattr(rule, "layers", None) is None]
    for rule in rules:
        with qsteer.steer(policy, critic, rule):
            found[rule] = hosts.chunk(policy)[:, :4]
        assert torch.isfinite(found[rule]).all() and not torch.equal(found[rule], base)
        if name != "xvla" or isinstance(rule, qsteer.QGF):
            assert (value(found[rule]) > value(base)).all(), rule
    if layers:
        assert not torch.equal(found[RULES[0]], found[RULES[1]])
    for sampler in (qsteer.BestOfN(4), qsteer.BeamSearch(2, 2), qsteer.KeepBest()):
        with qsteer.steer(policy, critic, RULES[3], sampler=sampler):
            assert (value(hosts.chunk(policy)[:, :4]) >= value(base)).all(), sampler


@pytest.mark.parametrize("name", ["xvla"])
def test_all_layers_are_the_whole_gradient_to_the_bit(name: str):
    policy = hosts.shared(name)
    field, noise = opened(policy)
    value = hosts.Target().bind(hosts.observe(policy, 2))
    mine = qsteer.value(lambda a: value(a[:, :4, :3]))
    pushes = [qsteer.Tweedie(1.0, layers=n)(field, mine)(noise, 0.5) for n in (None, 2, 1)]
    assert torch.equal(pushes[0], pushes[1])
    assert not torch.allclose(pushes[0], pushes[2], rtol=1e-3)


class Grip(nn.Module):
    """Wants the first gripper open at every step; remembers what it was shown."""

    def bind(self, obs: dict[str, Tensor]) -> qsteer.Value:
        self.seen: list[Tensor] = []
        return qsteer.value(self.score)

    def score(self, a: Tensor) -> Tensor:
        self.seen.append(a.detach())
        return a[..., 6].sum(1)


def test_x_vlas_grippers_are_seen_as_the_robot_does():
    """Joint space: 14 dimensions, of which 6 and 13 are logits to the policy."""
    policy, critic, seen = vlas.xvla(steps=4, space="joint", action=14), Grip(), []
    base = hosts.chunk(policy)
    assert base.shape == (2, 6, 14)
    for method in (qsteer.Euler(), qsteer.Tweedie(0.0), qsteer.BestOfN(1)):
        with qsteer.steer(policy, critic, method):
            assert torch.equal(hosts.chunk(policy), base)
    with qsteer.steer(policy, critic, qsteer.Tweedie(0.3), sampler=hosts.Spy(seen)):
        bent = hosts.chunk(policy)
    shown = torch.stack([a for a in critic.seen if len(a) == 2])
    assert shown[..., [6, 13]].min() > 0 and shown[..., [6, 13]].max() < 1
    assert shown[..., 0].min() < 0
    assert (bent[:, :4, 6].sum(1) > base[:, :4, 6].sum(1)).all()
    steered, value, x = seen[0]
    field, qgf = steered.base, qsteer.QGF(0.3)
    push = steered(x, 0.5) - field(x, 0.5)
    assert (push[..., 6] == 0).all(), "no gradient: the network never sees a gripper's entry of x"
    assert (push[:, :4, :6] != 0).any()
    assert (qgf(field, value)(x, 0.5) - field(x, 0.5))[:, :4, 6].min() > 0, "along the sigmoid's slope"
    assert field.bounds is None


def test_molmoacts_padding_stays_empty():
    """Noise, further candidates and velocity: 3 of 32 dimensions."""
    field, noise = opened(hosts.shared("molmoact2"))
    more = field.draws(noise, 50)
    assert (noise[..., :3] != 0).all() and more[..., :3].std() > 0.8
    for each in (noise, more, field(noise, 0.3), field.repeat(2)(more[:, :2].flatten(0, 1), 0.3)):
        assert each.shape[-1] == 32 and (each[..., 3:] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"inference_action_mode": "discrete"},
            "got inference_action_mode='discrete'; set it to 'continuous'",
        ),
        ({"enable_lora_vlm": True}, "got enable_lora_vlm=True; merge the adapters"),
    ],
)
def test_molmoact_without_its_loop_is_refused(change, message, monkeypatch: pytest.MonkeyPatch):
    policy = hosts.shared("molmoact2")
    for name, given in change.items():
        monkeypatch.setattr(policy.config, name, given)
    with pytest.raises(TypeError, match=message):
        qsteer.steer(policy, hosts.Target(), hosts.STRONG)


def test_molmoacts_own_cuda_graph_is_to_be_switched_off(monkeypatch: pytest.MonkeyPatch):
    """As lerobot does it: by its configuration, and eval()."""
    policy = hosts.build("molmoact2")
    monkeypatch.setattr(type(policy.model.model), "device", torch.device("cuda"))
    with pytest.raises(TypeError, match=r"CUDA graph; set policy.config.enable_inference_cuda_graph = False"):
        qsteer.steer(policy, hosts.Target(), hosts.STRONG)
    policy.config.enable_inference_cuda_graph = False
    policy.eval()
    with qsteer.steer(policy, hosts.Target(), hosts.STRONG) as handle:
        assert "steers the first 4 of 6 steps, 3 dimensions" in repr(handle)


def test_molmoacts_own_chunking_is_refused():
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    policy = hosts.build("molmoact2")
    with qsteer.steer(policy, hosts.Target(), hosts.STRONG):
        policy.config.rtc_config = RTCConfig()
        policy.init_rtc_processor()
        with pytest.raises(RuntimeError, match="expected it to call"):
            hosts.chunk(policy)
    with pytest.raises(RuntimeError, match="expected real-time chunking to be off"):
        qsteer.steer(policy, hosts.Target(), hosts.STRONG)


def test_wall_x_without_its_loop_is_refused(monkeypatch: pytest.MonkeyPatch):
    policy = hosts.shared("wall_x")
    monkeypatch.setattr(policy.config, "prediction_mode", "fast")
    with pytest.raises(TypeError, match="got prediction_mode='fast'; set it to 'diffusion'"):
        qsteer.steer(policy, hosts.Target(), hosts.STRONG)
