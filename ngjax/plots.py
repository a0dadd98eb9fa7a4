"""Pictures of neural graphs."""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ngjax.spec import EdgeGroup, NeuralGraphSpec, NodeGroup, format_path

if TYPE_CHECKING:
    import matplotlib.axes

# All lengths are inches, and the axes' data units are inches too.
_MOST_COLUMNS = 14  # in one row; deeper networks go on in the next one, as text does
_PITCH = 1.6  # from one column to the next
_WIDTH = 0.42  # of a node group
_LABEL = 0.5  # below a node group
_LANE = 0.14  # between connections that pass above the node groups
_MARGIN = 0.75  # left and right of the columns
_ROW_GAP = 0.35
_FONT_SIZE = 7.0  # points
_LINE_LENGTH = 24  # letters of a name in one line

EdgeKind = Literal["dense", "grouped", "depthwise", "one to one", "constant", "mirror"]
NodeKind = Literal["input", "hidden, free", "hidden, pinned", "output"]

_NODE_COLORS: dict[NodeKind, str] = {
    "input": "#7fbf7b",
    "hidden, free": "#6fa8dc",
    "hidden, pinned": "#c9c9c9",
    "output": "#f0a070",
}
_EDGE_STYLES: dict[EdgeKind, tuple[str, str]] = {
    "dense": ("#4a6fa5", "every neuron to every neuron"),
    "grouped": ("#2a9d8f", "in groups"),
    "depthwise": ("#2a9d8f", "one to one, with a kernel (depthwise)"),
    "one to one": ("#d1730b", "one to one (normalization scale)"),
    "constant": ("#555555", "constant (residual, product)"),
    "mirror": ("#a02c6b", "parameter used again (mirror)"),
}


