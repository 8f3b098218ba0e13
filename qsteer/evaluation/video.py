"""Films of several arms side by side in the same episodes.

MuJoCo chooses its graphics library once in a process, when it is first imported, and evaluation imports it
without any. So a film is made by a child process, which replays recorded actions: under the same seed the
physics is the same, and the child needs no policy. A replay that ends otherwise than the recording is an
error, not a film.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector.utils import CloudpickleWrapper
from jaxtyping import UInt8

from qsteer.envs.chunked import ChunkedAction
from qsteer.envs.rollouts import Rollouts

try:
    from PIL import Image, ImageDraw, ImageFont
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('films need pillow: pip install "qsteer[plots]"') from error

BACKENDS = ("egl", "osmesa", "glfw")
PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 16, 16) as renderer:
    renderer.update_scene(data)
    print("drawn" if renderer.render().any() else "black")
"""
NO_BACKEND = (
    "no OpenGL library that MuJoCo can draw with; install one (none needs a GPU): "
    "`apt-get install libosmesa6` or `apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri`"
)
GREEN, INK = (26, 127, 55), (31, 35, 40)
GAP, HOLD_S = 2, 2

type Frame = UInt8[np.ndarray, "Y X 3"]


class RenderError(RuntimeError):
    """Nothing can draw here, or the child process that drew failed."""


def find_gl_backend() -> str | None:
    """Return the first of MuJoCo's ``egl``, ``osmesa`` and ``glfw`` that draws in a child process, or None.

    Cost: one to two seconds per library tried.
    """
    for backend in BACKENDS:
        tried = subprocess.run(
            [sys.executable, "-c", PROBE], env=_make_environment(backend), capture_output=True
        )
        if b"drawn" in tried.stdout:
            return backend
    return None


def side_by_side(
    make_env: Callable[[], gymnasium.Env],
    arms: Sequence[Rollouts],
    *,
    episodes: Sequence[int],
    paths: Sequence[str | Path],
    size: int = 240,
    stride: int = 2,
    fps: int = 20,
    camera: str | None = None,
    backend: str | None = None,
) -> tuple[Path, ...]:
    """Film recorded episodes: one column an arm, one row an episode, labelled with arm, step and success.

    An arm that has finished stands still until all have.

    Args:
        make_env: makes the environment of the rollouts, whose ``render()`` returns RGB frames. It is called
            in a child process; use a module's function or ``functools.partial`` of one.
        arms: rollouts of the same seed, made with ``record=True``.
        episodes: which to film.
        paths: one film each, ``.mp4`` or ``.gif``, whichever suffixes are given; a GIF of two panels and five
            seconds has about 1 MB.
        size: of one panel, in pixels.
        stride: environment steps per frame.
        fps: frames per second; at ``stride = 2`` and 20 environment steps a second, 10 is real time.
        camera: asked of the environment itself, ``render(camera=...)``; OGBench's arms look best from
            ``front_pixels``. None: its own choice.
        backend: MuJoCo's graphics library; None: :func:`find_gl_backend`. Environments of other engines
            ignore it.

    Returns:
        The paths.

    Raises:
        ValueError: rollouts without actions or of different seeds, an episode that is not there, another
            suffix.
        RenderError: no graphics library works, or the child failed; a replay that ends otherwise is such a
            failure.

    Cost: without a GPU some 0.1 s per frame and panel.
    """
    files = tuple(Path(path) for path in paths)
    film = _Film(make_env, tuple(arms), tuple(episodes), files, size, stride, fps, camera)
    backend = backend or find_gl_backend()
    if backend is None:
        raise RenderError(NO_BACKEND)
    with tempfile.TemporaryFile() as job:
        job.write(pickle.dumps(CloudpickleWrapper(film.write)))
        job.seek(0)
        child = "import pickle, sys; pickle.load(sys.stdin.buffer)()"
        command = [sys.executable, "-c", child]
        done = subprocess.run(command, stdin=job, env=_make_environment(backend), capture_output=True)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise RenderError(f"drawing with MUJOCO_GL={backend} failed:\n" + "\n".join(lines[-12:]))
    return files


