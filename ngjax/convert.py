"""Checkpoints of the PyTorch reference models (Kofinas et al. 2024, `mkofinas/neural-graphs`) in this library's models.

Those of its learned optimizers (`lsbicego/learning-gnns`) too.

Only arrays come in: read a checkpoint with `ngjax.torch_file` or torch, and pass its tensors by name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ngjax.chains import mlp_spec
from ngjax.graph import GroupedGraph, to_groups, to_params
from ngjax.nn import NGGNN, NGT, EncoderConfig, GraphReadout, ParamsReadout, WeightSpaceModel, WeightStatistics
from ngjax.optimizers.features import MOMENTUM_DECAYS, NUM_FEATURES, PREPROCESS_P
from ngjax.optimizers.graph_rules import GraphRule
from ngjax.optimizers.leaves import Leaves
from ngjax.optimizers.named_rules import Rule
from ngjax.optimizers.parts import inferred_spec
from ngjax.optimizers.rules import FFRule, LSTMRule
from ngjax.optimizers.steps import MAGNITUDE_SCALE, STEP_SCALE
from ngjax.optimizers.transform import Layout, learned_opt
from ngjax.spec import NeuralGraphSpec, path_keys
from ngjax.zoo.siren import apply_siren

REPAIRS = ("alignment", "normalization", "masking")

_POOLINGS = {
    "concat_output_nodes": "cat_output",
    "mean_output_nodes": "mean_output",
    "mean_all_nodes": "mean",
    "max_all_nodes": "max",
    "mean_all_edges": "mean_edge",
    "max_all_edges": "max_edge",
    "class_token": "token",
}

Layers = Sequence[Float[Array, "..."]]


class ReferenceModel(NamedTuple):
    """A reference model in this library's terms: `model.apply(variables, to_groups(spec, params), spec=spec)`."""

    model: WeightSpaceModel
    variables: dict[str, Any]
    spec: NeuralGraphSpec


class ReferenceRule(NamedTuple):
    """A learned optimizer of the reference in this library's terms: `ng_learned_opt(rule, meta_params=meta_params)`."""

    rule: Rule
    meta_params: dict[str, Any]


def from_reference(
    config: Mapping[str, Any], state_dict: Mapping[str, Any], *, repair: Collection[str] = ()
) -> Callable[[Layers, Layers], Any] | optax.GradientTransformationExtraArgs:
    """A callable with the library's own model inside that computes what the reference computes.

    Args:
      config: of the model: `model` is one of `ng_gnn_classifier`, `ng_t_classifier`, `ng_gnn_editor`, `ng_t_editor`,
        `siren_render`, `learned_optimizer_ff`, `learned_optimizer_lstm`, `learned_optimizer_ng_gnn` and
        `learned_optimizer_ng_t`; the other entries are plain hyper-parameters. Position embeddings of the learned
        optimizers are rows for inputs, hidden layers and outputs of the network with `layer_sizes`.
      state_dict: arrays by parameter name, with or without the prefix `param/`. They may be traced, so that gradients
        with respect to them can be taken.
      repair: defects of the reference to put right: `"alignment"` (the NG-GNN editor and learned optimizers read biases
        from their own nodes, and the NG-T one nodes and edges from their own places), `"normalization"` (node features
        are normalized per network, not over the mini-batch), `"masking"` (padding takes no part).

    Returns:
      `f(weights, biases)` of lists of `[B, in, out, 1]` and `[B, out, 1]`, which returns logits `[B, classes]`, for
      editors `(delta_weights, delta_biases)` of the same shapes, for `siren_render` values `[B, points, outputs]`. For
      learned optimizers an `optax` transformation over a dict of the tensors named in `config["parameter_order"]`.

    Raises:
      ValueError: an unknown model or repair, a parameter that is missing, left over or of the wrong shape, a constant
        of the learned optimizers' features that is not this library's.
    """
    unknown = set(repair) - set(REPAIRS)
    if unknown:
        raise ValueError(f"unknown repair {sorted(unknown)}; known are {', '.join(REPAIRS)}")
    state = _State(state_dict)
    if config.get("model") == "siren_render":
        return _siren_render(config, state)
    if str(config.get("model")).startswith("learned_optimizer"):
        return _learned_optimizer(config, state_dict, repair)
    model, variables, spec = reference_model(config, state_dict, repair=repair)

    def run(weights: Layers, biases: Layers) -> Any:
        params = {f"layer_{i}": {"kernel": w, "bias": b} for i, (w, b) in enumerate(zip(weights, biases, strict=True))}
        result = model.apply(variables, to_groups(spec, params, feature_axis=True), spec=spec)
        if not isinstance(result, GroupedGraph):
            return result
        edit = to_params(spec, result, feature_axis=True)
        layers = [edit[f"layer_{i}"] for i in range(len(weights))]
        return [layer["kernel"] for layer in layers], [layer["bias"] for layer in layers]

    return run


