import itertools
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.path import Path

import ngjax
from ngjax.actions import fixed, permutation
from ngjax.plots import plot_spec
from ngjax.spec import EdgeGroup, NeuralGraphSpec, NodeGroup, ParamSpec, PathKey, param_view
from tests import test_six_architectures as six
from tests.trace import test_networks as networks


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def traced(module, *inputs):
    model = module()
    return ngjax.trace_spec(model.apply, jax.eval_shape(model.init, jax.random.key(0), *inputs), *inputs)


SPECS = {
    "MLP": lambda: ngjax.mlp_spec((2, 32, 32, 1), activation="siren"),
    "deep MLP": lambda: ngjax.mlp_spec(range(2, 42)),
    "wide MLP": lambda: ngjax.mlp_spec((3072, 16384, 1000)),
    "DenseNet": lambda: six.dense_net().spec,
    "attention": lambda: six.attention("heads").spec,
    "gated unit": lambda: six.gated_unit().spec,
    "group norm": lambda: six.group_norm_block().spec,
    "scan": lambda: six.scanned_residual().spec,
    "scanned attention": lambda: six.scanned_attention().spec,
    "tied embeddings": lambda: six.tied_embeddings().spec,
    "ResNet, traced": lambda: traced(networks.Residual, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)),
    "transformer, traced": lambda: traced(networks.Transformer, jax.ShapeDtypeStruct((2, 7), jnp.int32)),
}


def drawn(ax, kind):
    """The patches of node or edge groups by name, in the order in which they were drawn."""
    found = {}
    for patch in ax.patches:
        start, name = patch.get_gid().split(":", 1)
        if start == kind:
            found.setdefault(name, []).append(patch)
    return found


def strands(patch):
    """How many lines or bands a connection is drawn as."""
    return int(np.sum(patch.get_path().codes == Path.MOVETO))


def texts(ax):
    return [text.get_text() for text in ax.texts]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def rectangles(artists, renderer):
    return [artist.get_window_extent(renderer) for artist in artists]


def overlapping(first, second):
    """Whether two rectangles share more than a rounded pixel."""
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return width > 1 and height > 1


@pytest.mark.parametrize("name", list(SPECS))
def test_everything_is_drawn_once_and_nothing_covers_a_node_group(name):
    spec = SPECS[name]()
    ax = plot_spec(spec)
    boxes, edges = drawn(ax, "nodes"), drawn(ax, "edges")
    assert set(boxes) == set(spec.node_group)
    assert {len(patches) for patches in boxes.values()} == {1}
    assert set(edges) == {group.name for group in spec.edge_groups}
    assert {len(patches) for patches in edges.values()} <= {1, 2}  # two where it goes on in another row

    ax.figure.canvas.draw()
    renderer = ax.figure.canvas.get_renderer()
    groups = [patches[0] for patches in boxes.values()]
    places = rectangles(groups, renderer)
    labels = rectangles([text for text in ax.texts if text.get_va() == "top"], renderer)
    assert len(labels) == len(groups)
    for a, b in itertools.combinations(places + labels, 2):
        assert not overlapping(a, b)
    page = ax.figure.bbox
    written = [*rectangles(ax.texts, renderer), ax.get_legend().get_window_extent(renderer)]
    for area in places + written:
        assert page.x0 <= area.x0 <= area.x1 <= page.x1
        assert page.y0 <= area.y0 <= area.y1 <= page.y1
    for area in places + labels:
        assert not overlapping(area, ax.get_legend().get_window_extent(renderer))


@pytest.mark.parametrize("name", ["MLP", "attention", "deep MLP", "ResNet, traced"])
def test_levels_go_from_left_to_right_and_row_by_row(name):
    spec = SPECS[name]()
    boxes = {name: patches[0] for name, patches in drawn(plot_spec(spec), "nodes").items()}
    columns = {}
    for group in spec.node_groups:
        columns.setdefault(group.level, set()).add(round(boxes[group.name].get_x(), 6))
    assert all(len(places) == 1 for places in columns.values())
    in_order = [columns[level].copy().pop() for level in sorted(columns)]
    breaks = [i for i, (a, b) in enumerate(itertools.pairwise(in_order)) if b <= a]
    assert len(breaks) == (len(in_order) - 1) // 14
    per_row = breaks[0] + 1 if breaks else len(in_order)
    assert [i + 1 for i in breaks] == [per_row * (k + 1) for k in range(len(breaks))]
    lowest = {}
    for group in spec.node_groups:
        row = sorted(columns).index(group.level) // per_row
        lowest.setdefault(row, []).append(boxes[group.name].get_y())
    for above, below in itertools.pairwise(range(len(lowest))):
        assert min(lowest[above]) > max(lowest[below])


