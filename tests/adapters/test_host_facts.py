"""What we stand on in lerobot's code: facts by name, so that a new version says which one it has moved."""

import inspect
from importlib import import_module
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

lerobot = pytest.importorskip("lerobot")
POLICIES = "lerobot.policies"

ARGUMENTS = {
    "pi0's step": (
        "pi0.modeling_pi0",
        "PI0Pytorch.denoise_step",
        "x_t timestep prefix_pad_masks past_key_values state",
    ),
    "pi0.5's step": (
        "pi05.modeling_pi05",
        "PI05Pytorch.denoise_step",
        "x_t timestep prefix_pad_masks past_key_values",
    ),
    "SmolVLA's step": (
        "smolvla.modeling_smolvla",
        "VLAFlowMatching.denoise_step",
        "x_t timestep prefix_pad_masks past_key_values",
    ),
    "pi0's entry": ("pi0.modeling_pi0", "PI0Pytorch.sample_actions", "noise num_steps"),
    "pi0.5's entry": ("pi05.modeling_pi05", "PI05Pytorch.sample_actions", "noise num_steps"),
    "SmolVLA's entry": ("smolvla.modeling_smolvla", "VLAFlowMatching.sample_actions", "noise"),
    "the shared loop": (
        "common.flow_matching",
        "euler_integrate",
        "denoise_fn noise num_steps rtc_processor rtc_enabled inference_delay prev_chunk_left_over "
        "execution_horizon",
    ),
    "real-time chunking": (
        "rtc.modeling_rtc",
        "RTCProcessor.denoise_step",
        "x_t prev_chunk_left_over inference_delay time original_denoise_step_partial execution_horizon",
    ),
    "its weights": ("rtc.modeling_rtc", "RTCProcessor.get_prefix_weights", "start end total"),
    "multi-task DiT's step": (
        "multi_task_dit.modeling_multi_task_dit",
        "DiffusionTransformer.forward",
        "x timestep conditioning_vec",
    ),
    "multi-task DiT's entry": (
        "multi_task_dit.modeling_multi_task_dit",
        "FlowMatchingObjective.conditional_sample",
        "model batch_size conditioning_vec",
    ),
    "VLA-JEPA's first call": (
        "vla_jepa.action_head",
        "VLAJEPAActionHead._build_inputs",
        "conditioning_tokens actions state timesteps",
    ),
    "Evo1's first call": (
        "evo1.flow_matching",
        "FlowmatchingActionHead._project_actions",
        "action_seq embodiment_id",
    ),
    "GR00T's first call": (
        "groot.groot_n1_7",
        "MultiEmbodimentActionEncoder.forward",
        "actions timesteps cat_ids",
    ),
    "GR00T's entry": (
        "groot.groot_n1_7",
        "GR00TN17ActionHead.get_action_with_features",
        "backbone_features state_features embodiment_id backbone_output action_input",
    ),
    "EO1's first call": (
        "eo1.modeling_eo1",
        "EO1VisionFlowMatchingModel.embed_suffix",
        "timestep noisy_actions",
    ),
    "X-VLA's step": (
        "xvla.soft_transformer",
        "SoftPromptedTransformer.forward",
        "domain_id vlm_features aux_visual_inputs action_with_noise proprio t",
    ),
    "MolmoAct2's step": (
        "molmoact2.molmoact2_hf_model.modeling_molmoact2",
        "ActionExpert.forward_with_context",
        "actions timesteps context modulation",
    ),
    "MolmoAct2's entry": (
        "molmoact2.molmoact2_hf_model.modeling_molmoact2",
        "MolmoAct2Model.generate_actions_from_inputs",
        "action_dim_is_pad num_steps",
    ),
    "Wall-X's first call": (
        "wall_x.modeling_wall_x",
        "ActionHead.step",
        "timestep noisy_action dof_mask",
    ),
    "X-VLA's entry": ("xvla.modeling_xvla", "XVLAModel.generate_actions", "domain_id proprio steps"),
}
"""Module, function, and the names of the arguments that a Host record or an adapter relies on."""

