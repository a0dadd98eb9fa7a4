"""Can one graph format serve padded mixed batches and networks of 25 million weights?

Question 1: one NG-GNN layer on a batch of INRs (2-32-32-1), forward and backward, by blocks and over the edge list:
do both give the same numbers, and what does each cost?
Question 2: the same layer, block by block, on the shapes of a ResNet-50 (convolutions, normalization scales as diagonal
edges, biases as node features): does it run, in what time and with what peak memory?

    python benchmarks/two_paths.py --networks 128 --resnet-features 8

Prints a table. Compare the rows of one run with each other, not with other machines.
"""

import argparse
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

import ngjax
from ngjax.actions import AxisAction, fixed, permutation
from ngjax.spec import EdgeGroup, NeuralGraphSpec, NodeGroup, ParamSpec, PathKey, param_view
from ngjax.zoo.siren import init_siren

SIZES = (2, 32, 32, 1)


def resnet50_spec() -> NeuralGraphSpec:
    """Kernels and normalization scales and shifts of a ResNet-50 (25.6 million weights) as node and edge groups.

    The residual stream of a stage is one group of neurons; branches add to it by further edge groups.
    """
    builder = _Builder()
    stream = builder.nodes("input", 3, "input", 0)
    stream = builder.conv(stream, "stem", 64, 7, level=1)
    level = 2
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        out = builder.nodes(f"stage_{stage}", 4 * width, "hidden", level + 3 * blocks)
        for block in range(blocks):
            name = f"stage_{stage}_{block}"
            source = stream if block == 0 else out
            if block == 0:
                builder.edges(f"{name}_skip", stream, out, 1)
            hidden = builder.conv(source, f"{name}_a", width, 1, level=level)
            hidden = builder.conv(hidden, f"{name}_b", width, 3, level=level + 1)
            builder.edges(f"{name}_c", hidden, out, 1)
            level += 3
        stream, level = out, level + 1
    logits = builder.nodes("logits", 1000, "output", level + 1)
    builder.edges("head", stream, logits, 0)
    return builder.spec()


