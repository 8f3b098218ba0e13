"""A steering in a directory: what comes back acts as what was saved, bit for bit."""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path

import hosts
import product_cases
import pytest
import torch
from torch import Tensor, nn

import qsteer
from qsteer.maps import FlowMap, MetaFlowMap
from qsteer.maps.flow_maps import MapConfig
from qsteer.maps.meta import MetaMapConfig
from qsteer.steering.parts import decode, encode
from qsteer.types import Field, Rule, Value

METHODS = [
    *((rule, None) for rules in product_cases.RULES.values() for rule in rules),
    *((None, sampler) for sampler in product_cases.SAMPLERS.values()),
    (qsteer.Tweedie(alpha=qsteer.Auto(caution=2.0)), qsteer.BestOfN(2, inner=qsteer.KeepBest())),
    (qsteer.Gated(qsteer.Negated(qsteer.QGF()), limit=float("inf")), qsteer.Euler(clip="policy")),
]


@pytest.fixture(scope="module")
def critic() -> qsteer.Critic:
    torch.manual_seed(0)
    return qsteer.Critic(qsteer.CriticConfig(obs_dim=4, action_dim=3, horizon=4, hidden=(16, 16), members=3))


def act(policy: nn.Module) -> Tensor:
    torch.manual_seed(5)
    return hosts.chunk(policy)


@pytest.mark.parametrize(("rule", "sampler"), METHODS, ids=str)
def test_every_method_comes_back(critic, tmp_path, rule, sampler):
    policy = hosts.build("plain")
    with qsteer.steer(policy, critic, rule, sampler=sampler) as handle:
        steered = act(policy)
        handle.save_pretrained(tmp_path / "saved")
    before = torch.get_rng_state()
    with qsteer.load(tmp_path / "saved", policy=policy) as handle:
        assert torch.equal(torch.get_rng_state(), before)
        assert (handle.rule, handle.sampler) == (rule, sampler or qsteer.Euler())
        assert torch.equal(act(policy), steered)
    assert sum(file.stat().st_size for file in (tmp_path / "saved").rglob("*")) < 100_000


@pytest.mark.parametrize("name", hosts.LEROBOT)
def test_a_policy_of_lerobots_by_its_own_object(critic, tmp_path, name):
    policy = hosts.build(name)
    with qsteer.steer(policy, critic, hosts.STRONG, executed=4) as handle:
        steered = act(policy)
        base = tmp_path / "base"
        policy.config.save_pretrained(base)
        saved = handle.save_pretrained(tmp_path / "saved", base=base, revision="abc")
    told = json.loads((saved / "steering.json").read_text())["base"]
    assert (told["path"], told["revision"]) == (str(base), "abc")
    assert json.loads((saved / "config.json").read_text())["type"] == "qsteer"
    assert str(base) in (saved / "README.md").read_text()
    assert not (saved / "model.safetensors").exists()
    with qsteer.load(saved, policy=policy) as handle:
        assert handle.executed == 4
        assert torch.equal(act(policy), steered)


