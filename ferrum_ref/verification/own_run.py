"""The checkpoint run by this project's decoder on a backend.  Clause: VE-RUN-1 (specs/verify.md)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.forward import ForwardBatch
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory, KvShape
from ferrum_ref.kv_cache.storage_latent import LatentKvFactory
from ferrum_ref.models.checkpoint import open_checkpoint
from ferrum_ref.models.decoder import Decoder
from ferrum_ref.models.decoder_weights import read_decoder_weights
from ferrum_ref.verification.comparison import Array, Run


class OwnModel:
    """A decoder over a checkpoint, on one backend.

    Raises what opening the checkpoint raises; UnsupportedError for a backend without the kernels it needs.
    """

    def __init__(self, path: Path, backend: ComputeBackend) -> None:
        with open_checkpoint(path) as checkpoint:
            self.config = checkpoint.config
            self._decoder = Decoder(checkpoint.config, read_decoder_weights(checkpoint, backend), backend)
        self._backend = backend

    def run(self, token_ids: Sequence[int], continuation: Sequence[int]) -> Run:
        """Every layer's hidden state and the logits of `token_ids`, then our choice at each place of `continuation`.

        `continuation` is what the other program went on with.  Pure.  [VE-RUN-1]
        """
        points: dict[str, Array] = {}

        def keep(name: str, tensor: TensorRef) -> None:
            if name.endswith(".hidden"):
                points[name] = tensor.to_numpy().astype(np.float64)

        logits = self._logits(token_ids, keep)
        points["logits"] = logits
        if not continuation:
            return Run(points)
        whole = [*token_ids, *continuation[:-1]]
        following = self._logits(whole)[len(token_ids) - 1 :]
        return Run(points, tuple(int(row.argmax()) for row in following))

    def _logits(self, token_ids: Sequence[int], observe: object = None) -> Array:
        config = self.config
        shape = KvShape(config.num_layers, config.num_kv_heads, config.head_dim, self._decoder.dtype)
        kind = ContiguousKvFactory if config.latent is None else LatentKvFactory
        factory = kind(self._backend, shape, self._decoder.max_tokens)
        kv = factory.bind([factory.new_cache()], [len(token_ids)])
        batch = ForwardBatch.build([list(token_ids)], [0]).with_all_logits()
        observer = observe if callable(observe) else None
        logits: Array = self._decoder.forward(batch, kv, observer).to_numpy().astype(np.float64)
        return logits