LINES = {
    "noise at time 1": ("common.flow_matching", "euler_integrate", "time = 1.0 + step * dt"),
    "steps of -1 / n": ("common.flow_matching", "euler_integrate", "dt = -1.0 / num_steps"),
    "the Jacobian of real-time chunking is the identity": (
        "rtc.modeling_rtc",
        "RTCProcessor.denoise_step",
        "v_t = original_denoise_step_partial(x_t)\n            x_t.requires_grad_(True)",
    ),
    "multi-task DiT counts by linspace": (
        "multi_task_dit.modeling_multi_task_dit",
        "FlowMatchingObjective.conditional_sample",
        "torch.linspace(0, 1, num_steps + 1",
    ),
    "VLA-JEPA's whole steps": (
        "vla_jepa.action_head",
        "VLAJEPAActionHead.predict_action",
        "int(t_cont * self.config.action_num_timestep_buckets)",
    ),
    "Evo1's own function": (
        "evo1.flow_matching",
        "FlowmatchingActionHead.get_action",
        "def predict_velocity(seq: torch.Tensor, step_time_emb: torch.Tensor)",
    ),
    "Evo1's table of times": (
        "evo1.flow_matching",
        "FlowmatchingActionHead.get_action",
        "time_index = min(int(t * 999), 999)",
    ),
    "GR00T's whole steps": (
        "groot.groot_n1_7",
        "GR00TN17ActionHead.get_action_with_features",
        "int(t_cont * self.num_timestep_buckets)",
    ),
    "EO1's own function": (
        "eo1.modeling_eo1",
        "EO1VisionFlowMatchingModel.sample_actions",
        "def denoise_fn(input_x_t, current_timestep):\n"
        "            action_time_embs = self.embed_suffix(current_timestep, input_x_t)\n"
        "            inputs_embeds[:, act_slice] = action_time_embs",
    ),
    "EO1's loop": (
        "eo1.modeling_eo1",
        "EO1VisionFlowMatchingModel.sample_actions",
        "x_t = euler_integrate(denoise_fn, x_t, self.config.num_denoise_steps)\n        return x_t",
    ),
    "MolmoAct2's loop": (
        "molmoact2.molmoact2_hf_model.modeling_molmoact2",
        "MolmoAct2Model._run_action_flow_loop",
        "trajectory = trajectory + dt * velocity",
    ),
    "MolmoAct2's times": (
        "molmoact2.molmoact2_hf_model.modeling_molmoact2",
        "MolmoAct2Model.generate_actions_from_inputs",
        "torch.full((batch_size,), idx / steps, device=device, dtype=torch.float32)",
    ),
    "MolmoAct2's graph is for CUDA": (
        "molmoact2.molmoact2_hf_model.inference",
        "ActionCudaGraphManager.can_use_action_flow",
        'if inputs.trajectory.device.type != "cuda":\n            return False',
    ),
    "Wall-X's loop": (
        "wall_x.modeling_wall_x",
        "Qwen2_5_VLMoEForAction.predict",
        'action_trajectory = odeint(step, noisy_action, times, method="euler")',
    ),
    "Wall-X's times": (
        "wall_x.modeling_wall_x",
        "Qwen2_5_VLMoEForAction.predict",
        "torch.linspace(\n                0,\n                1,\n"
        "                num_inference_timesteps + 1,",
    ),
    "Wall-X's ten steps": (
        "wall_x.modeling_wall_x",
        "Qwen2_5_VLMoEForAction.predict",
        "num_inference_timesteps: int | None = 10",
    ),
    "X-VLA renoises from where it began": (
        "xvla.modeling_xvla",
        "XVLAModel.generate_actions",
        "x_t = x1 * t.view(-1, 1, 1) + action * (1 - t).view(-1, 1, 1)",
    ),
    "X-VLA's times": (
        "xvla.modeling_xvla",
        "XVLAModel.generate_actions",
        "t = torch.full((batch_size,), i / steps, device=proprio.device, dtype=target_dtype)",
    ),
    "X-VLA decodes its last prediction": (
        "xvla.modeling_xvla",
        "XVLAModel.generate_actions",
        "return self.action_space.postprocess(action)",
    ),
    "X-VLA acts by its inner method": (
        "xvla.modeling_xvla",
        "XVLAPolicy.select_action",
        "actions = self._get_action_chunk(batch)",
    ),
}
"""Where a line of a loop is: another clock or sign would steer in the wrong direction."""


