"""Risk 1 of the design: can the spec's types say what real architectures are?

Six networks (and the LSTM cell, mixture of experts and stacks that the same types have to hold later) are described by
hand, as data. Whatever writes specs later has to arrive at something like these.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngjax.actions import concat, fixed, letters, old_places, permutation, product, stack
from ngjax.graph import join_nodes, split_nodes, to_graph, to_groups, to_params
from ngjax.spec import (
    EdgeGroup,
    NeuralGraphSpec,
    NodeGroup,
    NodeLayout,
    ParamSpec,
    flatten_with_path,
    format_path,
    param_view,
)
from ngjax.symmetry import permute_params, random_permutations


class Case(NamedTuple):
    """A network: its spec by hand, its shapes, and its function of `(params, inputs)` in plain jax.numpy."""

    spec: NeuralGraphSpec
    shapes: Any
    forward: Callable
    inputs: Callable


def relu(x):
    return jax.nn.relu(x)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def perturbed_params(case, seed, lead=(), trail=()):
    """Weights of the case's shapes, none of them 0 or 1, about keeping the variance of what passes through."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        fan_in = math.prod(shape[:-1]) if len(shape) > 1 else 9
        return (normal(rng, *lead, *shape, *trail) + np.float32(0.3)) / np.float32(fan_in**0.5)

    return jax.tree.map(leaf, case.shapes, is_leaf=lambda x: isinstance(x, tuple))


class Params:
    """Numbers and views of the leaves of a tree of shapes, and their `ParamSpec`s from actions by path."""

    def __init__(self, shapes, axes):
        leaves, self.treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
        pairs, _ = flatten_with_path(jax.tree.unflatten(self.treedef, range(len(leaves))))
        self.number = {format_path(path): i for path, i in pairs}
        self.shapes = leaves
        self.specs = tuple(
            ParamSpec(path, leaves[i], "float32", tuple(a.id for a in axes[format_path(path)])) for path, i in pairs
        )

    def view(self, name, **kwargs):
        i = self.number[name]
        return param_view(i, self.shapes[i], **kwargs)


