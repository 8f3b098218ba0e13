import pytest
import torch

import qsteer
from qsteer.critics import Critic, CriticConfig
from qsteer.evaluation.arms import RULES, SAMPLERS, WORDS, Maps, describe_arm, parse
from qsteer.maps import FlowMap, GlassPosterior, MapConfig, MetaFlowMap, MetaMapConfig
from qsteer.policies import FlowPolicy, FlowPolicyConfig


def test_an_arm_is_what_its_name_says():
    arm = parse("tweedie=0.3+best-of-4+keep-best")
    euler = qsteer.Euler(clip="policy")
    assert arm.rule == qsteer.Tweedie(alpha=0.3)
    assert arm.sampler == qsteer.KeepBest(qsteer.BestOfN(4, euler))
    assert (arm.name, arm.kind) == ("tweedie+best-of-4+keep-best", "steered")
    assert parse("qgf=0.02").rule == qsteer.QGF(weight=0.02)
    assert parse("qgf-matched=0.2").rule == qsteer.QGF(weight=0.2, scaling="match_norm")
    assert parse("negated=0.2").rule == qsteer.Negated(qsteer.Tweedie(alpha=0.2))
    assert parse("base") == parse("base") and parse("base").rule is None and parse("base").sampler == euler


def test_arms_on_learnt_maps_take_them_from_where_they_lie(tmp_path):
    meta = MetaFlowMap(MetaMapConfig(4, 2, 16, hidden=(8,)))
    flow, fmq = (FlowMap(MapConfig(4, 2, 16, hidden=(8,), residual=True)) for _ in range(2))
    for name, model in ("meta", meta), ("flow", flow), ("fmq", fmq):
        model.save_pretrained(tmp_path / name)
    maps, euler = Maps.load(tmp_path), qsteer.Euler(clip="policy")
    assert parse("posterior=0.3", maps).rule == qsteer.Posterior(maps.meta, alpha=0.3)
    raw = qsteer.Posterior(maps.meta, alpha=0.06, scaling="raw", standardize=False)
    assert parse("posterior-raw=0.06", maps).rule == raw
    assert parse("posterior-glass=0.2").rule == qsteer.Posterior(GlassPosterior(), alpha=0.2)
    assert parse("gradient-free=0.2", maps).rule == qsteer.GradientFreePosterior(maps.meta, alpha=0.2)
    beam = qsteer.BeamSearch(eta=0.15, flow_map=maps.flow, inner=euler)
    assert parse("beam-search-map=0.15", maps).sampler == beam
    best = qsteer.BeamSearch(32, rounds=0, eta=0.0, flow_map=maps.fmq, inner=euler)
    assert parse("fmq-best-of-32", maps).sampler == best
    adaptive = qsteer.TrustRegion(0.3, 0.3, euler)
    assert parse("trust-region-adaptive=0.3").sampler == adaptive
    assert parse("map-best-of-1", maps).kind == "control"
    with pytest.raises(FileNotFoundError, match=r"expected a trained 'meta' map.*qsteer distill"):
        parse("posterior=0.2")
    assert Maps.load(tmp_path / "none") == Maps()


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("base", "base"),
        ("best-of-8", "steered"),
        ("random-of-8", "control"),
        ("random-direction=0.2", "control"),
        ("random-qgf=0.06", "control"),
        ("feynman-kac=1", "steered"),
        ("feynman-kac=0", "control"),
    ],
)
def test_controls_are_told_from_treatments(spec, kind):
    assert parse(spec).kind == kind


@pytest.mark.parametrize(
    "spec",
    [
        "tweedy=0.2",
        "tweedie",
        "best-of-",
        "best-of-0",
        "tweedie=0.2+qgf=0.2",
        "tweedie=-1",
        "keep-best=3",
        "",
    ],
)
def test_a_wrong_name_says_what_names_there_are(spec):
    with pytest.raises(ValueError, match="expected"):
        parse(spec)


def test_the_base_arm_is_the_policys_own_euler_chain():
    torch.manual_seed(0)
    policy = FlowPolicy(FlowPolicyConfig(obs_dim=3, action_dim=2, horizon=4, hidden=(16,)))
    critic = Critic(CriticConfig(obs_dim=3, action_dim=2, horizon=4, hidden=(16,)))
    obs, noise = torch.randn(5, 3), torch.randn(5, 4, 2)
    x = noise
    with torch.no_grad():
        for i in range(10):
            x = x + 0.1 * policy(obs, x, torch.full((5,), i * 0.1))
    torch.testing.assert_close(parse("base").agent(policy, critic)(obs, noise), x.clamp(-1, 1))
    steered = parse("tweedie=0.5").agent(policy, critic)(obs, noise)
    arm = parse("tweedie=0.5")
    torch.testing.assert_close(arm.agent(policy, critic, compile="static")(obs, noise), steered)
    torch.testing.assert_close(arm.agent(policy, critic, compile="graph", rows=6)(obs, noise), steered)
    with pytest.raises(ValueError, match="expected noise on a CUDA device"):
        arm.agent(policy, critic, compile="graph", rows=5)(obs, noise)
    value = critic.bind(obs)
    assert (value(steered) > value(x.clamp(-1, 1))).float().mean() > 0.5


def test_every_arm_has_words():
    assert set(WORDS) == {"base", *RULES, *SAMPLERS}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("base", "frozen policy"),
        ("tweedie=0.2", "Tweedie, strength 0.2"),
        ("tweedie=auto", "Tweedie, strength automatic"),
        ("tweedie", "Tweedie"),
        ("tweedie-from0.3-to0.6=0.2", "Tweedie, strength 0.2, from t = 0.3, up to t = 0.6"),
        ("qgf=0.06", "QGF, raw weight 0.06"),
        ("fmq-best-of-32", "best of 32 of the adapted flow map"),
        (
            "tweedie=0.2+best-of-8+keep-best",
            "Tweedie, strength 0.2 + best of 8 + the frozen policy's if better",
        ),
        ("Tweedie, half the layers", "Tweedie, half the layers"),
        ("stock", "stock"),
    ],
)
def test_an_arm_in_words(spec, words):
    assert describe_arm(spec) == words