def source(module: str, name: str) -> Any:
    """A function of lerobot's; a module that cannot be imported here is read instead."""
    try:
        found: Any = import_module(f"{POLICIES}.{module}")
    except ImportError:
        pytest.skip(f"{module} needs an extra")
    for part in name.split("."):
        found = getattr(found, part)
    return found


CLOSURES = {
    "EO1's function": (
        "eo1.modeling_eo1",
        "EO1VisionFlowMatchingModel.sample_actions",
        "denoise_fn",
        "act_end act_slice act_start attention_mask chunk_size inputs_embeds past_key_values position_ids "
        "self",
    ),
    "Wall-X's function": (
        "wall_x.modeling_wall_x",
        "Qwen2_5_VLMoEForAction.predict",
        "step",
        "action_dim attention_mask batch_size dof_mask input_ids inputs_embeds moe_token_types "
        "past_key_values position_ids pred_horizon self",
    ),
}
"""Functions inside loops, and the variables around them, which a record repeats for several rows."""


@pytest.mark.parametrize("fact", CLOSURES)
def test_closures(fact: str):
    module, name, inside, expected = CLOSURES[fact]
    code = inspect.unwrap(source(module, name)).__code__.co_consts
    (found,) = [c for c in code if isinstance(c, CodeType) and c.co_name == inside]
    assert " ".join(sorted(found.co_freevars)) == expected, f"{fact} has changed; correct its record's repeat"


@pytest.mark.parametrize("fact", ARGUMENTS)
def test_arguments(fact: str):
    module, name, expected = ARGUMENTS[fact]
    names = inspect.signature(source(module, name)).parameters
    missing = [each for each in expected.split() if each not in names]
    assert not missing, f"{fact}: {name} has no {missing}; correct its Host record"


@pytest.mark.parametrize("fact", LINES)
def test_lines(fact: str):
    module, name, line = LINES[fact]
    assert line in inspect.getsource(source(module, name)), f"{fact}: {name} has changed; look at its clock"


@pytest.mark.parametrize("fact", ["pi0", "pi05", "smolvla"])
def test_the_loop_is_in_euler_integrate(fact: str):
    """And the step is looked up on the model at each call, so that an instance's own is met."""
    text = (Path(lerobot.__file__).parent / "policies" / fact / f"modeling_{fact}.py").read_text()
    assert "return euler_integrate(" in text and "self.denoise_step(" in text, f"{fact}: its loop has moved"


def test_only_known_arguments_are_new_in_the_loop():
    """``hard_prefix`` (lerobot's main branch) arrives as a time for each step, which HostField knows."""
    known = set(ARGUMENTS["the shared loop"][2].split()) | {"hard_prefix", "hard_prefix_mask"}
    found = set(inspect.signature(source("common.flow_matching", "euler_integrate")).parameters)
    assert found <= known, f"the shared loop: new arguments {found - known}; see what they do to the velocity"


def test_actions_are_normalised_as_the_bounds_suppose():
    from lerobot.configs import NormalizationMode

    known = {"MIN_MAX", "MEAN_STD", "IDENTITY", "QUANTILES", "QUANTILE10"}
    assert {mode.name for mode in NormalizationMode} <= known, "a new mode: has it bounds?"