def test_learnt_maps_come_back_once(critic, tmp_path):
    torch.manual_seed(1)
    meta = MetaFlowMap(MetaMapConfig(5, 3, 4, hidden=(8,)))
    flow = FlowMap(MapConfig(5, 3, 4, hidden=(8,)))
    policy = hosts.build("plain")
    rule, sampler = qsteer.Posterior(meta, samples=2), qsteer.BeamSearch(2, 2, flow_map=flow)
    text = json.dumps(
        encode(
            (rule, sampler, rule), lambda module: {"MetaFlowMap": "m", "FlowMap": "f"}[type(module).__name__]
        )
    )
    back = decode(json.loads(text), lambda kind, at: {"m": meta, "f": flow}[at])
    assert back[0].posterior is meta and back[1].flow_map is flow
    handle = qsteer.steer(policy, critic, rule, sampler=qsteer.KeepBest(sampler))
    handle.save_pretrained(tmp_path)
    handle.remove()
    assert len(list((tmp_path / "maps").iterdir())) == 2
    loaded = qsteer.load(tmp_path, policy=policy)
    assert isinstance(loaded.rule, qsteer.Posterior)
    for ours, theirs in ((meta, loaded.rule.posterior), (flow, loaded.sampler.inner.flow_map)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        assert not any(p.requires_grad for p in theirs.parameters())
    loaded.remove()


def test_a_live_critic_is_saved_as_it_acts(critic, tmp_path):
    policy, live = hosts.build("plain"), qsteer.LiveCritic(critic)
    with qsteer.steer(policy, live, hosts.STRONG) as handle:
        steered = act(policy)
        handle.save_pretrained(tmp_path)
    with qsteer.load(tmp_path, policy=policy):
        assert torch.equal(act(policy), steered)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_comes_back(critic, tmp_path, dtype):
    policy, critic = hosts.build("plain").to(dtype), copy.deepcopy(critic).to(dtype)
    with qsteer.steer(policy, critic, hosts.STRONG) as handle:
        handle.save_pretrained(tmp_path)
    with qsteer.load(tmp_path, policy=policy) as handle:
        pairs = zip(critic.parameters(), handle.critic.parameters(), strict=True)
        assert all(torch.equal(ours, theirs) and theirs.dtype == dtype for ours, theirs in pairs)


def test_the_fast_path_and_the_trace_come_back(critic, tmp_path):
    policy = hosts.build("plain")
    with qsteer.steer(policy, critic, hosts.STRONG, compile="static", trace=True) as handle:
        act(policy)
        handle.save_pretrained(tmp_path)
    with qsteer.load(tmp_path, policy=policy) as handle:
        act(policy)
        assert handle.compile == "static" and handle.trace.actions


def test_another_policy_is_refused(critic, tmp_path):
    policy = hosts.build("plain")
    with qsteer.steer(policy, critic, hosts.STRONG) as handle:
        handle.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected the weights that were steered, fingerprint \w+, got \w+"):
        qsteer.load(tmp_path, policy=hosts.build("plain", seed=1))
    policy.velocity.net[0].bias.data[3] += 1e-6
    with pytest.raises(ValueError, match="expected the weights that were steered"):
        qsteer.load(tmp_path, policy=policy)
    with pytest.raises(ValueError, match="expected the Plain that was steered, got PI05Policy"):
        qsteer.load(tmp_path, policy=hosts.shared("pi05"))
    with pytest.raises(
        ValueError, match=r"no checkpoint of it is known, got none; pass qsteer.load\(..., policy="
    ):
        qsteer.load(tmp_path)


def test_a_policy_with_other_settings_is_refused(critic, tmp_path):
    policy = hosts.build("plain")
    with qsteer.steer(policy, critic, hosts.STRONG) as handle:
        handle.save_pretrained(tmp_path)
    hosts.set_steps(policy, 7)
    with pytest.raises(ValueError, match=r"expected steps = 10, with which it was steered, got 7"):
        qsteer.load(tmp_path, policy=policy)
    hosts.set_steps(policy, 10)
    policy.executed = 5
    with pytest.raises(ValueError, match=r"expected horizon = 4, with which it was steered, got 5"):
        qsteer.load(tmp_path, policy=policy)


@dataclass(frozen=True)
class Mine(Rule):
    def __call__(self, field: Field, value: Value) -> Field:
        return field


def test_what_cannot_be_saved_says_so(critic, tmp_path):
    policy = hosts.build("plain")
    for rule, name in ((Mine(), "Mine"), (qsteer.Posterior(lambda e, x, t: e), "function")):
        with qsteer.steer(policy, critic, rule) as handle:
            with pytest.raises(TypeError, match=rf"of qsteer's own, got .*{name}.*steer with it in code"):
                handle.save_pretrained(tmp_path / "no")
    with qsteer.steer(policy, hosts.Target(), hosts.STRONG) as handle:
        with pytest.raises(TypeError, match=r"expected a qsteer.Critic, got Target"):
            handle.save_pretrained(tmp_path / "no")
    with qsteer.steer(policy, critic, critic_inputs=lambda batch: batch) as handle:
        with pytest.raises(TypeError, match="critic_inputs, a function, which cannot be saved"):
            handle.save_pretrained(tmp_path / "no")
    with pytest.raises(RuntimeError, match="removed"):
        handle.save_pretrained(tmp_path / "no")
    with qsteer.steer(hosts.build("pi05"), critic) as handle:
        with pytest.raises(ValueError, match=r"config.pretrained_path says where its checkpoint is.*base="):
            handle.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def spoil(folder: Path, **changes: object) -> None:
    path = folder / "steering.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, r"expected format 1, got 2; load it with the version of qsteer"),
        ({"rule": {"class": "Newer", "alpha": 1}}, r"got the class 'Newer'"),
        ({"rule": {"class": "Tweedie", "beta": 1}}, r"got Tweedie's \['beta'\]"),
        ({"rule": {"class": "Tweedie", "alpha": -1.0}}, r"expected a finite strength of at least 0"),
        ({"sampler": {"class": "system", "n": 1}}, r"got the class 'system'"),
        (
            {"rule": {"class": "Posterior", "posterior": {"module": "MetaFlowMap", "at": "../other"}}},
            r"expected a folder inside it, got '../other'",
        ),
    ],
)
def test_a_directory_that_is_not_understood(critic, tmp_path, changes, message):
    policy = hosts.build("plain")
    with qsteer.steer(policy, critic, hosts.STRONG) as handle:
        handle.save_pretrained(tmp_path)
    spoil(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        qsteer.load(tmp_path, policy=policy)
    hosts.chunk(policy)


def test_a_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the folder of a saved steering, got nothing there"):
        qsteer.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"steering.json"):
        qsteer.load(tmp_path)


def test_a_save_replaces_what_was_there(critic, tmp_path):
    policy = hosts.build("plain")
    with qsteer.steer(policy, critic, hosts.STRONG) as handle:
        handle.save_pretrained(tmp_path / "saved")
        (tmp_path / "saved" / "stale").write_text("")
        handle.swap(rule=replace(hosts.STRONG, alpha=0.1))
        handle.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "stale").exists()
    with qsteer.load(tmp_path / "saved", policy=policy) as handle:
        assert handle.rule.alpha == 0.1
