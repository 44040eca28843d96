"""Latent attention against transformers' own module in float64: contiguous and paged caches, whole and in pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as upstream

from ferrum_ref.errors import BackendError, ConfigError, InvalidParameterError
from ferrum_ref.interfaces.kernel_ops import KernelOps
from ferrum_ref.kv_cache.storage_contiguous import ContiguousKvFactory, KvShape
from ferrum_ref.kv_cache.storage_latent import LatentKvFactory, LatentKvStorage
from ferrum_ref.kv_cache.storage_paged import PagedKvStorage
from ferrum_ref.models.decoder_rope import rope_tables
from ferrum_ref.models.latent import LatentAttention, LatentKernels, read_latent
from ferrum_ref.models.latent_config import LatentSettings, deepseek_latent, latent_scale
from ferrum_ref.models.matrix_reader import MatrixReader
from ferrum_ref.plugins import load_backend
from ferrum_ref.types.devices import DataType

HIDDEN, HEADS, ROWS = 32, 4, 37
VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "halves": {"rope_interleave": False},
    "queries in one step": {"q_lora_rank": None},
    "biases": {"attention_bias": True},
    "values wider than keys": {"v_head_dim": 24, "qk_nope_head_dim": 2},
}


class Arrays:
    """A weight source over a dict."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.tensors = tensors

    def read(self, name: str, dtype: Any = np.float32, out: Any = None) -> Any:
        return self.tensors[name].astype(dtype)


def ignore(_name: str, _tensor: Any) -> None:
    """Nobody watches."""


class Case:
    """One attention of transformers, its results, and the same weights here."""

    def __init__(self, changes: dict[str, Any], backend_name: str, stay_double: Any, randomised: Any) -> None:
        sizes = {
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "q_lora_rank": 20,
            "kv_lora_rank": 14,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 6,
            "v_head_dim": 10,
            "max_position_embeddings": 64,
        }
        config = transformers.DeepseekV3Config(**{**sizes, **changes})
        config._attn_implementation = "eager"
        torch.manual_seed(0)
        module = upstream.DeepseekV3Attention(config, 0).eval()
        randomised(module, 5)
        self.x = np.random.default_rng(2).standard_normal((ROWS, HIDDEN)).astype(np.float32)
        positions = torch.arange(ROWS)[None]
        mask = torch.full((ROWS, ROWS), -torch.inf).triu(1)[None, None]
        rotary = upstream.DeepseekV3RotaryEmbedding(config)
        x = torch.from_numpy(self.x)[None]
        with torch.no_grad():
            self.own = module(x, rotary(x, positions), mask)[0][0].numpy()
            with stay_double():
                tables = rotary(x.double(), positions)
                self.exact = module.double()(x.double(), tables, mask.double())[0][0].numpy()
        self.bound = 4 * np.abs(self.own - self.exact).max()
        self.backend = load_backend(backend_name)
        self.settings = deepseek_latent(config.to_dict())
        source = Arrays({name: value.float().numpy() for name, value in module.state_dict().items()})
        reader = MatrixReader(source, self.backend, DataType.FP32)
        weights = read_latent(source, reader, self.backend, "", self.settings, DataType.FP32)
        tables = rope_tables(self.settings.rope_dim, 64, 10000.0)
        self.part = LatentAttention(kernels_of(self.backend, tables), self.settings, weights, 1e-6)
        self.shape = KvShape(1, 1, self.settings.cached_dim)

    def run(self, kv: Any, start: int, size: int) -> Any:
        x = self.backend.tensor_factory().from_numpy(np.ascontiguousarray(self.x[start : start + size]))
        attended = self.part.attend(x, np.arange(start, start + size), kv, 0, ignore)
        assert attended.shape() == (size, HEADS * self.settings.value_dim)
        return self.part.project(attended).to_numpy()

    def error(self, pieces: list[Any]) -> float:
        return float(np.abs(np.concatenate(pieces) - self.exact).max())


def kernels_of(backend: Any, tables: Any) -> LatentKernels:
    kernels: KernelOps = backend.kernel_ops()
    linear, norm, position = kernels.linear_ops(), kernels.norm_ops(), kernels.position_ops()
    assert linear
    assert norm
    assert position
    cos, sin = (backend.tensor_factory().from_numpy(table) for table in tables)
    return LatentKernels(backend, linear, norm, position, cos, sin)


@pytest.fixture(params=["numpy", "torch"])
def make_case(request: pytest.FixtureRequest, stay_double: Any, randomised: Any) -> Any:
    return lambda name: Case(VARIANTS[name], request.param, stay_double, randomised)


@pytest.mark.clause("LM-LATENT-1", "LM-LATENT-2", "LM-LATENT-3")
@pytest.mark.parametrize("name", VARIANTS)
def test_whole_and_in_pieces_over_contiguous_and_paged_latents(name: str, make_case: Any) -> None:
    case = make_case(name)
    sizes = [11, 1, 1, 20, 4]
    contiguous = ContiguousKvFactory(case.backend, case.shape, 64)
    whole = contiguous.bind([contiguous.new_cache()], [ROWS])
    assert case.error([case.run(whole, 0, ROWS)]) <= case.bound
    cache, start, pieces = contiguous.new_cache(), 0, []
    for size in sizes:
        bound = contiguous.bind([cache], [size])
        pieces.append(case.run(bound, start, size))
        bound.commit()
        start += size
    assert case.error(pieces) <= case.bound
    storage = PagedKvStorage(case.backend, case.shape, 9, 5)
    table, start, pieces = [7, 0, 3, 8, 1, 5, 2, 6], 0, []
    for size in sizes:
        pieces.append(case.run(storage.bind([table], [start], [size]), start, size))
        start += size
    assert case.error(pieces) <= case.bound