def reference_model(
    config: Mapping[str, Any], state_dict: Mapping[str, Any], *, repair: Collection[str] = ()
) -> ReferenceModel:
    """The model, its variables and the spec of the networks it reads; arguments and errors as in `from_reference`."""
    state = _State(state_dict)
    kind = config.get("model")
    builders = {
        "ng_gnn_classifier": _gnn,
        "ng_gnn_editor": _gnn,
        "ng_t_classifier": _transformer,
        "ng_t_editor": _transformer,
    }
    if kind not in builders:
        raise ValueError(f"unknown model {kind!r}; known are {', '.join([*builders, 'siren_render', *_OPTIMIZERS])}")
    sizes = tuple(config["layer_sizes"])
    spec = mlp_spec(sizes, activation="siren")
    encoder, params, constants = _encoder(config, state, sizes)
    backbone, backbone_params = builders[kind](config, state, encoder, repair)
    readout: nn.Module
    if kind.endswith("editor"):
        readout, readout_params = _editor_head(config, state, sizes, repair)
    else:
        readout, readout_params = _classifier_head(config, state)
    state.check_all_used()
    variables: dict[str, Any] = {
        "params": {"backbone": backbone_params | {"encoder": params}, "readout": readout_params}
    }
    if constants:
        variables["constants"] = {"backbone": {"encoder": constants}}
    return ReferenceModel(WeightSpaceModel(backbone, readout), variables, spec)


def reference_rule(
    config: Mapping[str, Any], state_dict: Mapping[str, Any], *, repair: Collection[str] = ()
) -> ReferenceRule:
    """The update rule of a learned optimizer and its meta-parameters; arguments and errors as in `from_reference`."""
    constants = {
        "momentum_decays": list(MOMENTUM_DECAYS),
        "preprocess_p": PREPROCESS_P,
        "step_scale": STEP_SCALE,
        "magnitude_scale": MAGNITUDE_SCALE,
    }
    for name, expected in constants.items():
        if config.get(name, expected) != expected:
            raise ValueError(f"config {name}: this library computes with {expected}, received {config[name]}")
    unknown = set(repair) - set(REPAIRS)
    if unknown:
        raise ValueError(f"unknown repair {sorted(unknown)}; known are {', '.join(REPAIRS)}")
    kind = config.get("model")
    if kind not in _OPTIMIZERS:
        raise ValueError(f"learned optimizer {kind!r} is unknown; known are {', '.join(_OPTIMIZERS)}")
    # The backbone has the names of the classifiers' under a prefix.
    state = _State({name.removeprefix("param/").removeprefix("gnn."): array for name, array in state_dict.items()})
    if "momentum" in state:
        state.get("momentum")  # a buffer with the decays
    rule, meta_params = _OPTIMIZERS[kind](config, state, repair)
    num_layers = config["head_hidden_layers"] + 1
    meta_params["head"] = {f"dense_{i}": state.linear(f"fc.{2 * i}") for i in range(num_layers)}
    state.check_all_used()
    return ReferenceRule(rule, meta_params)


