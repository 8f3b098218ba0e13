"""What simulators need of the process that they run in: a graphics library, a seed for numpy."""

import contextlib
import os
import sys
from collections.abc import Iterator
from ctypes.util import find_library

import numpy as np


def choose_graphics(*, needed: bool = True) -> None:
    """Choose among MuJoCo's graphics libraries where the user has not; robosuite takes EGL, there or not.

    Args:
        needed: pictures will be asked for; otherwise none of the libraries need be there.

    Raises:
        RuntimeError: one is needed, and there is neither EGL nor OSMesa.
    """
    if sys.platform != "linux" or os.environ.get("MUJOCO_GL", "").lower() in ("egl", "osmesa", "glx"):
        return
    for choice, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if find_library(library) is not None:
            os.environ["MUJOCO_GL"] = choice
            return
    if not needed:
        os.environ["MUJOCO_GL"] = "disabled"
        return
    raise RuntimeError(
        "expected a graphics library, got neither EGL nor OSMesa; install one of them: apt-get install "
        "libegl1 libgl1-mesa-dri, or libosmesa6"
    )


@contextlib.contextmanager
def seed_numpy(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, which some simulators draw from, for a while; leave it as it was."""
    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(state)
