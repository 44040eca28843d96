"""Mutated weight files, and a child process that loads them under limits and an audit hook.

Run as a program (by test_hostile_files.py):  hostile_files.py <first seed> <count> <folder> <kind>...
Prints one JSON object: per kind, how many files loaded, how many were refused, and every fault found.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import struct
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = ("safetensors", "index", "gguf", "npy", "npz", "pytorch", "pytorch_legacy", "onnx", "config", "tokenizer")
LIMIT_BYTES = 2**30
LIMIT_S = 2.0
NUMBERS = (0, 1, 2, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**61, 2**63 - 1, 2**63, 2**64 - 1, -1)
NAMES = ("../secret", "/etc/passwd", "..", "a/../../secret", "C:\\x", "\x00", "\ud800", "x" * 5000, "")


# --- mutations of bytes


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_early(data: bytearray, rng: random.Random) -> None:
    """Most headers lie at the start."""
    for _ in range(rng.choice((1, 2, 4))):
        data[rng.randrange(min(len(data), 400))] = rng.randrange(256)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def grow(data: bytearray, rng: random.Random) -> None:
    data += rng.randbytes(rng.choice((1, 8, 5000)))


def lie(data: bytearray, rng: random.Random) -> None:
    """A number that some field may be, over some place."""
    width = rng.choice((4, 8))
    place = rng.randrange(max(1, min(len(data), rng.choice((64, 2000, len(data)))) - width))
    data[place : place + width] = (rng.choice(NUMBERS) % 256**width).to_bytes(width, rng.choice(("little", "big")))


def repeat(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    piece = data[start : start + rng.randrange(1, 64)]
    place = rng.randrange(len(data))
    data[place:place] = piece * rng.choice((1, 2, 100))


MUTATIONS = (flip, flip, flip_early, flip_early, cut, grow, lie, lie, repeat)


def mutated(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if data:
            rng.choice(MUTATIONS)(data, rng)
    return bytes(data)


def mutated_json(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """Another value somewhere in the tree: a lying number, a name with a path, another kind, deep nesting."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.8):
        key = rng.choice(list(value))
        changed = dict(value)
        action = rng.random()
        if action < 0.1:
            del changed[key]
        elif action < 0.2:
            changed[rng.choice(NAMES)] = changed[key]
        else:
            changed[key] = mutated_json(value[key], rng, depth + 1)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], mutated_json(value[place], rng, depth + 1), *value[place + 1 :]]
    return rng.choice(
        (
            *NUMBERS,
            *NAMES,
            None,
            True,
            1.5,
            1e308,
            float("nan"),
            [],
            {},
            [[]] * 50,
            {"a": value},
            [value] * 3,
            str(value),
        )
    )


def json_text(value: Any, rng: random.Random) -> bytes:
    text = json.dumps(value)
    action = rng.random()
    if action < 0.05:
        depth = rng.choice((50, 5000, 200_000))
        text = "[" * depth + text + ("]" * depth if rng.random() < 0.5 else "")
    elif action < 0.08:
        text = '{"a":' * rng.choice((100, 100_000)) + text
    elif action < 0.1:
        text = text.replace("1", "1" * 6000, 1)
    return (
        mutated(text.encode("utf-8", "surrogatepass"), rng) if rng.random() < 0.3 else text.encode("utf-8", "replace")
    )


# --- files of each kind


class Evil:
    """A pickle that would run something."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.parts = (function, arguments)

    def __reduce__(self) -> Any:
        return self.parts


def evil_pickle(rng: random.Random, canary: Path) -> bytes:
    command = f"touch {canary}"
    target = rng.choice(
        (
            Evil(os.system, command),
            Evil(eval, f"open({str(canary)!r}, 'w')"),
            Evil(exec, f"open({str(canary)!r}, 'w')"),
            Evil(Path.touch, canary),
            Evil(__import__, "antigravity"),
            Evil(getattr, os, "system"),
            {"w": Evil(os.system, command)},
        )
    )
    try:
        data = pickle.dumps(target, protocol=rng.choice((0, 1, 2, 3, 4, 5)))
    except (pickle.PicklingError, TypeError):
        data = pickle.dumps(Evil(os.system, command), protocol=2)
    if rng.random() < 0.3:
        data = b"cposix\nsystem\n(X" + struct.pack("<I", len(command)) + command.encode() + b"tR."
    if rng.random() < 0.2:
        data = data[:-1] + rng.choice(
            (b"\x96" + b"\xff" * 8, b"r\xff\xff\xff\xff.", b"\x8b\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f")
        )
    return mutated(data, rng) if rng.random() < 0.3 else data


LAUGHS = b"\x80\x02]q\x00(NNe0" + b"".join(b"]q%c(h%ch%ce0" % (i, i - 1, i - 1) for i in range(1, 100)) + b"h\x63."
NESTED = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
TUPLES = b"\x80\x02)" + b"\x85" * 200_000 + b"."


def rezipped(content: bytes, change: Callable[[str, bytes], bytes], deflate: bool = False) -> bytes:
    """The archive with its entries changed and its checksums right again."""
    target = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target.getvalue()


def bomb() -> bytes:
    """An honest archive of 320 MiB of zeros in 1.4 MB: more than the loader was told to make."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (83886080,), }".ljust(117) + b"\n"
    target = io.BytesIO()
    with (
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
        new.open("w.npy", "w", force_zip64=True) as entry,
    ):
        entry.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
        zeros = bytes(2**24)
        for _ in range(20):
            entry.write(zeros)
    return target.getvalue()