def conv(x, kernel, groups=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


# -- (a) a DenseNet block, its features flattened into a dense layer ---------------------------------------------------


def dense_net():
    c_in, c1, c2, c3, height, width, n_out = 2, 4, 3, 5, 3, 4, 3
    shapes = {
        "conv1": {"kernel": (3, 3, c_in, c1), "bias": (c1,)},
        "conv2": {"kernel": (1, 1, c_in + c1, c2), "bias": (c2,)},
        "conv3": {"kernel": (5, 2, c_in + c1 + c2, c3), "bias": (c3,)},
        "head": {"kernel": (height * width * (c_in + c1 + c2 + c3), n_out), "bias": (n_out,)},
    }
    image, logits = fixed("image", c_in, "input"), fixed("logits", n_out, "output")
    f1, f2, f3 = permutation("f1", c1), permutation("f2", c2), permutation("f3", c3)
    x1, x2, x3 = concat("x1", [image, f1]), concat("x2", [image, f1, f2]), concat("x3", [image, f1, f2, f3])
    pixels = fixed("pixels", height * width, "reshape")
    flat = product("flat", [pixels, x3])
    taps = {n: fixed(f"taps_{n}", n, "conv_general_dilated") for n in (1, 2, 3, 5)}
    params = Params(
        shapes,
        {
            "conv1/kernel": (taps[3], taps[3], image, f1),
            "conv1/bias": (f1,),
            "conv2/kernel": (taps[1], taps[1], x1, f2),
            "conv2/bias": (f2,),
            "conv3/kernel": (taps[5], taps[2], x2, f3),
            "conv3/bias": (f3,),
            "head/kernel": (flat, logits),
            "head/bias": (logits,),
        },
    )

    def conv_from(name, start, size):
        """The part of a kernel that reads the `size` features from `start`."""
        return params.view(name, kernel=(0, 1), source=(2,), target=(3,), starts={2: start}, splits={2: (size,)})

    def head_from(start, size):
        """The same features at every pixel of the flattened axis."""
        all_features = c_in + c1 + c2 + c3
        return params.view(
            "head/kernel",
            kernel=(0,),
            source=(1,),
            target=(2,),
            starts={0: start},
            splits={0: (height * width, size)},
            strides={0: (all_features, 1)},
        )

    def bias(name):
        return params.view(f"{name}/bias", target=(0,))

    parts = [("image", 0, c_in), ("f1", c_in, c1), ("f2", c_in + c1, c2), ("f3", c_in + c1 + c2, c3)]
    edges = [
        EdgeGroup(f"{name}->{layer}", name, layer, view=conv_from(f"{kernel}/kernel", start, size))
        for layer, kernel, sources in (("f1", "conv1", 1), ("f2", "conv2", 2), ("f3", "conv3", 3))
        for name, start, size in parts[:sources]
    ]
    edges += [EdgeGroup(f"{name}->logits", name, "logits", view=head_from(start, size)) for name, start, size in parts]
    spec = NeuralGraphSpec(
        params=params.specs,
        node_groups=(
            NodeGroup("image", c_in, "input", 0, "image", slots=c_in),
            NodeGroup("f1", c1, "hidden", 1, "f1", "relu", bias=bias("conv1")),
            NodeGroup("f2", c2, "hidden", 2, "f2", "relu", bias=bias("conv2")),
            NodeGroup("f3", c3, "hidden", 3, "f3", "relu", bias=bias("conv3")),
            NodeGroup("logits", n_out, "output", 4, "logits", slots=n_out, bias=bias("head")),
        ),
        edge_groups=tuple(edges),
        actions=(image, logits, f1, f2, f3, x1, x2, x3, pixels, flat, *taps.values()),
    )

    def forward(p, x):
        for layer in ("conv1", "conv2", "conv3"):
            x = jnp.concatenate([x, relu(conv(x, p[layer]["kernel"]) + p[layer]["bias"])], axis=-1)
        return x.reshape(x.shape[0], -1) @ p["head"]["kernel"] + p["head"]["bias"]

    return Case(spec, shapes, forward, lambda rng: normal(rng, 2, height, width, c_in))


# -- (b) attention with grouped queries, in three layouts of its weights -----------------------------------------------


def softmax_or_none(scores):
    """Softmax with a further choice of score 0: without it the bias of the keys would not matter at all."""
    return jax.nn.softmax(jnp.concatenate([scores, jnp.zeros_like(scores[..., :1])], axis=-1), axis=-1)[..., :-1]


KV, REP, DQK, DV, MODEL, TOKEN, N_OUT = 3, 2, 4, 5, 6, 4, 3


def attention(layout):
    """Query heads in groups that share a key and a value head.

    Layouts: `heads` has a leaf for each of query, key and value with the heads on an axis of their own; `flat` has one
    kernel with query, key and value one after the other; `interleaved` one with them in turn for each key head.
    """
    q_size, k_size, v_size, att_size = KV * REP * DQK, KV * DQK, KV * DV, KV * REP * DV
    per_head = REP * DQK + DQK + DV
    shapes = {
        "embed": {"kernel": (TOKEN, MODEL), "bias": (MODEL,)},
        "head": {"kernel": (MODEL, N_OUT), "bias": (N_OUT,)},
    }
    if layout == "heads":
        shapes |= {
            "query": {"kernel": (MODEL, KV * REP, DQK), "bias": (KV * REP, DQK)},
            "key": {"kernel": (MODEL, KV, DQK), "bias": (KV, DQK)},
            "value": {"kernel": (MODEL, KV, DV), "bias": (KV, DV)},
            "out": {"kernel": (KV * REP, DV, MODEL), "bias": (MODEL,)},
        }
    else:
        shapes |= {
            "qkv": {"kernel": (MODEL, KV * per_head), "bias": (KV * per_head,)},
            "out": {"kernel": (att_size, MODEL), "bias": (MODEL,)},
        }

    tokens, logits = fixed("tokens", TOKEN, "input"), fixed("logits", N_OUT, "output")
    model = permutation("model", MODEL)
    kv = permutation("kv_heads", KV)
    rep = permutation("queries", REP, per=[kv])
    dqk = permutation("qk_dim", DQK, per=[kv])
    dv = permutation("v_dim", DV, per=[kv])
    heads = product("heads", [kv, rep])
    q, k, v = product("q", [kv, rep, dqk]), product("k", [kv, dqk]), product("v", [kv, dv])
    att = product("att", [kv, rep, dv])
    actions = [tokens, logits, model, kv, rep, dqk, dv, heads, q, k, v, att]
    axes = {
        "embed/kernel": (tokens, model),
        "embed/bias": (model,),
        "out/bias": (model,),
        "head/kernel": (model, logits),
        "head/bias": (logits,),
    }
    if layout == "heads":
        axes |= {
            "query/kernel": (model, heads, dqk),
            "query/bias": (heads, dqk),
            "key/kernel": (model, kv, dqk),
            "key/bias": (kv, dqk),
            "value/kernel": (model, kv, dv),
            "value/bias": (kv, dv),
            "out/kernel": (heads, dv, model),
        }
        params = Params(shapes, axes)
        kernels = {n: params.view(f"{m}/kernel", source=(0,), target=(1, 2)) for n, m in QKV_NAMES.items()}
        biases = {n: params.view(f"{m}/bias", target=(0, 1)) for n, m in QKV_NAMES.items()}
        out = params.view("out/kernel", source=(0, 1), target=(2,))
    else:
        if layout == "flat":
            qkv = concat("qkv", [q, k, v])
            places = {
                "q": {"start": 0, "split": (KV, REP, DQK), "stride": (REP * DQK, DQK, 1)},
                "k": {"start": q_size, "split": (KV, DQK), "stride": (DQK, 1)},
                "v": {"start": q_size + k_size, "split": (KV, DV), "stride": (DV, 1)},
            }
        else:
            q_of_head, each = product("q_of_head", [rep, dqk]), None
            each = concat("qkv_of_head", [q_of_head, dqk, dv])
            qkv = product("qkv", [kv, each])
            actions += [q_of_head, each]
            places = {
                "q": {"start": 0, "split": (KV, REP, DQK), "stride": (per_head, DQK, 1)},
                "k": {"start": REP * DQK, "split": (KV, DQK), "stride": (per_head, 1)},
                "v": {"start": REP * DQK + DQK, "split": (KV, DV), "stride": (per_head, 1)},
            }
        actions.append(qkv)
        axes |= {"qkv/kernel": (model, qkv), "qkv/bias": (qkv,), "out/kernel": (att, model)}
        params = Params(shapes, axes)

        def part(name, leaf, axis):
            where = places[name]
            target = tuple(range(axis, axis + len(where["split"])))
            windows = {"starts": {axis: where["start"]}, "splits": {axis: where["split"]}}
            return params.view(
                f"qkv/{leaf}", source=range(axis), target=target, strides={axis: where["stride"]}, **windows
            )

        kernels = {name: part(name, "kernel", 1) for name in places}
        biases = {name: part(name, "bias", 0) for name in places}
        out = params.view("out/kernel", source=(0,), target=(1,))

    def dense(name, source, target, view):
        return EdgeGroup(name, source, target, view=view)

    spec = NeuralGraphSpec(
        params=params.specs,
        node_groups=(
            NodeGroup("tokens", TOKEN, "input", 0, "tokens", slots=TOKEN),
            NodeGroup("model", MODEL, "hidden", 1, "model", bias=params.view("embed/bias", target=(0,))),
            NodeGroup("q", q_size, "hidden", 2, "q", bias=biases["q"]),
            NodeGroup("k", k_size, "hidden", 2, "k", bias=biases["k"]),
            NodeGroup("v", v_size, "hidden", 2, "v", bias=biases["v"]),
            NodeGroup("scores", KV * REP, "hidden", 3, "heads", "softmax"),
            NodeGroup("att", att_size, "hidden", 4, "att"),
            NodeGroup("stream", MODEL, "hidden", 5, "model", bias=params.view("out/bias", target=(0,))),
            NodeGroup("logits", N_OUT, "output", 6, "logits", slots=N_OUT, bias=params.view("head/bias", target=(0,))),
        ),
        edge_groups=(
            dense("embed", "tokens", "model", params.view("embed/kernel", source=(0,), target=(1,))),
            *(dense(name, "model", name, kernels[name]) for name in ("q", "k", "v")),
            EdgeGroup("q->scores", "q", "scores", blocks=KV * REP),
            EdgeGroup("k->scores", "k", "scores", blocks=KV),
            EdgeGroup("scores->att", "scores", "att", blocks=KV * REP),
            EdgeGroup("v->att", "v", "att", blocks=KV * DV, target_layout=NodeLayout((KV, REP, DV), block=(0, 2))),
            dense("out", "att", "stream", out),
            EdgeGroup("residual", "model", "stream", blocks=MODEL),
            dense("head", "stream", "logits", params.view("head/kernel", source=(0,), target=(1,))),
        ),
        actions=tuple(actions),
    )

    def forward(p, x):
        x = x @ p["embed"]["kernel"] + p["embed"]["bias"]
        if layout == "heads":
            q, k, v = (
                jnp.einsum("td,dhe->the", x, p[name]["kernel"]) + p[name]["bias"] for name in ("query", "key", "value")
            )
            q = q.reshape(-1, KV, REP, DQK)
        else:
            fused = x @ p["qkv"]["kernel"] + p["qkv"]["bias"]
            if layout == "flat":
                q, k, v = jnp.split(fused, [q_size, q_size + k_size], axis=-1)
            else:
                q, k, v = jnp.split(fused.reshape(-1, KV, per_head), [REP * DQK, REP * DQK + DQK], axis=-1)
            q, k, v = q.reshape(-1, KV, REP, DQK), k.reshape(-1, KV, DQK), v.reshape(-1, KV, DV)
        weights = softmax_or_none(jnp.einsum("tgrd,sgd->grts", q, k) / 2.0)
        mixed = jnp.einsum("grts,sge->tgre", weights, v).reshape(-1, att_size)
        x = x + mixed @ p["out"]["kernel"].reshape(att_size, MODEL) + p["out"]["bias"]
        return x @ p["head"]["kernel"] + p["head"]["bias"]

    return Case(spec, shapes, forward, lambda rng: normal(rng, 7, TOKEN))


QKV_NAMES = {"q": "query", "k": "key", "v": "value"}


# -- (c) a gated linear unit -------------------------------------------------------------------------------------------


def gated_unit():
    n_in, width, n_out = 3, 6, 2
    shapes = {"up": {"kernel": (n_in, 2 * width), "bias": (2 * width,)}, "down": {"kernel": (width, n_out)}}
    inputs, outputs, hidden = fixed("inputs", n_in, "input"), fixed("outputs", n_out, "output"), permutation("h", width)
    pair = concat("gate_and_value", [hidden, hidden])
    params = Params(
        shapes,
        {"up/kernel": (inputs, pair), "up/bias": (pair,), "down/kernel": (hidden, outputs)},
    )

    def half(start):
        window = {"starts": {1: start}, "splits": {1: (width,)}}
        return params.view("up/kernel", source=(0,), target=(1,), **window)

    def half_bias(start):
        return params.view("up/bias", target=(0,), starts={0: start}, splits={0: (width,)})

    spec = NeuralGraphSpec(
        params=params.specs,
        node_groups=(
            NodeGroup("inputs", n_in, "input", 0, "inputs", slots=n_in),
            NodeGroup("gate", width, "hidden", 1, "h", "silu", bias=half_bias(0)),
            NodeGroup("value", width, "hidden", 1, "h", bias=half_bias(width)),
            NodeGroup("product", width, "hidden", 2, "h"),
            NodeGroup("outputs", n_out, "output", 3, "outputs", slots=n_out),
        ),
        edge_groups=(
            EdgeGroup("up gate", "inputs", "gate", view=half(0)),
            EdgeGroup("up value", "inputs", "value", view=half(width)),
            EdgeGroup("gate->product", "gate", "product", blocks=width),
            EdgeGroup("value->product", "value", "product", blocks=width),
            EdgeGroup("down", "product", "outputs", view=params.view("down/kernel", source=(0,), target=(1,))),
        ),
        actions=(inputs, outputs, hidden, pair),
    )

    def forward(p, x):
        gate, value = jnp.split(x @ p["up"]["kernel"] + p["up"]["bias"], 2, axis=-1)
        return (jax.nn.silu(gate) * value) @ p["down"]["kernel"]

    return Case(spec, shapes, forward, lambda rng: normal(rng, 8, n_in))


# -- (d) a residual block with group normalization, a grouped and a depthwise convolution ------------------------------


def group_norm_block():
    n_in, groups, size, out_size, n_out = 2, 3, 2, 4, 3
    channels, mid = groups * size, groups * out_size
    shapes = {
        "stem": {"kernel": (3, 3, n_in, channels)},
        "norm1": {"scale": (channels,), "bias": (channels,)},
        "grouped": {"kernel": (3, 1, size, mid), "bias": (mid,)},
        "depthwise": {"kernel": (2, 2, 1, mid)},
        "norm2": {"scale": (mid,), "bias": (mid,)},
        "project": {"kernel": (1, 1, mid, channels)},
        "head": {"kernel": (channels, n_out), "bias": (n_out,)},
    }
    image, logits = fixed("image", n_in, "input"), fixed("logits", n_out, "output")
    group = permutation("groups", groups)
    inner, inner_mid = permutation("inner", size, per=[group]), permutation("inner_mid", out_size, per=[group])
    stream, middle = product("stream", [group, inner]), product("middle", [group, inner_mid])
    one, two, three = (fixed(f"taps_{n}", n, "conv_general_dilated") for n in (1, 2, 3))
    params = Params(
        shapes,
        {
            "stem/kernel": (three, three, image, stream),
            "norm1/scale": (stream,),
            "norm1/bias": (stream,),
            "grouped/kernel": (three, one, inner, middle),
            "grouped/bias": (middle,),
            "depthwise/kernel": (two, two, one, middle),
            "norm2/scale": (middle,),
            "norm2/bias": (middle,),
            "project/kernel": (one, one, middle, stream),
            "head/kernel": (stream, logits),
            "head/bias": (logits,),
        },
    )

    def vector(name):
        return params.view(name, target=(0,))

    def hidden(name, level, axis, activation="none", bias=None):
        n = channels if axis == "stream" else mid
        return NodeGroup(name, n, "hidden", level, axis, activation, bias=bias)

    spec = NeuralGraphSpec(
        params=params.specs,
        node_groups=(
            NodeGroup("image", n_in, "input", 0, "image", slots=n_in),
            hidden("stem", 1, "stream"),
            NodeGroup("statistics", groups, "hidden", 2, "groups"),
            hidden("norm1", 3, "stream", "relu", vector("norm1/bias")),
            hidden("grouped", 4, "middle", "relu", vector("grouped/bias")),
            hidden("depthwise", 5, "middle"),
            hidden("norm2", 6, "middle", "relu", vector("norm2/bias")),
            hidden("sum", 7, "stream", "relu"),
            NodeGroup("logits", n_out, "output", 8, "logits", slots=n_out, bias=vector("head/bias")),
        ),
        edge_groups=(
            EdgeGroup(
                "stem", "image", "stem", view=params.view("stem/kernel", kernel=(0, 1), source=(2,), target=(3,))
            ),
            EdgeGroup("stem->statistics", "stem", "statistics", blocks=groups),
            EdgeGroup("statistics->norm1", "statistics", "norm1", blocks=groups),
            EdgeGroup("norm1", "stem", "norm1", blocks=channels, view=params.view("norm1/scale", block=(0,))),
            EdgeGroup(
                "grouped",
                "norm1",
                "grouped",
                blocks=groups,
                view=params.view(
                    "grouped/kernel",
                    kernel=(0, 1),
                    source=(2,),
                    block=(3,),
                    target=(4,),
                    splits={3: (groups, out_size)},
                ),
            ),
            EdgeGroup(
                "depthwise",
                "grouped",
                "depthwise",
                blocks=mid,
                view=params.view("depthwise/kernel", kernel=(0, 1), source=(2,), block=(3,)),
            ),
            EdgeGroup("norm2", "depthwise", "norm2", blocks=mid, view=params.view("norm2/scale", block=(0,))),
            EdgeGroup(
                "project", "norm2", "sum", view=params.view("project/kernel", kernel=(0, 1), source=(2,), target=(3,))
            ),
            EdgeGroup("residual", "norm1", "sum", blocks=channels),
            EdgeGroup("head", "sum", "logits", view=params.view("head/kernel", source=(0,), target=(1,))),
        ),
        actions=(image, logits, group, inner, inner_mid, stream, middle, one, two, three),
    )

    def norm(x, p):
        grouped = x.reshape(*x.shape[:-1], groups, -1)
        mean = grouped.mean((1, 2, 4), keepdims=True)
        variance = ((grouped - mean) ** 2).mean((1, 2, 4), keepdims=True)
        normalized = (grouped - mean) / jnp.sqrt(variance + 1e-3)
        return normalized.reshape(x.shape) * p["scale"] + p["bias"]

    def forward(p, x):
        x = relu(norm(conv(x, p["stem"]["kernel"]), p["norm1"]))
        y = relu(conv(x, p["grouped"]["kernel"], groups) + p["grouped"]["bias"])
        y = relu(norm(conv(y, p["depthwise"]["kernel"], mid), p["norm2"]))
        x = relu(x + conv(y, p["project"]["kernel"]))
        return x.mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]

    return Case(spec, shapes, forward, lambda rng: normal(rng, 2, 5, 4, n_in))


