"""Tiny random checkpoints written by transformers, what transformers computes with them, and a judge of the decoder.

    tiny = tiny_model(transformers.Qwen3Config, head_dim=16)     # saved to a directory: tiny.path
    judge(tiny)                                                  # logits within the bound, 48 greedy tokens identical
    logit_error(tiny, changed(tiny, norm_topk_prob=False)) > tiny.bound    # a wrong constant is caught

Every parameter and buffer is random. "float64" means float64 throughout: transformers rounds to float32 inside its
norms, softmaxes and routers even in a float64 model, so those conversions are switched off; rotary tables stay float32.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory, KvShape
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.plugins import load_backend

NUM_GREEDY = 48
NUM_PROMPT = 40
ALLOWED_FACTOR = 4.0  # times transformers' own float32 error
NUM_PROMPTS_TRIED = 12
SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}


class _StayDouble(TorchDispatchMode):
    """Conversions of float64 to a narrower float do nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        narrow = kwargs.get("dtype") in (torch.float32, torch.bfloat16, torch.float16)
        if func is torch.ops.aten._to_copy.default and args[0].dtype is torch.float64 and narrow:
            return args[0].clone()
        if func is torch.ops.aten._softmax.default and args[0].dtype is torch.float64:
            return func(args[0], args[1], False)
        return func(*args, **kwargs)


@dataclass(eq=False)
class TinyModel:
    """One checkpoint and what transformers says about it; everything is computed when first asked for."""

    path: Path
    config: Any
    make: Callable[[], Any]  # a fresh float32 model of these weights, eager
    seed: int
    num_prompt: int = NUM_PROMPT

    @functools.cached_property
    def single(self) -> Any:
        """The float32 model."""
        return self.make()

    @functools.cached_property
    def double(self) -> Any:
        """The float64 model, its rotary frequencies in float32; call it within `_StayDouble`."""
        model = self.make().double()
        for module in model.modules():
            for name, values in module._buffers.items():
                if values is not None and name.endswith("inv_freq"):
                    module._buffers[name] = values.float()
        return model

    def exact_logits(self, ids: list[int]) -> NDArray[np.float64]:
        """transformers in float64: [T, V]."""
        model = self.double  # made outside: there, rotary frequencies do become float32
        with torch.no_grad(), _StayDouble():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        assert logits.dtype is torch.float64
        return np.asarray(logits.numpy())

    def single_logits(self, ids: list[int]) -> NDArray[np.float32]:
        """transformers in float32: [T, V]."""
        with torch.no_grad():
            return np.asarray(self.single(torch.tensor([ids]), use_cache=False).logits[0].numpy())

    @functools.cached_property
    def _chosen(self) -> tuple[list[int], list[int]]:
        """The first prompt whose greedy continuation in float64 has no near-tie and varies, and that continuation."""
        vocab = self.config.vocab_size
        for attempt in range(NUM_PROMPTS_TRIED):
            ids = np.random.default_rng([self.seed, attempt]).integers(3, vocab, self.num_prompt).tolist()
            least = 20 * np.abs(self.single_logits(ids) - self.exact_logits(ids)).max()
            tokens = self._stepwise(ids, least) if self._grows else self._greedy(ids, least)
            if len(tokens) == NUM_GREEDY and len(set(tokens)) >= 5:
                return ids, tokens
        raise AssertionError(f"{self.path}: no prompt of {NUM_PROMPTS_TRIED} continues well; choose another seed")

    @property
    def _grows(self) -> bool:
        """Whether rotary tables depend on the length so far, so that a prefix's logits are not the whole text's."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        kinds = {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)}
        return bool(kinds & {"dynamic", "longrope"})

    def _stepwise(self, ids: list[int], least_margin: float) -> list[int]:
        """Greedy tokens of float64, by one whole forward each; fewer where one is too near a tie."""
        tokens: list[int] = []
        while len(tokens) < NUM_GREEDY and (
            found := _clear_choices(self.exact_logits(ids + tokens)[-1:], least_margin)
        ):
            tokens += found
        return tokens

    def _greedy(self, ids: list[int], least_margin: float) -> list[int]:
        """The same: float32 drafts over a cache, one float64 forward confirms every token up to the first other one."""
        tokens: list[int] = []
        while len(tokens) < NUM_GREEDY:
            draft = self._draft(ids + tokens, NUM_GREEDY - len(tokens))
            logits = self.exact_logits(ids + tokens + draft[:-1])[-len(draft) :]
            found = _clear_choices(logits, least_margin)
            same = next((i for i, (a, b) in enumerate(zip(found, draft, strict=False)) if a != b), len(found))
            tokens += found[: same + 1]
            if len(found) < len(draft) and same == len(found):
                break
        return tokens

    def _draft(self, ids: list[int], count: int) -> list[int]:
        """Greedy tokens of float32 over transformers' own cache."""
        tokens: list[int] = []
        new, cache = torch.tensor([ids]), None
        with torch.no_grad():
            while len(tokens) < count:
                out = self.single(new, past_key_values=cache, use_cache=True)
                tokens.append(int(out.logits[0, -1].argmax()))
                new, cache = torch.tensor([tokens[-1:]]), out.past_key_values
        return tokens

    @property
    def ids(self) -> list[int]:
        """The prompt."""
        return self._chosen[0]

    @property
    def continuation(self) -> list[int]:
        """The 48 greedy tokens of float64."""
        return self._chosen[1]

    @property
    def text(self) -> list[int]:
        """Prompt and continuation: what logits are compared on."""
        return self.ids + self.continuation

    @functools.cached_property
    def exact(self) -> NDArray[np.float64]:
        """float64 logits of `text`."""
        return self.exact_logits(self.text)

    @functools.cached_property
    def own_error(self) -> float:
        """The largest error of transformers' own float32 logits of `text`."""
        error = float(np.abs(self.single_logits(self.text) - self.exact).max())
        assert 0 < error < 1e-4 * np.abs(self.exact).max(), f"{self.path}: transformers' float32 is off by {error}"
        return error

    @property
    def bound(self) -> float:
        """What the decoder's float32 logits may err by."""
        return ALLOWED_FACTOR * self.own_error


