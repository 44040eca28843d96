"""Operations that move elements and compute nothing: exact, bit for bit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from ferrum_ref.interfaces.backend import ComputeBackend
from ferrum_ref.interfaces.tensor import TensorRef
from ferrum_ref.parity.ops import bridge, draws
from ferrum_ref.parity.ops.operation import IID, Case, Expected, Inputs, Operation, case, exact
from ferrum_ref.parity.units import Array, Storage
from ferrum_ref.types.algorithm import Algorithm

SPECIAL = np.array([-0.0, np.inf, -np.inf, np.nan])


class _Moving(Operation):
    """Inputs x0, x1, ... of the sizes' `shapes`; every element is a different number, some are special."""

    def draw(self, case: Case, storage: Storage, rng: np.random.Generator) -> Inputs:
        arrays = {}
        for index, shape in enumerate(case.sizes["shapes"]):
            array = draws.normal(rng, shape, storage)
            if case.probe == "special values":
                flat = array.reshape(-1)
                flat[: SPECIAL.size] = storage.round(np.append(SPECIAL, storage.smallest_normal / 2))[-flat.size :][
                    : SPECIAL.size
                ]
            if case.probe == "strided":
                array = draws.strided(array)
            if case.probe == "transposed":
                array = draws.swapped(array, 0, array.ndim - 1)
            arrays[f"x{index}"] = array
        return Inputs(case, storage, arrays)

    def call(self, backend: ComputeBackend, inputs: Inputs) -> tuple[Array, ...]:
        tensors = [bridge.tensor(backend, inputs, name) for name in inputs.arrays]
        return bridge.host(*self.apply(backend, tensors, inputs.case))

    def expect(self, inputs: Inputs, algorithm: Algorithm) -> Sequence[Expected]:
        pieces = self.values(list(inputs.arrays.values()), inputs.case)
        return [exact(f"y{index}", piece) for index, piece in enumerate(pieces)]

    @abstractmethod
    def apply(self, backend: ComputeBackend, tensors: list[TensorRef], case: Case) -> Sequence[TensorRef]:
        """The backend's results."""

    @abstractmethod
    def values(self, arrays: list[Array], case: Case) -> Sequence[Array]:
        """What they must be."""


class Concat(_Moving):
    name = "concat"
    cases = (
        case(IID, shapes=((2, 3), (2, 5)), dim=1),
        case("special values", shapes=((3, 4), (1, 4), (2, 4)), dim=0),
        case("strided", shapes=((2, 6), (2, 7)), dim=1),
        case("transposed", shapes=((2, 3, 4), (2, 1, 4)), dim=1),
        case(IID, shapes=((2, 0, 3), (2, 5, 3)), dim=1),
        case(IID, shapes=((65,),), dim=0),
        case(IID, shapes=((33, 40), (33, 37)), dim=1),
    )

    def apply(self, backend: ComputeBackend, tensors: list[TensorRef], case: Case) -> Sequence[TensorRef]:
        return [backend.tensor_ops().concat(tensors, case.sizes["dim"])]

    def values(self, arrays: list[Array], case: Case) -> Sequence[Array]:
        return [np.concatenate(arrays, axis=case.sizes["dim"])]


class Split(_Moving):
    name = "split"
    cases = (
        case(IID, shapes=((2, 8),), pieces=(3, 5), dim=1),
        case("special values", shapes=((6, 3),), pieces=(1, 2, 3), dim=0),
        case("strided", shapes=((2, 9),), pieces=(4, 5), dim=1),
        case("transposed", shapes=((4, 3, 5),), pieces=(1, 0, 2), dim=1),
        case(IID, shapes=((0, 4),), pieces=(2, 2), dim=1),
        case(IID, shapes=((129,),), pieces=(64, 65), dim=0),
        case(IID, shapes=((40, 67),), pieces=(30, 37), dim=1),
    )

    def apply(self, backend: ComputeBackend, tensors: list[TensorRef], case: Case) -> Sequence[TensorRef]:
        return backend.tensor_ops().split(tensors[0], case.sizes["pieces"], case.sizes["dim"])

    def values(self, arrays: list[Array], case: Case) -> Sequence[Array]:
        ends = np.cumsum(case.sizes["pieces"])[:-1]
        return [np.asarray(piece) for piece in np.split(arrays[0], ends, axis=case.sizes["dim"])]


