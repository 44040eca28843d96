"""The checkpoint run by Hugging Face transformers, in float64 and in float32.  Clauses: VE-RUN-2..4 (specs/verify.md).

This is the one module of `ferrum_ref` that imports torch and transformers, when it is called.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np

from ferrum_ref.errors import InvalidFormatError, UnsupportedError
from ferrum_ref.formats.gguf import is_gguf
from ferrum_ref.models.checkpoint import only_gguf_in, open_checkpoint
from ferrum_ref.verification.comparison import Array, Run


def run_transformers(
    path: Path,
    token_ids: Sequence[int],
    num_generated: int,
    progress: Callable[[str], None] = lambda message: None,
) -> tuple[Run, Run, tuple[float, ...]]:
    """The same tokens in float64 and in float32, and the lead of each greedy token over the next best.  [VE-RUN-2..4]

    Both runs are of whole sequences, without a cache; the greedy text is the float64 run's. One model is in memory at a
    time.  Raises UnsupportedError: transformers or torch is missing, or does not know the architecture;
    InvalidFormatError: transformers refuses the files, or finds none of a tensor.
    """
    torch = _import()
    progress("transformers in float64")
    with _loaded(path, torch.float64) as model:
        points = _points(model, token_ids)
        greedy, margins = _continue(model, token_ids, num_generated)
        wide = Run(points, greedy)
    progress("transformers in float32")
    with _loaded(path, torch.float32) as model:
        narrow = Run(_points(model, token_ids))
    return wide, narrow, margins


def _import() -> Any:
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"verify: {error.name} is not installed; pip install 'ferrum-ref[verify]' brings what it needs"
        ) from None
    return torch


@contextmanager
def _loaded(path: Path, dtype: Any) -> Iterator[Any]:
    """The model in evaluation mode, with plain attention and plain experts."""
    import transformers
    from safetensors import SafetensorError

    quiet: Any = transformers.logging.set_verbosity_error
    quiet()
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager", "local_files_only": True}
    gguf = path if path.is_file() else only_gguf_in(path) if not (path / "config.json").exists() else None
    try:
        with redirect_stderr(io.StringIO()):  # progress bars of the library's own
            model = _from_gguf(gguf, dtype) if gguf and is_gguf(gguf) else _from_directory(path, options)
    except (ValueError, KeyError, OSError, ImportError, RuntimeError, SafetensorError) as error:
        kind = UnsupportedError if isinstance(error, (ImportError, KeyError)) else InvalidFormatError
        reason = " ".join(str(error).split())[:300]
        raise kind(f"verify {path}: transformers does not load this: {reason}") from None
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    yield model.eval()


def _from_gguf(path: Path, dtype: Any) -> Any:
    """A GGUF file's model, its configuration, names and numbers all as transformers reads them.  [VE-RUN-2]"""
    import transformers
    from transformers import modeling_gguf_pytorch_utils as gguf_loading

    config = transformers.AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    model = _blank(config, dtype)
    load: Any = gguf_loading.load_gguf_checkpoint
    tensors = load(str(path), return_tensors=True, model_to_load=model)["tensors"]
    _fill(model, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    return model


def _from_directory(path: Path, options: dict[str, Any]) -> Any:
    """A directory's model; packed weights are handed over as the numbers that they stand for.  [VE-RUN-3]"""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True)
    if getattr(config, "quantization_config", None) is None:
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        model, told = load(str(path), output_loading_info=True, **options)
        _refuse_gaps(told["missing_keys"], told["unexpected_keys"])
        return model
    del config.quantization_config
    dtype = options["dtype"]
    model = _blank(config, dtype)
    with open_checkpoint(path) as checkpoint:
        exact = {name: torch.from_numpy(checkpoint.read(name, np.float64)) for name in checkpoint.tensors}
    _fill(model, {name: tensor.to(dtype) for name, tensor in exact.items()})
    return model


def _blank(config: Any, dtype: Any) -> Any:
    """The architecture without its numbers."""
    import transformers

    make: Any = transformers.AutoModelForCausalLM.from_config
    return make(config, dtype=dtype, attn_implementation="eager")


def _fill(model: Any, state: dict[str, Any]) -> None:
    """Raises ValueError where tensors are missing or left over."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    _refuse_gaps({name for name in missing if name not in tied}, unexpected)


def _refuse_gaps(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """transformers itself goes on with random numbers where tensors are missing."""
    absent, extra = sorted(missing), sorted(unexpected)
    if absent or extra:
        raise ValueError(f"tensors missing: {absent[:3]}, left over: {extra[:3]}")


def _layers(model: Any) -> Any:
    """The decoder's layers: the only list of modules as long as the configuration says."""
    import torch

    config = model.config.get_text_config()
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == config.num_hidden_layers:
            return module
    raise UnsupportedError(f"verify: no list of {config.num_hidden_layers} layers in {type(model).__name__}")


def _points(model: Any, token_ids: Sequence[int]) -> dict[str, Array]:
    """Hidden state after each layer, and the logits."""
    import torch

    points: dict[str, Array] = {}

    def watch(index: int) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            points[f"layers.{index}.hidden"] = hidden.detach().reshape(-1, hidden.shape[-1]).to(torch.float64).numpy()

        return hook

    handles = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(_layers(model))]
    try:
        points["logits"] = _logits(model, token_ids)
    finally:
        for handle in handles:
            handle.remove()
    return points


def _logits(model: Any, token_ids: Sequence[int]) -> Array:
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    array: Array = logits.to(torch.float64).numpy()
    return array


def _continue(model: Any, token_ids: Sequence[int], num: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """`num` greedy tokens, each from a run of the whole text, and their leads over the next best."""
    text, margins = list(token_ids), []
    for _ in range(num):
        row = _logits(model, text)[-1]
        second, first = np.partition(row, -2)[-2:]
        margins.append(float(first - second))
        text.append(int(row.argmax()))
    return tuple(text[len(token_ids) :]), tuple(margins)