# -- (e) scanned stacks ------------------------------------------------------------------------------------------------


def scanned_residual():
    """A residual stream shared by all layers, hidden neurons of each layer's own."""
    depth, n_in, model, width, n_out = 3, 2, 5, 4, 2
    shapes = {
        "embed": {"kernel": (n_in, model)},
        "layers": {
            "up": {"kernel": (depth, model, width), "bias": (depth, width)},
            "down": {"kernel": (depth, width, model), "bias": (depth, model)},
        },
        "head": {"kernel": (model, n_out)},
    }
    inputs, outputs = fixed("inputs", n_in, "input"), fixed("outputs", n_out, "output")
    layers, stream = fixed("layers", depth, "scan"), permutation("stream", model)
    own = [permutation(f"h{i}", width) for i in range(depth)]
    hidden = stack("hidden", own, per=layers)
    params = Params(
        shapes,
        {
            "embed/kernel": (inputs, stream),
            "layers/up/kernel": (layers, stream, hidden),
            "layers/up/bias": (layers, hidden),
            "layers/down/kernel": (layers, hidden, stream),
            "layers/down/bias": (layers, stream),
            "head/kernel": (stream, outputs),
        },
    )
    nodes = [NodeGroup("inputs", n_in, "input", 0, "inputs", slots=n_in)]
    nodes.append(NodeGroup("s0", model, "hidden", 1, "stream"))
    edges = [EdgeGroup("embed", "inputs", "s0", view=params.view("embed/kernel", source=(0,), target=(1,)))]
    for i in range(depth):
        slice_of = functools.partial(params.view, starts={0: i}, splits={0: (1,)})
        up, down = f"layers/up/{i}", f"layers/down/{i}"
        nodes += [
            NodeGroup(
                f"h{i}", width, "hidden", 2 * i + 2, f"h{i}", "tanh", bias=slice_of("layers/up/bias", target=(1,))
            ),
            NodeGroup(
                f"s{i + 1}", model, "hidden", 2 * i + 3, "stream", bias=slice_of("layers/down/bias", target=(1,))
            ),
        ]
        edges += [
            EdgeGroup(up, f"s{i}", f"h{i}", view=slice_of("layers/up/kernel", source=(1,), target=(2,))),
            EdgeGroup(down, f"h{i}", f"s{i + 1}", view=slice_of("layers/down/kernel", source=(1,), target=(2,))),
            EdgeGroup(f"residual {i}", f"s{i}", f"s{i + 1}", blocks=model),
        ]
    nodes.append(NodeGroup("outputs", n_out, "output", 2 * depth + 2, "outputs", slots=n_out))
    head = params.view("head/kernel", source=(0,), target=(1,))
    edges.append(EdgeGroup("head", f"s{depth}", "outputs", view=head))
    spec = NeuralGraphSpec(params.specs, tuple(nodes), tuple(edges), (inputs, outputs, layers, stream, *own, hidden))

    def forward(p, x):
        def block(x, layer):
            h = jnp.tanh(x @ layer["up"]["kernel"] + layer["up"]["bias"])
            return x + h @ layer["down"]["kernel"] + layer["down"]["bias"], None

        return jax.lax.scan(block, x @ p["embed"]["kernel"], p["layers"])[0] @ p["head"]["kernel"]

    return Case(spec, shapes, forward, lambda rng: normal(rng, 6, n_in))


