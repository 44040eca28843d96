"""A weight matrix as its parts lie: what lets packed matrices cross from a model to a backend without being expanded.

    matrix [out, in] = the rows of its parts, one part below the other; each part is what `quantized_linear` takes

Extension of upstream's `ferrum_interfaces::transformer`, whose matrices are dense.  Clauses: TW-PARTS-1..3
(specs/transformer.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ferrum_ref.interfaces.quant_schemes import QuantScheme
from ferrum_ref.interfaces.tensor import TensorRef


class DecoderMatrix(Enum):
    """The matrices of a decoder that `TransformerWeights` hands out; EMBED and LM_HEAD belong to no layer."""

    EMBED = "embed"
    QKV = "qkv"
    OUTPUT = "o"
    GATE_UP = "gate_up"
    DOWN = "down"
    LM_HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class WeightPart:
    """Rows of a matrix in one stored form; `scheme` None: `tensor` is the rows, plain numbers `[rows, columns]`.

    `shape` is (rows, columns) of the numbers, whatever shape the packed tensor has.  [TW-PARTS-1]
    """

    tensor: TensorRef
    scheme: QuantScheme | None
    shape: tuple[int, int]

    @classmethod
    def dense(cls, tensor: TensorRef) -> WeightPart:
        """A whole matrix of plain numbers.  Pure."""
        rows, columns = tensor.shape()
        return cls(tensor, None, (rows, columns))
