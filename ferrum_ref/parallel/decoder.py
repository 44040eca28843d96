"""One rank of a tensor-parallel decoder: the decoder over its shards, with a sum over the ranks where rows were cut.

    y = sum over ranks r of x_r W_r^T                   attention output, feed-forward
    embedding[ids] = sum over ranks of the rows each has (zeros elsewhere);  logits = the ranks' vocabulary runs

Source: Shoeybi et al. 2019 (Megatron-LM), section 3.  Clauses: TP-RUN-1..7 (specs/parallel.md).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.collectives import Collectives, Floats
from ferrum_ref.interfaces.forward import ForwardBatch, Ints, Observer
from ferrum_ref.interfaces.kv_storage import KvBatch
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.decoder import Decoder, Layer
from ferrum_ref.models.decoder_attention import DenseAttention
from ferrum_ref.models.decoder_ops import DecoderOps
from ferrum_ref.models.decoder_parts import Attention, FeedForward, See
from ferrum_ref.models.decoder_weights import DecoderWeights, LayerWeights, read_decoder_weights
from ferrum_ref.parallel.rules import ExpertSharding
from ferrum_ref.parallel.shards import Part
from ferrum_ref.parallel.source import ShardedSource, WholeSource
from ferrum_ref.types.devices import DataType


class Across:
    """Tensors of one backend over the ranks of a group, by way of the host in float32."""

    def __init__(self, backend: ComputeBackend, peers: Collectives) -> None:
        self._factory = backend.tensor_factory()
        self.peers = peers

    def summed(self, tensor: TensorRef) -> TensorRef:
        """The sum over the ranks, rounded once to the tensor's type.  [TP-RUN-2]"""
        return self.put(self.peers.all_reduce_sum(on_host(tensor)), tensor.dtype())

    def put(self, values: Floats, dtype: DataType) -> TensorRef:
        """On the backend, in that type."""
        return self._factory.from_numpy(values).to_dtype(dtype)


class RankDecoder(Decoder):
    """A `Decoder` of one rank's config and weights; every rank's `forward` gives the same logits of all tokens.

    All ranks run the same batches in the same order, one at a time. A batch that is refused is refused on every rank,
    before anything is said.  [TP-RUN-1..7]
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        backend: ComputeBackend,
        peers: Collectives,
        max_tokens: int | None = None,
    ) -> None:
        """`config` and `weights` of a `ShardedSource`.  Raises as `Decoder`."""
        self._across = Across(backend, peers)
        super().__init__(config, weights, backend, max_tokens)

    @property
    def peers(self) -> Collectives:
        """The group."""
        return self._across.peers

    @property
    def num_layers(self) -> int:
        """Layers that run here, each with keys and values of `config.num_kv_heads` heads to cache."""
        return len(self.weights.layers)

    def forward(
        self, batch: ForwardBatch, kv: KvBatch, observe: Observer | None = None, *, inputs: TensorRef | None = None
    ) -> TensorRef:
        """As `Decoder.forward`, over all ranks: logits `[R, V]`, the same bits on every rank.  [TP-RUN-1, TP-RUN-4]

        `observe` sees this rank's share of what is cut, and the whole of the rest.
        """
        watch = None if observe is None else _but_logits(observe)
        local = super().forward(batch, kv, watch, inputs=inputs)
        logits = self._gathered(local)
        if observe is not None:
            observe("logits", logits)
        return logits

    def embed(self, token_ids: Ints) -> TensorRef:
        """Rows of the vocabulary run that each rank has, summed: exact.  [TP-RUN-3]"""
        peers = self.peers
        if peers.num_ranks == 1:
            return super().embed(token_ids)
        run = Part(self.config.vocab_size).units(peers.rank, peers.num_ranks)
        is_mine = (token_ids >= run.start) & (token_ids < run.stop)
        rows = super().embed(np.where(is_mine, token_ids - run.start, 0))
        values = on_host(rows)
        values[~is_mine] = 0.0
        return self._across.put(peers.all_reduce_sum(values), rows.dtype())

    def _gathered(self, local: TensorRef) -> TensorRef:
        """`[R, V_r]` of each rank -> `[R, V]`; shorter runs are padded on the way."""
        peers, vocabulary = self.peers, Part(self.config.vocab_size)
        if peers.num_ranks == 1:
            return local
        sizes = [len(vocabulary.units(rank, peers.num_ranks)) for rank in range(peers.num_ranks)]
        values = on_host(local)
        padded = np.zeros((len(values), max(sizes)), np.float32)
        padded[:, : values.shape[1]] = values
        gathered = peers.all_gather(padded)
        whole = np.concatenate([each[:, :size] for each, size in zip(gathered, sizes, strict=True)], axis=1)
        return self._across.put(whole, local.dtype())

    def _build(self, config: DecoderConfig, index: int, weights: LayerWeights) -> Layer:
        layer = super()._build(config, index, weights)
        if self.peers.num_ranks == 1:
            return layer
        attention: Attention
        if isinstance(layer.attention, DenseAttention):
            attention = _SummedDense(self._ops, config, index, weights, self._across)
        else:
            attention = _SummedAttention(layer.attention, self._across)
        return replace(layer, attention=attention, feed_forward=_SummedFeedForward(layer.feed_forward, self._across))


def read_rank(
    source: WholeSource,
    backend: ComputeBackend,
    peers: Collectives,
    dtype: DataType = DataType.FP32,
    *,
    experts: ExpertSharding = ExpertSharding.SPLIT,
    max_tokens: int | None = None,
) -> RankDecoder:
    """This rank's part of a model, ready to run.  [TP-RUN-1]

    Raises InvalidParameterError, naming both numbers, where the model cannot lie over that many ranks; errors of the
    checkpoint pass through.
    """
    part = ShardedSource(source, peers.rank, peers.num_ranks, experts)
    return RankDecoder(part.config, read_decoder_weights(part, backend, dtype), backend, peers, max_tokens)


class _SummedDense(DenseAttention):
    """Grouped-query attention over this rank's heads."""

    def __init__(
        self, ops: DecoderOps, config: DecoderConfig, layer: int, weights: LayerWeights, across: Across
    ) -> None:
        super().__init__(ops, config, layer, weights)
        self._across = across

    def project(self, attended: TensorRef) -> TensorRef:
        return self._across.summed(super().project(attended))


class _SummedAttention:
    """Another attention over this rank's heads."""

    def __init__(self, own: Attention, across: Across) -> None:
        self._own = own
        self._across = across

    def attend(self, normed: TensorRef, positions: Ints, kv: KvBatch, layer: int, see: See) -> TensorRef:
        return self._own.attend(normed, positions, kv, layer, see)

    def project(self, attended: TensorRef) -> TensorRef:
        return self._across.summed(self._own.project(attended))


class _SummedFeedForward:
    """A feed-forward over this rank's features or experts."""

    def __init__(self, own: FeedForward, across: Across) -> None:
        self._own = own
        self._across = across

    def __call__(self, normed: TensorRef, see: See) -> TensorRef:
        return self._across.summed(self._own(normed, see))


def on_host(tensor: TensorRef) -> Floats:
    """The values as a fresh float32 array: exact. Pure."""
    return np.array(tensor.to_numpy(), dtype=np.float32)


def _but_logits(observe: Observer) -> Observer:
    """Keeps a rank's own run of the logits back."""

    def watch(name: str, tensor: TensorRef) -> None:
        if name != "logits":
            observe(name, tensor)

    return watch
