"""Rollouts of a toy environment: one episode at a time gives the same, and arms are paired."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor
from walk import A, Walk
from walks import SEED, H, follow

from qsteer.envs.chunked import ChunkedAction
from qsteer.envs.rollouts import (
    Rollouts,
    Simulators,
    make_noise_generator,
    rollout,
    to_tensors,
)


def by_hand(env: gymnasium.Env, act: Callable, seed: int, episode: int) -> dict[str, Any]:
    """One episode, one action at a time: what a rollout must agree with."""
    generator = make_noise_generator(seed, episode)
    obs, _ = env.reset(seed=seed + episode)
    rewards, lucky, actions, done, terminated = [], [], [], False, False
    while not done:
        noise = torch.randn(1, H, A, generator=generator)
        for action in act(torch.tensor(obs)[None].float(), noise)[0].numpy():
            obs, reward, terminated, truncated, info = env.step(action)
            rewards.append(reward)
            lucky.append(info.get("success", info.get("is_success", terminated)))
            actions.append(action)
            if done := terminated or truncated:
                break
    return {
        "success": any(lucky),
        "sum_reward": sum(rewards),
        "max_reward": max(rewards),
        "length": len(rewards),
        "actions": np.array(actions),
    }


@pytest.fixture(scope="module")
def simulators() -> Iterator[Simulators]:
    with Simulators(Walk, horizon=H, num_envs=3) as made:
        yield made


@pytest.fixture(scope="module")
def followed(simulators: Simulators) -> Rollouts:
    return simulators.rollout(follow, episodes=8, seed=SEED, record=True, progress=False)


def same(a: Rollouts, b: Rollouts) -> bool:
    return all(
        np.array_equal(getattr(a, k), getattr(b, k)) for k in ("success", "sum_reward", "length", "seed")
    )


class TestRollouts:
    def test_is_what_one_episode_at_a_time_gives(self, followed: Rollouts) -> None:
        for e in range(8):
            expected = by_hand(Walk(), follow, SEED, e)
            for key in ("success", "length"):
                assert getattr(followed, key)[e] == expected[key], (e, key)
            for key in ("sum_reward", "max_reward"):
                assert getattr(followed, key)[e] == pytest.approx(expected[key], abs=1e-6)
            np.testing.assert_allclose(followed.actions[e], expected["actions"], atol=1e-6)
        assert len(set(followed.length)) > 2  # or nothing above says anything of chunks that end early
        assert set(followed.length % H) == {0, 1, 2}
        assert 0 < followed.success.mean() < 1
        assert list(followed.seed) == list(range(SEED, SEED + 8))

    def test_other_numbers_of_environments_agree(self, followed: Rollouts) -> None:
        single = rollout(Walk, follow, horizon=H, episodes=5, seed=SEED, num_envs=1, progress=False)
        np.testing.assert_allclose(single.sum_reward, followed.sum_reward[:5], atol=1e-6)
        assert np.array_equal(single.length, followed.length[:5])

    def test_an_arm_does_not_depend_on_the_arms_before_it(
        self, simulators: Simulators, followed: Rollouts
    ) -> None:
        again = simulators.rollout(follow, episodes=8, seed=SEED, progress=False)
        assert same(again, followed)
        assert again.actions is None

    def test_arms_are_paired(self, simulators: Simulators, followed: Rollouts) -> None:
        """Another arm meets the same starts and the same noise, though its episodes need not end alike."""
        seen: dict[float, Tensor] = {}

        def first_noise(obs: Tensor, noise: Tensor) -> Tensor:
            for o, n in zip(obs, noise, strict=True):
                if o[-1] == 0:
                    seen[float(o[0])] = n
            return torch.zeros_like(noise)

        simulators.rollout(first_noise, episodes=8, seed=SEED, progress=False)
        starts = [Walk().reset(seed=SEED + e)[0][0] for e in range(8)]
        assert len(seen) == 8
        for e, start in enumerate(starts):
            assert torch.equal(
                seen[float(torch.tensor(start).float())],
                torch.randn(H, A, generator=make_noise_generator(SEED, e)),
            )

    def test_other_seeds_are_other_noise(self) -> None:
        draws = {
            float(torch.randn((), generator=make_noise_generator(s, e))) for s in range(4) for e in range(4)
        }
        assert len(draws) == 16  # in particular (s, e + 1) and (s + 1, e) differ

    def test_more_environments_than_episodes(self, simulators: Simulators, followed: Rollouts) -> None:
        two = simulators.rollout(follow, episodes=2, seed=SEED, progress=False)
        assert np.array_equal(two.length, followed.length[:2])

    def test_only_running_episodes_are_asked(self, simulators: Simulators) -> None:
        rows = []

        def counting(obs: Tensor, noise: Tensor) -> Tensor:
            rows.append(len(obs))
            assert obs.dtype == noise.dtype == torch.float32
            assert noise.shape[1:] == (H, A)
            return noise

        result = simulators.rollout(counting, episodes=7, seed=1, progress=False)
        assert sum(rows) == sum(-(-length // H) for length in result.length)
        assert max(rows) == 3
        assert rows[0] == 3 and rows[-1] < 3

    def test_actions_are_clipped_and_recorded_as_executed(self, simulators: Simulators) -> None:
        result = simulators.rollout(
            lambda _, noise: noise.sign() * 5, episodes=3, record=True, progress=False
        )
        assert all(np.abs(a).max() == 1.0 for a in result.actions)
        assert [len(a) for a in result.actions] == list(result.length)

    def test_the_agents_own_randomness_is_repeatable_and_leaves_the_callers_alone(
        self, simulators: Simulators
    ) -> None:
        def random(_: Tensor, noise: Tensor) -> Tensor:
            return torch.rand_like(noise)

        before = torch.random.get_rng_state()
        once, again = (simulators.rollout(random, episodes=4, seed=3, progress=False) for _ in range(2))
        assert same(once, again)
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_agents_run_without_gradients(self, simulators: Simulators) -> None:
        weight = torch.ones(A, requires_grad=True)
        simulators.rollout(lambda _, noise: noise * weight, episodes=1, progress=False)

    def test_saved_rollouts_have_lerobots_keys_and_come_back(
        self, followed: Rollouts, tmp_path: Path
    ) -> None:
        path = followed.save(tmp_path / "new" / "eval.json")
        info = json.loads(path.read_text())
        assert {"episode_ix", "sum_reward", "max_reward", "success", "seed"} <= set(info["per_episode"][0])
        lerobots = {"avg_sum_reward", "avg_max_reward", "pc_success", "eval_s", "eval_ep_s"}
        assert lerobots <= set(info["aggregated"])
        assert info["aggregated"]["pc_success"] == pytest.approx(100 * followed.success.mean())
        assert [p.name for p in path.parent.iterdir()] == ["eval.json"]
        assert same(Rollouts.load(path), followed)

    @pytest.mark.parametrize(
        ("act", "error", "says"),
        [
            (lambda _, noise: noise.numpy(), TypeError, "expected a tensor, got ndarray"),
            (lambda _, noise: noise[:, :1], ValueError, r"got \(3, 1, 2\)"),
            (lambda _, noise: noise / 0.0, ValueError, "expected finite actions"),
        ],
    )
    def test_an_agents_mistakes(self, simulators: Simulators, act: Callable, error: type, says: str) -> None:
        with pytest.raises(error, match=says):
            simulators.rollout(act, episodes=3, progress=False)
        assert len(simulators.rollout(follow, episodes=1, progress=False).length) == 1  # still usable

    def test_arguments_out_of_range(self, simulators: Simulators) -> None:
        with pytest.raises(ValueError, match="episodes, seed: expected at least 1 and 0, got 0"):
            simulators.rollout(follow, episodes=0)
        with pytest.raises(ValueError, match="horizon, num_envs"):
            Simulators(Walk, horizon=0)


class TestChunkedAction:
    @pytest.mark.parametrize("shape", [(), (1,), (1, A + 1), (A,)])
    def test_an_observation_that_would_be_broadcast_is_refused(self, shape: tuple[int, ...]) -> None:
        class Other(Walk):
            def _observe(self) -> np.ndarray:
                return np.zeros(shape)

        expected = rf"observation: expected the shape of its space, \({A + 1},\), got {re.escape(str(shape))}"
        with pytest.raises(ValueError, match=expected):
            ChunkedAction(Other(), 2).reset(seed=0)

    def test_success_is_what_the_environment_says_at_any_step_or_else_termination(self) -> None:
        for says in ("success", "is_success"):
            env = ChunkedAction(Walk(says), 2)
            env.reset(seed=0)
            assert env.step(np.array([[1.0, -1.0], [0.0, 0.0]]))[-1]["success"]
            *_, info = env.step(np.array([[-1.0, 1.0], [-1.0, 1.0]]))
            assert env.unwrapped.place[0] < env.unwrapped.place[1]  # no longer in that state
            assert info["success"]
        for reach, ended in ((1.5, True), (np.inf, False)):
            env = ChunkedAction(Walk(None, reach), 20)
            env.reset(seed=0)
            *_, info = env.step(np.tile([0.9, 0.0], (20, 1)))
            assert info["success"] is ended

    def test_nothing_happens_after_the_end_or_before_the_first_reset(self) -> None:
        env = ChunkedAction(Walk(), 20)
        assert env.step(np.ones((20, A)))[-1]["executed"] == 0
        env.reset(seed=0)
        obs, reward, _, truncated, info = env.step(np.ones((20, A), np.float32))
        assert truncated
        assert info["executed"] == info["length"] == env.unwrapped.limit
        assert reward == info["sum_reward"]
        again, reward, _, truncated, info = env.step(np.ones((20, A), np.float32))
        assert truncated and reward == 0 and info["executed"] == 0
        np.testing.assert_array_equal(again, obs)

    def test_observations_of_several_parts_are_rendered_at_the_last_step_only(self) -> None:
        class Filmed(Walk):
            observation_space = gymnasium.spaces.Dict(
                state=Walk().observation_space, image=gymnasium.spaces.Box(0, 255, (3, 2, 2), np.uint8)
            )
            on = True

            def cameras(self, on: bool) -> None:
                Filmed.on = on

            def seen(self, state: np.ndarray) -> dict[str, np.ndarray]:
                return {"state": state, "image": np.full((3, 2, 2), 7 * Filmed.on, np.uint8)}

            def reset(self, **options: Any) -> Any:
                state, info = super().reset(**options)
                return self.seen(state), info

            def step(self, action: np.ndarray) -> Any:
                state, *rest = super().step(action)
                frames.append(Filmed.on)
                return self.seen(state), *rest

        frames: list[bool] = []
        env = ChunkedAction(Filmed(None), 3)
        assert env.step(np.zeros((3, A)))[0]["image"].shape == (3, 2, 2)  # before the first reset
        assert env.reset(seed=0)[0]["image"].max() == 7
        obs, *_ = env.step(np.zeros((3, A), np.float32))
        assert frames == [False, False, True] and obs["image"].max() == 7
        converted = to_tensors(obs)
        assert converted["image"].dtype == torch.uint8 and converted["state"].dtype == torch.float32

    def test_rewards_of_a_chunk_are_discounted(self) -> None:
        plain, discounted = (ChunkedAction(Walk(None), 3, gamma) for gamma in (1.0, 0.5))
        env = Walk(None)
        env.reset(seed=0)
        rewards = [float(env.step(np.array([0.3, 0.1], np.float32))[1]) for _ in range(3)]
        for chunked, weights in (plain, (1, 1, 1)), (discounted, (1, 0.5, 0.25)):
            chunked.reset(seed=0)
            _, reward, _, _, info = chunked.step(np.tile(np.array([0.3, 0.1], np.float32), (3, 1)))
            assert reward == pytest.approx(np.dot(weights, rewards))
            assert info["sum_reward"] == pytest.approx(sum(rewards))

    def test_spaces_it_cannot_serve(self) -> None:
        class Image(Walk):
            observation_space = gymnasium.spaces.Dict({"button": gymnasium.spaces.Discrete(2)})

        class Button(Walk):
            action_space = gymnasium.spaces.Discrete(2)

        for make, says in (
            (Image, "observation space: expected a Box"),
            (Button, "action space: expected a Box"),
        ):
            with pytest.raises(ValueError, match=says):
                ChunkedAction(make(), H)


class Says(Walk):
    """Reports these infos, one a step, and terminates after the last."""

    def __init__(self, *infos: dict[str, Any]) -> None:
        super().__init__()
        self.infos = infos

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.clock += 1
        return self._observe(), 0.0, self.clock == len(self.infos), False, self.infos[self.clock - 1]


YES, NO = ({"is_success": {"task": flag, "reach": True}} for flag in (True, False))


@pytest.mark.parametrize(
    ("infos", "expected"),
    [
        ([NO, NO], False),
        ([NO, YES], True),
        ([{"is_success": np.array([False])}], False),
        ([{"success": np.float32(1)}], True),
        ([{"success": False}, {}], False),  # a failure ends the episode, and that step says nothing
        ([{}, {}], True),
        ([{}, {"success": False}], False),
    ],
)
def test_success_is_what_the_environment_says(infos: list[dict[str, Any]], expected: bool) -> None:
    env = ChunkedAction(Says(*infos), len(infos))
    for _ in range(2):
        env.reset(seed=0)
        assert env.step(np.zeros((len(infos), A), np.float32))[4]["success"] is expected


@pytest.mark.parametrize(
    "said", [{"reach": True}, "False", None, np.ones(2, bool), [True, False], {"task": {}}, 0.5]
)
def test_a_success_that_is_no_flag_is_refused(said: object) -> None:
    env = ChunkedAction(Says({"is_success": said}), 1)
    env.reset(seed=0)
    with pytest.raises(TypeError, match=r'info\["is_success"\]: expected a flag'):
        env.step(np.zeros((1, A), np.float32))
