"""What the tests of the judge hand to it by name, in this process and in others."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np

from ferrum_ref.types.algorithm import Algorithm


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    wide = x.astype(np.float32)
    mean = np.mean(wide * wide, axis=-1, keepdims=True)
    return (wide / np.sqrt(mean + np.float32(eps)) * weight.astype(np.float32)).astype(x.dtype)


def mean_forgotten(x: Any, weight: Any, eps: float) -> Any:
    return (x.astype(np.float32) * weight.astype(np.float32)).astype(x.dtype)


def hangs(x: Any, weight: Any, eps: float) -> Any:
    while x.ndim == 3:
        time.sleep(0.01)
    return rms_norm(x, weight, eps)


def crashes(x: Any, weight: Any, eps: float) -> Any:
    if x.ndim == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if x.shape == (576,):
        os._exit(7)
    return rms_norm(x, weight, eps)


def raises(x: Any, weight: Any, eps: float) -> Any:
    raise ZeroDivisionError("a kernel's own mistake")


class DeviceWithBadCode:
    """Once a kernel has touched what is not its own, every later call of this process fails, as on a CUDA device."""

    lost = False

    def rms_norm(self, x: Any, weight: Any, eps: float) -> Any:
        self.lost = self.lost or x.ndim == 3
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return rms_norm(x, weight, eps)


def not_a_number(x: Any, weight: Any, eps: float) -> Any:
    return np.full_like(x, np.nan)


def wrong_shape(x: Any, weight: Any, eps: float) -> Any:
    return rms_norm(x, weight, eps).reshape(-1)


wide_sums = rms_norm.__class__(rms_norm.__code__, globals(), "wide_sums")
wide_sums.algorithm = Algorithm(accumulate="fp64")  # type: ignore[attr-defined]

honest = {"rms_norm": rms_norm}
forgetful = {"rms_norm": mean_forgotten}
hanging = {"rms_norm": hangs}
crashing = {"rms_norm": crashes}
raising = {"rms_norm": raises}
spoiling = {"rms_norm": DeviceWithBadCode().rms_norm}
nan = {"rms_norm": not_a_number}
flat = {"rms_norm": wrong_shape}
markup = {"rms_norm": lambda x, weight, eps: (_ for _ in ()).throw(RuntimeError("<script>alert(1)</script>"))}
unknown = {"rms_morn": rms_norm}
not_functions = {"rms_norm": 3}
number = 3


def factory(device: str) -> Any:
    return honest if device == "cpu" else None


def broken_factory(device: str) -> Any:
    raise OSError("no such library")
