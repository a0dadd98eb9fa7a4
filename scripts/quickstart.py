"""What does a network know? Reads digits out of the weights of small networks, in a few minutes on a laptop.

    python scripts/quickstart.py --out quickstart-out

Each of scikit-learn's 1,797 handwritten digits becomes the weights of small SIRENs (2-32-32-1), fitted to draw it.
Classifiers then have to name the digit from the weights alone, and again after the hidden neurons of the networks they
are tested on are shuffled, which leaves what the networks draw unchanged. Images of the test networks are never seen
in training.

Writes `results.json`, `digits.png`, `learning_curves.png` and `neural_graph.png` into the output folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import matplotlib as mpl
import numpy as np
import optax
import tqdm
import tyro
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

import ngjax
from ngjax import train, zoo
from ngjax.baselines import FlatMLP, ProbeReadout, flat_statistics
from ngjax.files import write_atomically
from ngjax.machine import describe_process
from ngjax.report import markdown_table, save_figure

SIZES = (2, 32, 32, 1)
SPEC = ngjax.mlp_spec(SIZES, activation="siren")
OUTPUT_OFFSET = 0.5
NUM_CLASSES = 10
NUM_STAGES = 7

TABLE_NOTES = """\
neurons shuffled: the test accuracy after the hidden neurons of every test network were put into a random order, which
  leaves what it draws as it was; then the share of predictions and the largest change of a logit this made.
one shared start: all networks were fitted from the same initial weights, the others each from weights of its own.
without probes: the graph alone has to find out what a network draws, which takes far more networks and passes."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. The defaults are those of the README's table."""

    out: pathlib.Path
    """Folder for results and pictures."""
    seed: int = 1
    """Of everything random. The settings below were chosen with seed 0, that is on another split of the images."""
    num_images: int | None = None
    """How many of the digits to use, all by default."""
    test_fraction: float = 0.2
    """Share of the images that is held out."""
    fits_per_image: int = 4
    """Networks per image, each from its own random start."""
    fit_steps: int = 150
    """Steps of Adam that fit a network to its image."""
    probes: int = 64
    """Learned inputs on which NG-GNN runs the networks it reads."""
    features: int = 16
    """Width of NG-GNN."""
    layers: int = 4
    """Layers of NG-GNN."""
    graph_epochs: int = 2
    """Passes over the training networks for NG-GNN."""
    epochs: int = 12
    """Passes over the training networks for the others."""


class Networks(NamedTuple):
    """Networks, which are what is classified here.

    Attributes:
      params: SIREN parameters, leaves `[N, ...]`.
      labels: `[N]`, the digit each network draws.
    """

    params: Any
    labels: np.ndarray


class Split(NamedTuple):
    """Networks for training, and networks of other images for testing.

    Those of an image stand together, `fits_per_image` of them.
    """

    train: Networks
    test: Networks
    fits_per_image: int


class Classifier(NamedTuple):
    """A model together with how it is trained.

    Attributes:
      key: its prefix in results.json.
      title: its name in the table and the pictures.
      networks: what it is trained and tested on.
      init: `(key, params) -> variables`.
      apply: `(variables, params) -> logits [B, 10]`.
      learning_rate: of AdamW.
      batch_size: networks per step.
      epochs: passes over the training networks.
    """

    key: str
    title: str
    networks: Split
    init: Callable[[jax.Array, Any], Any]
    apply: Callable[[Any, Any], jax.Array]
    learning_rate: float
    batch_size: int
    epochs: int


class Outcome(NamedTuple):
    """What came out for one classifier. Accuracies are shares of the test networks."""

    accuracy: float
    shuffled_accuracy: float
    changed_predictions: float
    largest_logit_change: float
    largest_logit: float
    predictions: np.ndarray
    shuffled_predictions: np.ndarray
    curve: list[tuple[float, float]]  # (passes over the training networks, test accuracy)