def plot_spec(spec: NeuralGraphSpec, *, ax: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
    """Draws the node and edge groups of a spec.

    Node groups are boxes, in columns by level; heights grow with the logarithm of the number of neurons. Edge groups
    are bands (every neuron to every neuron), narrow bands (groups), thin lines (one to one), dashed (constants, as
    residuals) and dotted (a parameter that is used again), with the shape of the kernel where there is one. Connections
    that skip a level pass above the boxes; deep networks go on in further rows.

    Args:
      spec: what to draw. Some hundred node groups are fine.
      ax: where to draw; everything is shrunk to fit into it. A new figure of the size that the spec needs if missing.

    Returns:
      The axes, whose `figure` can be saved. Artists carry `nodes:<name>` and `edges:<name>` as their `gid`.

    Raises:
      ImportError: without matplotlib.
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.patheffects import withStroke
    except ImportError as error:
        raise ImportError('plot_spec needs matplotlib: pip install "ngjax[examples]"') from error
    drawing = _arrange(spec)
    if ax is None:
        _, ax = plt.subplots(figsize=(drawing.width, drawing.height), layout="constrained")
        scale = 1.0
    else:
        space = ax.get_window_extent().transformed(ax.get_figure().dpi_scale_trans.inverted())  # type: ignore[union-attr]
        scale = min(1.0, space.width / drawing.width, space.height / drawing.height)
    for piece in drawing.pieces:
        _draw_edges(ax, piece, scale)
    for box in drawing.boxes.values():
        _draw_nodes(ax, box, scale)
    for text in drawing.texts:
        ax.text(
            text.x,
            text.y,
            text.text,
            size=_FONT_SIZE * scale * text.size,
            ha=text.ha,
            va=text.va,
            color=text.color,
            zorder=5,
            linespacing=1.05,
            path_effects=[withStroke(linewidth=2 * scale, foreground="white")],
        )
    ax.set(xlim=(0, drawing.width), ylim=(0, drawing.height), aspect="equal")
    ax.set_axis_off()
    _draw_legend(ax, drawing, scale)
    return ax


# -- what is where ----------------------------------------------------------------------------------------------------


class Box(NamedTuple):
    """A node group: which, in which row and column, and where its center and height are."""

    group: NodeGroup
    kind: NodeKind
    row: int
    column: int
    x: float
    y: float
    height: float

    @property
    def left(self) -> float:
        return self.x - _WIDTH / 2

    @property
    def right(self) -> float:
        return self.x + _WIDTH / 2


class End(NamedTuple):
    """Where a piece of a connection begins or ends: a stretch of a vertical line."""

    x: float
    y: float
    height: float


class Piece(NamedTuple):
    """What is drawn of an edge group in one row.

    Attributes:
      name, kind: of the edge group.
      strands: how many lines or bands stand for it.
      start, end: where it begins and ends.
      over: height at which it passes above the node groups, `None` where it goes straight.
      turns: where it rises and falls.
    """

    name: str
    kind: EdgeKind
    strands: int
    start: End
    end: End
    over: float | None = None
    turns: tuple[float, float] = (0.0, 0.0)


class Text(NamedTuple):
    """Text in the picture; `size` in units of the common size."""

    x: float
    y: float
    text: str
    size: float = 1.0
    ha: Literal["left", "center", "right"] = "center"
    va: Literal["top", "center"] = "center"
    color: str = "black"


class Drawing(NamedTuple):
    """All of a picture."""

    width: float
    height: float
    boxes: dict[str, Box]
    pieces: list[Piece]
    texts: list[Text]
    node_kinds: tuple[NodeKind, ...]
    edge_kinds: tuple[EdgeKind, ...]


class _Route(NamedTuple):
    """A piece before heights are known: `None` stands for the margin of the row."""

    group: EdgeGroup
    row: int
    source: str | None
    target: str | None
    above: bool


def node_kind(spec: NeuralGraphSpec, group: NodeGroup) -> NodeKind:
    """What a node group is drawn as."""
    if group.role == "hidden":
        return "hidden, free" if spec.is_free(group.axis) else "hidden, pinned"
    return group.role


def edge_kind(spec: NeuralGraphSpec, group: EdgeGroup) -> EdgeKind:
    """What an edge group is drawn as."""
    if group.mirror:
        return "mirror"
    if group.view is None:
        return "constant"
    blocks, n_in, n_out = spec.edge_block_shape(group)
    if blocks == 1:
        return "dense"
    if n_in == n_out == 1:
        return "depthwise" if group.kernel_size > 1 else "one to one"
    return "grouped"


def _arrange(spec: NeuralGraphSpec) -> Drawing:
    """Places everything; the same spec gives the same picture."""
    places, num_rows, num_columns = _grid(spec)
    routes = [route for group in spec.edge_groups for route in _routes(group, places)]
    lanes = _lanes(routes, places, num_columns)
    stacks = _stacks(spec, places)
    heights = {n: _box_height(group.size) for n, group in spec.node_group.items()}
    tall = {at: sum(heights[name] + _LABEL for name in names) for at, names in stacks.items()}
    notes = _notes(spec)
    kinds_of_nodes = dict.fromkeys(node_kind(spec, group) for group in spec.node_groups)
    kinds_of_edges = dict.fromkeys(edge_kind(spec, group) for group in spec.edge_groups)
    width = max((num_columns - 1) * _PITCH + _WIDTH + 2 * (_MARGIN + 0.65 * (num_rows > 1)), 5.5)
    left = (width - (num_columns - 1) * _PITCH) / 2
    num_lanes = [
        1
        + max((lane for route, lane in zip(routes, lanes, strict=True) if route.row == row and route.above), default=-1)
        for row in range(num_rows)
    ]
    row_heights = [
        num_lanes[row] * _LANE + max(n for at, n in tall.items() if at[0] == row) + _ROW_GAP for row in range(num_rows)
    ]
    legend = 0.17 * math.ceil((len(kinds_of_nodes) + len(kinds_of_edges)) / _legend_columns(width)) + 0.1
    top = 0.1 + 0.18 * len(notes)
    height = top + sum(row_heights) + legend

    boxes, roofs = {}, []
    y = height - top
    for row in range(num_rows):
        inside = row_heights[row] - num_lanes[row] * _LANE - _ROW_GAP
        roofs.append(y - num_lanes[row] * _LANE - _ROW_GAP / 2)
        for (_, column), names in ((at, names) for at, names in stacks.items() if at[0] == row):
            at_y = roofs[row] - (inside - tall[row, column]) / 2
            for name in names:
                group = spec.node_group[name]
                center = at_y - heights[name] / 2
                x = left + column * _PITCH
                boxes[name] = Box(group, node_kind(spec, group), row, column, x, center, heights[name])
                at_y -= heights[name] + _LABEL
        y -= row_heights[row]
    margins = (left - _WIDTH / 2 - _MARGIN, left + (num_columns - 1) * _PITCH + _WIDTH / 2 + _MARGIN)
    pieces = [
        _piece(spec, route, lane, boxes, roofs[route.row], margins) for route, lane in zip(routes, lanes, strict=True)
    ]
    texts = [_node_text(box) for box in boxes.values()]
    texts += _edge_texts(spec, routes, pieces, boxes)
    for i, note in enumerate(notes):
        size = 1.3 if i == 0 else 1.0
        color = "black" if i == 0 else "#555555"
        texts.append(Text(margins[0], height - 0.15 - 0.18 * i, note, size, "left", color=color))
    return Drawing(width, height, boxes, pieces, texts, tuple(kinds_of_nodes), tuple(kinds_of_edges))


def _grid(spec: NeuralGraphSpec) -> tuple[dict[str, tuple[int, int]], int, int]:
    """Row and column of each node group; number of rows and of columns in each."""
    levels = sorted({group.level for group in spec.node_groups})
    num_rows = math.ceil(len(levels) / _MOST_COLUMNS)
    num_columns = math.ceil(len(levels) / num_rows)
    at = {level: divmod(i, num_columns) for i, level in enumerate(levels)}
    return {group.name: at[group.level] for group in spec.node_groups}, num_rows, num_columns


def _stacks(spec: NeuralGraphSpec, places: Mapping[str, tuple[int, int]]) -> dict[tuple[int, int], list[str]]:
    """The names in each column from top to bottom: near what feeds them, so that few connections cross."""
    sources = collections.defaultdict(list)
    for edges in spec.edge_groups:
        sources[edges.target].append(edges.source)
    stacks: dict[tuple[int, int], list[str]] = collections.defaultdict(list)
    for name, at in places.items():
        stacks[at].append(name)
    rank: dict[str, float] = {}
    for at in sorted(stacks):
        near = {name: [rank[other] for other in sources[name] if other in rank] for name in stacks[at]}
        stacks[at].sort(key=lambda name: sum(near[name]) / len(near[name]) if near[name] else 0.5)
        rank |= {name: (i + 0.5) / len(stacks[at]) for i, name in enumerate(stacks[at])}
    return stacks


def _routes(group: EdgeGroup, places: Mapping[str, tuple[int, int]]) -> list[_Route]:
    """The pieces of a connection: one, or one up to the end of its row and one from the beginning of another."""
    (row, column), (to_row, to_column) = places[group.source], places[group.target]
    if row == to_row:
        return [_Route(group, row, group.source, group.target, above=to_column != column + 1)]
    last = max(c for r, c in places.values() if r == row)
    neighbours = to_row == row + 1 and column == last and to_column == 0
    return [
        _Route(group, row, group.source, None, above=not neighbours),
        _Route(group, to_row, None, group.target, above=not neighbours),
    ]


def _lanes(routes: Sequence[_Route], places: Mapping[str, tuple[int, int]], num_columns: int) -> list[int]:
    """For connections that pass above the node groups, which lane they take: short ones the lowest."""

    def stretch(route: _Route) -> tuple[float, float]:
        ends = [
            places[name][1] if name is not None else margin
            for name, margin in ((route.source, -1), (route.target, num_columns))
        ]
        first, last = float(min(ends)), float(max(ends))
        return (first, last) if first < last else (first - 0.5, last + 0.5)

    lanes = [0] * len(routes)
    taken: dict[tuple[int, int], list[tuple[float, float]]] = collections.defaultdict(list)
    order = [i for i, route in enumerate(routes) if route.above and route.source != route.target]
    for i in sorted(order, key=lambda i: (stretch(routes[i])[1] - stretch(routes[i])[0], i)):
        first, last = stretch(routes[i])
        lanes[i] = next(
            lane for lane in itertools.count() if all(last <= a or b <= first for a, b in taken[routes[i].row, lane])
        )
        taken[routes[i].row, lanes[i]].append((first, last))
    return lanes


def _piece(
    spec: NeuralGraphSpec,
    route: _Route,
    lane: int,
    boxes: Mapping[str, Box],
    roof: float,
    margins: tuple[float, float],
) -> Piece:
    kind, group = edge_kind(spec, route.group), route.group
    strands = {"grouped": min(group.blocks, 4), "depthwise": min(group.blocks, 6), "one to one": min(group.blocks, 6)}
    over = roof + (lane + 0.5) * _LANE if route.above else None
    source = boxes[route.source] if route.source is not None else None
    target = boxes[route.target] if route.target is not None else None
    if source is not None and source is target:  # a loop on top of the box
        up = source.y + source.height / 2
        ends = End(source.x - 0.1, up, 0.0), End(source.x + 0.1, up, 0.0)
        return Piece(group.name, kind, 1, *ends, up + 0.2, (ends[0].x, ends[1].x))
    if over is None:
        start = None if source is None else End(source.right, source.y, source.height)
        end = None if target is None else End(target.left, target.y, target.height)
        start = start or End(margins[0], end.y, end.height)  # type: ignore[union-attr]
        end = end or End(margins[1], start.y, start.height)
        return Piece(group.name, kind, strands.get(kind, 1), start, end)
    bend = 0.14 + 0.06 * (lane % 6)
    start = End(margins[0], over, 0.0) if source is None else End(source.right, source.y + 0.3 * source.height, 0.0)
    end = End(margins[1], over, 0.0) if target is None else End(target.left, target.y + 0.3 * target.height, 0.0)
    turns = (start.x if source is None else start.x + bend, end.x if target is None else end.x - bend)
    return Piece(group.name, kind, 1, start, end, over, turns)


def _box_height(size: int) -> float:
    return 0.24 + 0.13 * math.log2(size)


# -- what is written ---------------------------------------------------------------------------------------------------


def _node_text(box: Box) -> Text:
    group = box.group
    activation = "" if group.activation == "none" else f" · {group.activation}"
    pinned = " · pinned" if box.kind == "hidden, pinned" else ""
    text = f"{_short(group.name)}\n{group.size:,}{activation}{pinned}"
    return Text(box.x, box.y - box.height / 2 - 0.04, text, va="top")


def _edge_texts(
    spec: NeuralGraphSpec, routes: Sequence[_Route], pieces: Sequence[Piece], boxes: Mapping[str, Box]
) -> list[Text]:
    """Kernel shapes and constants in the middle of connections, and where those go that leave a row."""
    texts = []
    met: collections.Counter[tuple[float, float]] = collections.Counter()
    for route, piece in zip(routes, pieces, strict=True):
        group = route.group
        color = _EDGE_STYLES[piece.kind][0]
        written = _weights_text(spec, group)
        x = (piece.start.x + piece.end.x) / 2
        y = (piece.start.y + piece.end.y) / 2 if piece.over is None else piece.over
        if written and route.source is not None:
            y -= 0.14 * met[x, y]
            met[x, y] += 1
            texts.append(Text(x, y, written, 0.9, color="#333333"))
        if route.above and route.source is None:
            texts.append(Text(piece.start.x, y, f"{_last(boxes[group.source])} →", 0.8, "right", color=color))
        if route.above and route.target is None:
            texts.append(Text(piece.end.x, y, f"→ {_last(boxes[group.target])}", 0.8, "left", color=color))
    return texts


def _weights_text(spec: NeuralGraphSpec, group: EdgeGroup) -> str:
    """Shape of the kernel, number of groups, and a constant that is not one."""
    blocks, n_in, n_out = spec.edge_block_shape(group)
    return ", ".join(
        text
        for text, shown in (
            ("×".join(map(str, group.kernel_shape)), group.kernel_size > 1),
            (f"{blocks} groups", blocks > 1 and n_in * n_out > 1),
            (f"{group.constant:g}", group.view is None and group.constant != 1),
        )
        if shown
    )


def _last(box: Box) -> str:
    text = "/".join(box.group.name.split("/")[-2:])
    return text if len(text) <= 16 else f"…{text[-15:]}"


def _short(name: str) -> str:
    """A name in at most two lines: the last parts of its path that fit."""
    parts = re.sub(r"^params/", "", name).split("/")
    lines: list[str] = []
    while parts and len(lines) < 2:
        line = _clipped(parts.pop())
        while parts and len(parts[-1]) + 1 + len(line) <= _LINE_LENGTH:
            line = f"{parts.pop()}/{line}"
        lines.insert(0, line)
    if parts:
        lines[0] = _clipped(f"…/{lines[0]}")
    return "/\n".join(lines)


def _clipped(text: str) -> str:
    """The beginning and the end of a long name."""
    keep = _LINE_LENGTH // 2 - 1
    return text if len(text) <= _LINE_LENGTH else f"{text[:keep]}…{text[-keep:]}"


def _notes(spec: NeuralGraphSpec) -> list[str]:
    """The title, and what is not in the graph."""
    scalars = sum(math.prod(param.shape) for param in spec.params if param.is_floating)
    notes = [f"{spec.num_nodes:,} nodes, {spec.num_edges:,} edges, {scalars:,} parameters"]
    if spec.loose:
        params = dict.fromkeys(spec.params[view.param] for view in spec.loose)
        names = [f"{format_path(param.path)} {list(param.shape)}" for param in itertools.islice(params, 3)]
        rest = f" and {len(params) - 3} more" if len(params) > 3 else ""
        notes.append(f"{spec.num_loose:,} loose scalars, with no place in the graph: {', '.join(names)}{rest}")
    return notes


# -- drawing -----------------------------------------------------------------------------------------------------------


def _draw_nodes(ax: matplotlib.axes.Axes, box: Box, scale: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    ax.add_patch(
        FancyBboxPatch(
            (box.left, box.y - box.height / 2),
            _WIDTH,
            box.height,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=_NODE_COLORS[box.kind],
            edgecolor="#333333",
            linewidth=0.8 * scale,
            hatch="////" if box.kind == "hidden, pinned" else None,
            zorder=3,
            gid=f"nodes:{box.group.name}",
        )
    )


def _draw_edges(ax: matplotlib.axes.Axes, piece: Piece, scale: float) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    if piece.over is not None:
        vertices, codes = _arch(piece)
    elif piece.kind in ("dense", "grouped"):
        vertices, codes = _bands(piece)
    elif piece.kind in ("depthwise", "one to one"):
        vertices, codes = _lines(piece)
    else:
        vertices, codes = _lines(piece._replace(strands=1))
    filled = piece.over is None and piece.kind in ("dense", "grouped")
    ax.add_patch(
        PathPatch(Path(vertices, codes), zorder=1, gid=f"edges:{piece.name}", **_stroke(piece.kind, filled, scale))
    )


def _stroke(kind: EdgeKind, filled: bool, scale: float) -> dict[str, Any]:
    """How a connection of this kind is drawn, in the picture and in its legend."""
    color = _EDGE_STYLES[kind][0]
    if filled:
        return {"facecolor": color, "edgecolor": color, "alpha": 0.33, "linewidth": 0.5 * scale}
    widths: dict[EdgeKind, float] = {"dense": 3.5, "grouped": 2.2, "constant": 1.2, "mirror": 1.4}
    dashes: dict[EdgeKind, Any] = {"constant": (0, (4, 2)), "mirror": (0, (1, 1.5))}
    return {
        "facecolor": "none",
        "edgecolor": color,
        "alpha": 0.4 if kind == "dense" else 0.9,
        "linewidth": widths.get(kind, 0.8) * scale,
        "linestyle": dashes.get(kind, "solid"),
    }


Outline = tuple[list[tuple[float, float]], list[int]]
_MOVE, _LINE, _CURVE, _CLOSE = 1, 2, 4, 79  # matplotlib.path.Path's codes


def _curve(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """Control points of a curve that is horizontal at both ends."""
    middle = (start[0] + end[0]) / 2
    return [(middle, start[1]), (middle, end[1]), end]


def _bands(piece: Piece) -> Outline:
    """Areas between stretches of the two ends, one below the other."""
    vertices, codes = [], []
    fill = 1.0 if piece.strands == 1 else 0.6
    for i in range(piece.strands):
        (a, b), (c, d) = (_stretch(end, i, piece.strands, fill) for end in (piece.start, piece.end))
        here, there = (piece.start.x, a), (piece.end.x, c)
        back = (piece.start.x, b)
        vertices += [here, *_curve(here, there), (piece.end.x, d), *_curve((piece.end.x, d), back), here]
        codes += [_MOVE, *[_CURVE] * 3, _LINE, *[_CURVE] * 3, _CLOSE]
    return vertices, codes


def _lines(piece: Piece) -> Outline:
    """Parallel lines between the two ends."""
    vertices, codes = [], []
    for i in range(piece.strands):
        (a, b), (c, d) = (_stretch(end, i, piece.strands, 0.0) for end in (piece.start, piece.end))
        here = (piece.start.x, (a + b) / 2)
        vertices += [here, *_curve(here, (piece.end.x, (c + d) / 2))]
        codes += [_MOVE, *[_CURVE] * 3]
    return vertices, codes


def _stretch(end: End, i: int, count: int, fill: float) -> tuple[float, float]:
    """Bottom and top of the i-th of `count` equal parts of an end, of which each fills a share of its place."""
    share = end.height / count
    middle = end.y + end.height / 2 - (i + 0.5) * share
    return middle - fill * share / 2, middle + fill * share / 2


def _arch(piece: Piece) -> Outline:
    """A line that rises, passes above the node groups, and falls."""
    assert piece.over is not None
    (x0, y0, _), (x1, y1, _), over = piece.start, piece.end, piece.over
    up, down = piece.turns
    vertices = [(x0, y0), (up, y0), (up, y0), (up, (y0 + over) / 2), (up, over), (up, over)]
    ahead = math.copysign(min(0.15, abs(down - up) / 2), down - up)
    vertices += [(up + ahead, over), (down - ahead, over)]
    vertices += [(down, over), (down, over), (down, (y1 + over) / 2), (down, y1), (down, y1), (x1, y1)]
    return vertices, [_MOVE, *[_CURVE] * 6, _LINE, *[_CURVE] * 6]


def _legend_columns(width: float) -> int:
    return max(1, int(width / 2.7))


def _draw_legend(ax: matplotlib.axes.Axes, drawing: Drawing, scale: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(
            facecolor=_NODE_COLORS[kind],
            edgecolor="#333333",
            linewidth=0.8 * scale,
            hatch="////" if kind == "hidden, pinned" else None,
            label=kind.replace("hidden", "hidden neurons") if "hidden" in kind else f"{kind} neurons",
        )
        for kind in drawing.node_kinds
    ]
    for kind in drawing.edge_kinds:
        style = _stroke(kind, False, scale)
        label = _EDGE_STYLES[kind][1]
        if kind in ("dense", "grouped"):
            handles.append(Patch(**_stroke(kind, True, scale), label=label))
        else:
            line = Line2D([], [], color=style["edgecolor"], linewidth=style["linewidth"], linestyle=style["linestyle"])
            line.set_label(label)
            handles.append(line)
    ax.legend(
        handles=handles,
        loc="lower center",
        ncol=_legend_columns(drawing.width),
        fontsize=_FONT_SIZE * scale,
        frameon=False,
        borderaxespad=0.2,
        handlelength=2.4,
    )
