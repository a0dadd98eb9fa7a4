"""Probe features: the network itself is run on learned inputs (Kofinas et al. 2024, section 3.3)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ngjax.graph import join_nodes, split_nodes
from ngjax.nn.activations import activation_function, apply_activations
from ngjax.nn.topology import BlockTopology, Edges, ListTopology, Topology
from ngjax.spec import ROLES


def probe_values(
    topology: Topology,
    nodes: Float[Array, "... N F"],
    edges: Edges,
    inputs: Float[Array, "n0 P"],
    max_hidden_layers: int,
) -> Float[Array, "... N P"]:
    """Values of all neurons when the network reads each of `P` inputs.

    Runs any network without cycles whose weights are one number each: values flow along the edges from level to level.

    Args:
      topology: wiring.
      nodes: biases; feature 0 is used.
      edges: weights; feature 0 is used.
      inputs: one column per probe; rows beyond the network's inputs are not used.
      max_hidden_layers: depth up to which an edge list, whose depth is not known, is followed.

    Raises:
      ValueError: the network has kernels, cycles or activations that are not elementwise functions.
    """
    if any(values.shape[-2] > 1 for values in edges):
        raise ValueError("probe features need networks of dense layers; this one has convolution kernels")
    if isinstance(topology, BlockTopology):
        return _by_blocks(topology, nodes[..., 0], edges, inputs)
    return _by_levels(topology, nodes[..., 0], edges[0][..., 0, 0], inputs, max_hidden_layers)


def _by_blocks(
    topology: BlockTopology, biases: Float[Array, "... N"], edges: Edges, inputs: Float[Array, "n0 P"]
) -> Float[Array, "... N P"]:
    spec = topology.spec
    lead, probes = biases.shape[:-1], inputs.shape[-1]
    values: dict[str, Array] = {}
    read = 0
    for group in sorted(spec.node_groups, key=lambda g: g.level):
        if group.role == "input":
            rows = inputs[read : read + group.size]
            values[group.name] = jnp.broadcast_to(rows, (*lead, group.size, probes))
            read += group.size
            continue
        total = biases[..., spec.node_slices[group.name], None]
        for edge_group, weights in zip(spec.edge_groups, edges, strict=True):
            if edge_group.target != group.name:
                continue
            if edge_group.source not in values:
                raise ValueError(
                    f"edge group {edge_group.name!r} leads back to {group.name!r}: the network has a cycle"
                )
            source = split_nodes(values[edge_group.source], edge_group.blocks, edge_group.source_layout)
            # Products with as few as two inputs: full precision, as elsewhere in the network that is probed.
            summed = jnp.einsum("...bio,...bip->...bop", weights[..., 0, 0], source, precision="highest")
            total = total + join_nodes(summed, edge_group.target_layout)
        values[group.name] = activation_function(group.activation)(total)
    return jnp.concatenate([values[group.name] for group in spec.node_groups], axis=-2)


def _by_levels(
    topology: ListTopology,
    biases: Float[Array, " N"],
    weights: Float[Array, " E"],
    inputs: Float[Array, "n0 P"],
    max_hidden_layers: int,
) -> Float[Array, "N P"]:
    fields = topology.graph.nodes
    senders, receivers = topology.graph.senders, topology.graph.receivers
    is_input = (fields.role == ROLES.index("input"))[:, None]
    start = jnp.where(is_input, inputs[jnp.minimum(fields.position, inputs.shape[0] - 1)], 0.0)

    def next_level(values: Array, level: Array) -> tuple[Array, None]:
        messages = weights[:, None] * values[senders]
        total = jax.ops.segment_sum(messages, receivers, topology.num_nodes) + biases[:, None]
        here = (fields.level == level)[:, None] & ~is_input
        # Only this level goes through the activation: others may hold values it has no finite derivative at.
        return jnp.where(here, apply_activations(jnp.where(here, total, 0.0), fields.activation), values), None

    levels = jnp.arange(1, max_hidden_layers + 2)
    values, _ = jax.lax.scan(next_level, start, levels)
    return topology.mask_nodes(values)


class ProbeEncoder(nn.Module):
    """Node features from probe values: a linear map and a layer norm for each layer.

    Attributes:
      features: width of the result.
      max_hidden_layers: hidden layers with maps of their own; inputs and outputs have one each as well.
      dtype: of the computation.
    """

    features: int
    max_hidden_layers: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, topology: Topology, values: Float[Array, "... N P"]) -> Float[Array, "... N d"]:
        rows, width = self.max_hidden_layers + 2, self.features
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=0)
        kernel = self.param("kernel", init, (rows, values.shape[-1], width), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (rows, width), jnp.float32)
        scale = self.param("norm_scale", nn.initializers.ones, (rows, width), jnp.float32)
        shift = self.param("norm_bias", nn.initializers.zeros, (rows, width), jnp.float32)
        values, kernel, bias = nn.dtypes.promote_dtype(values, kernel, bias, dtype=self.dtype)
        if isinstance(topology, BlockTopology):
            parts = []
            for group in topology.spec.node_groups:
                row = self._row(group.role, topology.spec.position_bases[group.name])
                place = topology.spec.node_slices[group.name]
                mapped = _layer_norm(values[..., place, :] @ kernel[row] + bias[row])
                parts.append(mapped * scale[row].astype(mapped.dtype) + shift[row].astype(mapped.dtype))
            return jnp.concatenate(parts, axis=-2)
        fields = topology.graph.nodes
        of_role = jnp.asarray([0, 1, rows - 1])[fields.role]
        of_node = jnp.where(fields.role == ROLES.index("hidden"), 1 + fields.position, of_role)
        own = jax.nn.one_hot(of_node, rows, dtype=values.dtype)
        mapped = jnp.zeros((*values.shape[:-1], width), values.dtype)
        for i in range(rows):  # a gather of one matrix per node would need more memory than the products
            mapped = mapped + own[:, i : i + 1] * (values @ kernel[i] + bias[i])
        mapped = _layer_norm(mapped)
        return mapped * scale[of_node].astype(mapped.dtype) + shift[of_node].astype(mapped.dtype)

    def _row(self, role: str, position: int) -> int:
        return {"input": 0, "hidden": 1 + position, "output": self.max_hidden_layers + 1}[role]


def _layer_norm(x: Array, epsilon: float = 1e-5) -> Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + epsilon)