def scanned_chain():
    """No residual stream: what leaves one slice enters the next, so the two axes of the leaf are one slice apart."""
    depth, n_in, width, n_out = 3, 2, 5, 2
    shapes = {
        "first": {"kernel": (n_in, width)},
        "layers": {"kernel": (depth, width, width), "bias": (depth, width)},
        "last": {"kernel": (width, n_out)},
    }
    inputs, outputs = fixed("inputs", n_in, "input"), fixed("outputs", n_out, "output")
    layers = fixed("layers", depth, "scan")
    own = [permutation(f"h{i}", width) for i in range(depth + 1)]
    before, after = stack("before", own[:-1], per=layers), stack("after", own[1:], per=layers)
    params = Params(
        shapes,
        {
            "first/kernel": (inputs, own[0]),
            "layers/kernel": (layers, before, after),
            "layers/bias": (layers, after),
            "last/kernel": (own[-1], outputs),
        },
    )

    def slice_of(name, i, **roles):
        return params.view(name, starts={0: i}, splits={0: (1,)}, **roles)

    spec = NeuralGraphSpec(
        params.specs,
        node_groups=(
            NodeGroup("inputs", n_in, "input", 0, "inputs", slots=n_in),
            NodeGroup("h0", width, "hidden", 1, "h0", "tanh"),
            *(
                NodeGroup(
                    f"h{i + 1}",
                    width,
                    "hidden",
                    i + 2,
                    f"h{i + 1}",
                    "tanh",
                    bias=slice_of("layers/bias", i, target=(1,)),
                )
                for i in range(depth)
            ),
            NodeGroup("outputs", n_out, "output", depth + 2, "outputs", slots=n_out),
        ),
        edge_groups=(
            EdgeGroup("first", "inputs", "h0", view=params.view("first/kernel", source=(0,), target=(1,))),
            *(
                EdgeGroup(
                    f"layer {i}", f"h{i}", f"h{i + 1}", view=slice_of("layers/kernel", i, source=(1,), target=(2,))
                )
                for i in range(depth)
            ),
            EdgeGroup("last", f"h{depth}", "outputs", view=params.view("last/kernel", source=(0,), target=(1,))),
        ),
        actions=(inputs, outputs, layers, *own, before, after),
    )

    def forward(p, x):
        def block(x, layer):
            return jnp.tanh(x @ layer["kernel"] + layer["bias"]), None

        return jax.lax.scan(block, jnp.tanh(x @ p["first"]["kernel"]), p["layers"])[0] @ p["last"]["kernel"]

    return Case(spec, shapes, forward, lambda rng: normal(rng, 6, n_in))


