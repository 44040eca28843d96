"""The BERT encoder, over KernelOps and TensorOps: any ComputeBackend runs it.

    h_0 = norm(word[id] + type[t] + position[p])
    a_l = norm(h_l + W_o attention(q, k, v)),      [q; k; v] = W_qkv h_l
    h_(l+1) = norm(a_l + W_down act(W_up a_l))

Source: Devlin et al. 2019; Vaswani et al. 2017 (post-norm).  Clauses: FM-BERT-5..8 (specs/families.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ferrum_ref.errors import InvalidParameterError, ModelError, ResourceExhaustedError, ShapeError
from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.forward import Ints, Observer
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.models.bert_config import BertConfig
from ferrum_ref.models.bert_weights import BertLayer, BertWeights
from ferrum_ref.models.encoder_ops import EncoderOps
from ferrum_ref.models.hidden_activation import hidden_activation


class BertEncoder:
    """Stateless. Safe to share between threads."""

    def __init__(self, config: BertConfig, weights: BertWeights, backend: ComputeBackend) -> None:
        """Raises UnsupportedError if the backend lacks a kernel, or the activation is unknown."""
        self.config = config
        self.weights = weights
        self.backend = backend
        self._ops = EncoderOps(backend, "BertEncoder")
        self._activation = hidden_activation(config.hidden_act, backend, weights.words.dtype())

    def forward(
        self,
        sequences: Sequence[Sequence[int]],
        token_types: Sequence[Sequence[int]] | None = None,
        observe: Observer | None = None,
    ) -> list[TensorRef]:
        """The last hidden state `[T_i, E]` of every sequence, in order.  [FM-BERT-5..7]

        Nothing is padded: a sequence's numbers depend on itself alone. Token types default to 0. `observe(name, rows)`
        sees "embedding" and "layers.i.hidden", the sequences' rows laid end to end, shorter sequences first.
        Pure. Raises ModelError (no sequence, an empty one), InvalidParameterError (token or type out of range),
        ResourceExhaustedError (longer than the position table), ShapeError (token types of other lengths).
        """
        positions = [np.arange(len(ids)) for ids in sequences]
        types = [[0] * len(ids) for ids in sequences] if token_types is None else token_types
        if [len(row) for row in types] != [len(ids) for ids in sequences]:
            raise ShapeError(
                "BertEncoder.forward: token types and tokens differ in length, expected one type per token"
            )
        return self._forward(sequences, types, positions, observe)

    def forward_padded(self, input_ids: Ints, attention_mask: Ints, token_type_ids: Ints | None = None) -> TensorRef:
        """The same for a padded batch `[B, T]`: `[B, T, E]`, zeros where the mask is 0.  [FM-BERT-8]

        A token's position is its column, wherever the padding lies. Pure.
        Raises ShapeError for unequal shapes, InvalidParameterError for a mask other than 0 and 1, and as `forward`.
        """
        ids, mask = np.asarray(input_ids), np.asarray(attention_mask)
        types = np.zeros_like(ids) if token_type_ids is None else np.asarray(token_type_ids)
        if ids.ndim != 2 or ids.shape != mask.shape or ids.shape != types.shape:
            raise ShapeError(
                f"BertEncoder.forward_padded: ids {ids.shape}, mask {mask.shape}, types {types.shape},"
                " expected one shape [B, T]"
            )
        if not np.isin(mask, (0, 1)).all():
            raise InvalidParameterError("BertEncoder.forward_padded: the mask holds other values than 0 and 1")
        kept = mask.astype(bool)
        columns = [np.flatnonzero(row) for row in kept]
        found = self._forward([*_rows(ids, kept)], [*_rows(types, kept)], columns, None)
        whole = np.zeros((*ids.shape, self.config.hidden_size), dtype=found[0].to_numpy().dtype)
        for index, rows in enumerate(found):
            whole[index, columns[index]] = rows.to_numpy()
        return self.backend.tensor_factory().from_numpy(whole)

    def _forward(
        self,
        sequences: Sequence[Sequence[int]],
        types: Sequence[Sequence[int]],
        positions: Sequence[npt.NDArray[Any]],
        observe: Observer | None,
    ) -> list[TensorRef]:
        lengths = [len(ids) for ids in sequences]
        if not lengths or 0 in lengths:
            raise ModelError(f"BertEncoder.forward: every sequence needs at least one token, got lengths {lengths}")
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        token_ids, type_ids, columns = (
            np.concatenate([np.asarray(rows[index], dtype=np.int64) for index in order])
            for rows in (sequences, types, positions)
        )
        self._check(token_ids, type_ids, columns)
        hidden = self._embed(token_ids, type_ids, columns)
        see = observe or _ignore
        see("embedding", hidden)
        ordered = [lengths[index] for index in order]
        for number, layer in enumerate(self.weights.layers):
            hidden = self._layer(layer, hidden, ordered)
            see(f"layers.{number}.hidden", hidden)
        pieces = self._ops.tensor.split(hidden, ordered, 0)
        found = dict(zip(order, pieces, strict=True))
        return [found[index] for index in range(len(lengths))]

    def _embed(self, token_ids: Ints, type_ids: Ints, positions: Ints) -> TensorRef:
        lookup, add = self._ops.gather, self._ops.tensor.add
        rows = add(lookup(self.weights.words, token_ids), lookup(self.weights.types, type_ids))
        return self._ops.norm(add(rows, lookup(self.weights.positions, positions)), self.weights.norm)

    def _layer(self, layer: BertLayer, hidden: TensorRef, lengths: Sequence[int]) -> TensorRef:
        ops = self._ops
        attended = ops.attend(ops.affine(hidden, layer.qkv), lengths, self.config.num_heads)
        hidden = ops.norm(ops.tensor.add(ops.affine(attended, layer.output), hidden), layer.attention_norm)
        inner = self._activation(ops.affine(hidden, layer.up))
        return ops.norm(ops.tensor.add(ops.affine(inner, layer.down), hidden), layer.norm)

    def _check(
        self, token_ids: npt.NDArray[np.int64], types: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]
    ) -> None:
        """Everything that `forward` refuses, before anything is computed.  [FM-BERT-6]"""
        for name, values, limit in (
            ("token id", token_ids, self.config.vocab_size),
            ("token type", types, self.config.type_vocab_size),
        ):
            wrong = values[(values < 0) | (values >= limit)]
            if len(wrong):
                raise InvalidParameterError(f"BertEncoder.forward: {name} must be in [0, {limit}), got {wrong[0]}")
        if columns.max() >= self.config.max_position_embeddings:
            raise ResourceExhaustedError(
                f"BertEncoder.forward: {columns.max() + 1} tokens, but the model has"
                f" {self.config.max_position_embeddings} positions; truncate the text"
            )


def _rows(values: npt.NDArray[Any], kept: npt.NDArray[np.bool_]) -> list[list[int]]:
    """The kept values of each row."""
    return [row[keep].tolist() for row, keep in zip(values, kept, strict=True)]


def _ignore(_name: str, _tensor: TensorRef) -> None:
    """Nobody watches."""