def main(config: Config) -> dict[str, Any]:
    """Runs everything; returns what results.json holds."""
    start = time.perf_counter()
    out = train.prepare_folder(config.out)  # before any work: an unwritable folder fails here
    seconds: dict[str, float] = {}
    fit_key, train_key, shuffle_key = jax.random.split(jax.random.key(config.seed), 3)

    digits = zoo.load_digits()
    digits = digits._replace(images=digits.images[: config.num_images], labels=digits.labels[: config.num_images])
    split = zoo.stratified_split(digits.labels, test_fraction=config.test_fraction, seed=config.seed)
    print(f"{len(digits.labels)} digits, {len(split[1])} of them for testing")

    with stage(seconds, "fit_own_starts", "fit networks, each from its own start"):
        own, psnr = fit_networks(config, digits, fit_key, shared_start=False)
    with stage(seconds, "fit_shared_start", "fit networks, all from one shared start"):
        shared, shared_psnr = fit_networks(config, digits, fit_key, shared_start=True)
    print(f"the networks reproduce their images at {psnr:.0f} dB and {shared_psnr:.0f} dB (medians)")
    own, shared = split_networks(own, digits.labels, split), split_networks(shared, digits.labels, split)

    classifiers = make_classifiers(config, own, shared)
    outcomes = {}
    for classifier in classifiers:
        with stage(seconds, classifier.key, f"train {classifier.title}"):
            outcomes[classifier.key] = train_and_test(classifier, train_key, shuffle_key, seed=config.seed)

    save_figure(draw_digits(classifiers, outcomes, digits.images[split[1]], own.test), out / "digits.png")
    save_figure(draw_learning_curves(classifiers, outcomes), out / "learning_curves.png")
    save_figure(draw_neural_graph(take(own.test.params, 0), int(own.test.labels[0])), out / "neural_graph.png")
    table = format_table(classifiers, outcomes)
    results = {
        **{
            f"{classifier.key}_{name}": value
            for classifier in classifiers
            for name, value in named_numbers(outcomes[classifier.key]).items()
        },
        "psnr_median": psnr,
        "psnr_median_shared_init": shared_psnr,
        "train_networks": len(own.train.labels),
        "test_networks": len(own.test.labels),
        "seconds": {**seconds, "total": round(time.perf_counter() - start, 1)},
        **describe_process(),
        "config": {**dataclasses.asdict(config), "out": str(config.out)},
        "table": table.splitlines(),
    }
    with write_atomically(out / "results.json") as path:
        path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{table}\n\n{TABLE_NOTES}\n")
    print(f"{results['seconds']['total']:.0f} s; numbers and pictures are in {out}")
    return results


# -- networks ---------------------------------------------------------------------------------------------------------


def fit_networks(config: Config, digits: zoo.Images, key: jax.Array, *, shared_start: bool) -> tuple[Any, float]:
    """Networks that draw the digits, leaves `[images, fits, ...]`, and the median of their PSNR in dB."""
    fits = 1 if shared_start else config.fits_per_image
    images = np.repeat(digits.images, fits, axis=0)
    if shared_start:
        initial = zoo.init_siren(key, SIZES)
    else:
        initial = jax.vmap(lambda key: zoo.init_siren(key, SIZES))(jax.random.split(key, len(images)))
    with tqdm.tqdm(total=len(images), unit=" networks", disable=None) as bar:  # None: where there is no terminal
        fitted = zoo.fit_sirens(
            initial,
            images,
            steps=config.fit_steps,
            output_offset=OUTPUT_OFFSET,
            progress=lambda done, of: bar.update(done - bar.n),
        )
    params = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, fits, *leaf.shape[1:]), fitted.params)
    return params, float(np.median(fitted.psnr))


def split_networks(params: Any, labels: np.ndarray, split: tuple[np.ndarray, np.ndarray]) -> Split:
    """The split of the images, carried over to all networks of each image: leaves become `[networks, ...]`."""
    fits = jax.tree.leaves(params)[0].shape[1]

    def of_images(rows: np.ndarray) -> Networks:
        flat = jax.tree.map(lambda leaf: leaf[rows].reshape(-1, *leaf.shape[2:]), params)
        return Networks(flat, np.repeat(labels[rows], fits))

    return Split(*map(of_images, split), fits)


def shuffle_neurons(params: Any, key: jax.Array) -> Any:
    """The same networks, the hidden neurons of each in a random order of its own."""
    return jax.tree.map(np.asarray, ngjax.permute_randomly(key, SPEC, params, feature_axis=False))