def scanned_attention():
    """Heads of each layer's own, and inner dimensions of each head's own: a permutation nested in a stack."""
    depth, model, heads, dim, n_in, n_out = 2, 4, 3, 2, 3, 2
    qkv = dict.fromkeys("qkv", (depth, model, heads, dim))
    shapes = {"embed": (n_in, model), "layers": {**qkv, "o": (depth, heads, dim, model)}, "head": (model, n_out)}
    inputs, outputs = fixed("inputs", n_in, "input"), fixed("outputs", n_out, "output")
    layers, stream = fixed("layers", depth, "scan"), permutation("stream", model)
    head = [permutation(f"heads_{i}", heads) for i in range(depth)]
    qk = [permutation(f"qk_{i}", dim, per=[head[i]]) for i in range(depth)]
    v = [permutation(f"v_{i}", dim, per=[head[i]]) for i in range(depth)]
    all_heads, all_qk, all_v = (stack(n, parts, per=layers) for n, parts in (("heads", head), ("qk", qk), ("v", v)))
    q_nodes = [product(f"q_nodes_{i}", [head[i], qk[i]]) for i in range(depth)]
    v_nodes = [product(f"v_nodes_{i}", [head[i], v[i]]) for i in range(depth)]
    params = Params(
        shapes,
        {
            "embed": (inputs, stream),
            "layers/q": (layers, stream, all_heads, all_qk),
            "layers/k": (layers, stream, all_heads, all_qk),
            "layers/v": (layers, stream, all_heads, all_v),
            "layers/o": (layers, all_heads, all_v, stream),
            "head": (stream, outputs),
        },
    )
    size = heads * dim
    nodes = [NodeGroup("inputs", n_in, "input", 0, "inputs", slots=n_in), NodeGroup("s0", model, "hidden", 1, "stream")]
    edges = [EdgeGroup("embed", "inputs", "s0", view=params.view("embed", source=(0,), target=(1,)))]
    for i in range(depth):
        slice_of = functools.partial(params.view, starts={0: i}, splits={0: (1,)})
        level = 4 * i + 2
        nodes += [
            NodeGroup(f"q{i}", size, "hidden", level, f"q_nodes_{i}"),
            NodeGroup(f"k{i}", size, "hidden", level, f"q_nodes_{i}"),
            NodeGroup(f"v{i}", size, "hidden", level, f"v_nodes_{i}"),
            NodeGroup(f"scores{i}", heads, "hidden", level + 1, f"heads_{i}", "softmax"),
            NodeGroup(f"att{i}", size, "hidden", level + 2, f"v_nodes_{i}"),
            NodeGroup(f"s{i + 1}", model, "hidden", level + 3, "stream"),
        ]
        edges += [
            EdgeGroup(f"{n}{i}", f"s{i}", f"{n}{i}", view=slice_of(f"layers/{n}", source=(1,), target=(2, 3)))
            for n in "qkv"
        ]
        edges += [
            EdgeGroup(f"q{i}->scores", f"q{i}", f"scores{i}", blocks=heads),
            EdgeGroup(f"k{i}->scores", f"k{i}", f"scores{i}", blocks=heads),
            EdgeGroup(f"scores{i}->att", f"scores{i}", f"att{i}", blocks=heads),
            EdgeGroup(f"v{i}->att", f"v{i}", f"att{i}", blocks=size),
            EdgeGroup(f"o{i}", f"att{i}", f"s{i + 1}", view=slice_of("layers/o", source=(1, 2), target=(3,))),
            EdgeGroup(f"residual{i}", f"s{i}", f"s{i + 1}", blocks=model),
        ]
    nodes.append(NodeGroup("outputs", n_out, "output", 4 * depth + 2, "outputs", slots=n_out))
    edges.append(EdgeGroup("head", f"s{depth}", "outputs", view=params.view("head", source=(0,), target=(1,))))
    letters_ = (inputs, outputs, layers, stream, *head, *qk, *v)
    words = (all_heads, all_qk, all_v, *q_nodes, *v_nodes)
    spec = NeuralGraphSpec(params.specs, tuple(nodes), tuple(edges), (*letters_, *words))

    def forward(p, x):
        def block(x, layer):
            q, k, v = (jnp.einsum("td,dhe->the", x, layer[n]) for n in "qkv")
            weights = softmax_or_none(jnp.einsum("the,she->hts", q, k))
            return x + jnp.einsum("hts,she,hed->td", weights, v, layer["o"]), None

        return jax.lax.scan(block, x @ p["embed"], p["layers"])[0] @ p["head"]

    return Case(spec, shapes, forward, lambda rng: normal(rng, 5, n_in))


