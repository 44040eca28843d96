"""The nodes of an ONNX graph, read without running them: which initialiser feeds what, with which numbers.

Exporters fold weights together under made-up names; the node that takes one says what it is.
Clauses: FM-ONNX-1..2 (specs/audio.md).  Source: onnx.proto, NodeProto and AttributeProto.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from ferrum_ref.formats.byte_source import ByteSource
from ferrum_ref.formats.complaint import invalid, quoted
from ferrum_ref.formats.onnx_initializers import OnnxFile, parsed_model

_FLOAT: Final = 1  # AttributeProto.AttributeType
_INT: Final = 2
_INTS: Final = 7
_MAX_NODES: Final = 1 << 18
_MAX_NUMBERS: Final = 64  # of one attribute

Numbers = tuple[int, ...] | tuple[float, ...]


@dataclass(frozen=True, slots=True)
class OnnxNode:
    """A node: its kind, the names it takes, and its attributes that are numbers."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    numbers: Mapping[str, Numbers]

    def ints(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """An attribute of whole numbers; `default` where it has none."""
        found = tuple(each for each in self.numbers.get(name, ()) if isinstance(each, int))
        return found or default


def read_onnx_graph(source: ByteSource) -> tuple[OnnxFile, Mapping[str, OnnxNode]]:
    """The initialisers of a model whose data lie in the file itself, and its named nodes.  [FM-ONNX-1..2]

    Raises what OnnxFile raises; InvalidFormatError (two nodes of one name, text that is not UTF-8).
    """
    model = parsed_model(source)
    file = OnnxFile(source, None, model)
    try:
        return file, MappingProxyType(_nodes(model, source.name))
    except (UnicodeError, ValueError, AttributeError) as error:
        raise invalid("ONNX", source.name, "node", type(error).__name__, "a readable message") from None


def _nodes(model: Any, source: str) -> dict[str, OnnxNode]:
    if len(model.graph.node) > _MAX_NODES:
        raise invalid("ONNX", source, "graph", f"{len(model.graph.node)} nodes", f"at most {_MAX_NODES}")
    found: dict[str, OnnxNode] = {}
    for proto in model.graph.node:
        name = _text(proto.name, source)
        if not name:
            continue
        if name in found:
            raise invalid("ONNX", source, "node", f"{quoted(name)} twice", "a new name")
        inputs = tuple(_text(each, source) for each in proto.input)
        found[name] = OnnxNode(name, _text(proto.op_type, source), inputs, _numbers(proto, source))
    return found


def _numbers(proto: Any, source: str) -> Mapping[str, Numbers]:
    found: dict[str, Numbers] = {}
    for attribute in proto.attribute:
        name = _text(attribute.name, source)
        if attribute.type == _INTS and len(attribute.ints) <= _MAX_NUMBERS:
            found[name] = tuple(int(each) for each in attribute.ints)
        elif attribute.type == _INT:
            found[name] = (int(attribute.i),)
        elif attribute.type == _FLOAT:
            found[name] = (float(attribute.f),)
    return MappingProxyType(found)


def _text(field: Any, source: str) -> str:
    """A text field; protobuf hands out bytes when they are not UTF-8."""
    if not isinstance(field, str):
        raise invalid("ONNX", source, "text", field, "UTF-8")
    return field
