"""Random policies: lerobot's own sizes and precisions."""

import sys

import pytest
import torch

from qsteer.testing import hosts
from qsteer.testing.lerobot import shrink

torch.set_num_threads(1)


class TestHosts:
    def test_full_sizes_are_lerobots_own(self) -> None:
        """Without memory: on the meta device."""
        half = torch.bfloat16
        for host, millions, dtype in (("pi05", 4143, half), ("pi0", 4028, half), ("smolvla", 450, None)):
            policy = hosts.make(host, "full", cameras=3, chunk=50, device="meta", dtype=dtype)
            assert {p.device.type for p in (*policy.parameters(), *policy.buffers())} == {"meta"}
            assert sum(p.numel() for p in policy.parameters()) // 10**6 == millions
            config = policy.config
            assert (config.chunk_size, config.n_action_steps, config.max_action_dim) == (50, 50, 32)
            assert len(config.image_features) == 3
            if host != "smolvla":
                assert config.image_resolution == (224, 224)
                expert = policy.model.paligemma_with_expert.gemma_expert.model
                assert len(expert.layers) == 18 and expert.layers[0].mlp.up_proj.weight.dtype == half
                assert policy.model.action_in_proj.weight.dtype == torch.float32

    def test_bfloat16_is_where_lerobot_has_it(self) -> None:
        from lerobot.policies.pi05 import modeling_pi05
        from lerobot.policies.pi05.configuration_pi05 import PI05Config

        options = {**hosts.TOY.options(), "image_resolution": (28, 28), "dtype": "bfloat16", "device": "cpu"}
        with shrink(modeling_pi05, 16, 2):
            theirs = modeling_pi05.PI05Policy(PI05Config(**options))
        ours = hosts.pi05(dtype=torch.bfloat16)
        kinds = [
            {name: t.dtype for name, t in (*p.named_parameters(), *p.named_buffers())} for p in (ours, theirs)
        ]
        assert kinds[0] == kinds[1] and set(kinds[0].values()) >= {torch.bfloat16, torch.float32}
        buffers = dict(theirs.named_buffers())
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in ours.named_buffers())
        assert torch.get_default_dtype() == torch.float32

    @pytest.mark.parametrize("host", hosts.HOSTS)
    def test_what_is_asked_for_is_what_is_made(self, host: str) -> None:
        policy = hosts.make(host, "tiny", cameras=2, chunk=7)
        assert not any(p.requires_grad for p in policy.parameters())
        observation = hosts.batch(policy, rows=2)
        assert sum("image" in name for name in observation) == (0 if host == "mlp" else 2)
        assert policy.predict_action_chunk(observation).shape[:2] == (2, 7)

    def test_mistakes(self) -> None:
        for options, says in (
            ({"host": "pi06"}, "expected one of mlp, pi0, pi05, smolvla"),
            ({"host": "pi05", "size": "big"}, "tiny, small, full"),
            ({"host": "pi05", "cameras": 0}, "at least 1 each"),
            ({"host": "smolvla", "dtype": torch.bfloat16}, "for pi0 and pi05"),
        ):
            with pytest.raises(ValueError, match=says):
                hosts.make(**options)

    def test_without_lerobot_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "lerobot.policies.pi05", None)
        with pytest.raises(ModuleNotFoundError, match=r"qsteer\[lerobot\]"):
            hosts.pi05()