def hostile(kind: str, base: bytes, rng: random.Random, canary: Path) -> bytes:
    """One mutated file of a kind."""
    if kind in ("config", "tokenizer", "index"):
        value = json.loads(base)
        for _ in range(rng.choice((1, 1, 2))):
            value = mutated_json(value, rng)
        return json_text(value, rng)
    if kind == "safetensors" and rng.random() < 0.6:
        length = int.from_bytes(base[:8], "little")
        header = json.loads(base[8 : 8 + length])
        for _ in range(rng.choice((1, 2))):
            header = mutated_json(header, rng)
        text = json_text(header, rng)
        return struct.pack("<Q", len(text)) + text + base[8 + length :]
    if kind in ("pytorch", "pytorch_legacy"):
        return hostile_pytorch(kind, base, rng, canary)
    if kind == "onnx" and rng.random() < 0.4:
        return hostile_onnx(base, rng)
    if kind == "npz" and rng.random() < 0.5:
        return rezipped(base, lambda name, data: mutated(data, rng), deflate=rng.random() < 0.5)
    return mutated(base, rng)


def hostile_onnx(base: bytes, rng: random.Random) -> bytes:
    """A sound message that lies: about shapes and types, or about where external data are."""
    import onnx

    model = onnx.ModelProto()
    model.ParseFromString(base)
    for proto in model.graph.initializer:
        if proto.external_data:
            names = (*(name for name in NAMES if name != "\ud800"), "link", "sub/../../secret", "e.bin", "folder")
            entry = rng.choice(proto.external_data)
            entry.value = str(rng.choice(NUMBERS)) if rng.random() < 0.3 else rng.choice(names)
        elif rng.random() < 0.5:
            proto.data_type = rng.choice((1, 2, 6, 7, 8, 9, 10, 14, 16, 17, 21, 22, 23, 99))
        else:
            proto.dims[0] = rng.choice([number for number in NUMBERS if -(2**63) <= number < 2**63])
    return bytes(model.SerializeToString())


def hostile_pytorch(kind: str, base: bytes, rng: random.Random, canary: Path) -> bytes:
    choice = rng.random()
    if choice < 0.25:
        stream = evil_pickle(rng, canary)
    elif choice < 0.3:
        stream = rng.choice((LAUGHS, NESTED, TUPLES))
    elif kind == "pytorch_legacy":
        return mutated(base, rng)
    elif choice < 0.75:
        return rezipped(base, lambda name, data: mutated(data, rng) if name.endswith("data.pkl") else data)
    else:
        return mutated(base, rng)
    if kind == "pytorch_legacy":
        head = (
            pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
        )
        return rng.choice((b"", head)) + stream
    return rezipped(base, lambda name, data: stream if name.endswith("data.pkl") else data)


# --- the child


class Watch:
    """What the audit hook saw that loading weights must never do."""

    FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "exec")
    FORBIDDEN_TOO = ("compile", "import", "socket.connect", "os.remove", "os.rename", "os.mkdir", "ctypes.dlopen")

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder.resolve())
        self.active = False
        self.seen: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in self.FORBIDDEN or event in self.FORBIDDEN_TOO:
            self.seen.append(f"{event} {str(arguments)[:200]}")
        elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(self.folder + os.sep) or (isinstance(arguments[1], str) and "w" in arguments[1]):
                self.seen.append(f"open {path[:200]}")