@pytest.mark.clause("LM-LATENT-3")
def test_the_cache_keeps_one_short_vector_a_token(make_case: Any) -> None:
    case = make_case("as published")
    assert case.settings.cached_dim == 14 + 8
    assert case.shape.num_kv_heads * case.shape.head_dim < HEADS * (case.settings.query_dim + case.settings.value_dim)
    wrong = ContiguousKvFactory(case.backend, KvShape(1, 1, 20), 64)
    kv = wrong.bind([wrong.new_cache()], [ROWS])
    with pytest.raises(BackendError, match="22"):
        case.run(kv, 0, ROWS)


@pytest.mark.clause("LM-LATENT-6", "LM-LATENT-3")
def test_latent_caches_keep_the_vector_once_and_change_no_bit(make_case: Any) -> None:
    case = make_case("as published")
    plain, latent = (kind(case.backend, case.shape, 64) for kind in (ContiguousKvFactory, LatentKvFactory))
    two, one = plain.new_cache(), latent.new_cache()
    start = 0
    for size in (20, 1, 16):
        both = [factory.bind([cache], [size]) for factory, cache in ((plain, two), (latent, one))]
        assert np.array_equal(*(case.run(kv, start, size) for kv in both))
        for kv in both:
            kv.commit()
        start += size
    assert one.num_tokens == ROWS
    assert 2 * one.size_bytes() == two.size_bytes()
    pages, pages_of_one = (kind(case.backend, case.shape, 9, 5) for kind in (PagedKvStorage, LatentKvStorage))
    table = [7, 0, 3, 8, 1, 5, 2, 6]
    first, second = (storage.bind([table], [0], [ROWS]) for storage in (pages, pages_of_one))
    assert np.array_equal(case.run(first, 0, ROWS), case.run(second, 0, ROWS))
    assert 2 * pages_of_one.size_bytes() == pages.size_bytes()
    pages_of_one.copy_block(7, 4)
    for storage in (pages, pages_of_one):
        assert np.array_equal(storage.read(0, [7], 5)[0].to_numpy(), pages_of_one.read(0, [4], 5)[1].to_numpy())
    with pytest.raises(InvalidParameterError, match="num_blocks must be >= 1"):
        LatentKvStorage(case.backend, case.shape, 0, 5)
    with pytest.raises(InvalidParameterError, match="cannot hold"):
        pages_of_one.bind([[1]], [0], [6])
    other = case.backend.tensor_factory().zeros((1, 1, 22), DataType.FP32, case.shape.device)
    same = case.backend.tensor_factory().zeros((1, 1, 22), DataType.FP32, case.shape.device)
    for kv in (latent.bind([one], [1]), pages_of_one.bind([[0]], [0], [1])):
        with pytest.raises(InvalidParameterError, match="got values of their own"):
            kv.append(0, same, other)


@pytest.mark.clause("LM-LATENT-4")
def test_scale_grows_with_stretched_positions_only_where_mscale_all_dim_says_so() -> None:
    assert latent_scale(16, None) == 0.25
    assert latent_scale(16, {"rope_type": "default", "mscale_all_dim": 1.0, "factor": 40}) == 0.25
    assert latent_scale(16, {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0}) == 0.25
    stretched = {"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7}
    ours = upstream.yarn_apply_mscale({"rope_type": "yarn", **stretched}, 0.25)
    assert latent_scale(16, stretched) == pytest.approx(ours, rel=1e-15)
    assert latent_scale(16, {**stretched, "factor": 0.5}) == 0.25
    with pytest.raises(ConfigError, match=r"rope_parameters\.factor: got None"):
        latent_scale(16, {"rope_type": "yarn", "mscale_all_dim": 1.0})


@pytest.mark.clause("LM-LATENT-5")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: got 7, expected an even number"),
        ({"kv_lora_rank": 0}, "kv_lora_rank: got 0"),
        ({"q_lora_rank": "8"}, "q_lora_rank: got '8'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads: got 2, expected the 4 query heads"),
        ({"rope_interleave": 1}, "rope_interleave: got 1"),
    ],
)
def test_impossible_sizes_are_refused_by_their_names(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deepseek_latent({"num_attention_heads": 4, **changes})


@pytest.mark.clause("LM-LATENT-5")
def test_published_sizes_are_the_defaults() -> None:
    expected = LatentSettings(
        num_heads=128,
        query_rank=1536,
        kv_rank=512,
        nope_dim=128,
        rope_dim=64,
        value_dim=128,
        interleaved=True,
        softmax_scale=192**-0.5,
    )
    found = deepseek_latent(transformers.DeepseekV3Config().to_dict())
    assert found == deepseek_latent({"num_attention_heads": 128})
    assert found.softmax_scale == pytest.approx(expected.softmax_scale, rel=1e-15)
    assert (found.query_rank, found.kv_rank, found.cached_dim, found.query_dim) == (1536, 512, 576, 192)