def _clear_choices(logits: NDArray[np.float64], least_margin: float) -> list[int]:
    """The largest of each row, up to the first row where another comes near."""
    ordered = np.sort(logits, axis=1)
    near = ordered[:, -1] - ordered[:, -2] < least_margin
    end = int(near.argmax()) if near.any() else len(logits)
    return [int(token) for token in logits[:end].argmax(axis=1)]


def randomise(model: Any, seed: int) -> None:
    """Every parameter and buffer: matrices of unit gain, norms and biases that matter, routers that decide clearly."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Any) -> Any:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32)

    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            if not value.is_floating_point():
                continue
            if value.ndim == 1:
                is_norm = "norm" in name or "ln_" in name
                centre = value.float().mean().round() if is_norm and name.endswith("weight") else 0.0
                value.copy_(centre + (1.0 if "sinks" in name else 0.3) * normal(value))
            elif "embed_tokens" in name or name.endswith(("wte.weight", "embed_in.weight")):
                value.copy_(normal(value))
            elif name.endswith("wpe.weight"):
                value.copy_(0.5 * normal(value))
            elif value.ndim == 2 and "bias" in name:  # one row for each expert
                value.copy_(0.3 * normal(value))
            else:
                gain = 3.0 if name.endswith(("gate.weight", "router.weight")) else 1.5
                value.copy_(gain * normal(value) / np.sqrt(np.mean(value.shape[-2:])))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """transformers warns of unusual but meaningful configurations and shows a progress bar."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()


def _make(config: Any, seed: int) -> Any:
    with _quietly():
        model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    randomise(model, seed)
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


@pytest.fixture(scope="session")
def stay_double() -> Callable[[], Any]:
    """A context in which transformers' float64 modules do not round to float32 inside."""
    return _StayDouble


@pytest.fixture(scope="session")
def randomised() -> Callable[[Any, int], None]:
    """randomised(module, seed): see `randomise`."""
    return randomise


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """tiny_model(ConfigClass, seed=0, num_prompt=40, **settings) -> a saved random model, made once.

    `settings` go over the common `SIZES`; the value `...` leaves a common size out.
    """
    made: dict[Any, TinyModel] = {}

    def build(kind: type, seed: int = 0, num_prompt: int = NUM_PROMPT, **settings: Any) -> TinyModel:
        key = (kind.__name__, seed, num_prompt, repr(sorted(settings.items())))
        if key not in made:
            chosen = {name: value for name, value in {**SIZES, **settings}.items() if value is not ...}
            with _quietly():
                config = kind(**chosen)
                path = tmp_path_factory.mktemp("tiny") / "hf"
                make = functools.partial(_make, config, seed)
                make().save_pretrained(path)
            made[key] = TinyModel(path, config, make, seed, num_prompt)
        return made[key]

    return build