# -- (f) tied embeddings, with loose scalars ---------------------------------------------------------------------------


def tied_embeddings():
    vocabulary, model, width, length = 7, 4, 6, 5
    shapes = {
        "embedding": (vocabulary, model),
        "mix": (length,),
        "temperature": (),
        "up": {"kernel": (model, width), "bias": (width,)},
        "down": {"kernel": (width, model)},
    }
    words, positions = fixed("vocabulary", vocabulary, "gather"), fixed("positions", length, "dot_general")
    stream, hidden = permutation("stream", model), permutation("hidden", width)
    params = Params(
        shapes,
        {
            "embedding": (words, stream),
            "mix": (positions,),
            "temperature": (),
            "up/kernel": (stream, hidden),
            "up/bias": (hidden,),
            "down/kernel": (hidden, stream),
        },
    )
    spec = NeuralGraphSpec(
        params=params.specs,
        node_groups=(
            NodeGroup("words", vocabulary, "input", 0, "vocabulary", slots=vocabulary),
            NodeGroup("embedded", model, "hidden", 1, "stream"),
            NodeGroup("hidden", width, "hidden", 2, "hidden", "gelu", bias=params.view("up/bias", target=(0,))),
            NodeGroup("sum", model, "hidden", 3, "stream"),
            NodeGroup("next word", vocabulary, "output", 4, "vocabulary", slots=vocabulary),
        ),
        edge_groups=(
            EdgeGroup("embed", "words", "embedded", view=params.view("embedding", source=(0,), target=(1,))),
            EdgeGroup("up", "embedded", "hidden", view=params.view("up/kernel", source=(0,), target=(1,))),
            EdgeGroup("down", "hidden", "sum", view=params.view("down/kernel", source=(0,), target=(1,))),
            EdgeGroup("residual", "embedded", "sum", blocks=model),
            EdgeGroup(
                "unembed", "sum", "next word", view=params.view("embedding", source=(1,), target=(0,)), mirror=True
            ),
        ),
        actions=(words, positions, stream, hidden),
        loose=(params.view("mix", target=(0,)), params.view("temperature")),
    )

    def forward(p, tokens):
        x = jnp.einsum("btd,t->bd", p["embedding"][tokens], p["mix"])
        x = x + jax.nn.gelu(x @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"]
        return x @ p["embedding"].T * jnp.exp(p["temperature"])

    return Case(spec, shapes, forward, lambda rng: rng.integers(vocabulary, size=(6, length)))


# -- the same types hold what later issues need ------------------------------------------------------------------------


def lstm():
    n_in, width, n_out, gates = 2, 5, 2, ("input_gate", "forget_gate", "cell_gate", "output_gate")
    shapes = {"w": (n_in + width, 4 * width), "b": (4 * width,), "head": (width, n_out)}
    inputs, outputs, hidden = fixed("inputs", n_in, "input"), fixed("outputs", n_out, "output"), permutation("h", width)
    read, four = concat("inputs_and_h", [inputs, hidden]), concat("gates", [hidden] * 4)
    params = Params(shapes, {"w": (read, four), "b": (four,), "head": (hidden, outputs)})

    def part(i, start, size):
        window = {"starts": {0: start, 1: i * width}, "splits": {0: (size,), 1: (width,)}}
        return params.view("w", source=(0,), target=(1,), **window)

    spec = NeuralGraphSpec(
        params=params.specs,
        node_groups=(
            NodeGroup("inputs", n_in, "input", 0, "inputs", slots=n_in),
            *(
                NodeGroup(
                    name,
                    width,
                    "hidden",
                    1,
                    "h",
                    "tanh" if name == "cell_gate" else "sigmoid",
                    bias=params.view("b", target=(0,), starts={0: i * width}, splits={0: (width,)}),
                )
                for i, name in enumerate(gates)
            ),
            NodeGroup("cell", width, "hidden", 2, "h", "tanh"),
            NodeGroup("h", width, "hidden", 3, "h"),
            NodeGroup("outputs", n_out, "output", 4, "outputs", slots=n_out),
        ),
        edge_groups=(
            *(EdgeGroup(f"x->{name}", "inputs", name, view=part(i, 0, n_in)) for i, name in enumerate(gates)),
            *(EdgeGroup(f"h->{name}", "h", name, view=part(i, n_in, width)) for i, name in enumerate(gates)),
            *(EdgeGroup(f"{name}->cell", name, "cell", blocks=width) for name in gates[:3]),
            EdgeGroup("cell->cell", "cell", "cell", blocks=width),
            EdgeGroup("cell->h", "cell", "h", blocks=width),
            EdgeGroup("output_gate->h", "output_gate", "h", blocks=width),
            EdgeGroup("head", "h", "outputs", view=params.view("head", source=(0,), target=(1,))),
        ),
        actions=(inputs, outputs, hidden, read, four),
    )

    def forward(p, xs):
        def step(carry, x):
            h, c = carry
            i, f, g, o = jnp.split(jnp.concatenate([x, h], axis=-1) @ p["w"] + p["b"], 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        start = jnp.zeros((xs.shape[1], width))
        return jax.lax.scan(step, (start, start), xs)[1] @ p["head"]

    return Case(spec, shapes, forward, lambda rng: normal(rng, 4, 3, n_in))


def experts():
    """A mixture of experts: the experts may change places, and so may the hidden neurons within each."""
    n_in, count, width, n_out = 3, 3, 4, 2
    shapes = {"router": (n_in, count), "up": (count, n_in, width), "down": (count, width, n_out)}
    inputs, outputs = fixed("inputs", n_in, "input"), fixed("outputs", n_out, "output")
    expert = permutation("experts", count)
    inner = permutation("inner", width, per=[expert])
    hidden = product("hidden", [expert, inner])
    params = Params(
        shapes, {"router": (inputs, expert), "up": (expert, inputs, inner), "down": (expert, inner, outputs)}
    )
    spec = NeuralGraphSpec(
        params=params.specs,
        node_groups=(
            NodeGroup("inputs", n_in, "input", 0, "inputs", slots=n_in),
            NodeGroup("router", count, "hidden", 1, "experts", "softmax"),
            NodeGroup("hidden", count * width, "hidden", 2, "hidden", "relu"),
            NodeGroup("outputs", n_out, "output", 3, "outputs", slots=n_out),
        ),
        edge_groups=(
            EdgeGroup("router", "inputs", "router", view=params.view("router", source=(0,), target=(1,))),
            EdgeGroup("up", "inputs", "hidden", view=params.view("up", target=(0, 2), source=(1,))),
            EdgeGroup("router->hidden", "router", "hidden", blocks=count),
            EdgeGroup("down", "hidden", "outputs", view=params.view("down", source=(0, 1), target=(2,))),
        ),
        actions=(inputs, outputs, expert, inner, hidden),
    )

    def forward(p, x):
        gate = jax.nn.softmax(x @ p["router"], axis=-1)
        hidden = relu(jnp.einsum("bi,eih->beh", x, p["up"])) * gate[..., None]
        return jnp.einsum("beh,eho->bo", hidden, p["down"])

    return Case(spec, shapes, forward, lambda rng: normal(rng, 9, n_in))


BUILDERS = {
    "dense_net": dense_net,
    "attention_heads": functools.partial(attention, "heads"),
    "attention_flat": functools.partial(attention, "flat"),
    "attention_interleaved": functools.partial(attention, "interleaved"),
    "gated_unit": gated_unit,
    "group_norm_block": group_norm_block,
    "scanned_residual": scanned_residual,
    "scanned_chain": scanned_chain,
    "scanned_attention": scanned_attention,
    "tied_embeddings": tied_embeddings,
    "lstm": lstm,
    "experts": experts,
}


@functools.cache
def build(name):
    case = BUILDERS[name]()
    return case._replace(forward=jax.jit(case.forward))


@pytest.fixture(params=list(BUILDERS))
def case(request):
    return build(request.param)


@pytest.fixture
def params(case):
    return perturbed_params(case, 1)


def relative_changes(case, params, others):
    """Largest change of the function's values, relative to their scale, for each of `others`."""
    inputs = case.inputs(np.random.default_rng(2))
    before = np.asarray(case.forward(params, inputs))
    return np.array([np.abs(case.forward(other, inputs) - before).max() for other in others]) / np.abs(before).max()


def assert_trees_equal(received, expected):
    assert jax.tree.structure(received) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(received), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def letter_shapes(spec):
    """Shapes of the index arrays of all independent permutations."""
    return {a.id: (*(spec.action[id].size for id in a.per), a.size) for a in spec.actions if a.kind == "permutation"}


def identity(shape):
    return np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)


def rotation(shape):
    """Another rotation at each place, the identity at none."""
    shifts = 1 + np.arange(math.prod(shape[:-1]), dtype=np.int32) % (shape[-1] - 1)
    return (identity(shape) + shifts.reshape(*shape[:-1], 1)) % np.int32(shape[-1])


def changed_leaves(spec, before, after):
    pairs = zip(spec.flatten(before), spec.flatten(after), strict=True)
    return [i for i, (a, b) in enumerate(pairs) if (np.asarray(a) != np.asarray(b)).any()]


# -- the symmetry ------------------------------------------------------------------------------------------------------


def test_permuting_neurons_leaves_the_function_unchanged(case, params):
    spec = case.spec
    free = [i for i, param in enumerate(spec.params) if any(spec.is_free(id) for id in param.axes)]
    assert free
    permuted = [permute_params(spec, random_permutations(jax.random.key(seed), spec), params) for seed in range(1, 6)]
    assert changed_leaves(spec, params, permuted[0]) == free
    assert relative_changes(case, params, permuted).max() < 1e-5


def test_each_independent_permutation_alone_leaves_the_function_unchanged(case, params):
    spec, shapes = case.spec, letter_shapes(case.spec)
    permuted = []
    for id, shape in shapes.items():
        perms = {other: identity(size) for other, size in shapes.items()} | {id: rotation(shape)}
        permuted.append(permute_params(spec, perms, params))
        carries = [i for i, p in enumerate(spec.params) if any(id in letters(spec.action, axis) for axis in p.axes)]
        assert carries
        assert changed_leaves(spec, params, permuted[-1]) == carries
    assert relative_changes(case, params, permuted).max() < 1e-5


def test_an_axis_that_moves_alone_changes_the_function(case, params):
    """The tests above have teeth: on every axis of every leaf a shuffle of its own is seen, pinned or free."""
    shuffled, names = [], []
    for i, param in enumerate(case.spec.params):
        for axis, n in enumerate(param.shape):
            if n > 1:
                leaves = case.spec.flatten(params)
                leaves[i] = np.roll(leaves[i], 1, axis)
                shuffled.append(case.spec.unflatten(leaves, like=params))
                names.append(f"{format_path(param.path)}[{axis}]")
    changes = relative_changes(case, params, shuffled)
    assert changes.min() > 1e-3, dict(zip(names, changes, strict=True))


def test_a_wrongly_freed_id_changes_the_function(case, params):
    """Free each pinned id, on all of its axes at once: the function tells, and so does the constructor."""
    spec, shuffled = case.spec, []
    for pinned in spec.pinned:
        size = spec.action[pinned.id].size
        if size == 1:
            continue
        actions = tuple(permutation(a.id, a.size) if a.id == pinned.id else a for a in spec.actions)
        with pytest.raises(ValueError, match=r"keep their order|does not move it as|do not move so"):
            dataclasses.replace(spec, actions=actions)
        freed = {action.id: action for action in actions}
        leaves = spec.flatten(params)
        for i, param in enumerate(spec.params):
            for axis, id in enumerate(param.axes):
                if pinned.id in letters(freed, id):
                    index = old_places(freed, {pinned.id: rotation((size,))}, id, identity((param.shape[axis],)), str)
                    leaves[i] = np.take(leaves[i], index, axis)
        shuffled.append(spec.unflatten(leaves, like=params))
    assert relative_changes(case, params, shuffled).min() > 1e-3


def test_the_constructor_refuses_an_axis_that_moves_alone(case):
    """Give one axis of one leaf a permutation of its own: the graph no longer moves as the weights do."""
    for i, param in enumerate(case.spec.params):
        for axis, n in enumerate(param.shape):
            if n == 1:
                continue
            axes = (*param.axes[:axis], "alone", *param.axes[axis + 1 :])
            changed = (*case.spec.params[:i], param._replace(axes=axes), *case.spec.params[i + 1 :])
            with pytest.raises(ValueError, match=r"does not move it as|depends on"):
                dataclasses.replace(case.spec, params=changed, actions=(*case.spec.actions, permutation("alone", n)))


# -- the graph ---------------------------------------------------------------------------------------------------------


def test_permuted_weights_are_the_same_graph_with_nodes_in_another_order(case, params):
    spec = case.spec
    perms = random_permutations(jax.random.key(3), spec)
    before, after = to_graph(spec, params), to_graph(spec, permute_params(spec, perms, params))
    order = np.arange(spec.num_nodes)
    for group in spec.node_groups:
        place = spec.node_slices[group.name]
        if spec.is_free(group.axis):
            order[place] = place.start + np.asarray(perms[group.axis])
    assert (order != np.arange(spec.num_nodes)).any()
    for name in ("features", "role", "group", "position", "activation", "level"):
        np.testing.assert_array_equal(getattr(after.nodes, name), np.asarray(getattr(before.nodes, name))[order])
    np.testing.assert_array_equal(after.globals.loose, before.globals.loose)
    start = 0
    for group in spec.edge_groups:
        stop = start + spec.edge_group_size(group)
        matrix = adjacency(before, slice(start, stop))
        np.testing.assert_array_equal(adjacency(after, slice(start, stop)), matrix[order][:, order])
        assert np.isfinite(matrix).any()
        start = stop


def adjacency(graph, edges):
    """`[source, target, K]` of one edge group, NaN where there is no edge."""
    n = graph.nodes.mask.shape[0]
    matrix = np.full((n, n, graph.edges.mask.shape[1]), np.nan)
    matrix[np.asarray(graph.senders)[edges], np.asarray(graph.receivers)[edges]] = graph.edges.features[edges, :, 0]
    return matrix


def test_round_trips_are_exact(case, params):
    spec = case.spec
    assert_trees_equal(to_params(spec, to_graph(spec, params)), params)
    assert_trees_equal(to_params(spec, to_groups(spec, params)), params)


@pytest.mark.parametrize(
    "name",
    [
        "dense_net",
        "attention_interleaved",
        "gated_unit",
        "group_norm_block",
        "scanned_attention",
        "tied_embeddings",
    ],
)
def test_round_trips_are_exact_with_batch_and_feature_axes_under_jit_and_vmap(name):
    case = build(name)
    spec = case.spec
    batch = perturbed_params(case, 4, lead=(2, 3), trail=(4,))

    def round_trip(p):
        graph = to_graph(spec, p)
        return to_params(spec, graph), graph.nodes.features

    received, nodes = jax.jit(jax.vmap(round_trip))(batch)
    assert_trees_equal(received, batch)
    assert nodes.shape == (2, 3, spec.num_nodes, 4)


def test_a_mirror_is_read_and_never_written_back():
    case = build("tied_embeddings")
    params = perturbed_params(case, 1)
    groups = to_groups(case.spec, params)
    [mirror] = [i for i, group in enumerate(case.spec.edge_groups) if group.mirror]
    np.testing.assert_array_equal(groups.edges[mirror][0, :, :, 0, 0], params["embedding"].T)
    changed = groups._replace(edges=(*groups.edges[:mirror], groups.edges[mirror] + 1))
    assert_trees_equal(to_params(case.spec, changed), params)


def test_layouts_join_what_they_split(case):
    for group in case.spec.edge_groups:
        for end, layout in (("source", group.source_layout), ("target", group.target_layout)):
            places = np.asarray(identity((case.spec.node_group[getattr(group, end)].size,)))
            split = split_nodes(jnp.asarray(places[:, None]), group.blocks, layout)
            np.testing.assert_array_equal(split[..., 0], case.spec.block_places(group, end))
            np.testing.assert_array_equal(join_nodes(split, layout)[..., 0], places)


# -- text and values ---------------------------------------------------------------------------------------------------


def test_json_round_trip(case, params):
    read = NeuralGraphSpec.from_json(case.spec.to_json())
    assert read == case.spec
    assert hash(read) == hash(case.spec)
    assert_trees_equal(read.unflatten(read.flatten(params)), params)  # without a treedef
    with pytest.raises(ValueError, match="another architecture"):
        read.flatten({"something": params})


def test_a_spec_built_again_is_equal_and_one_with_another_number_is_not(case):
    name = next(name for name in BUILDERS if build(name) is case)
    again = BUILDERS[name]().spec
    assert again is not case.spec
    assert again == case.spec
    assert hash(again) == hash(case.spec)
    group = case.spec.edge_groups[0]
    assert dataclasses.replace(case.spec, edge_groups=(group._replace(name="x"), *case.spec.edge_groups[1:])) != again


def test_the_table_names_every_group_and_permutation(case):
    text = str(case.spec)
    for name in (*case.spec.node_group, *(g.name for g in case.spec.edge_groups)):
        assert name in text
    for id in letter_shapes(case.spec):
        assert id in text
    assert max(map(len, text.splitlines())) <= 160