class _State:
    """Arrays by name that remembers which were asked for."""

    def __init__(self, arrays: Mapping[str, Any]):
        self._arrays = {name.removeprefix("param/"): array for name, array in arrays.items()}
        self._used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def get(self, name: str) -> Array:
        if name not in self._arrays:
            raise ValueError(f"parameter {name!r} is missing from the state dict")
        self._used.add(name)
        return jnp.asarray(self._arrays[name])

    def linear(self, name: str, *, has_bias: bool = True) -> dict[str, Array]:
        """A torch linear layer `[out, in]` as a Flax one."""
        layer = {"kernel": self.get(f"{name}.weight").T}
        return layer | {"bias": self.get(f"{name}.bias")} if has_bias else layer

    def norm(self, name: str) -> dict[str, Array]:
        return {"scale": self.get(f"{name}.weight"), "bias": self.get(f"{name}.bias")}

    def names(self, prefix: str) -> list[str]:
        return [name for name in self._arrays if name.startswith(prefix)]

    def check_all_used(self) -> None:
        left = sorted(self._arrays.keys() - self._used)
        if left:
            raise ValueError(f"parameters of the state dict that the configured model does not have: {', '.join(left)}")


def _statistics(config: Mapping[str, Any]) -> WeightStatistics | None:
    values = config.get("normalisation")
    if values is None:
        return None
    columns = (values[f"{kind}_{what}"] for kind in ("weights", "biases") for what in ("mean", "std"))
    return WeightStatistics(*(tuple(map(float, column)) for column in columns))


def _encoder(
    config: Mapping[str, Any], state: _State, sizes: tuple[int, ...]
) -> tuple[EncoderConfig, dict[str, Any], dict[str, Array]]:
    depth = config.get("input_projection_depth", 1)
    hidden = len(sizes) - 2
    num_probes = config.get("num_probe_inputs", 0)
    has_fourier = config["fourier_features"]
    encoder = EncoderConfig(
        reverse_edges=config["reverse_edges"],
        statistics=_statistics(config),
        fourier_frequencies=config["fourier_frequencies"] if has_fourier else 0,
        fourier_scale=float(config["fourier_sigma"]),
        depth=depth,
        num_probes=num_probes,
        positions="slot" if config["positional_embedding"] else "none",
        max_inputs=sizes[0],
        max_hidden_layers=hidden,
        max_outputs=sizes[-1],
    )
    prefix = "construct_graph."
    params: dict[str, Any] = {}
    constants: dict[str, Array] = {}
    for kind, name in (("edge", "proj_weight"), ("node", "proj_bias")):
        first = 1 if has_fourier else 0
        for i in range(depth):
            layer = state.linear(f"{prefix}{name}.{first + 2 * i}")
            if i == 0:
                layer["kernel"] = layer["kernel"][None]
            params[f"{kind}_in_{i}"] = layer
        if has_fourier:
            constants[f"{kind}_frequencies"] = state.get(f"{prefix}{name}.0.b").T[None]
    params["edge_out"] = state.linear(f"{prefix}proj_edge_in")
    params["node_out"] = state.linear(f"{prefix}proj_node_in")
    if encoder.positions == "slot":
        params["positions"] = state.get(f"{prefix}pos_embed")
    if num_probes:
        params["probe_inputs"] = state.get(f"{prefix}gpf.inputs")[0].T
        linear = [state.linear(f"{prefix}gpf.proj.{i}.0") for i in range(len(sizes))]
        norms = [state.norm(f"{prefix}gpf.proj.{i}.1") for i in range(len(sizes))]
        # The reference adds 0.5 to the networks' outputs, which here is a constant in the bias of the last map.
        linear[-1]["bias"] = linear[-1]["bias"] + 0.5 * jnp.sum(linear[-1]["kernel"], axis=0)
        params["probes"] = {
            "kernel": jnp.stack([layer["kernel"] for layer in linear]),
            "bias": jnp.stack([layer["bias"] for layer in linear]),
            "norm_scale": jnp.stack([norm["scale"] for norm in norms]),
            "norm_bias": jnp.stack([norm["bias"] for norm in norms]),
        }
    return encoder, params, constants