class Loaded:
    """A directory or GGUF file as the decoder runs it."""

    def __init__(self, path: Path, backend: str = "numpy", **reading: Any) -> None:
        self.backend = load_backend(backend)
        with open_checkpoint(path) as checkpoint:
            self.config = checkpoint.config
            self.decoder = Decoder(self.config, read_decoder_weights(checkpoint, self.backend, **reading), self.backend)
        self.factory = ContiguousKvFactory(self.backend, self.kv_shape, self.decoder.max_tokens)

    @property
    def kv_shape(self) -> Any:
        config = self.config
        return KvShape(config.num_layers, config.num_kv_heads, config.head_dim, self.decoder.dtype)

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits of every row, in one forward."""
        batch = ForwardBatch.build([ids], [0]).with_all_logits()
        kv = self.factory.bind([self.factory.new_cache()], batch.lengths)
        return np.asarray(self.decoder.forward(batch, kv).to_numpy())

    def greedy(self, ids: list[int], count: int, *, whole_forwards: bool = False) -> list[int]:
        """`count` greedy tokens over one contiguous cache, or by one whole forward each."""
        tokens: list[int] = []
        cache, new, start = self.factory.new_cache(), list(ids), 0
        while len(tokens) < count:
            if whole_forwards:
                cache, new, start = self.factory.new_cache(), ids + tokens, 0
            batch = ForwardBatch.build([new], [start])
            kv = self.factory.bind([cache], batch.lengths)
            tokens.append(int(self.decoder.forward(batch, kv).to_numpy()[-1].argmax()))
            kv.commit()
            start, new = start + len(new), [tokens[-1]]
        return tokens


@pytest.fixture(scope="session")
def load_tiny() -> Callable[..., Loaded]:
    """load_tiny(path, backend="numpy", **read_decoder_weights options) -> the decoder with its caches."""
    return Loaded


@pytest.fixture(scope="session")
def logit_error() -> Callable[..., float]:
    """logit_error(tiny, path=None, backend="numpy"): the largest logit error against float64; infinity for a NaN."""

    def measure(tiny: TinyModel, path: Path | None = None, backend: str = "numpy") -> float:
        error = float(np.abs(Loaded(path or tiny.path, backend).logits(tiny.text) - tiny.exact).max())
        return float("inf") if np.isnan(error) else error

    return measure


@pytest.fixture(scope="session")
def judge() -> Callable[..., float]:
    """judge(tiny, path=None, backend="numpy", whole_forwards=False): the bound holds, 48 greedy tokens agree.

    `whole_forwards` for rotary tables that depend on the length so far. Returns the error as a share of the bound.
    """

    def check(
        tiny: TinyModel, path: Path | None = None, *, backend: str = "numpy", whole_forwards: bool = False
    ) -> float:
        loaded = Loaded(path or tiny.path, backend)
        error = float(np.abs(loaded.logits(tiny.text) - tiny.exact).max())
        assert error <= tiny.bound, f"logits are off by {error}, allowed {tiny.bound}"
        assert loaded.greedy(tiny.ids, NUM_GREEDY, whole_forwards=whole_forwards) == tiny.continuation
        return error / tiny.bound

    return check


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """changed(tiny, **config fields) -> a copy of the directory whose config.json says otherwise; None removes a field.

    A dict is merged into the object of that name, one level deep.
    """

    def copy(tiny: TinyModel, **fields: Any) -> Path:
        path = tmp_path / f"changed-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny.path, path)
        config = json.loads((path / "config.json").read_text())
        for name, value in fields.items():
            if name not in config:
                raise KeyError(f"config.json of {tiny.path} has no {name!r}")
            if value is None:
                del config[name]
            elif isinstance(value, dict):
                config[name] = {key: v for key, v in {**config[name], **value}.items() if v is not None}
            else:
                config[name] = value
        (path / "config.json").write_text(json.dumps(config))
        return path

    return copy


@pytest.fixture
def rewritten(tmp_path: Path) -> Callable[..., Path]:
    """rewritten(tiny, change) -> a copy of the directory with change(name, tensor) in each tensor's place."""

    def copy(tiny: TinyModel, change: Callable[[str, Any], Any]) -> Path:
        path = tmp_path / f"rewritten-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny.path, path)
        file = path / "model.safetensors"
        tensors = safetensors.torch.load_file(file)
        changes = {name: change(name, tensor) for name, tensor in tensors.items()}
        assert any(changes[name] is not tensor for name, tensor in tensors.items()), "nothing changed"
        safetensors.torch.save_file(changes, file, metadata={"format": "pt"})
        return path

    return copy