def test_an_mlp():
    ax = plot_spec(SPECS["MLP"]())
    boxes = {name: patches[0] for name, patches in drawn(ax, "nodes").items()}
    colors = {name: to_hex(box.get_facecolor()) for name, box in boxes.items()}
    assert len({colors["input"], colors["hidden_1"], colors["output"]}) == 3
    assert colors["hidden_1"] == colors["hidden_2"]
    assert texts(ax) == [
        "input\n2",
        "hidden_1\n32 · siren",
        "hidden_2\n32 · siren",
        "output\n1",
        "67 nodes, 1,120 edges, 1,185 parameters",
    ]
    assert legend(ax) == ["input neurons", "hidden neurons, free", "output neurons", "every neuron to every neuron"]
    # A band from the whole of one side to the whole of the other.
    (band,) = drawn(ax, "edges")["layer_0/kernel"]
    area, source, target = band.get_path().get_extents(), boxes["input"], boxes["hidden_1"]
    np.testing.assert_allclose(area.x0, source.get_x() + source.get_width())
    np.testing.assert_allclose(area.x1, target.get_x())
    np.testing.assert_allclose([area.y0, area.y1], target.get_y() + target.get_height() * np.array([0, 1]))
    assert band.get_fill()
    # Heights grow with the logarithm of the number of neurons.
    heights = {size: box.get_height() for size, box in zip((2, 32, 32, 1), boxes.values(), strict=True)}
    np.testing.assert_allclose(heights[32] - heights[1], 5 * (heights[2] - heights[1]))
    assert heights[1] > 0


def test_kinds_of_edges_look_different():
    ax = plot_spec(SPECS["group norm"]())
    edges = {name: patches[0] for name, patches in drawn(ax, "edges").items()}
    spec = SPECS["group norm"]()
    named = {group.name: group for group in spec.edge_groups}
    looks = {}
    for name, patch in edges.items():
        group = named[name]
        kind = "constant" if group.view is None else group.blocks, group.kernel_shape
        looks[name] = kind, strands(patch), patch.get_linestyle(), to_hex(patch.get_edgecolor())
    by_kernel = {
        group.kernel_shape: name for name, group in named.items() if group.view is not None and group.blocks > 1
    }
    grouped, depthwise = by_kernel[3, 1], by_kernel[2, 2]
    (scale,) = (n for n, g in named.items() if g.source == "depthwise" and g.target == "norm2")
    residuals = [name for name, group in named.items() if group.view is None]
    assert looks[grouped][1] == 3
    assert looks[depthwise][1] == looks[scale][1] == 6
    assert looks[depthwise][3] != looks[scale][3]
    assert all(looks[name][1] == 1 and looks[name][2] not in ("-", "solid") for name in residuals)
    assert all(looks[name][2] in ("-", "solid") for name in (grouped, depthwise, scale))
    assert to_hex(edges[grouped].get_facecolor()) != to_hex(edges[residuals[0]].get_edgecolor())
    assert {"3×3", "3×1, 3 groups", "2×2"} <= set(texts(ax))
    assert legend(ax)[3:] == [
        "every neuron to every neuron",
        "constant (residual, product)",
        "one to one (normalization scale)",
        "in groups",
        "one to one, with a kernel (depthwise)",
    ]


def test_connections_that_skip_a_level_pass_above_what_is_between():
    spec = SPECS["DenseNet"]()
    ax = plot_spec(spec)
    boxes = {name: patches[0] for name, patches in drawn(ax, "nodes").items()}
    tops, seen = [], 0
    for group in spec.edge_groups:
        source, target = spec.node_group[group.source], spec.node_group[group.target]
        between = [g.name for g in spec.node_groups if source.level < g.level < target.level]
        (patch,) = drawn(ax, "edges")[group.name]
        top = patch.get_path().get_extents().y1
        for name in between:
            assert top > boxes[name].get_y() + boxes[name].get_height()
            seen += 1
        tops += [(top, source.level, target.level)] if between else []
    assert seen > 4
    # No two of them share a line.
    for (a, first, last), (b, begin, end) in itertools.combinations(tops, 2):
        assert abs(a - b) > 0.1 or last <= begin or end <= first


def test_mirrors_are_dotted_and_loose_scalars_are_named():
    spec = SPECS["tied embeddings"]()
    ax = plot_spec(spec)
    (mirror,) = (group.name for group in spec.edge_groups if group.mirror)
    (constant,) = (group.name for group in spec.edge_groups if group.view is None)
    patches = {name: drawn(ax, "edges")[name][0] for name in (mirror, constant)}
    assert patches[mirror].get_linestyle() != patches[constant].get_linestyle()
    assert "parameter used again (mirror)" in legend(ax)
    assert "6 loose scalars, with no place in the graph: mix [5], temperature []" in texts(ax)


