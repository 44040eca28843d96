"""The nodes of a graph that nobody runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from ferrum_ref.errors import InvalidFormatError
from ferrum_ref.formats import onnx_nodes
from ferrum_ref.formats.byte_source import MemoryBytes
from ferrum_ref.formats.onnx_nodes import read_onnx_graph


def content(*nodes: Any) -> bytes:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        [numpy_helper.from_array(np.arange(3, dtype=np.float32), "w")],
    )
    result: bytes = helper.make_model(graph).SerializeToString()
    return result


def opened(*nodes: Any) -> Any:
    return read_onnx_graph(MemoryBytes(content(*nodes), "here"))


@pytest.mark.clause("FM-ONNX-1")
def test_nodes_and_initialisers() -> None:
    convolution = helper.make_node(
        "Conv", ["x", "w"], ["a"], name="/c/Conv", dilations=[2], pads=[1, 1], group=4, auto_pad="SAME", scale=0.5
    )
    unnamed = helper.make_node("Add", ["a", "x"], ["y"])
    wide = helper.make_node("Pad", ["x"], ["b"], name="p", pads=list(range(65)))
    file, nodes = opened(convolution, unnamed, wide)
    assert file.read("w", 100).tolist() == [0, 1, 2]
    assert list(nodes) == ["/c/Conv", "p"]
    node = nodes["/c/Conv"]
    assert (node.kind, node.inputs) == ("Conv", ("x", "w"))
    assert dict(node.numbers) == {"dilations": (2,), "pads": (1, 1), "group": (4,), "scale": (0.5,)}
    assert node.ints("pads", (0,)) == (1, 1)
    assert node.ints("strides", (1,)) == (1,)
    assert node.ints("scale", (7,)) == (7,)
    assert nodes["p"].numbers == {}


@pytest.mark.clause("FM-ONNX-2")
def test_graphs_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = helper.make_node("Add", ["x", "x"], ["y"], name="first")
    with pytest.raises(InvalidFormatError, match="first twice"):
        opened(one, one)
    broken = content(one).replace(b"first", b"fir\xfft")
    with pytest.raises(InvalidFormatError, match="here"):
        read_onnx_graph(MemoryBytes(broken, "here"))
    monkeypatch.setattr(onnx_nodes, "_MAX_NODES", 1)
    opened(one)
    with pytest.raises(InvalidFormatError, match="2 nodes, expected at most 1"):
        opened(one, helper.make_node("Add", ["x", "x"], ["y"], name="second"))