class Child:
    """Loads files and collects what must not happen."""

    def __init__(self, folder: Path) -> None:
        from ferrum_ref.interfaces.weights import WeightLoaderConfig
        from ferrum_ref.numpy_backend.factory import NumpyTensorFactory
        from ferrum_ref.weights.loader import SourceWeightLoader
        from ferrum_ref.weights.settings import Limits

        config = WeightLoaderConfig(False, None, None, 2, 5, True, {})
        self.loader = SourceWeightLoader(config, NumpyTensorFactory(), limits=Limits(max_tensor_bytes=256 * 2**20))
        self.folder = folder
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []

    def load(self, kind: str, path: Path) -> dict[str, Any]:
        """Everything in the file, as arrays."""
        import numpy as np

        from ferrum_ref.interfaces.weights import TensorSpec, WeightSource
        from ferrum_ref.models.checkpoint import open_checkpoint
        from ferrum_ref.tokenizer.from_directory import tokenizer_from_directory
        from ferrum_ref.types.devices import DataType, Device

        if kind == "config":
            with open_checkpoint(path.parent) as checkpoint:
                return {name: checkpoint.read(name) for name in checkpoint.tensors}
        if kind == "tokenizer":
            tokenizer_from_directory(path.parent).encode("a b", False)
            return {}
        source = WeightSource.File(str(path), None)
        loader = self.loader
        found = loader._metadata(source)
        loaded = {}
        for name, shape in list(found.tensors.items())[:8]:
            spec = TensorSpec(name, shape, DataType.FP32, Device.CPU, source, [])
            loaded[name] = np.asarray(loader._load(spec, loader._opener).to_numpy())
            if loaded[name].shape != tuple(shape):
                raise AssertionError(f"{name}: shape {loaded[name].shape}, promised {shape}")
        return loaded

    def run(self, kind: str, path: Path, what: str, watch: Watch) -> None:
        from ferrum_ref.errors import FerrumError

        start_s = time.process_time()
        watch.active = True
        try:
            loaded = self.load(kind, path)
            watch.active = False
            self.outcomes["loaded"] += 1
            if difference := compared(kind, path, loaded):
                self.faults.append(f"{what}: {difference}")
        except FerrumError as error:
            watch.active = False
            self.outcomes[error.kind] += 1
            text = str(error)
            if "got no memory" in text or "\n" in text or len(text) > 1200 or "TOP-SECRET" in text:
                self.faults.append(f"{what}: message {text[:300]!r}")
        except BaseException as error:  # noqa: BLE001  whatever it is, it is a fault
            watch.active = False
            import traceback

            self.faults.append(f"{what}: {type(error).__name__}: {error!s:.200} {traceback.format_exc()[-700:]}")
        spent_s = time.process_time() - start_s
        if spent_s > LIMIT_S:
            self.faults.append(f"{what}: {spent_s:.1f} s")
        self.faults += [f"{what}: {seen}" for seen in watch.seen]
        watch.seen.clear()


def compared(kind: str, path: Path, loaded: dict[str, Any]) -> str:
    """What another reader makes of a file that loaded; "" when it agrees or refuses."""
    import numpy as np

    judge = JUDGES.get(kind)
    if judge is None or not loaded:
        return ""
    try:
        with np.errstate(all="ignore"):
            expected = judge(path)
    except Exception:  # noqa: BLE001  stricter than this project, which is its right
        return ""
    for name, values in loaded.items():
        if name not in expected:
            return f"{name!r} is not in what the judge reads"
        with np.errstate(all="ignore"):
            wanted = np.asarray(expected[name]).astype(np.float32)
        if wanted.shape != values.shape or not np.array_equal(wanted, values, equal_nan=True):
            return f"{name!r} differs from what the judge reads"
    return ""


def judge_safetensors(path: Path) -> Any:
    import ml_dtypes  # noqa: F401
    from safetensors.numpy import load_file

    return load_file(path)


def judge_npy(path: Path) -> Any:
    import numpy as np

    return {"tensor": np.load(path, allow_pickle=False)}


def judge_npz(path: Path) -> Any:
    import numpy as np

    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def judge_onnx(path: Path) -> Any:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path), load_external_data=False)
    return {each.name: numpy_helper.to_array(each, str(path.parent)) for each in model.graph.initializer}


JUDGES: dict[str, Callable[[Path], Any]] = {
    "safetensors": judge_safetensors,
    "npy": judge_npy,
    "npz": judge_npz,
    "onnx": judge_onnx,
}
FILE_NAMES = {
    "safetensors": "w.safetensors",
    "index": "model.safetensors.index.json",
    "gguf": "w.gguf",
    "npy": "w.npy",
    "npz": "w.npz",
    "pytorch": "w.pt",
    "pytorch_legacy": "w.bin",
    "onnx": "w.onnx",
    "config": "config.json",
    "tokenizer": "tokenizer.json",
}


def child(first: int, count: int, folder: Path, kinds: list[str]) -> dict[str, Any]:
    """Load `count` files of each kind, seeds from `first`, in `folder`/<kind> where the sound ones lie."""
    workers = {kind: Child(folder / kind) for kind in kinds}
    watches = {kind: Watch(folder / kind) for kind in kinds}
    bases = {kind: (folder / kind / FILE_NAMES[kind]).read_bytes() for kind in kinds}
    "".encode("cp437")  # a codec that zipfile loads when it meets such a name
    for kind, worker in workers.items():  # sound files first: every lazy import is done, and they load
        path = folder / kind / FILE_NAMES[kind]
        if difference := compared(kind, path, worker.load(kind, path)):
            raise AssertionError(difference)
    canary = folder / "canary"
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, used + LIMIT_BYTES))
    for kind, worker in workers.items():
        path = folder / kind / FILE_NAMES[kind]
        for seed in range(first, first + count):
            rng = random.Random(f"{kind} {seed}")
            content = bomb() if kind == "npz" and seed == 0 else hostile(kind, bases[kind], rng, canary)
            path.unlink()
            path.write_bytes(content)
            worker.run(kind, path, f"{kind} {seed}", watches[kind])
        path.write_bytes(bases[kind])
        if canary.exists():
            worker.faults.append("the canary was written: something was executed")
    return {kind: {"outcomes": worker.outcomes, "faults": worker.faults} for kind, worker in workers.items()}


if __name__ == "__main__":
    print(json.dumps(child(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])))