def test_self_edges_and_pinned_neurons():
    actions = (fixed("in", 2, "input"), permutation("h", 3), fixed("p", 3, "sort"), fixed("out", 1, "output"))
    shapes = {
        "a": ((2, 3), ("in", "h")),
        "b": ((3, 3), ("h", "h")),
        "c": ((3, 3), ("h", "p")),
        "d": ((3, 1), ("p", "out")),
    }
    params = tuple(ParamSpec((PathKey("dict", n),), s, "float32", axes) for n, (s, axes) in shapes.items())
    nodes = (
        NodeGroup("in", 2, "input", 0, "in"),
        NodeGroup("h", 3, "hidden", 1, "h", "tanh"),
        NodeGroup("p", 3, "hidden", 2, "p"),
        NodeGroup("out", 1, "output", 3, "out"),
    )
    ends = [("in", "h"), ("h", "h"), ("h", "p"), ("p", "out")]
    edges = tuple(
        EdgeGroup(name, *pair, view=param_view(i, shapes[name][0], source=(0,), target=(1,)))
        for i, (name, pair) in enumerate(zip(shapes, ends, strict=True))
    )
    ax = plot_spec(NeuralGraphSpec(params, nodes, edges, actions))
    boxes = {name: patches[0] for name, patches in drawn(ax, "nodes").items()}
    assert [name for name, box in boxes.items() if box.get_hatch()] == ["p"]
    assert "p\n3 · pinned" in texts(ax)
    assert "hidden neurons, pinned" in legend(ax)
    loop = drawn(ax, "edges")["b"][0].get_path().get_extents()
    top = boxes["h"].get_y() + boxes["h"].get_height()
    np.testing.assert_allclose(loop.y0, top)
    assert loop.y1 > top
    assert boxes["h"].get_x() < loop.x0 < loop.x1 < boxes["h"].get_x() + boxes["h"].get_width()


def test_deep_networks_go_on_in_further_rows():
    spec = ngjax.mlp_spec([8] * 120)
    ax = plot_spec(spec)
    width, height = ax.figure.get_size_inches()
    assert width < 30
    assert height < 30
    pieces = drawn(ax, "edges")
    assert sum(len(patches) == 2 for patches in pieces.values()) == (120 - 1) // 14
    small = plot_spec(SPECS["MLP"]()).figure.get_size_inches()
    assert small[0] < 8
    assert small[1] < 4


def test_long_names_are_shortened_at_their_path():
    layer = "an_attention_with_a_rather_long_name_0"
    params = {"model": {layer: {"kernel": np.ones((2, 3), np.float32)}, "b_1": {"kernel": np.ones((3, 1), np.float32)}}}
    spec = ngjax.trace_spec(
        lambda p, x: (x @ p["model"][layer]["kernel"]) @ p["model"]["b_1"]["kernel"], params, np.ones((1, 2))
    )
    lines = list(itertools.chain(*(text.split("\n") for text in texts(plot_spec(spec))[:3])))
    assert max(map(len, lines)) <= 25
    assert any(line.startswith("an_attentio…") for line in lines)


def test_the_same_spec_gives_the_same_picture():
    spec = SPECS["ResNet, traced"]()
    first, second = plot_spec(spec), plot_spec(NeuralGraphSpec.from_json(spec.to_json()))
    assert texts(first) == texts(second)
    for a, b in zip(first.patches, second.patches, strict=True):
        assert a.get_gid() == b.get_gid()
        np.testing.assert_array_equal(a.get_path().vertices, b.get_path().vertices)


def test_given_axes_are_drawn_into_and_everything_shrinks_with_them():
    spec = SPECS["transformer, traced"]()
    figure, axes = plt.subplots(1, 2, figsize=(8, 3))
    numbers = plt.get_fignums()
    assert plot_spec(spec, ax=axes[1]) is axes[1]
    assert plt.get_fignums() == numbers
    assert not axes[0].patches
    alone = plot_spec(spec)
    assert axes[1].texts[0].get_fontsize() < 0.5 * alone.texts[0].get_fontsize()
    assert len(axes[1].patches) == len(alone.patches)
    figure.canvas.draw()
    labels = rectangles([t for t in axes[1].texts if t.get_va() == "top"], figure.canvas.get_renderer())
    for a, b in itertools.combinations(labels, 2):
        assert not overlapping(a, b)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'pip install "ngjax\[examples\]"'):
        plot_spec(SPECS["MLP"]())