def _gnn(
    config: Mapping[str, Any], state: _State, encoder: EncoderConfig, repair: Collection[str]
) -> tuple[NGGNN, dict[str, Any]]:
    num_layers = config["num_layers"]
    histogram = config["degree_histogram"]
    mean_log_degree = sum(n * math.log(degree + 1) for degree, n in enumerate(histogram)) / sum(histogram)
    params: dict[str, Any] = {}
    for k in range(num_layers):
        conv = f"gnn.convs.{k}"
        for buffer in ("avg_deg_log", "avg_deg_lin"):  # the first is `mean_log_degree`, the second is not used
            if f"{conv}.aggr_module.{buffer}" in state:
                state.get(f"{conv}.aggr_module.{buffer}")
        message = state.linear(f"{conv}.pre_nns.0.0")
        width = message["kernel"].shape[0] // 2
        params[f"layer_{k}"] = {
            "film": state.linear(f"{conv}.edge_encoder"),
            "message_target": {"kernel": message["kernel"][:width], "bias": message["bias"]},
            "message_source": {"kernel": message["kernel"][width:]},
            "update": state.linear(f"{conv}.post_nns.0.0"),
            "mix": state.linear(f"{conv}.lin"),
        }
        if k == num_layers - 1:
            break
        norm = state.norm(f"gnn.norms.{k}")
        params[f"norm_scale_{k}"], params[f"norm_bias_{k}"] = norm["scale"], norm["bias"]
        edge, source, target = (state.linear(f"gnn.edge_update.{k}.lin_{end}") for end in "est")
        edge["bias"] = edge["bias"] + source.pop("bias") + target.pop("bias")
        out = state.linear(f"gnn.edge_update.{k}.lin1")
        params[f"edge_update_{k}"] = {"edge": edge, "source": source, "target": target, "out": out}
    model = NGGNN(
        features=config["hidden_dim"],
        num_layers=num_layers,
        encoder=encoder,
        norm_scope="graph" if "normalization" in repair else "batch",
        mean_log_degree=mean_log_degree,
    )
    return model, params


def _transformer(
    config: Mapping[str, Any], state: _State, encoder: EncoderConfig, repair: Collection[str]
) -> tuple[NGT, dict[str, Any]]:
    num_layers, last_edge_update = config["num_layers"], config["last_layer_edge_update"]
    # Those of learned optimizers lack the one and have the other.
    attention_out, pair_means = (
        "layers.0.self_attn.proj_out.weight" in state,
        ("layers.0.edge_mlp0.lin0_er.weight" in state),
    )
    params: dict[str, Any] = {}
    for k in range(num_layers):
        layer = f"layers.{k}"
        attention = f"{layer}.self_attn"
        params[f"layer_{k}"] = {
            "qkv_node": state.linear(f"{attention}.qkv_node", has_bias=False),
            "qkv_edge": state.linear(f"{attention}.qkv_edge", has_bias=False),
            "node_lin": state.linear(f"{layer}.lin0"),
            "node_norm_0": state.norm(f"{layer}.node_ln0"),
            "node_norm_1": state.norm(f"{layer}.node_ln1"),
            "node_mlp_0": state.linear(f"{layer}.node_mlp.0", has_bias=False),
            "node_mlp_1": state.linear(f"{layer}.node_mlp.2"),
        }
        if attention_out:
            params[f"layer_{k}"]["attention_out"] = state.linear(f"{attention}.proj_out")
        if k == num_layers - 1 and not last_edge_update:
            break
        update = f"{layer}.edge_updates" if f"{layer}.edge_updates.eln0.weight" in state else layer
        edge, source, target = (state.linear(f"{update}.edge_mlp0.lin0_{end}") for end in "est")
        edge["bias"] = edge["bias"] + source.pop("bias") + target.pop("bias")
        params[f"layer_{k}"] |= {
            "edge_in": edge,
            "edge_source": source,
            "edge_target": target,
            "edge_out": state.linear(f"{update}.edge_mlp0.lin1"),
            "edge_norm_0": state.norm(f"{update}.eln0"),
            "edge_mlp_0": state.linear(f"{update}.edge_mlp1.0", has_bias=False),
            "edge_mlp_1": state.linear(f"{update}.edge_mlp1.2"),
            "edge_norm_1": state.norm(f"{update}.eln1"),
        }
        if pair_means:
            for name, end in (("edge_row", "er"), ("edge_column", "ec")):
                params[f"layer_{k}"][name] = state.linear(f"{update}.edge_mlp0.lin0_{end}", has_bias=False)
    class_token = config.get("pooling") == "class_token"
    if class_token:
        params["token"] = state.get("cls_token").reshape(-1)
    model = NGT(
        node_features=config["node_dim"],
        edge_features=config["edge_dim"],
        attention_features=config["attention_dim"],
        node_hidden=config["node_mlp_dim"],
        edge_hidden=config["edge_mlp_dim"],
        edge_mlp_hidden=config.get("second_edge_mlp_dim"),
        num_layers=num_layers,
        num_heads=config["num_heads"],
        encoder=encoder,
        modulate_values=config["modulate_values"],
        last_edge_update=last_edge_update,
        class_token=class_token,
        attention_out=attention_out,
        pair_means=pair_means,
        alignment="corrected" if "alignment" in repair else config.get("alignment", "corrected"),
    )
    return model, params