class Transpose(_Moving):
    name = "transpose"
    cases = (
        case(IID, shapes=((3, 5),), dims=(0, 1)),
        case("special values", shapes=((2, 3, 4),), dims=(0, 2)),
        case("strided", shapes=((3, 4, 5),), dims=(1, 2)),
        case("transposed", shapes=((3, 4, 5),), dims=(0, 1)),
        case(IID, shapes=((0, 5),), dims=(0, 1)),
        case(IID, shapes=((7, 33),), dims=(1, 1)),
        case(IID, shapes=((41, 53),), dims=(0, 1)),
    )

    def apply(self, backend: ComputeBackend, tensors: list[TensorRef], case: Case) -> Sequence[TensorRef]:
        return [backend.tensor_ops().transpose(tensors[0], *case.sizes["dims"])]

    def values(self, arrays: list[Array], case: Case) -> Sequence[Array]:
        return [np.swapaxes(arrays[0], *case.sizes["dims"])]


class Permute(_Moving):
    name = "permute"
    cases = (
        case(IID, shapes=((3, 5),), dims=(1, 0)),
        case("special values", shapes=((2, 3, 4),), dims=(2, 0, 1)),
        case("strided", shapes=((3, 4, 5),), dims=(1, 2, 0)),
        case("transposed", shapes=((2, 3, 4, 5),), dims=(0, 2, 1, 3)),
        case(IID, shapes=((0, 5, 2),), dims=(2, 1, 0)),
        case(IID, shapes=((17,),), dims=(0,)),
        case(IID, shapes=((11, 13, 17),), dims=(2, 0, 1)),
    )

    def apply(self, backend: ComputeBackend, tensors: list[TensorRef], case: Case) -> Sequence[TensorRef]:
        return [backend.tensor_ops().permute(tensors[0], case.sizes["dims"])]

    def values(self, arrays: list[Array], case: Case) -> Sequence[Array]:
        return [np.transpose(arrays[0], case.sizes["dims"])]


class Stack(_Moving):
    name = "stack"
    cases = (
        case(IID, shapes=((2, 3), (2, 3)), dim=0),
        case("special values", shapes=((3, 4), (3, 4), (3, 4)), dim=1),
        case("strided", shapes=((2, 6), (2, 6)), dim=2),
        case(IID, shapes=((0, 3), (0, 3)), dim=0),
        case(IID, shapes=((35, 41), (35, 41)), dim=1),
    )

    def apply(self, backend: ComputeBackend, tensors: list[TensorRef], case: Case) -> Sequence[TensorRef]:
        return [bridge.batch_ops(backend).stack(tensors, case.sizes["dim"])]

    def values(self, arrays: list[Array], case: Case) -> Sequence[Array]:
        return [np.stack(arrays, axis=case.sizes["dim"])]


class Unstack(_Moving):
    name = "unstack"
    cases = (
        case(IID, shapes=((3, 5),), dim=0),
        case("special values", shapes=((2, 3, 4),), dim=1),
        case("strided", shapes=((2, 6),), dim=1),
        case(IID, shapes=((2, 0, 4),), dim=0),
        case(IID, shapes=((3, 35, 41),), dim=0),
    )

    def apply(self, backend: ComputeBackend, tensors: list[TensorRef], case: Case) -> Sequence[TensorRef]:
        return bridge.batch_ops(backend).unstack(tensors[0], case.sizes["dim"])

    def values(self, arrays: list[Array], case: Case) -> Sequence[Array]:
        return [np.asarray(piece) for piece in np.moveaxis(arrays[0], case.sizes["dim"], 0)]


class PadBatch(_Moving):
    name = "pad_batch"
    cases = (
        case(IID, shapes=((2, 3), (4, 1)), target=(4, 5)),
        case("special values", shapes=((3, 4), (2, 5)), target=(3, 8)),
        case("strided", shapes=((2, 6),), target=(2, 7)),
        case(IID, shapes=((0, 3), (1, 0)), target=(2, 3)),
        case(IID, shapes=((30, 41), (33, 35)), target=(34, 45)),
    )

    def apply(self, backend: ComputeBackend, tensors: list[TensorRef], case: Case) -> Sequence[TensorRef]:
        return bridge.batch_ops(backend).pad_batch(tensors, case.sizes["target"])

    def values(self, arrays: list[Array], case: Case) -> Sequence[Array]:
        target = case.sizes["target"]
        return [np.pad(one, [(0, wanted - size) for wanted, size in zip(target, one.shape)]) for one in arrays]
