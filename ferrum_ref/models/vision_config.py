"""What a CLIP vision tower needs to know: sizes, and how pixels become numbers.

Clauses: FM-VISION-1..2, FM-IMAGE-2 (specs/families.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ferrum_ref.errors import ConfigError, InvalidFormatError, UnsupportedError
from ferrum_ref.formats.json_file import read_json_object
from ferrum_ref.models.config import quoted
from ferrum_ref.models.config_fields import finite_number, flag, positive_number, size
from ferrum_ref.models.hidden_activation import ACTIVATIONS

_CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """A CLIP vision transformer.  [FM-VISION-1]  Defaults are CLIP's.  Raises ConfigError, naming the field."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    image_size: int = 224  # pixels of a side
    patch_size: int = 32  # pixels of a side
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "image_size", "patch_size"):
            size(getattr(self, name), name)
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size: got {self.hidden_size}, expected a multiple of the {self.num_heads} heads")
        if self.patch_size > self.image_size:
            raise ConfigError(f"patch_size: got {self.patch_size}, expected at most image_size {self.image_size}")
        object.__setattr__(self, "layer_norm_eps", positive_number(self.layer_norm_eps, "layer_norm_eps"))

    @property
    def patches_per_side(self) -> int:
        """Whole patches along a side; the rest of the picture is not seen."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """P: patches of a picture."""
        return self.patches_per_side**2

    @staticmethod
    def from_hf(config: Mapping[str, Any], source: str) -> VisionConfig:
        """From a "clip_vision_model" configuration; what it leaves out is CLIP's default.  [FM-VISION-2]

        Raises InvalidFormatError, UnsupportedError; both begin with `source`.  Pure.
        """
        if config.get("model_type") != "clip_vision_model":
            found = quoted(config.get("model_type"))
            raise UnsupportedError(f"read {source}: model_type: got {found}, expected 'clip_vision_model'")
        activation = config.get("hidden_act", "quick_gelu")
        if activation not in ACTIVATIONS:
            raise UnsupportedError(
                f"read {source}: hidden_act: got {quoted(activation)}, expected one of {', '.join(ACTIVATIONS)}"
            )
        if config.get("num_channels", 3) != 3:
            raise UnsupportedError(f"read {source}: num_channels: got {quoted(config['num_channels'])}, expected 3")
        names = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"}
        names |= {name: name for name in ("hidden_size", "intermediate_size", "image_size", "patch_size")}
        names |= {"layer_norm_eps": "layer_norm_eps"}
        given = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
        try:
            return VisionConfig(**given, hidden_act=activation)
        except ConfigError as error:
            raise InvalidFormatError(f"read {source}: {error.message}") from None


@dataclass(frozen=True, slots=True)
class PixelScaling:
    """(byte * factor - mean) / std, channel by channel.  [FM-IMAGE-2]"""

    factor: float = 1 / 255
    mean: tuple[float, float, float] = _CLIP_MEAN
    std: tuple[float, float, float] = _CLIP_STD

    @staticmethod
    def from_directory(directory: Path) -> PixelScaling:
        """preprocessor_config.json, else the image_processor of processor_config.json, else CLIP's numbers.

        Pure. Raises InvalidFormatError, naming the file and the field.
        """
        for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
            path = directory / name
            if path.exists():
                given = read_json_object(path)
                if key is not None:
                    given = given.get(key) or {}
                try:
                    return _scaling(given)
                except ConfigError as error:
                    raise InvalidFormatError(f"read {path}: {error.message}") from None
        return PixelScaling()


def _scaling(given: Any) -> PixelScaling:
    if not isinstance(given, Mapping):
        raise ConfigError(f"image_processor: got {quoted(given)}, expected an object")
    factor, mean, std = 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if flag(given.get("do_rescale", True), "do_rescale"):
        factor = positive_number(given.get("rescale_factor", 1 / 255), "rescale_factor")
    if flag(given.get("do_normalize", True), "do_normalize"):
        mean = _three(given.get("image_mean", _CLIP_MEAN), "image_mean", finite_number)
        std = _three(given.get("image_std", _CLIP_STD), "image_std", positive_number)
    return PixelScaling(factor, mean, std)


def _three(values: Any, field: str, check: Callable[[object, str], float]) -> tuple[float, float, float]:
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ConfigError(f"{field}: got {quoted(values)}, expected three numbers")
    red, green, blue = (check(value, field) for value in values)
    return red, green, blue