def _classifier_head(config: Mapping[str, Any], state: _State) -> tuple[GraphReadout, dict[str, Any]]:
    pooling = config["pooling"]
    if pooling not in _POOLINGS:
        raise ValueError(f"unknown pooling {pooling!r}; known are {', '.join(_POOLINGS)}")
    num_linear = sum(f"proj_out.{i}.weight" in state for i in range(0, 8, 2))
    params = {f"dense_{i}": state.linear(f"proj_out.{2 * i}") for i in range(num_linear)}
    readout = GraphReadout(
        features=config["num_classes"],
        hidden=params["dense_0"]["kernel"].shape[1],
        num_hidden=num_linear - 1,
        pooling=_POOLINGS[pooling],  # type: ignore[arg-type]
        layer_norm=False,
    )
    return readout, params


def _editor_head(
    config: Mapping[str, Any], state: _State, sizes: tuple[int, ...], repair: Collection[str]
) -> tuple[ParamsReadout, dict[str, Any]]:
    num_layers = len(sizes) - 1
    edge_out = state.linear("proj_edge.2")
    params = {
        "node_dense_0": state.linear("proj_node.0"),
        "node_dense_1": state.linear("proj_node.2"),
        "edge_dense_0": state.linear("proj_edge.0"),
        "edge_kernel": edge_out["kernel"][None],
        "edge_bias": edge_out["bias"][None],
        "weight_scale": jnp.stack([state.get(f"weight_scale.{i}") for i in range(num_layers)]),
        "bias_scale": jnp.stack([state.get(f"bias_scale.{i}") for i in range(num_layers)]),
    }
    misaligned = config["model"] == "ng_gnn_editor" and "alignment" not in repair
    readout = ParamsReadout(
        statistics=_statistics(config) if config["denormalise_outputs"] else None,
        max_layers=num_layers,
        bias_alignment="reference" if misaligned else "corrected",
    )
    return readout, params


def _siren_render(config: Mapping[str, Any], state: _State) -> Callable[[Layers, Layers], Array]:
    coordinates = state.get("inputs")[0]
    state.check_all_used()

    def render(weights: Layers, biases: Layers) -> Array:
        params = {
            f"layer_{i}": {"kernel": w[..., 0], "bias": b[..., 0]}
            for i, (w, b) in enumerate(zip(weights, biases, strict=True))
        }
        run = functools.partial(
            apply_siren, coordinates=coordinates, omega=config["omega"], output_offset=config["output_offset"]
        )
        return jax.vmap(run)(params)

    return render


def _learned_optimizer(
    config: Mapping[str, Any], state_dict: Mapping[str, Any], repair: Collection[str]
) -> optax.GradientTransformationExtraArgs:
    places = {name: i for i, name in enumerate(config["parameter_order"])}
    rule, meta_params = reference_rule(config, state_dict, repair=repair)

    def recorded_layout(leaves: Leaves) -> Layout:
        paths, shapes = leaves.paths, leaves.shapes
        names = [".".join(map(str, path_keys(path))) for path in paths]
        unknown = [name for name in names if name not in places]
        if unknown:
            raise ValueError(f"parameter {unknown[0]} is not in the recorded order: {', '.join(places)}")
        order = sorted(range(len(names)), key=lambda i: places[names[i]])
        if not isinstance(rule, GraphRule):
            return Layout(order)
        return Layout(order, inferred_spec(tuple(paths[i] for i in order), tuple(shapes[i] for i in order)))

    return learned_opt(rule, recorded_layout, meta_params=meta_params, step="paper")


def _ff_rule(config: Mapping[str, Any], state: _State, repair: Collection[str]) -> tuple[Rule, dict[str, Any]]:
    del state, repair  # there is a head and nothing else
    return FFRule(config["backbone_hidden"], config["head_hidden_layers"]), {}


