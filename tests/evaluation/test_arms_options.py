"""Arms whose names have options: windows, every k-th step, stale directions, last layers."""

from dataclasses import replace

import pytest
from fields import as_installed

import qsteer
from qsteer.evaluation.arms import describe_arm, parse


def test_arms_have_names_for_all_of_them():
    tweedie = qsteer.Tweedie(0.2)
    for spec, rule in {
        "tweedie-every2=0.2": replace(tweedie, every=2),
        "tweedie-from0.3=0.2": replace(tweedie, start=0.3),
        "tweedie-to0.6=0.2": replace(tweedie, stop=0.6),
        "tweedie-from0.3-to0.6-every2=0.2": replace(tweedie, start=0.3, stop=0.6, every=2),
        "tweedie-last4=0.2": replace(tweedie, layers=4),
        "tweedie-raw-every3=0.06": qsteer.Tweedie(0.06, scaling="raw", every=3),
        "tweedie-every2=auto": qsteer.Tweedie("auto", every=2),
        "qgf-every2=0.06": qsteer.QGF(0.06, every=2),
        "forward-tweedie=0.2": qsteer.ForwardTweedie(0.2),
        "forward-tweedie-stale=0.2": qsteer.ForwardTweedie(0.2, stale=True),
        "forward-tweedie-stale-every2=0.2": qsteer.ForwardTweedie(0.2, stale=True, every=2),
    }.items():
        arm = parse(spec)
        assert arm.rule == rule and arm.name == spec.partition("=")[0] and arm.kind == "steered"
    assert parse("tweedie-every2=0.2+best-of-4").sampler == parse("best-of-4").sampler
    assert parse("random-direction-every2=0.2").kind == "control"


def test_every_guidance_has_a_control_that_pushes_as_far():
    for spec, rule in {
        "random-qgf=0.06": qsteer.QGF(0.06),
        "random-tweedie-raw-every3=0.06": qsteer.Tweedie(0.06, scaling="raw", every=3),
        "random-tweedie=auto": qsteer.Tweedie("auto"),
    }.items():
        assert parse(spec).rule == qsteer.Randomized(rule) and parse(spec).kind == "control"
    assert (
        describe_arm("random-qgf-every2=0.06") == "QGF, raw weight 0.06, every 2 steps, in random directions"
    )
    with (
        as_installed(),
        pytest.raises(ValueError, match=r"expected a guidance rule.*got Negated"),
    ):
        parse("random-negated=0.2")


@pytest.mark.parametrize(
    "spec",
    [
        "tweedie-every=0.2",
        "tweedie-every0=0.2",
        "tweedie-every2.5=0.2",
        "tweedie-from2=0.2",
        "tweedie-from0.6-to0.3=0.2",
        "qgf-last2=0.2",
        "negated-every2=0.2",
        "best-of-every2",
        "-every2=0.2",
        "tweedie-every2",
    ],
)
def test_arms_that_cannot_be_are_refused(spec):
    with as_installed(), pytest.raises(ValueError, match=r"arm: expected 'base'.*-everyN, -fromT, -toT"):
        parse(spec)