def take(params: Any, rows: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[rows], params)


# -- classifiers ------------------------------------------------------------------------------------------------------


def make_classifiers(config: Config, own: Split, shared: Split) -> list[Classifier]:
    graph = {"learning_rate": 2e-3, "batch_size": 8, "epochs": config.graph_epochs}
    plain = {"learning_rate": 1e-3, "batch_size": 64, "epochs": config.epochs}
    return [
        Classifier("ng_gnn", "NG-GNN", own, *graph_network(config, own, config.probes), **graph),
        Classifier("ng_gnn_no_probe", "NG-GNN without probes", own, *graph_network(config, own, 0), **graph),
        Classifier("probe_only", "probes without graph", own, *probe_readout(config), **plain),
        Classifier("mlp", "MLP on flattened weights", own, *flat_mlp(own), **plain),
        Classifier("mlp_shared_init", "MLP, one shared start", shared, *flat_mlp(shared), **plain),
    ]


def graph_network(config: Config, networks: Split, probes: int) -> tuple[Callable, Callable]:
    statistics = ngjax.weight_statistics(SPEC, networks.train.params)
    encoder = ngjax.EncoderConfig(reverse_edges=True, num_probes=probes, statistics=statistics)
    model = ngjax.WeightSpaceModel(
        backbone=ngjax.NGGNN(features=config.features, num_layers=config.layers, encoder=encoder),
        readout=ngjax.GraphReadout(NUM_CLASSES, hidden=256, probe_outputs=probes > 0),
    )
    return (
        lambda key, params: model.init(key, ngjax.to_groups(SPEC, params), spec=SPEC),
        lambda variables, params: model.apply(variables, ngjax.to_groups(SPEC, params), spec=SPEC),
    )


def probe_readout(config: Config) -> tuple[Callable, Callable]:
    network = functools.partial(zoo.apply_siren, output_offset=OUTPUT_OFFSET)
    model = ProbeReadout(network, num_inputs=SIZES[0], num_outputs=NUM_CLASSES, num_probes=config.probes)
    return model.init, model.apply


def flat_mlp(networks: Split) -> tuple[Callable, Callable]:
    model, statistics = FlatMLP(NUM_CLASSES), flat_statistics(networks.train.params)
    return (
        lambda key, params: model.init(key, params, statistics),
        lambda variables, params: model.apply(variables, params, statistics),
    )


def train_and_test(classifier: Classifier, train_key: jax.Array, shuffle_key: jax.Array, *, seed: int) -> Outcome:
    networks, batch_size = classifier.networks, classifier.batch_size
    init_key, step_key = jax.random.split(train_key)
    variables = dict(jax.jit(classifier.init)(init_key, take(networks.train.params, slice(1))))
    initial = variables.pop("params")  # whatever else there is stays as it is
    count = len(networks.train.labels)
    num_steps = classifier.epochs * count // batch_size
    rows_at = train.epoch_batches(count, batch_size, seed=seed)

    def logits_of(params: Any, networks: Any) -> jax.Array:
        return classifier.apply({"params": params, **variables}, networks)

    def loss_fn(params: Any, batch: Networks, key: jax.Array) -> tuple[jax.Array, dict]:
        del key
        losses = optax.softmax_cross_entropy_with_integer_labels(logits_of(params, batch.params), batch.labels)
        return losses.mean(), {}

    predict = jax.jit(logits_of)
    # Learning curves come from one network per test image, the table from all of them. Neither chooses anything: what
    # is tested is the model after the last step.
    part = slice(None, None, networks.fits_per_image)

    def evaluate(params: Any) -> dict[str, float]:
        logits = in_chunks(functools.partial(predict, params), take(networks.test.params, part))
        return {"accuracy": np.mean(logits.argmax(-1) == networks.test.labels[part])}

    result = train.fit(
        loss_fn,
        initial,
        lambda step: take(networks.train, rows_at(step)),
        optimizer=train.make_optimizer(
            classifier.learning_rate, warmup_steps=num_steps // 20, total_steps=num_steps, clip_norm=1.0
        ),
        num_steps=num_steps,
        key=step_key,
        mesh=train.data_mesh(jax.devices()[:1]),
        evaluate=evaluate,
        eval_every=math.ceil(num_steps / 12),
    )
    predict = functools.partial(predict, result.state.params)
    logits = in_chunks(predict, networks.test.params)
    shuffled_logits = in_chunks(predict, shuffle_neurons(networks.test.params, shuffle_key))
    predictions, shuffled_predictions = logits.argmax(-1), shuffled_logits.argmax(-1)
    return Outcome(
        accuracy=float(np.mean(predictions == networks.test.labels)),
        shuffled_accuracy=float(np.mean(shuffled_predictions == networks.test.labels)),
        changed_predictions=float(np.mean(predictions != shuffled_predictions)),
        largest_logit_change=float(np.abs(logits - shuffled_logits).max()),
        largest_logit=float(np.abs(logits).max()),
        predictions=predictions,
        shuffled_predictions=shuffled_predictions,
        curve=[
            (row["step"] * batch_size / count, row["eval/accuracy"]) for row in result.history if "eval/accuracy" in row
        ],
    )