def _lstm_rule(config: Mapping[str, Any], state: _State, repair: Collection[str]) -> tuple[Rule, dict[str, Any]]:
    del repair
    meta_params = {
        "summary_0": state.linear("gnn_proj.0"),
        "summary_1": state.linear("gnn_proj.2"),
        "input_kernel": state.get("weight_ih").T,
        "hidden_kernel": state.get("weight_hh").T,
        "bias": state.get("bias_ih") + state.get("bias_hh"),
    }
    return LSTMRule(config["backbone_hidden"], config["head_hidden_layers"]), meta_params


def _graph_rule(
    config: Mapping[str, Any], state: _State, repair: Collection[str], kind: str
) -> tuple[Rule, dict[str, Any]]:
    """The backbone is that of the classifiers, under a prefix, with raw features of 14 numbers and 5 x 5 kernels."""
    width, num_layers, sizes = config["backbone_hidden"], config["backbone_layers"], tuple(config["layer_sizes"])
    encoder = EncoderConfig(
        reverse_edges=config["reverse_edges"],
        max_inputs=sizes[0],
        max_hidden_layers=len(sizes) - 2,
        max_outputs=sizes[-1],
        kernel_range=(1, config["max_kernel"], config["max_kernel"]),
    )
    prefix, positions = "construct_graph.", config["max_kernel"] ** 2
    node, edge = (state.linear(f"{prefix}proj_{kind}.0") for kind in ("bias", "weight"))
    # Features of a bias stand feature by feature, those of a weight (and of its reverse edges) position by position.
    node["kernel"] = node["kernel"].reshape(NUM_FEATURES, positions, width)[None, :, positions // 2]
    edge["kernel"] = jnp.concatenate(
        jnp.split(edge["kernel"].reshape(-1, NUM_FEATURES, width), 3 if encoder.reverse_edges else 1), axis=1
    )
    encoder_params = {
        "node_in_0": node,
        "edge_in_0": edge,
        "node_out": state.linear(f"{prefix}proj_node_in"),
        "edge_out": state.linear(f"{prefix}proj_edge_in"),
        "positions": state.get(f"{prefix}pos_embed")[: sizes[0] + len(sizes) - 2 + sizes[-1]],
    }
    shape = {"num_layers": num_layers, "hidden_dim": width}
    readout: dict[str, Any]
    backbone: NGGNN | NGT
    if kind == "gnn":
        for name in state.names(f"gnn.edge_update.{num_layers - 1}."):
            state.get(name)  # never called
        backbone, params = _gnn({**config, **shape}, state, encoder, repair)
        readout = {f"{of}_readout_{i}": state.linear(f"proj_{of}.{2 * i}") for of in ("node", "edge") for i in range(2)}
    else:
        widths = dict.fromkeys(("node_dim", "edge_dim", "attention_dim", "edge_mlp_dim"), width)
        wide = dict.fromkeys(("node_mlp_dim", "second_edge_mlp_dim"), 2 * width)
        others = {
            "num_heads": config["heads"],
            "pooling": "class_token" if config["class_token"] else None,
            "last_layer_edge_update": "edges",  # no other pairs are read
        }
        backbone, params = _transformer({**config, **shape, **widths, **wide, **others}, state, encoder, repair)
        readout = {f"readout_{i}": state.linear(f"proj_out.{2 * i}") for i in range(3)}
    misaligned = kind == "gnn" and config["alignment"] == "reference" and "alignment" not in repair
    rule = GraphRule(
        backbone,
        width,
        config["head_hidden_layers"],
        readout_hidden=1 if kind == "gnn" else 2,
        shared_readout=kind != "gnn",
        bias_alignment="reference" if misaligned else "corrected",
    )
    return rule, {"backbone": params | {"encoder": encoder_params}, "loose": jnp.zeros(width)} | readout


_OPTIMIZERS: dict[str, Callable[[Mapping[str, Any], _State, Collection[str]], tuple[Rule, dict[str, Any]]]] = {
    "learned_optimizer_ff": _ff_rule,
    "learned_optimizer_lstm": _lstm_rule,
    "learned_optimizer_ng_gnn": functools.partial(_graph_rule, kind="gnn"),
    "learned_optimizer_ng_t": functools.partial(_graph_rule, kind="transformer"),
}
