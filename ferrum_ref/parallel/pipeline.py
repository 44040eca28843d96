"""Layers over several ranks, one stage behind the other.

    stage s:  (residual, normed) from s - 1  ->  its layers  ->  (residual, normed) to s + 1
    the last stage:  logits to all others

Residual and the next layer's normed input both travel, because a fused norm reads the sum before it is rounded to its
type: so the result is that of the undivided decoder, bit for bit.  Clauses: TP-PIPE-1..4 (specs/parallel.md).
"""

from __future__ import annotations

import threading
from dataclasses import replace

from ferrum_ref.errors import InternalError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.collectives import Collectives, Floats
from ferrum_ref.interfaces.forward import ForwardBatch, Observer
from ferrum_ref.interfaces.kv_storage import KvBatch
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.decoder import Decoder, Layer
from ferrum_ref.models.decoder_ops import Norm
from ferrum_ref.models.decoder_weights import DecoderWeights, LayerWeights, read_decoder_weights
from ferrum_ref.parallel.decoder import RankDecoder, on_host
from ferrum_ref.parallel.rules import ExpertSharding
from ferrum_ref.parallel.source import ShardedSource, StageSource, WholeSource, layer_ranges
from ferrum_ref.parallel.subgroup import ALONE
from ferrum_ref.types.devices import DataType


class PipelineStage(RankDecoder):
    """The layers of one stage, which may be sharded besides.  [TP-PIPE-1..4]

    Every stage runs the same batches in the same order; each returns the logits. `num_layers` are to be cached here.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        backend: ComputeBackend,
        stages: Collectives,
        layers: range,
        peers: Collectives = ALONE,
        max_tokens: int | None = None,
    ) -> None:
        """`config` of the whole model (or of this rank's shards of it), `weights` of a `StageSource` with `layers`."""
        self._stages = stages
        self._first_layer = layers.start
        self._entry = _Entry()
        self._one_at_a_time = threading.Lock()
        if layers.start:
            weights = replace(weights, positions=None)  # they are in the residual already
        super().__init__(config, weights, backend, peers, max_tokens)

    def forward(
        self, batch: ForwardBatch, kv: KvBatch, observe: Observer | None = None, *, inputs: TensorRef | None = None
    ) -> TensorRef:
        """As `Decoder.forward`: logits `[R, V]` on every stage. `inputs` stand for the first stage's embedding.

        `observe` sees what is computed here, layers under their numbers in the whole model.  [TP-PIPE-2]
        """
        self.check(batch)
        stages, last = self._stages, self._stages.num_ranks - 1
        with self._one_at_a_time:
            if stages.rank:
                inputs = self._received(batch)
            watch = None if observe is None else self._renumbered(observe)
            if stages.rank == last:
                logits = super().forward(batch, kv, watch, inputs=inputs)
                for stage in range(last):
                    stages.send(on_host(logits), stage)
                return logits
            for values in self._hidden(batch, kv, watch, inputs):
                stages.send(values, stages.rank + 1)
            found = stages.recv((len(batch.logit_rows), self.config.vocab_size), last)
        return self._across.put(found, self.dtype)

    def _received(self, batch: ForwardBatch) -> TensorRef:
        """The residual; its norm is put where the first layer takes it from."""
        shape = (batch.num_tokens, self.config.hidden_size)
        residual, normed = (self._stages.recv(shape, self._stages.rank - 1) for _ in range(2))
        self._entry.normed = self._across.put(normed, self.dtype)
        return self._across.put(residual, self.dtype)

    def _hidden(
        self, batch: ForwardBatch, kv: KvBatch, observe: Observer | None, inputs: TensorRef | None
    ) -> list[Floats]:
        """Residual and normed rows after this stage's layers: the decoder shows them. Of the output matrix there is
        one row, whose products nobody wants."""
        wanted = [f"layers.{self.num_layers - 1}.hidden", "final_norm"]
        found: dict[str, Floats] = {}

        def watch(name: str, tensor: TensorRef) -> None:
            if name in wanted:
                found[name] = on_host(tensor)
            if observe is not None:
                observe(name, tensor)

        Decoder.forward(self, batch.with_all_logits(), kv, watch, inputs=inputs)
        if len(found) < len(wanted):
            raise InternalError(f"pipeline: the decoder showed {list(found)}, expected {wanted}")
        return [found[name] for name in wanted]

    def _build(self, config: DecoderConfig, index: int, weights: LayerWeights) -> Layer:
        layer = super()._build(config, self._first_layer + index, weights)
        if index or not self._first_layer:
            return layer
        return replace(layer, attention_norm=self._entry.instead_of(layer.attention_norm))

    def _renumbered(self, observe: Observer) -> Observer:
        is_first, is_last = not self._first_layer, self._stages.rank == self._stages.num_ranks - 1

        def watch(name: str, tensor: TensorRef) -> None:
            if name.startswith("layers."):
                _, number, what = name.split(".", 2)
                observe(f"layers.{self._first_layer + int(number)}.{what}", tensor)
            elif is_first if name == "embedding" else is_last:
                observe(name, tensor)

        return watch


def read_stage(
    source: WholeSource,
    backend: ComputeBackend,
    stages: Collectives,
    peers: Collectives = ALONE,
    dtype: DataType = DataType.FP32,
    *,
    experts: ExpertSharding = ExpertSharding.SPLIT,
    max_tokens: int | None = None,
) -> PipelineStage:
    """This rank's stage of a model, its shards of it if it has peers.  [TP-PIPE-1, TP-PIPE-4]

    Raises InvalidParameterError for more stages than layers, or as `read_rank`; errors of the checkpoint pass through.
    """
    layers = layer_ranges(source.config.num_layers, stages.num_ranks)[stages.rank]
    whole: WholeSource = source
    if peers.num_ranks > 1:
        whole = ShardedSource(source, peers.rank, peers.num_ranks, experts)
    weights = read_decoder_weights(StageSource(whole, layers), backend, dtype)
    return PipelineStage(whole.config, weights, backend, stages, layers, peers, max_tokens)


class _Entry:
    """The first norm of a later stage, which has been taken already by the stage before."""

    def __init__(self) -> None:
        self.normed: TensorRef | None = None
        self._own: Norm | None = None

    def instead_of(self, norm: Norm) -> _Entry:
        self._own = norm
        return self

    def __call__(self, x: TensorRef) -> TensorRef:
        found, self.normed = self.normed, None
        if found is None:
            raise InternalError("pipeline: nothing has been received for the first layer of this stage")
        return found

    def after_add(self, update: TensorRef, residual: TensorRef) -> tuple[TensorRef, TensorRef]:
        if self._own is None:
            raise InternalError("pipeline: the first layer of this stage has no norm of its own")
        return self._own.after_add(update, residual)
