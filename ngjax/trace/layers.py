"""Which neurons and which weights the results of an equation hold: how a traced program becomes layers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ngjax.trace import rules, scalars
from ngjax.trace.axes import Word, size_of
from ngjax.trace.neurons import Neurons
from ngjax.trace.rules import Words
from ngjax.trace.weights import (
    Window,
    axes_of,
    broadcast,
    reshape_ids,
    reshaped,
    shifted,
    sliced,
    squeezed,
    transposed,
)


class Composed(NamedTuple):
    """A product of two arrays of parameters (a low-rank update): two layers of weights with neurons in between.

    Attributes:
      factors: the windows of each, in the index space of the product's axes and then the axes summed over.
      words: of the axes summed over.
    """

    factors: tuple[tuple[Window, ...], tuple[Window, ...]]
    words: Words

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(size_of, self.words))


class Weights(NamedTuple):
    """An array made of parameters alone; `windows` are those entries that can be told, `composed` those summed up."""

    windows: tuple[Window, ...] = ()
    composed: tuple[Composed, ...] = ()


class Acts(NamedTuple):
    """An array that depends on the inputs.

    Attributes:
      labels: numbers of nodes, one array for each set of axes along which there are neurons; their axes are disjoint.
      is_input: an input as it came, up to a change of its shape: its neurons are yet to be found.
      values: the entries as a function of the neurons' values, on `scalars.GRID`; `None` where it is not known.
      waiting: parameters that statistics without neurons were multiplied with (`scale / deviation`), for the neurons
        that the product will be multiplied with.
    """

    labels: tuple[np.ndarray, ...] = ()
    is_input: bool = False
    values: np.ndarray | None = scalars.GRID
    waiting: tuple[Window, ...] = ()


Flow = Weights | Acts | None  # None: depends on neither


class Value(NamedTuple):
    """What is known of an array; `number` is a constant that is the same everywhere, or a small index vector."""

    words: Words
    flow: Flow = None
    number: Any = None


@dataclasses.dataclass
class Layers:
    """Follows neurons and weights through equations. `names` are those of the parameters, for the groups they make."""

    names: Sequence[str]
    neurons: Neurons = dataclasses.field(default_factory=Neurons)

    def flows(self, eqn: Any, operands: list[Value], words: list[Words]) -> list[Flow]:
        name, count = eqn.primitive.name, len(eqn.outvars)
        if name != "mul" and name not in _RESHAPES and name not in _CASTS:
            operands = [self.met(value) for value in operands]
        flows = [value.flow for value in operands]
        if all(flow is None for flow in flows):
            return [None] * count
        if name in rules.SIDE_BY_SIDE:
            return list(flows)
        shape = tuple(eqn.outvars[0].aval.shape)
        if name == "bitcast_convert_type" and shape != tuple(eqn.invars[0].aval.shape):
            return [Acts() if isinstance(flows[0], Acts) else Weights()]
        if name in rules.ELEMENTWISE:
            return [self.elementwise(eqn, operands, words[0], shape)] * count
        if name == "dot_general":
            return [self.product(eqn, operands, words[0], shape)]
        if name == "conv_general_dilated":
            return [self.convolution(eqn, operands, words[0], shape)]
        if name == "gather" and isinstance(flows[0], Weights):
            return [self.lookup(eqn, operands, words[0], shape)]
        if name == "concatenate":
            return [self.concatenation(eqn, operands, words[0], shape)]
        if name == "split":
            return self.splitting(eqn, operands)
        if name.startswith("scatter"):
            return [self.scattered(eqn, operands, words[0], shape)]
        flow = flows[0]
        if isinstance(flow, Weights):
            composed = tuple(_moved_composed(eqn, item, shape) for item in flow.composed) if name == "transpose" else ()
            return [Weights(_moved_windows(eqn, flow.windows, shape), composed)] * count
        if isinstance(flow, Acts):
            old = flow.labels
            if name in _SUMS:
                # A sum over neurons is a statistic, that of a softmax is part of it; other sums see the activation.
                if flow.values is not None and scalars.is_exponential(flow.values):
                    old = ()
                elif all(_moved_ids(eqn, ids) is not None for ids in old):
                    old = self.settled(operands[0])
            moved = (_moved_ids(eqn, ids) for ids in old)
            labels = tuple(ids for ids in moved if ids is not None and ids.size)
            if name in _SUMS:
                flow = Acts(labels)
            for ids in labels:
                if name in ("slice", "gather", "dynamic_slice"):
                    self.neurons.tell_apart(ids)
            is_input = flow.is_input and not labels and name in _RESHAPES
            return [Acts(labels, is_input, flow.values, _moved_windows(eqn, flow.waiting, shape))] * count
        return [Acts() if any(isinstance(f, Acts) for f in flows) else Weights()] * count

    def met(self, value: Value) -> Value:
        """The array with what waits for neurons given neurons of its own."""
        if not isinstance(value.flow, Acts) or not value.flow.waiting:
            return value
        shape = tuple(map(size_of, value.words))
        labels = list(value.flow.labels)
        for window in value.flow.waiting:
            labels = self.weighted(labels, window, "mul", value.words, shape, False)
        return value._replace(flow=Acts(tuple(labels)))

    def settled(self, value: Value, *, name: str | None = None) -> tuple[np.ndarray, ...]:
        """The neurons that an array holds the values of, their activation included."""
        flow = value.flow
        assert isinstance(flow, Acts)
        if name is None:
            name = "other" if flow.values is None else scalars.name_of(flow.values)
        if name == "none":
            return flow.labels
        shape = tuple(size_of(word) for word in value.words)
        # An array may have neurons along several axes; the newest are those that the function was applied to.
        newest = max(range(len(flow.labels)), key=lambda i: int(flow.labels[i].max()), default=None)
        labels = list(flow.labels)
        if newest is not None:
            ids = labels[newest]
            nodes = ids[ids >= 0]
            if not all(self.neurons.activation[i] == name for i in nodes.reshape(-1).tolist()):
                if not self.neurons.is_open(nodes):
                    ids = self.after(ids, value.words, shape, name)
                self.neurons.activate(ids, name)
            labels[newest] = ids
        return tuple(labels)

    def after(self, ids: np.ndarray, words: Words, shape: Sequence[int], name: str) -> np.ndarray:
        """A new group, one to one after the neurons in `ids`."""
        made = self.neurons.new(words, shape, axes_of(ids), name)
        self.neurons.link(ids, made)
        return made

    def elementwise(self, eqn: Any, operands: list[Value], words: Words, shape: tuple[int, ...]) -> Flow:
        name = eqn.primitive.name
        acts = [(value, value.flow) for value in operands if isinstance(value.flow, Acts)]
        full = [value for value in operands if len(value.words) == len(shape)]
        windows = [
            broadcast(w, shape, range(len(shape)), tuple(map(size_of, value.words)))
            for value in full
            for w in _windows_of(value.flow)
        ]
        weighted = any(isinstance(value.flow, Weights) for value in operands)
        if not acts:
            composed = [
                _repeated(item, shape, tuple(map(size_of, value.words)))
                for value in full
                if isinstance(value.flow, Weights)
                for item in value.flow.composed
            ]
            return Weights(tuple(windows), tuple(composed) if name in _LINEAR else ()) if weighted else None
        labelled = [(value, flow) for value, flow in acts if flow.labels]
        if (
            windows
            and (name in _CASTS or name == "mul")
            and len(labelled) <= 1
            and not any(f.is_input for _, f in acts)
        ):
            apart = labelled[0][1].labels if labelled else ()
            places = {axis for ids in apart for axis in axes_of(ids)}
            if not any(window.varies(axis) for window in windows for axis in (places or ())) and not _has_one(apart):
                return Acts(apart, waiting=tuple(windows))
        if not labelled and not windows:
            return Acts(is_input=len(acts) == 1 and acts[0][1].is_input and not weighted)
        together = len(labelled) == len(acts) and all(_same_labels(acts[0][1], flow) for _, flow in acts)
        if together and not weighted:
            numbers = [value.flow.values if isinstance(value.flow, Acts) else value.number for value in operands]
            constants = all(
                value.number is not None and np.ndim(value.number) == 0 for value in operands if value.flow is None
            )
            result = scalars.evaluate(eqn, numbers) if constants else acts[0][1].values
            return Acts(acts[0][1].labels, values=result)
        if len(labelled) == 1 and not windows:
            # Statistics, masks, gates without neurons of their own: the neurons stay.
            ((value, flow),) = labelled
            values = flow.values
            if name in _COMPARISONS:  # with a threshold that is a statistic
                return flow._replace(values=None)
            if values is not None and scalars.name_of(values) == "none":
                return flow
            softmax = name == "div" and values is not None and scalars.is_exponential(values)
            return Acts(self.settled(value, name="softmax" if softmax else None))
        labels: list[np.ndarray] = []
        for i, value in enumerate(operands):
            if isinstance(value.flow, Acts):
                for ids in self.settled(value):
                    labels = self.joined(labels, ids, -1.0 if name == "sub" and i == 1 else 1.0, name, words, shape)
        is_input = not labels and len(acts) == 1 and acts[0][1].is_input
        for window in windows:
            labels = self.weighted(labels, window, name, words, shape, is_input)
        return Acts(tuple(labels))

    def joined(
        self, labels: list[np.ndarray], ids: np.ndarray, sign: float, name: str, words: Words, shape: Sequence[int]
    ) -> list[np.ndarray]:
        """Adds neurons of one more operand to those of the others."""
        axes = set(axes_of(ids))
        near = [i for i, other in enumerate(labels) if axes & set(axes_of(other)) or other.size == ids.size == 1]
        if not near:
            return [*labels, ids]
        if len(near) == 1 and np.array_equal(labels[near[0]], ids):
            return labels
        others = [labels[i] for i in near]
        rest = [other for i, other in enumerate(labels) if i not in near]
        union = sorted(axes.union(*(axes_of(other) for other in others)))
        everything = [*((other, 1.0) for other in others), (ids, sign)]
        if name in _ADDITIONS:
            full = [x for x in everything if list(axes_of(x[0])) == union or x[0].size == 1]
            full = [x for x in full if self.neurons.is_open(x[0]) and len(np.unique(x[0])) == x[0].size]
            if full:
                target = max(full, key=lambda x: int(x[0].max()))
                if target[1] == 1.0:
                    for source, factor in everything:
                        if source is not target[0]:
                            self.neurons.link(source, target[0], constant=factor)
                    return [*rest, target[0]]
        made = self.neurons.new(words, shape, union, name)
        for source, factor in everything:
            self.neurons.link(source, made, constant=factor)
        return [*rest, made]

    def weighted(
        self,
        labels: list[np.ndarray],
        window: Window,
        name: str,
        words: Words,
        shape: tuple[int, ...],
        is_input: bool,
    ) -> list[np.ndarray]:
        """An operand of parameters meets the neurons: a bias, a scale, or a table with places along other axes."""
        title = _layer(self.names[window.param])
        varying = [axis for axis, n in enumerate(shape) if window.varies(axis) or (window.extent(axis) != n and n > 1)]
        if not varying:
            if len(labels) == 1 and labels[0].size == 1 and name in _ADDITIONS:
                return self.biased(labels, labels[0], window, title, words, shape)
            return labels
        overlaps = [len(set(varying) & set(axes_of(ids))) for ids in labels]
        if not any(overlaps):
            labels = [*labels, self.neurons.new(words, shape, varying, title, is_input=is_input)]
            ids = labels[-1]
        else:
            ids = labels[int(np.argmax(overlaps))]
        own = [axis for axis in varying if axis in axes_of(ids)]
        outside = [axis for axis in varying if axis not in own]
        covered = tuple(
            slice(window.starts[axis], window.starts[axis] + window.extent(axis)) if axis in own else slice(None)
            for axis in range(len(shape))
        )
        if name not in _ADDITIONS:
            # With places along axes that the neurons do not have, each neuron feeds one of its own at each of them.
            made = self.neurons.new(words, shape, sorted({*axes_of(ids), *outside}), title)
            self.neurons.link(ids[covered], made[covered], window)
            rest = np.ones(ids.shape, bool)
            rest[covered] = False
            if rest.any():
                self.neurons.link(np.where(rest, ids, -1), made)
            return [made if other is ids else other for other in labels]
        if not outside:
            return self.biased(labels, ids, window, title, words, shape)
        if not self.neurons.is_open(ids):
            made = self.after(ids, words, shape, title)
            labels, ids = [made if other is ids else other for other in labels], made
        places = self.neurons.new(words, shape, outside, "positions", is_input=True)
        self.neurons.link(places, ids, window)
        return labels

    def biased(
        self, labels: list[np.ndarray], ids: np.ndarray, window: Window, title: str, words: Words, shape: Sequence[int]
    ) -> list[np.ndarray]:
        region = tuple(
            slice(window.starts[axis], window.starts[axis] + window.extent(axis)) if n > 1 else slice(None)
            for axis, n in enumerate(ids.shape)
        )
        part = ids[region]
        distinct = len(np.unique(ids)) == ids.size
        if not (distinct and self.neurons.is_open(ids) and not self.neurons.biased[part].any()):
            made = self.after(ids, words, shape, title)
            labels, ids, part = [made if other is ids else other for other in labels], made, made[region]
        self.neurons.add_bias(window, part)
        return labels

    def product(self, eqn: Any, operands: list[Value], words: Words, shape: tuple[int, ...]) -> Flow:
        flows = [value.flow for value in operands]
        left, right, left_batch, right_batch = rules.contraction(eqn)
        ranks = [len(value.words) for value in operands]
        free = [
            [i for i in range(ranks[0]) if i not in left + left_batch],
            [i for i in range(ranks[1]) if i not in right + right_batch],
        ]
        # Places of the operands' axes in an index space: batch, free of the left, free of the right, contracted.
        batch, total = len(left_batch), len(shape)
        maps: list[dict[int, int]] = [{}, {}]
        for i in range(batch):
            maps[0][left_batch[i]] = maps[1][right_batch[i]] = i
        for i, axis in enumerate(free[0]):
            maps[0][axis] = batch + i
        for i, axis in enumerate(free[1]):
            maps[1][axis] = batch + len(free[0]) + i
        for i in range(len(left)):
            maps[0][left[i]] = maps[1][right[i]] = total + i
        space = total + len(left)
        sizes = list(shape) + [size_of(operands[0].words[axis]) for axis in left]
        all_words = list(words) + [operands[0].words[axis] for axis in left]

        def spread(ids: np.ndarray, side: int) -> np.ndarray:
            out = [1] * space
            order = sorted(range(ids.ndim), key=lambda axis: maps[side][axis])
            for axis in range(ids.ndim):
                out[maps[side][axis]] = ids.shape[axis]
            return ids.transpose(order).reshape(out)

        def narrow(ids: np.ndarray) -> np.ndarray:
            return ids.reshape(ids.shape[:total])

        contracted = list(range(total, space))
        if all(isinstance(flow, Acts) for flow in flows):
            both = [self.settled(value) for value in operands]
            return self.interaction(both, spread, narrow, all_words, shape, contracted)
        if not any(isinstance(flow, Acts) for flow in flows):
            if not all(isinstance(flow, Weights) for flow in flows):
                return Weights()
            factors = [
                tuple(_spread_window(window, maps[i], sizes) for window in _windows_of(flow))
                for i, flow in enumerate(flows)
            ]
            return Weights((), (Composed((factors[0], factors[1]), tuple(all_words[total:])),) if all(factors) else ())
        side = 0 if isinstance(flows[0], Acts) else 1
        acts, weights = flows[side], flows[1 - side]
        assert isinstance(acts, Acts)
        acts = acts._replace(labels=self.settled(operands[side]))
        windows = weights.windows if isinstance(weights, Weights) else ()
        if not isinstance(weights, Weights):  # a constant matrix: nothing to learn, and no neurons of its own
            kept = [spread(ids, side) for ids in acts.labels if not varies(ids, (left, right)[side])]
            return Acts(tuple(narrow(ids) for ids in kept))
        labels = [spread(ids, side) for ids in acts.labels]
        spread_windows = [_spread_window(window, maps[1 - side], sizes) for window in windows]
        # What does not vary over the sum is a gain of the results (weight normalization).
        moved = [w for w in spread_windows if any(w.varies(axis) for axis in contracted)]
        moved = moved if moved or weights.composed else spread_windows
        gains = [w for w in spread_windows if w not in moved]
        composed = [_spread_composed(item, maps[1 - side], sizes) for item in weights.composed]
        layers = [(first, second, item) for item in composed for first, second in _in_order(item, contracted)]
        read = [*moved, *(window for first, _, _ in layers for window in first)]
        source, others = self.sources(labels, contracted, acts, all_words, sizes, read)
        if not read:
            return Acts(tuple(narrow(ids) for ids in others))
        written = [*moved, *(window for _, second, _ in layers for window in second)]
        target_axes = [
            axis
            for axis in range(total)
            if any(w.varies(axis) or (w.extent(axis) != sizes[axis] and sizes[axis] > 1) for w in written)
        ]
        target = self.neurons.new(all_words, sizes, target_axes, _layer(self.names[written[0].param]))
        for window in moved:
            self.neurons.link(*_covered(window, sizes, source, target))
        for first, second, item in layers:
            tail = (1,) * len(item.words)
            shapes = [*sizes, *item.sizes]
            between = self.neurons.new(
                [*all_words, *item.words], shapes, range(space, len(shapes)), _layer(self.names[first[0].param])
            )
            for window in first:
                self.neurons.link(*_covered(window, shapes, source.reshape(source.shape + tail), between))
            for window in second:
                self.neurons.link(*_covered(window, shapes, between, target.reshape(target.shape + tail)))
        results = [*(narrow(ids) for ids in others), narrow(target)]
        for window in gains:
            window = window._replace(axes=window.axes[:total], starts=window.starts[:total])
            results = self.weighted(results, window, "mul", words, shape, False)
        return Acts(tuple(results))

    def sources(
        self,
        labels: list[np.ndarray],
        contracted: list[int],
        acts: Acts,
        words: Sequence[Word],
        sizes: Sequence[int],
        windows: Sequence[Window],
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """The neurons that a product with weights sums over, and those that it leaves alone."""
        here = [ids for ids in labels if varies(ids, contracted)]
        others = [ids for ids in labels if not varies(ids, contracted)]
        if len(here) == 1:
            (ids,) = here
            # Weights that are the same at places where the neurons are not: one group for all those places.
            shared = [
                axis
                for axis in axes_of(ids)
                if axis not in contracted and not any(window.varies(axis) for window in windows)
            ]
            if not shared:
                return ids, others
            made = self.neurons.new(words, sizes, [a for a in axes_of(ids) if a not in shared], "shared")
            self.neurons.link(ids, made)
            return made, others
        size_one = [ids for ids in labels if ids.size == 1]
        if all(sizes[axis] == 1 for axis in contracted) and size_one:
            return size_one[0], [ids for ids in labels if ids is not size_one[0]]
        if here:
            made = self.neurons.new(words, sizes, contracted, "sum")
            for ids in here:
                self.neurons.link(ids, made)
            return made, others
        name = "input" if acts.is_input else "positions"
        return self.neurons.new(words, sizes, contracted, name, is_input=True), others

    def interaction(
        self,
        settled: Sequence[Sequence[np.ndarray]],
        spread: Callable[[np.ndarray, int], np.ndarray],
        narrow: Callable[[np.ndarray], np.ndarray],
        words: Sequence[Word],
        shape: Sequence[int],
        contracted: Sequence[int],
    ) -> Flow:
        """A product of two arrays that both depend on the inputs: attention scores, mixing by them."""
        labels = [spread(ids, side) for side in range(2) for ids in settled[side]]
        axes = sorted({axis for ids in labels for axis in axes_of(ids) if axis < len(shape)})
        if not axes:
            return Acts()
        sizes = list(shape) + [1] * len(contracted)
        target = self.neurons.new(words, sizes, axes, "product")
        for ids in labels:
            if any(axis in axes for axis in axes_of(ids)):
                self.neurons.link(ids, target)
        return Acts((narrow(target),))

    def convolution(self, eqn: Any, operands: list[Value], words: Words, shape: tuple[int, ...]) -> Flow:
        x, kernel = operands
        if not isinstance(x.flow, Acts) or not isinstance(kernel.flow, Weights) or not kernel.flow.windows:
            return Acts() if any(isinstance(v.flow, Acts) for v in operands) else Weights()
        numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
        features, (out, into, *taps) = numbers.lhs_spec[1], numbers.rhs_spec
        count = eqn.invars[0].aval.shape[features]
        kernel_shape = eqn.invars[1].aval.shape
        here = [ids for ids in self.settled(x) if features in axes_of(ids) or (ids.size == 1 and count == 1)]
        if here:
            ids = here[0]
            if any(axis != features for axis in axes_of(ids)):
                made = self.neurons.new(x.words, eqn.invars[0].aval.shape, (features,), "shared")
                self.neurons.link(ids, made)
                ids = made
        else:
            ids = self.neurons.new(x.words, eqn.invars[0].aval.shape, (features,), "input", is_input=True)
        rows = ids.reshape(groups, count // groups)
        source = np.repeat(rows.T, kernel_shape[out] // groups, axis=1)  # [into, out]
        if groups == 1:
            source = rows.T
        places = [1] * len(kernel_shape)
        places[into] = source.shape[0]
        places[out] = source.shape[1]
        source = (source if into < out else source.T).reshape(places)
        target = self.neurons.new(kernel.words, kernel_shape, (out,), _layer(self.names[kernel.flow.windows[0].param]))
        inner = [into, *taps] if kernel_shape[into] > 1 or any(kernel_shape[axis] > 1 for axis in taps) else [out]
        windows = [w for w in kernel.flow.windows if any(w.varies(axis) for axis in inner)]
        gains = [w for w in kernel.flow.windows if w not in windows]
        if not windows:
            windows, gains = gains, []
        for window in windows:
            self.neurons.link(
                *_covered(window, kernel_shape, source, target), taps=tuple(kernel_shape[i] for i in taps)
            )
        labels = [target]
        for window in gains:
            labels = self.weighted(labels, window, "mul", kernel.words, kernel_shape, False)
        result = [1] * len(shape)
        result[numbers.out_spec[1]] = kernel_shape[out]
        return Acts(tuple(ids.reshape(result) for ids in labels))

    def lookup(self, eqn: Any, operands: list[Value], words: Words, shape: tuple[int, ...]) -> Flow:
        """Rows of a table of parameters, by indices."""
        flow, table = operands[0].flow, eqn.invars[0].aval.shape
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        assert isinstance(flow, Weights)
        kept = [
            i for i in range(len(table)) if i not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        ]
        if not flow.windows or numbers.operand_batching_dims or any(sizes[i] != table[i] for i in kept):
            return Acts() if isinstance(operands[1].flow, Acts) else Weights()
        if not isinstance(operands[1].flow, Acts):
            name = "positions"
        else:
            name = "input"
        source = self.neurons.new(operands[0].words, table, numbers.collapsed_slice_dims, name, is_input=True)
        target = self.neurons.new(operands[0].words, table, kept, _layer(self.names[flow.windows[0].param]))
        for window in flow.windows:
            self.neurons.link(*_covered(window, table, source, target))
        result = [1] * len(shape)
        for axis, place in zip(kept, numbers.offset_dims, strict=True):
            result[place] = table[axis]
        return Acts((target.reshape(result),))

    def scattered(self, eqn: Any, operands: list[Value], words: Words, shape: tuple[int, ...]) -> Flow:
        """Updates added to an array at places that the inputs choose: neurons along the axes they have whole."""
        numbers = eqn.params["dimension_numbers"]
        labels: list[np.ndarray] = []
        for value, is_update in ((operands[0], False), (operands[2], True)):
            if not isinstance(value.flow, Acts):
                continue
            for ids in self.settled(value):
                if is_update:
                    places = [i for i in range(len(shape)) if i not in numbers.inserted_window_dims]
                    whole = dict(zip(numbers.update_window_dims, places, strict=True))
                    if any(n > 1 and n != shape[whole[i]] if i in whole else n > 1 for i, n in enumerate(ids.shape)):
                        continue
                    out = [1] * len(shape)
                    for i, place in whole.items():
                        out[place] = ids.shape[i]
                    ids = ids.reshape(out)
                labels = self.joined(labels, ids, 1.0, "add", words, shape)
        return Acts(tuple(labels))

    def concatenation(self, eqn: Any, operands: list[Value], words: Words, shape: tuple[int, ...]) -> Flow:
        axis = eqn.params["dimension"]
        shapes = [v.aval.shape for v in eqn.invars]
        if not any(isinstance(value.flow, Acts) for value in operands):
            windows, composed, start = [], [], 0
            for value, own in zip(operands, shapes, strict=True):
                if isinstance(value.flow, Weights):
                    windows += [shifted(window, axis, start) for window in value.flow.windows]
                    shift = functools.partial(shifted, axis=axis, by=start)
                    composed += [_mapped(item, shift) for item in value.flow.composed]
                start += own[axis]
            return Weights(tuple(windows), tuple(composed))
        if any(isinstance(value.flow, Acts) and varies_any(value.flow.labels, (axis,)) for value in operands):
            pieces = []
            for value, own in zip(operands, shapes, strict=True):
                near = (
                    [ids for ids in self.settled(value) if axis in axes_of(ids) or (own[axis] == 1 and ids.size == 1)]
                    if isinstance(value.flow, Acts)
                    else []
                )
                if near:
                    ids = near[0]
                elif isinstance(value.flow, Acts):
                    name = "input" if value.flow.is_input else "positions"
                    ids = self.neurons.new(value.words, own, (axis,), name, is_input=True)
                else:
                    ids = np.full([n if i == axis else 1 for i, n in enumerate(own)], -1)
                if ids.shape[axis] != own[axis]:
                    ids = np.repeat(ids, own[axis], axis=axis)
                pieces.append(ids)
            common = [max(p.shape[i] for p in pieces) for i in range(len(shape))]
            pieces = [
                np.broadcast_to(p, [p.shape[i] if i == axis else common[i] for i in range(len(shape))]) for p in pieces
            ]
            return Acts((np.concatenate(pieces, axis=axis),))
        # Along an axis without neurons (a class token before the others): neurons stay if all agree on them.
        labels: list[np.ndarray] = []
        for value in operands:
            if isinstance(value.flow, Acts):
                for ids in self.settled(value):
                    labels = self.joined(labels, ids, 1.0, "add", words, shape)
        for value in operands:
            if isinstance(value.flow, Weights):
                for window in value.flow.windows:
                    own = value.words
                    token = (*shape[:axis], size_of(own[axis]), *shape[axis + 1 :])
                    labels = self.weighted(labels, window, "add", words, token, False)
        return Acts(tuple(labels), is_input=all(isinstance(v.flow, Acts) and v.flow.is_input for v in operands))

    def splitting(self, eqn: Any, operands: list[Value]) -> list[Flow]:
        axis, flow = eqn.params["axis"], operands[0].flow
        results: list[Flow] = []
        start = 0
        for size in eqn.params["sizes"]:
            if isinstance(flow, Weights):
                parts = [sliced(window, axis, start, start + size) for window in flow.windows]
                results.append(Weights(tuple(part for part in parts if part is not None)))
            elif isinstance(flow, Acts):
                labels = tuple(
                    ids[(slice(None),) * axis + (slice(start, start + size),)] if ids.shape[axis] > 1 else ids
                    for ids in flow.labels
                )
                for ids in labels:
                    self.neurons.tell_apart(ids)
                results.append(flow._replace(labels=labels, is_input=False))
            else:
                results.append(None)
            start += size
        return results


_CASTS = frozenset(("convert_element_type", "copy", "reduce_precision", "stop_gradient"))
_SUMS = frozenset(("reduce_sum", "reduce_max", "reduce_min", "reduce_window_max", "reduce_window_sum", "cumsum"))
_RESHAPES = frozenset(("reshape", "transpose", "squeeze", "broadcast_in_dim", "rev", "pad"))
_COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge"))
_ADDITIONS = frozenset(("add", "add_any", "sub"))
_LINEAR = _ADDITIONS | {"mul", "div", "neg", *_CASTS}


def _has_one(labels: Sequence[np.ndarray]) -> bool:
    return any(ids.size == 1 for ids in labels)


def _windows_of(flow: Flow) -> tuple[Window, ...]:
    if isinstance(flow, Weights):
        return flow.windows
    return flow.waiting if isinstance(flow, Acts) else ()


def _same_labels(a: Acts, b: Acts) -> bool:
    return len(a.labels) == len(b.labels) and all(map(np.array_equal, a.labels, b.labels))


def varies(ids: np.ndarray, axes: Sequence[int]) -> bool:
    """Whether the neurons differ along any of the axes."""
    return any(ids.shape[axis] > 1 for axis in axes)


def varies_any(labels: Sequence[np.ndarray], axes: Sequence[int]) -> bool:
    """Whether any neurons differ along any of the axes."""
    return any(varies(ids, axes) for ids in labels)


def _layer(name: str) -> str:
    """The name of a layer: that of its parameter without the last part."""
    return name.rpartition("/")[0] or name


def _covered(
    window: Window, sizes: Sequence[int], source: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Window]:
    """Neurons at the places that a window covers."""
    region = [slice(s, s + window.extent(axis)) for axis, s in enumerate(window.starts)]

    def part(ids: np.ndarray) -> np.ndarray:
        return ids[
            tuple(
                r if n > 1 and sizes[i] > 1 else slice(None)
                for i, (r, n) in enumerate(zip(region, ids.shape, strict=True))
            )
        ]

    return part(source), part(target), window


def _spread_window(window: Window, places: dict[int, int], sizes: Sequence[int]) -> Window:
    """The window in an index space; along axes that it does not have it is the same everywhere."""
    axes: list[Any] = [((n, 0),) if n > 1 else () for n in sizes]
    starts = [0] * len(sizes)
    for axis, place in places.items():
        axes[place], starts[place] = window.axes[axis], window.starts[axis]
    return window._replace(axes=tuple(axes), starts=tuple(starts))


def _mapped(item: Composed, change: Callable[[Window], Window]) -> Composed:
    """A product of parameters with all its windows changed."""
    first, second = (tuple(map(change, windows)) for windows in item.factors)
    return item._replace(factors=(first, second))


def _spread_composed(item: Composed, places: dict[int, int], sizes: Sequence[int]) -> Composed:
    """A product of parameters in an index space, its own sums behind it."""
    tail = {len(places) + i: len(sizes) + i for i in range(len(item.words))}
    return _mapped(item, lambda window: _spread_window(window, places | tail, [*sizes, *item.sizes]))


def _in_order(item: Composed, contracted: Sequence[int]) -> list[tuple[tuple[Window, ...], tuple[Window, ...]]]:
    """The factor that is read first, and the other; none where both, or neither, are summed over."""
    read = [any(window.varies(axis) for window in windows for axis in contracted) for windows in item.factors]
    if read == [True, False]:
        return [item.factors]
    return [item.factors[::-1]] if read == [False, True] else []


def _repeated(item: Composed, shape: tuple[int, ...], old: tuple[int, ...]) -> Composed:
    """A product of parameters in an array that it is broadcast to."""
    new, own = (*shape, *item.sizes), (*old, *item.sizes)
    return _mapped(item, lambda window: broadcast(window, new, range(len(new)), own))


def _moved_composed(eqn: Any, item: Composed, shape: tuple[int, ...]) -> Composed:
    """A product of parameters after a transposition."""
    order = eqn.params["permutation"]
    order = (*order, *range(len(order), len(order) + len(item.words)))
    return _mapped(item, lambda window: transposed(window, order))


def _moved_windows(eqn: Any, windows: Sequence[Window], shape: tuple[int, ...]) -> tuple[Window, ...]:
    """Windows of parameters after an equation that only moves entries; those it does more to are dropped."""
    name, params, old = eqn.primitive.name, eqn.params, eqn.invars[0].aval.shape
    moved: list[Window | None] = []
    for window in windows:
        result: Window | None = window
        if name == "transpose":
            result = transposed(window, params["permutation"])
        elif name == "broadcast_in_dim":
            result = broadcast(window, shape, params["broadcast_dimensions"], old)
        elif name == "squeeze":
            result = squeezed(window, params["dimensions"])
        elif name == "reshape":
            result = reshaped(window, old, shape)
        elif name == "slice":
            steps = params["strides"] or (1,) * len(old)
            for axis, (start, stop, step) in enumerate(
                zip(params["start_indices"], params["limit_indices"], steps, strict=True)
            ):
                if result is not None and (start, stop, step) != (0, old[axis], 1):
                    result = sliced(result, axis, start, stop, step)
        elif name == "pad":
            for axis, (low, _, interior) in enumerate(params["padding_config"]):
                if interior or low < 0:
                    result = None
                elif result is not None and low:
                    result = shifted(result, axis, low)
        else:
            result = None
        moved.append(result)
    return tuple(window for window in moved if window is not None)


def _moved_ids(eqn: Any, ids: np.ndarray) -> np.ndarray | None:
    """Numbers of neurons after an equation, `None` where it mixes them."""
    name, params, old = eqn.primitive.name, eqn.params, eqn.invars[0].aval.shape
    shape = eqn.outvars[0].aval.shape
    if name == "transpose":
        return ids.transpose(params["permutation"])
    if name == "broadcast_in_dim":
        out = [1] * len(shape)
        for axis, place in enumerate(params["broadcast_dimensions"]):
            out[place] = ids.shape[axis]
        return ids.reshape(out)
    if name == "squeeze":
        return ids.reshape([n for i, n in enumerate(ids.shape) if i not in params["dimensions"]])
    if name == "reshape":
        return reshape_ids(ids, old, shape)
    if name == "rev":
        return np.flip(ids, tuple(axis for axis in params["dimensions"] if ids.shape[axis] > 1))
    if name == "slice":
        steps = params["strides"] or (1,) * len(old)
        return ids[
            tuple(
                slice(a, b, s) if n > 1 else slice(None)
                for n, a, b, s in zip(ids.shape, params["start_indices"], params["limit_indices"], steps, strict=True)
            )
        ]
    if name == "pad":
        for axis, (low, high, interior) in enumerate(params["padding_config"]):
            if ids.shape[axis] == 1:
                continue
            if interior:
                return None
            start, stop = max(0, -low), ids.shape[axis] - max(0, -high)
            ids = ids[(slice(None),) * axis + (slice(start, stop),)]
            width = [(0, 0)] * ids.ndim
            width[axis] = (max(0, low), max(0, high))
            ids = np.pad(ids, width, constant_values=-1)
        return ids
    if name in ("dynamic_slice", "dynamic_update_slice"):
        sizes = params.get("slice_sizes", shape)
        return None if any(n > 1 and a != b for n, a, b in zip(ids.shape, sizes, old, strict=True)) else ids
    if name == "gather":
        numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
        lost = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        kept = [i for i in range(len(old)) if i not in lost]
        if varies(ids, lost) or any(ids.shape[i] > 1 and sizes[i] != old[i] for i in kept):
            return None
        out = [1] * len(shape)
        for axis, place in zip(kept, numbers.offset_dims, strict=True):
            out[place] = ids.shape[axis]
        return ids.reshape(out)
    if name.startswith(("reduce_window", "cum")) or name == "sort":
        lengths = eqn.outvars[0].aval.shape
        return None if any(n > 1 and n != m for n, m in zip(ids.shape, lengths, strict=True)) else ids
    if name.startswith("reduce_") or name in ("argmax", "argmin", "reduce"):
        axes = params["axes"] if "axes" in params else params["dimensions"]
        if varies(ids, axes):
            return None
        return ids.reshape([n for i, n in enumerate(ids.shape) if i not in axes])
    return None