class _Builder:
    def __init__(self) -> None:
        self.params: list[ParamSpec] = []
        self.node_groups: list[NodeGroup] = []
        self.edge_groups: list[EdgeGroup] = []
        self.actions: list[AxisAction] = [fixed(f"kernel_{k}", k, "kernel") for k in (1, 3, 7)]

    def param(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> int:
        self.params.append(ParamSpec((PathKey("dict", name),), shape, "float32", axes))
        return len(self.params) - 1

    def nodes(self, name: str, size: int, role: str, level: int) -> NodeGroup:
        self.actions.append(permutation(name, size) if role == "hidden" else fixed(name, size, role))
        bias = None
        if role != "input":
            bias = param_view(self.param(f"{name}_bias", (size,), (name,)), (size,), target=(0,))
        slots = 1 if role == "hidden" else size
        self.node_groups.append(
            NodeGroup(name, size, role, level, axis=name, activation="none", slots=slots, bias=bias)
        )
        return self.node_groups[-1]

    def edges(self, name: str, source: NodeGroup, target: NodeGroup, kernel: int) -> None:
        """A convolution with a square kernel; `kernel=0` for a dense layer."""
        window = (kernel, kernel) if kernel else ()
        shape = (*window, source.size, target.size)
        axes = (*(f"kernel_{k}" for k in window), source.axis, target.axis)
        n = len(window)
        view = param_view(self.param(name, shape, axes), shape, source=(n,), target=(n + 1,), kernel=range(n))
        self.edge_groups.append(EdgeGroup(name, source.name, target.name, view=view))

    def conv(self, source: NodeGroup, name: str, width: int, kernel: int, level: int) -> NodeGroup:
        """A convolution and its normalization: a scale for each channel, and a shift."""
        conv = self.nodes(f"{name}_conv", width, "hidden", level)
        self.edges(name, source, conv, kernel)
        norm = self.nodes(f"{name}_norm", width, "hidden", level)
        view = param_view(self.param(f"{name}_scale", (width,), (conv.axis,)), (width,), block=(0,))
        self.edge_groups.append(EdgeGroup(f"{name}_scale", conv.name, norm.name, blocks=width, view=view))
        return norm

    def spec(self) -> NeuralGraphSpec:
        # One channel permutation for a convolution and its normalization.
        shared = {f"{g.source}": g.target for g in self.edge_groups if g.blocks > 1}
        rename = {target: source for source, target in shared.items()}
        params = tuple(p._replace(axes=tuple(rename.get(a, a) for a in p.axes)) for p in self.params)
        order = {"input": 0, "hidden": 1, "output": 2}
        nodes = [g._replace(axis=rename.get(g.axis, g.axis)) for g in self.node_groups]
        nodes.sort(key=lambda g: (order[g.role], g.level))
        actions = tuple(a for a in self.actions if a.id not in rename)
        return NeuralGraphSpec(params, tuple(nodes), tuple(self.edge_groups), actions)


def median_seconds(run, repeats: int) -> float:
    """After one call to compile and warm up."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def peak_memory() -> float:
    """Gigabytes, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def inrs(networks: int, repeats: int) -> None:
    spec = ngjax.mlp_spec(SIZES, activation="siren")
    keys = jax.random.split(jax.random.key(0), networks)
    params = jax.vmap(lambda key: init_siren(key, SIZES))(keys)
    model = ngjax.WeightSpaceModel(ngjax.NGGNN(32, num_layers=1), ngjax.GraphReadout(10, num_outputs=1))
    grouped = ngjax.to_groups(spec, params)
    budget = ngjax.budget_for([spec], networks)
    unstacked = [jax.tree.map(lambda x, i=i: x[i], params) for i in range(networks)]
    batch = jax.jit(lambda ps: ngjax.batch_graphs([ngjax.to_graph(spec, p) for p in ps], budget))(unstacked)
    variables = jax.jit(model.init, static_argnames="spec")(jax.random.key(1), grouped, spec=spec)

    def loss(variables, graph, spec):
        logits = model.apply(variables, graph, spec=spec)
        return jnp.sum(jnp.sin(logits)), logits

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnames="spec")
    rows = {"block by block": (grouped, spec), "edge list": (batch, None)}
    results = {name: grad(variables, graph, spec=own) for name, (graph, own) in rows.items()}
    leaves = [jax.tree.leaves(r) for r in results.values()]
    error = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a))) for a, b in zip(*leaves, strict=True))
    print(f"one NG-GNN layer (d 32, reverse edges) on {networks} INRs 2-32-32-1, forward and backward")
    for name, (graph, own) in rows.items():
        seconds = median_seconds(lambda graph=graph, own=own: grad(variables, graph, spec=own), repeats)
        print(f"  {name:15s} {1e3 * seconds / networks:8.2f} ms per network")
    print(f"  largest difference of loss, logits and gradients: {error:.1e} of the scale\n")


def resnet(features: int, repeats: int) -> None:
    start = time.perf_counter()
    spec = resnet50_spec()
    built = time.perf_counter() - start
    key = jax.random.key(0)
    leaves = [jax.random.normal(jax.random.fold_in(key, i), p.shape) * 0.05 for i, p in enumerate(spec.params)]
    params = spec.unflatten(leaves)
    encoder = ngjax.EncoderConfig(kernel_range=(1, 3, 3), max_hidden_layers=200, max_outputs=1000)
    model = ngjax.NGGNN(features, num_layers=1, encoder=encoder)

    def run(variables, params):
        return model.apply(variables, ngjax.to_groups(spec, params), spec=spec).nodes

    variables = jax.jit(lambda key, p: model.init(key, ngjax.to_groups(spec, p), spec=spec))(key, params)
    start = time.perf_counter()
    compiled = jax.jit(run).lower(variables, params).compile()
    compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    seconds = median_seconds(lambda: compiled(variables, params), repeats)
    weights = sum(leaf.size for leaf in leaves)
    print(
        f"one NG-GNN layer (d {features}, reverse edges), forward, block by block on a ResNet-50's {weights:,} weights"
    )
    print(
        f"  spec {built:.2f} s, {spec.num_nodes:,} nodes, {spec.num_edges:,} edges; compilation {compile_seconds:.1f} s"
    )
    print(
        f"  {seconds:.2f} s per run; temporaries {memory.temp_size_in_bytes / 1e9:.2f} GB, "
        f"process peak {peak_memory():.2f} GB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=128)
    parser.add_argument("--resnet-features", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    inrs(arguments.networks, arguments.repeats)
    resnet(arguments.resnet_features, max(1, arguments.repeats // 2))