def in_chunks(predict: Callable, params: Any, size: int = 40) -> np.ndarray:
    """`predict` on so many networks at a time; the last chunk is filled up, so that it is compiled once."""
    count = len(jax.tree.leaves(params)[0])
    parts = [
        predict(take(params, np.arange(start, start + size).clip(max=count - 1))) for start in range(0, count, size)
    ]
    return np.concatenate(parts)[:count]


# -- what is reported -------------------------------------------------------------------------------------------------


def named_numbers(outcome: Outcome) -> dict[str, float]:
    return {
        "test_accuracy": outcome.accuracy,
        "shuffled_test_accuracy": outcome.shuffled_accuracy,
        "changed_predictions": outcome.changed_predictions,
        "largest_logit_change": outcome.largest_logit_change,
        "largest_logit": outcome.largest_logit,
    }


def format_table(classifiers: list[Classifier], outcomes: dict[str, Outcome]) -> str:
    """The results as a table in Markdown."""
    header = ("", "test accuracy", "neurons shuffled", "predictions changed", "largest logit change")
    rows = [
        (
            classifier.title,
            f"{outcome.accuracy:.1%}",
            f"{outcome.shuffled_accuracy:.1%}",
            f"{outcome.changed_predictions:.1%}",
            f"{outcome.largest_logit_change:.1e} of {outcome.largest_logit:.1f}",
        )
        for classifier in classifiers
        for outcome in [outcomes[classifier.key]]
    ]
    return markdown_table(header, rows)


@contextlib.contextmanager
def stage(seconds: dict[str, float], key: str, title: str) -> Iterator[None]:
    """Announces a part of the run and keeps how long it took."""
    print(f"[{len(seconds) + 1}/{NUM_STAGES}] {title} ...", flush=True)
    start = time.perf_counter()
    yield
    seconds[key] = round(time.perf_counter() - start, 1)
    print(f"      {seconds[key]:.0f} s", flush=True)


# -- pictures ---------------------------------------------------------------------------------------------------------


def draw_digits(
    classifiers: list[Classifier], outcomes: dict[str, Outcome], images: np.ndarray, test: Networks
) -> Figure:
    """Test images, what their networks draw, and what two classifiers read before and after shuffling."""
    fits = len(test.labels) // len(images)
    labels = test.labels[::fits]
    columns = np.array([np.flatnonzero(labels == label)[0] for label in np.unique(labels)])
    _, height, width, _ = images.shape
    drawn = jax.vmap(lambda params: zoo.render(params, height, width, output_offset=OUTPUT_OFFSET))(
        take(test.params, columns * fits)
    )
    readings = []
    for classifier in classifiers:
        if classifier.key in ("ng_gnn", "mlp_shared_init"):
            outcome, rows = outcomes[classifier.key], columns * classifier.networks.fits_per_image
            readings.append((f"{classifier.title} reads", outcome.predictions[rows]))
            readings.append(("... neurons shuffled", outcome.shuffled_predictions[rows]))
    figure, axes = plt.subplots(
        2 + len(readings), len(columns), figsize=(len(columns) + 2, 4.6), height_ratios=[2, 2, *[1] * len(readings)]
    )
    for j, column in enumerate(columns):
        for axis, image in zip(axes[:2, j], (images[column], drawn[j]), strict=True):
            axis.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=1)
        for axis, (_, predictions) in zip(axes[2:, j], readings, strict=True):
            axis.set_facecolor("#2e7d32" if predictions[j] == labels[column] else "#c62828")
            axis.text(0.5, 0.45, str(predictions[j]), color="white", ha="center", va="center", weight="bold", size=12)
    titles = ["image", "drawn by its network", *(title for title, _ in readings)]
    for axis, title in zip(axes[:, 0], titles, strict=True):
        axis.set_ylabel(title, rotation=0, ha="right", va="center")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.suptitle("Digits of the test set, read from the weights of networks that draw them", y=0.95)
    return figure