@dataclass(frozen=True)
class _Film:
    """What the child process gets."""

    make_env: Callable[[], gymnasium.Env]
    arms: tuple[Rollouts, ...]
    episodes: tuple[int, ...]
    paths: tuple[Path, ...]
    size: int
    stride: int
    fps: int
    camera: str | None

    def __post_init__(self) -> None:
        if not self.arms or any(arm.actions is None for arm in self.arms):
            raise ValueError("arms: expected rollouts with actions, got none; roll out with record=True")
        if any(not np.array_equal(arm.seed, self.arms[0].seed) for arm in self.arms):
            raise ValueError("arms: expected the same episodes, got different seeds or numbers of episodes")
        n = len(self.arms[0].seed)
        if not self.episodes or not all(0 <= episode < n for episode in self.episodes):
            raise ValueError(f"episodes: expected some of 0 .. {n - 1}, got {list(self.episodes)}")
        if bad := [str(path) for path in self.paths if path.suffix not in WRITERS]:
            raise ValueError(f"paths: expected names that end in {', '.join(WRITERS)}, got {bad}")
        if min(self.size, self.stride, self.fps) < 1:
            given = f"{self.size}, {self.stride} and {self.fps}"
            raise ValueError(f"size, stride, fps: expected at least 1, got {given}")

    def write(self) -> None:
        """Draw all panels, put them together and write the files."""
        env = ChunkedAction(self.make_env(), 1)
        rows = [[self._panel(env, arm, episode) for arm in self.arms] for episode in self.episodes]
        env.close()
        last = max(len(panel) for row in rows for panel in row)
        stills = [[[panel[min(i, len(panel) - 1)] for panel in row] for row in rows] for i in range(last)]
        frames = [np.concatenate([np.concatenate(row, axis=1) for row in still]) for still in stills]
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            WRITERS[path.suffix](path, frames, self.fps)

    def _panel(self, env: ChunkedAction, arm: Rollouts, episode: int) -> list[Frame]:
        """Replay one episode of one arm."""
        actions = arm.actions[episode] if arm.actions is not None else ()
        env.reset(seed=int(arm.seed[episode]))
        _draw_quickly(env)
        panel, step, solved, over = [self._draw(env, arm.name, 0, False)], 0, False, False
        for step, action in enumerate(actions, 1):
            _, _, terminated, truncated, info = env.step(action[None])
            over, solved = terminated or truncated, info["success"]
            if over or step % self.stride == 0:
                panel.append(self._draw(env, arm.name, step, solved))
            if over:
                break
        if not over or solved != arm.success[episode] or step != arm.length[episode]:
            raise RenderError(
                f"episode {episode} of {arm.name!r} did not end as recorded: expected make_env to make the "
                "environment of the rollouts, and its reset(seed=...) to fix the episode"
            )
        return panel

    def _draw(self, env: ChunkedAction, name: str, step: int, solved: bool) -> Frame:
        """Draw the scene with arm and step above it, and a frame around it once it is solved."""
        scene: Any = env.unwrapped
        frame: Any = env.render() if self.camera is None else scene.render(camera=self.camera)
        bar, edge = round(0.1 * self.size), max(2, self.size // 80)
        colour = GREEN if solved else INK
        panel = Image.new("RGB", (self.size, self.size + bar), colour)
        panel.paste(Image.fromarray(frame).resize((self.size, self.size), Image.Resampling.LANCZOS), (0, bar))
        draw = ImageDraw.Draw(panel)
        font = ImageFont.load_default(size=0.55 * bar)
        draw.text((0.3 * bar, bar / 2), name, "white", font, anchor="lm")
        progress = f"solved at {step}" if solved else f"step {step}"
        draw.text((self.size - 0.3 * bar, bar / 2), progress, "white", font, anchor="rm")
        if solved:
            draw.rectangle((0, 0, self.size - 1, self.size + bar - 1), outline=GREEN, width=edge)
        return np.pad(np.asarray(panel), ((GAP, GAP), (GAP, GAP), (0, 0)), constant_values=255)


def _draw_quickly(env: gymnasium.Env) -> None:
    """Use coarser shadows and no multisampling, which scaling down hides: it takes a third of the time."""
    if (model := getattr(env.unwrapped, "model", None)) is not None:
        model.vis.quality.shadowsize, model.vis.quality.offsamples = 1024, 0


def _write_gif(path: Path, frames: list[Frame], fps: int) -> None:
    """Use one palette for all frames and no dithering, so that what does not move costs nothing."""
    sheet = Image.fromarray(np.concatenate(frames[:: -(-len(frames) // 8)]))
    palette = sheet.quantize(256, method=Image.Quantize.FASTOCTREE)  # keeps small bright things
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    duration = [1000 // fps] * (len(images) - 1) + [1000 * HOLD_S]
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)


def _write_mp4(path: Path, frames: list[Frame], fps: int) -> None:
    import imageio

    images: list[Any] = frames + [frames[-1]] * (fps * HOLD_S)
    imageio.mimwrite(path, images, fps=fps, macro_block_size=2)  # H.264 wants even sizes


WRITERS = {".gif": _write_gif, ".mp4": _write_mp4}


def _make_environment(backend: str) -> dict[str, str]:
    """Environment variables of a child that draws with ``backend`` and imports what this process can."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYOPENGL_PLATFORM"}
    return inherited | {"MUJOCO_GL": backend, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
