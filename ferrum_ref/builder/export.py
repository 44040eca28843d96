"""DecoderConfig -> ModelIR: the plain graph, one node for each thing the equations name.

Nothing is merged, folded or fused: that is what the passes are for. Names of values are those that an observer of the
decoder sees.  Clauses: MB-EXPORT-1..4 (specs/model_builder.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Final

from ferrum_ref.builder.graph import IrGraph, Node, Port
from ferrum_ref.builder.operators_model import ENTRIES
from ferrum_ref.errors import UnsupportedError
from ferrum_ref.interfaces.model_builder import (
    ArchitectureDefinition,
    GraphDefinition,
    InitializationStrategy,
    ModelArchitectureFamily,
    ModelDimensions,
    ModelIR,
    ModelMetadata,
    ParameterSpec,
)
from ferrum_ref.models.config import DecoderConfig
from ferrum_ref.models.tensor_names import EMBEDDING, FINAL_NORM, LM_HEAD, expected_tensors
from ferrum_ref.types.devices import DataType
from ferrum_ref.types.models import ModelType

IR_VERSION: Final = "ferrum-ref-ir/1"
INITIAL_STD: Final = 0.02  # of matrices, as the family's authors initialise them

_EXPRESSED: Final = frozenset(
    {
        "architecture", "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
        "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "attention_bias",
        "mlp_bias", "eos_token_ids", "bos_token_id", "pad_token_id", "dtype",
    }
)  # fmt: skip


def export_definition(
    config: DecoderConfig,
    *,
    name: str,
    model_type: ModelType,
    dtype: DataType,
    max_tokens: int,
    additional: Mapping[str, Any],
) -> ModelIR:
    """The model as data; positions reach max_tokens. Pure.  [MB-EXPORT-1..4]

    Raises UnsupportedError for a configuration that says more than the graph can express.
    """
    _require_expressible(config)
    graph = _Exporter(config, dtype, max_tokens).run()
    definition = ModelIR(
        metadata=ModelMetadata(
            name=name,
            version=IR_VERSION,
            model_type=model_type,
            architecture_family=ModelArchitectureFamily.Transformer,
            description=f"{config.architecture} decoder of {config.num_layers} layers",
            author=None,
            license=None,
            additional=dict(additional),
        ),
        architecture=ArchitectureDefinition(
            name=config.architecture,
            dimensions=ModelDimensions(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                intermediate_size=config.intermediate_size,
                max_sequence_length=max_tokens,
            ),
            config={**config.to_dict(), "dtype": dtype.value},
        ),
        parameters=[],
        layers=[],
        graph=GraphDefinition([], [], [], []),
    )
    graph.write(definition)
    return definition


def _require_expressible(config: DecoderConfig) -> None:
    """Anything the graph below does not know of must be absent: nothing that changes logits is ignored."""
    said = [
        field.name
        for field in fields(config)
        if field.name not in _EXPRESSED and (field.default is MISSING or getattr(config, field.name) != field.default)
    ]
    if config.architecture != "llama":
        said.insert(0, f"architecture {config.architecture!r}")
    if said:
        raise UnsupportedError(
            f"export_model_definition: the IR does not express {', '.join(said)}; build the model"
            " without custom layers at optimization_level 2, which needs no IR"
        )


class _Exporter:
    """Adds the nodes of one model, layer by layer."""

    def __init__(self, config: DecoderConfig, dtype: DataType, max_tokens: int) -> None:
        self._config = config
        self._dtype = dtype
        self._max_tokens = max_tokens
        self._shapes = dict(expected_tensors(config))
        self._graph = IrGraph([], [], [], [])
        self._entry = {name: self._node(name, "input", [], config={"name": name}) for name in ENTRIES}

    def run(self) -> IrGraph:
        config = self._config
        hidden = self._node("embedding", "embedding", [self._entry["token_ids"]], [EMBEDDING], tap="embedding")
        for index in range(config.num_layers):
            hidden = self._layer(index, hidden)
        normed = self._norm("final_norm", hidden, FINAL_NORM)
        head = EMBEDDING if config.tie_word_embeddings else LM_HEAD
        logits = self._node("logits", "linear", [normed], [head], tap="logits")
        self._graph.entries = list(ENTRIES)
        self._graph.exits = [logits.node]
        return self._graph

    def _layer(self, index: int, hidden: Port) -> Port:
        config, name, weights = self._config, f"layers.{index}", f"model.layers.{index}"
        normed = self._norm(f"{name}.attention_norm", hidden, f"{weights}.input_layernorm.weight")
        attended = self._attention(index, normed)
        if index == config.num_layers - 1:
            rows = self._entry["logit_rows"]
            attended = self._node(f"{name}.wanted_attention", "select_rows", [attended, rows])
            hidden = self._node(f"{name}.wanted_residual", "select_rows", [hidden, rows])
        output = self._linear(f"{name}.output", attended, f"{weights}.self_attn.o_proj", config.attention_bias)
        residual = self._node(f"{name}.after_attention", "add", [output, hidden], tap=f"{name}.after_attention")
        normed = self._norm(f"{name}.ffn_norm", residual, f"{weights}.post_attention_layernorm.weight")
        group = {"group": f"{name}.gate_up"}
        gate = self._linear(f"{name}.gate", normed, f"{weights}.mlp.gate_proj", config.mlp_bias, **group)
        up = self._linear(f"{name}.up", normed, f"{weights}.mlp.up_proj", config.mlp_bias, **group)
        active = self._node(f"{name}.gate_active", "silu", [gate])
        gated = self._node(f"{name}.gated", "mul", [active, up], tap=f"{name}.gated")
        down = self._linear(f"{name}.down", gated, f"{weights}.mlp.down_proj", config.mlp_bias)
        return self._node(f"{name}.hidden", "add", [down, residual], tap=f"{name}.hidden")

    def _attention(self, index: int, normed: Port) -> Port:
        config, name = self._config, f"layers.{index}"
        group = {"group": f"{name}.qkv", "group_tap": f"{name}.qkv"}
        heads = {}
        for part, count in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
            weight = f"model.layers.{index}.self_attn.{part}_proj"
            flat = self._linear(f"{name}.{part}", normed, weight, config.attention_bias, **group)
            shape = {"shape": [-1, count, config.head_dim]}
            heads[part] = self._node(f"{name}.{part}_heads", "reshape", [flat], config=shape)
        tables = self._node(
            f"{name}.rope_tables",
            "rope_tables",
            [],
            config={
                "head_dim": config.head_dim,
                "num_positions": self._max_tokens,
                "theta": config.rope_theta,
                "dtype": self._dtype.value,
            },
        )
        turn = [tables, Port(tables.node, 1), self._entry["positions"]]
        q = self._node(f"{name}.q_rotated", "rotary", [heads["q"], *turn])
        k = self._node(f"{name}.k_rotated", "rotary", [heads["k"], *turn])
        q = self._node(f"{name}.q_scaled", "scale", [q], config={"factor": config.head_dim**-0.5})
        settings = {
            "layer": index,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "softmax_scale": 1.0,
        }
        attended = self._node(f"{name}.attention", "attention", [q, k, heads["v"]], config=settings)
        flat_shape = {"shape": [-1, config.num_heads * config.head_dim]}
        return self._node(f"{name}.attention_rows", "reshape", [attended], config=flat_shape, tap=f"{name}.attention")

    def _linear(self, name: str, x: Port, weight: str, has_bias: bool, **metadata: str) -> Port:
        parameters = [f"{weight}.weight", *([f"{weight}.bias"] if has_bias else [])]
        return self._node(name, "linear", [x], parameters, metadata=metadata)

    def _norm(self, name: str, x: Port, weight: str) -> Port:
        return self._node(name, "rms_norm", [x], [weight], config={"eps": self._config.rms_norm_eps}, tap=name)

    def _node(
        self,
        name: str,
        operation: str,
        inputs: list[Port],
        parameters: list[str] | None = None,
        *,
        config: dict[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        tap: str | None = None,
    ) -> Port:
        for parameter in parameters or []:
            self._declare(parameter)
        node = Node(name, operation, inputs, list(parameters or []), config or {}, dict(metadata or {}))
        if tap is not None:
            node.set_taps({0: [tap]})
        return self._graph.add(node)

    def _declare(self, name: str) -> None:
        if name in self._graph.parameters:
            return
        shape = self._shapes[name]
        strategy: InitializationStrategy = InitializationStrategy.Normal(0.0, INITIAL_STD)
        if len(shape) == 1:
            strategy = InitializationStrategy.Zeros if name.endswith(".bias") else InitializationStrategy.Ones
        self._graph.add_parameter(ParameterSpec(name, list(shape), self._dtype, True, strategy, {}))