def draw_learning_curves(classifiers: list[Classifier], outcomes: dict[str, Outcome]) -> Figure:
    """Accuracy on networks of the test images during training."""
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for classifier in classifiers:
        axis.plot(*zip(*outcomes[classifier.key].curve, strict=True), marker="o", markersize=3, label=classifier.title)
    axis.axhline(1 / NUM_CLASSES, color="gray", linestyle=":", label="guessing")
    axis.set(
        xscale="log",
        xlabel="passes over the training networks",
        ylabel="accuracy on test networks",
        ylim=(0, 1),
        title="Learning to read digits from weights",
    )
    axis.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axis.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def draw_neural_graph(params: Any, label: int) -> Figure:
    """One network as its neural graph: a column of nodes per layer, colored by bias, edges colored by weight."""
    graph = ngjax.to_groups(SPEC, params)
    biases = np.asarray(graph.nodes)[:, 0]
    weights = [np.asarray(edges).reshape(sizes) for edges, sizes in zip(graph.edges, pairwise(SIZES), strict=True)]
    columns = [np.stack([np.full(n, x), np.linspace(1, -1, n + 2)[1:-1]], axis=-1) for x, n in enumerate(SIZES)]

    figure, axis = plt.subplots(figsize=(10, 6))
    for (sources, targets), weight in zip(pairwise(columns), weights, strict=True):
        lines = np.stack(np.broadcast_arrays(sources[:, None], targets[None]), axis=-2).reshape(-1, 2, 2)
        share = weight.ravel() / np.abs(weight).max()
        order = np.argsort(np.abs(share))  # strong ones on top
        colors = mpl.colormaps["RdBu_r"](0.5 + 0.5 * share)
        colors[:, 3] = np.abs(share)
        axis.add_collection(
            LineCollection(lines[order], colors=colors[order], linewidths=0.2 + 1.5 * np.abs(share[order]))
        )
    largest = np.abs(biases).max()
    nodes = axis.scatter(
        *np.concatenate(columns).T, c=biases, cmap="PuOr", vmin=-largest, vmax=largest, s=70, edgecolors="k", zorder=3
    )
    names = ["x, y", *(f"hidden layer {i}" for i in range(1, len(SIZES) - 1)), "pixel"]
    for x, (name, size) in enumerate(zip(names, SIZES, strict=True)):
        axis.text(x, 1.05, f"{name}\n{size} node{'s' * (size > 1)}", ha="center", va="bottom")
    picture = axis.inset_axes((len(SIZES) - 0.85, -0.25, 0.6, 0.5), transform=axis.transData)
    picture.imshow(zoo.render(params, 8, 8, output_offset=OUTPUT_OFFSET)[..., 0], cmap="gray_r", vmin=0, vmax=1)
    picture.set(xticks=[], yticks=[])
    picture.set_title("what it draws", fontsize=10)
    axis.set(ylim=(-1, 1.2), xlim=(-0.15, len(SIZES) - 0.15))
    axis.set_axis_off()
    edges = mpl.cm.ScalarMappable(mpl.colors.Normalize(-1, 1), "RdBu_r")
    figure.colorbar(nodes, ax=axis, label="nodes: bias", shrink=0.6, pad=0.02)
    figure.colorbar(edges, ax=axis, label="edges: weight, relative to the largest of its layer", shrink=0.6, pad=0.03)
    axis.set_title(f"The neural graph of a network that draws a {label}", pad=20)
    return figure


if __name__ == "__main__":
    mpl.use("agg")
    main(tyro.cli(Config, description=__doc__))
