"""Trains a classifier that reads a zoo of image SIRENs, and tests it on networks of images it has never seen.

    python scripts/train_inr_classifier.py fast-ng-gnn --zoo mnist-inrs --out runs/ng-gnn
    python scripts/train_inr_classifier.py paper-ng-gnn --zoo mnist-inrs --out runs/ng-gnn-paper --probes 0

The `paper` presets are the settings of Kofinas et al. 2024, the `fast` ones those for a few minutes on a laptop; every
setting has a flag (`paper-ng-gnn --help`). One run per seed, one after the other; each chooses the model with the best
accuracy on the validation networks, and that one alone is tested. Killed, it goes on with `--if-exists resume`.

Writes into the output folder: `results.json`, `learning_curves.png`, `confusion.png`, and per seed a folder
`seed-0/` with `best.safetensors`, `metrics.jsonl` and all that resuming needs.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import matplotlib as mpl
import numpy as np
import optax
import safetensors
import safetensors.numpy
import tyro
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import ngjax
from ngjax import train, zoo
from ngjax.baselines import FlatMLP, ProbeReadout, flat_statistics
from ngjax.files import write_atomically
from ngjax.machine import describe_machine, describe_versions
from ngjax.report import deviation_of, markdown_table, save_figure
from ngjax.zoo.augment import AUGMENTATIONS, augment

MOST_FOR_STATISTICS = 20_000  # networks; more would not change a mean in its third digit, and have to fit into memory
VALIDATION_SEED = 0  # not that of a run: all runs on a zoo choose by the same networks

TABLE_NOTES = """\
best step: of the model with the best accuracy on the validation networks, the one that is tested.
neurons shuffled: its test accuracy after the hidden neurons of every test network were put into a random order, which
  leaves the image as it was; then the share of predictions this changed."""


# -- settings ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What all models are trained with. The defaults are those of the paper, section 4.1 and its code."""

    zoo: pathlib.Path
    """Folder of the zoo. Its networks need the labels `label` (the class) and `split`."""
    out: pathlib.Path
    """Folder for results and pictures."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run for each: its initial parameters, order of the data, augmentations and dropout."""
    if_exists: train.IfExists = "refuse"
    """What to do with runs that are in the folder already."""
    networks: int | None = None
    """How many of the training networks to use, the first ones; all by default."""
    validation_fraction: float = 0.1
    """Share of the training images to validate on, for a zoo whose split has no `validation`."""
    epochs: float = 200
    """Passes over the training networks."""
    batch_size: int = 128
    learning_rate: float = 1e-3
    """Of AdamW with amsgrad."""
    weight_decay: float = 5e-4
    clip_norm: float = 10.0
    """Largest norm of the gradient."""
    warmup_steps: int = 1000
    cosine: bool = False
    """Lower the learning rate along a cosine to zero; otherwise it is constant after the warm-up."""
    augmentation: Literal["none", "paper", "reference"] = "paper"
    """Of the training networks. `reference` is what the code of the papers does."""
    permutation: bool = False
    """Also put the hidden neurons of the training networks into a random order at every step."""
    eval_every: int = 1000
    """Steps between validations. There is one after the last step in any case."""
    save_every_seconds: float = 300.0
    """Between checkpoints: what a kill costs at most."""
    distributed: bool = False
    """Join the other processes of a job on several hosts, each of which runs this same command."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphConfig(Config):
    """What NG-GNN and NG-T share."""

    probes: int = 64
    """Learned inputs on which the networks are run, 0 for none."""
    probe_outputs: bool = False
    """Also hand the outputs at the probes to the readout directly."""
    fourier_frequencies: int = 128
    """Of the random Fourier features of weights and biases, 0 for none."""
    fourier_scale: float = 3.0
    """Their standard deviation."""
    dropout: float = 0.2
    readout_hidden: int = 32
    readout_layers: int = 2
    """Hidden layers of the readout."""
    readout_norm: bool = False
    """Layer norm in front of the readout, which the paper has not."""
    micro_batch: int | None = None
    """Networks whose gradient a device computes at a time; by default 2 on CPU, where activations then stay in cache,
    and elsewhere all of its share of a batch."""
    statistics: pathlib.Path | None = None
    """Zoo whose training networks give the mean and deviation of weights; by default the one that is trained on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NGGNNConfig(GraphConfig):
    """NG-GNN, a graph network."""

    features: int = 32
    """Width of nodes and edges."""
    layers: int = 4
    reverse_edges: bool = True
    norm_scope: Literal["graph", "batch"] = "graph"
    """Normalize over each network, or as the paper's code does over everything in the batch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NGTConfig(GraphConfig):
    """NG-T, a transformer."""

    node_features: int = 64
    edge_features: int = 32
    attention_features: int = 128
    node_hidden: int = 128
    edge_hidden: int = 64
    layers: int = 4
    heads: int = 8
    reverse_edges: bool = False
    fourier_scale: float = 1.0
    readout_hidden: int = 128
    readout_layers: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig(Config):
    """The MLP on flattened weights."""

    hidden: tuple[int, ...] = (512, 512)
    """Widths of its hidden layers."""
    statistics: pathlib.Path | None = None
    """Zoo whose training networks give the mean and deviation of weights; by default the one that is trained on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbesConfig(Config):
    """An MLP on the outputs of the networks at learned inputs: what a network does, without how."""

    probes: int = 64
    """Learned inputs."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of its hidden layers."""


TITLES = {NGGNNConfig: "NG-GNN", NGTConfig: "NG-T", MLPConfig: "MLP on flattened weights", ProbesConfig: "probes alone"}

_REQUIRED = {"zoo": tyro.MISSING, "out": tyro.MISSING}
_FAST = {
    **_REQUIRED,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "clip_norm": 1.0,
    "warmup_steps": 50,
    "cosine": True,
    "augmentation": "none",
    "eval_every": 250,
}
_FAST_GRAPH = {**_FAST, "probe_outputs": True, "fourier_frequencies": 0, "dropout": 0.0, "readout_norm": True}

PRESETS: dict[str, Config] = {
    "paper-ng-gnn": NGGNNConfig(**_REQUIRED),
    "paper-ng-t": NGTConfig(**_REQUIRED),
    "paper-mlp": MLPConfig(**_REQUIRED),
    "paper-probes": ProbesConfig(**_REQUIRED),
    "fast-ng-gnn": NGGNNConfig(**_FAST_GRAPH, epochs=5, features=16, readout_hidden=256),
    "fast-ng-t": NGTConfig(
        **_FAST_GRAPH,
        epochs=3,
        node_features=32,
        edge_features=16,
        attention_features=32,
        node_hidden=64,
        edge_hidden=32,
        layers=2,
        heads=4,
        readout_hidden=256,
        readout_layers=2,
    ),
    "fast-mlp": MLPConfig(**(_FAST | {"learning_rate": 1e-3}), epochs=12),
    "fast-probes": ProbesConfig(**(_FAST | {"learning_rate": 1e-3}), epochs=12),
}


def parse(args: Sequence[str] | None = None) -> Config:
    """The settings of a command line."""
    presets = {name: (TITLES[type(config)], config) for name, config in PRESETS.items()}
    return tyro.extras.overridable_config_cli(presets, description=__doc__, args=args)


def settings_of(config: Config, data: Data) -> dict[str, Any]:
    """What decides how a run ends, seed aside: a run that is resumed must have the same."""
    fields = dataclasses.asdict(config)
    for name in ("zoo", "out", "seeds", "if_exists", "save_every_seconds", "distributed"):
        del fields[name]
    networks = {part: len(rows) for part, rows in data.rows.items()}
    settings = {"model": type(config).__name__, **fields, "zoo": dict(data.zoo.metadata), "rows": networks}
    return json.loads(json.dumps(settings, default=str))


def check_settings(path: pathlib.Path, settings: dict[str, Any]) -> None:
    """Compares the settings with those that a run was started with, if there is one."""
    if not path.exists():
        return
    before = json.loads(path.read_text())
    changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if changed:
        listed = "; ".join(f"{name}: was {before.get(name)}, now {settings.get(name)}" for name in changed)
        raise ValueError(f"{path.parent} holds a run with other settings and cannot be resumed with these: {listed}")


# -- data -------------------------------------------------------------------------------------------------------------


class Networks(NamedTuple):
    """Networks with their classes, leaves `[rows, ...]`."""

    params: Any
    labels: np.ndarray


class Data(NamedTuple):
    """A zoo, and which of its rows are for what.

    Attributes:
      zoo: the zoo.
      spec: the one architecture of all these rows.
      rows: of `train`, `validation` and `test`.
      classes: names of the classes.
    """

    zoo: Any
    spec: ngjax.NeuralGraphSpec
    rows: dict[str, np.ndarray]
    classes: tuple[str, ...]

    @property
    def labels(self) -> np.ndarray:
        """Class of every network of the zoo."""
        return self.zoo.labels["label"]

    def read(self, rows: np.ndarray) -> Networks:
        """These networks, from the disk."""
        return Networks(self.zoo.read(rows), self.labels[rows].astype(np.int32))


def open_data(path: pathlib.Path, *, networks: int | None, validation_fraction: float) -> Data:
    """The networks for training, validation and testing, by the zoo's label `split`."""
    opened = zoo.open(path)
    for name in ("label", "split"):
        if name not in opened.labels:
            raise ValueError(f"{path}: its networks have no label {name!r}; they have {', '.join(opened.labels)}")
    labels = opened.labels["label"]
    if not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        raise ValueError(f"{path}: 'label' is {labels.dtype}, expected classes, numbered from 0")
    names = opened.categories.get("split", ())
    missing = {"train", "test"} - set(names)
    if missing:
        raise ValueError(f"{path}: 'split' has no {' and no '.join(sorted(missing))}; it has {', '.join(names)}")
    rows = {name: opened.rows(split=name) for name in ("train", "validation", "test") if name in names}
    if not len(rows.get("validation", ())):
        rows["train"], rows["validation"] = split_by_image(opened, rows["train"], fraction=validation_fraction)
    if networks is not None and not 1 <= networks <= len(rows["train"]):
        raise ValueError(f"{path}: {networks} training networks were asked for, and it has {len(rows['train'])}")
    rows["train"] = rows["train"][:networks]
    for name, of_part in rows.items():
        if not len(of_part):
            raise ValueError(f"{path}: no networks for {name}")
    specs = np.unique(opened.spec_ids[np.concatenate(list(rows.values()))])
    if len(specs) > 1:
        raise ValueError(
            f"{path}: its networks are of {len(specs)} architectures, and this script trains on one at a time"
        )
    names = opened.categories.get("label") or opened.metadata.get("class_names") or range(labels.max() + 1)
    classes = tuple(map(str, names))
    if len(classes) <= labels.max():
        raise ValueError(f"{path}: 'label' goes up to {labels.max()}, but the classes are {', '.join(classes)}")
    return Data(opened, opened.specs[specs[0]], rows, classes)


def split_by_image(opened: Any, rows: np.ndarray, *, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to validate on, all networks of an image on the same side."""
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction={fraction}, expected a share between 0 and 1")
    images = opened.labels["image"][rows] if "image" in opened.labels else rows
    numbers = np.random.default_rng(VALIDATION_SEED).permutation(np.unique(images))
    held_out = np.isin(images, numbers[: max(1, round(fraction * len(numbers)))])
    return rows[~held_out], rows[held_out]


def read_for_statistics(data: Data, path: pathlib.Path | None) -> Any:
    """Training networks, evenly spaced if they are many, of this zoo or another."""
    if path is not None:
        data = data._replace(zoo=zoo.open(path))
        data = data._replace(rows={"train": data.zoo.rows(split="train")})
    rows = data.rows["train"]
    count = min(len(rows), MOST_FOR_STATISTICS)
    return data.zoo.read(rows[np.arange(count) * len(rows) // count])


# -- models -----------------------------------------------------------------------------------------------------------


class Classifier(NamedTuple):
    """A model as three functions.

    Attributes:
      init: `(key, params of networks) -> variables`.
      apply: `(variables, params of networks, dropout key or None) -> logits [B, classes]`.
      save: `(path, variables, metadata)`, atomically.
    """

    init: Callable[[jax.Array, Any], Any]
    apply: Callable[[Any, Any, jax.Array | None], jax.Array]
    save: Callable[[pathlib.Path, Any, Mapping[str, str]], None]


def make_classifier(config: Config, data: Data) -> Classifier:
    if isinstance(config, GraphConfig):
        return graph_network(config, data)
    if isinstance(config, MLPConfig):
        return flat_mlp(config, data)
    assert isinstance(config, ProbesConfig)
    return probe_readout(config, data)


def graph_network(config: GraphConfig, data: Data) -> Classifier:
    spec = data.spec
    omega = data.zoo.metadata.get("omega", 30.0)
    if config.probes and omega != 30:
        raise ValueError(f"{config.zoo}: omega is {omega}, but probes run SIRENs with sin(30 x); use --probes 0")
    encoder = ngjax.EncoderConfig(
        reverse_edges=config.reverse_edges,
        statistics=ngjax.weight_statistics(spec, read_for_statistics(data, config.statistics)),
        fourier_frequencies=config.fourier_frequencies,
        fourier_scale=config.fourier_scale,
        num_probes=config.probes,
    )
    if isinstance(config, NGGNNConfig):
        backbone: Any = ngjax.NGGNN(
            features=config.features,
            num_layers=config.layers,
            encoder=encoder,
            dropout=config.dropout,
            norm_scope=config.norm_scope,
        )
    else:
        backbone = ngjax.NGT(
            node_features=config.node_features,
            edge_features=config.edge_features,
            attention_features=config.attention_features,
            node_hidden=config.node_hidden,
            edge_hidden=config.edge_hidden,
            num_layers=config.layers,
            num_heads=config.heads,
            encoder=encoder,
            last_edge_update=False,
            dropout=config.dropout,
        )
    readout = ngjax.GraphReadout(
        len(data.classes),
        hidden=config.readout_hidden,
        num_hidden=config.readout_layers,
        layer_norm=config.readout_norm,
        probe_outputs=config.probe_outputs and config.probes > 0,
    )
    model = ngjax.WeightSpaceModel(backbone, readout)

    def apply(variables: Any, params: Any, key: jax.Array | None) -> jax.Array:
        rngs = {} if key is None else {"dropout": key}
        return model.apply(variables, ngjax.to_groups(spec, params), spec=spec, train=key is not None, rngs=rngs)

    return Classifier(
        init=lambda key, params: model.init(key, ngjax.to_groups(spec, params), spec=spec),
        apply=apply,
        save=lambda path, variables, metadata: ngjax.save_model(path, model, variables, metadata=metadata),
    )


def flat_mlp(config: MLPConfig, data: Data) -> Classifier:
    model = FlatMLP(len(data.classes), config.hidden)
    statistics = flat_statistics(read_for_statistics(data, config.statistics))
    return Classifier(
        # With the statistics, which are not trained but saved with the rest.
        init=lambda key, params: {**model.init(key, params, statistics), "statistics": statistics._asdict()},
        apply=lambda variables, params, key: model.apply(
            {"params": variables["params"]}, params, type(statistics)(**variables["statistics"])
        ),
        save=save_variables,
    )


def probe_readout(config: ProbesConfig, data: Data) -> Classifier:
    metadata = data.zoo.metadata
    network = functools.partial(
        zoo.apply_siren, omega=metadata.get("omega", 30.0), output_offset=metadata.get("output_offset", 0.0)
    )
    num_inputs = data.spec.num_positions("input")
    model = ProbeReadout(network, num_inputs, len(data.classes), config.probes, config.hidden)
    return Classifier(
        init=model.init, apply=lambda variables, params, key: model.apply(variables, params), save=save_variables
    )


def save_variables(path: pathlib.Path, variables: Any, metadata: Mapping[str, str]) -> None:
    """The variables of a baseline in the layout of `ngjax.save_model`, without a configuration to build it from."""
    arrays = {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(variables, sep="/").items()}
    with write_atomically(path) as unfinished:
        safetensors.numpy.save_file(arrays, unfinished, metadata={"metadata": json.dumps(dict(metadata))})


def read_metadata(path: pathlib.Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["metadata"])


def read_variables(path: pathlib.Path) -> Any:
    """The variables of any model that a run saved."""
    return traverse_util.unflatten_dict(safetensors.numpy.load_file(path), sep="/")


class BestModels:
    """The model with the best validation accuracy so far, and those that were before it.

    Which is best is read from the files and remembered nowhere else. A run that is resumed goes back to its last
    checkpoint and may have found better models since; it comes by their steps again, so these are dropped, and the
    best of those before must still be there.

    Args:
      folder: of the run; the best model is `best.safetensors` in it.
      save: `(path, params, metadata)`.
    """

    def __init__(self, folder: pathlib.Path, save: Callable[[pathlib.Path, Any, Mapping[str, str]], None]) -> None:
        self.path = folder / "best.safetensors"
        self._history = folder / "bests"
        self._save = save

    def go_back(self, step: int) -> None:
        """Forgets the models of later steps."""
        if jax.process_index() == 0:
            for path in self._found():
                if int(path.stem) > step:
                    path.unlink()
            self._publish()

    def offer(self, step: int, accuracy: float, params: Any) -> None:
        """Keeps a model if it is better than those before; of equal ones the first stays."""
        found = self._found()
        if jax.process_index() == 0 and (not found or accuracy > float(read_metadata(found[-1])["accuracy"])):
            self._history.mkdir(exist_ok=True)
            metadata = {"step": str(step), "accuracy": repr(accuracy)}
            self._save(self._history / f"{step:010}.safetensors", params, metadata)
            self._publish()

    def _found(self) -> list[pathlib.Path]:
        return sorted(self._history.glob("[0-9]*.safetensors"))

    def _publish(self) -> None:
        found = self._found()
        if not found:
            self.path.unlink(missing_ok=True)
            return
        with write_atomically(self.path) as unfinished:
            shutil.copyfile(found[-1], unfinished)


# -- training and testing ---------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What came out for one seed. Accuracies are shares of networks."""

    seed: int
    best_step: int
    validation_accuracy: float
    test_accuracy: float
    shuffled_test_accuracy: float
    changed_predictions: float
    largest_logit_change: float
    largest_logit: float
    confusion: list[list[int]]  # test networks by true and by predicted class
    steps: int
    resumed_from: int
    """Step at which the process that finished the run took over, 0 if it started it."""
    seconds: float
    """Training and validation in that process."""
    num_params: int


def main(config: Config) -> dict[str, Any]:
    """Runs all seeds; returns what results.json holds."""
    train.join_processes(config.distributed)
    out = train.prepare_folder(config.out)  # before any work: an unwritable folder fails here
    data = open_data(config.zoo, networks=config.networks, validation_fraction=config.validation_fraction)
    mesh = make_mesh(config)
    if not config.seeds or config.epochs <= 0:
        raise ValueError(
            f"seeds={config.seeds} and epochs={config.epochs}, expected at least one seed, and epochs above 0"
        )
    settings = settings_of(config, data)
    folders = {seed: train.prepare_folder(out / f"seed-{seed}", config.if_exists) for seed in config.seeds}
    for folder in folders.values():
        if config.if_exists != "resume" and jax.process_index() == 0:
            for name in ("settings.json", "result.json"):
                (folder / name).unlink(missing_ok=True)
        check_settings(folder / "settings.json", settings)
    counts = {part: len(rows) for part, rows in data.rows.items()}
    say(f"{TITLES[type(config)]} on {config.zoo}: networks for " + ", ".join(f"{p} {n:,}" for p, n in counts.items()))

    classifier = make_classifier(config, data)
    outcomes = []
    for seed, folder in folders.items():
        outcomes.append(run_seed(config, data, classifier, mesh, seed, folder, settings))
        results = summarize(config, data, mesh, outcomes)
        if jax.process_index() == 0:  # after every seed: what is done is kept, whatever comes
            with write_atomically(out / "results.json") as path:
                path.write_text(json.dumps(results, indent=2) + "\n")
            curves = {of.seed: train.read_metrics(folders[of.seed] / "metrics.jsonl") for of in outcomes}
            save_figure(draw_learning_curves(config, data, curves), out / "learning_curves.png")
            save_figure(draw_confusion(config, data, outcomes), out / "confusion.png")
    say("\n" + "\n".join(results["table"]) + f"\n\n{TABLE_NOTES}\n\nnumbers, pictures and models are in {out}")
    return results


def make_mesh(config: Config) -> Mesh:
    """All devices; of the cores of a CPU, as many as can share a batch equally."""
    devices = jax.devices()
    if devices[0].platform == "cpu" and jax.process_count() == 1:
        devices = devices[: max(n for n in range(1, len(devices) + 1) if config.batch_size % n == 0)]
    if config.batch_size % len(devices):
        raise ValueError(f"batch_size={config.batch_size} cannot be shared by {len(devices)} devices")
    return train.data_mesh(devices)


def micro_batch_of(config: Config, mesh: Mesh) -> int | None:
    if not isinstance(config, GraphConfig):
        return None
    share = config.batch_size // mesh.size
    if config.micro_batch is None and mesh.devices.flat[0].platform == "cpu":
        return 1 + (share % 2 == 0)
    return config.micro_batch


def run_seed(
    config: Config,
    data: Data,
    classifier: Classifier,
    mesh: Mesh,
    seed: int,
    folder: pathlib.Path,
    settings: dict[str, Any],
) -> Outcome:
    """Trains one seed, or what is missing of it, and tests its best model."""
    result_path = folder / "result.json"
    if result_path.exists():
        say(f"seed {seed} is finished")
        return Outcome(**json.loads(result_path.read_text()))
    init_key, step_key, shuffle_key = jax.random.split(jax.random.key(seed), 3)
    variables = dict(jax.jit(classifier.init)(init_key, data.zoo.read(data.rows["train"][:1])))
    initial = variables.pop("params")  # whatever else there is stays as it is
    num_params = sum(leaf.size for leaf in jax.tree.leaves(initial))
    count = len(data.rows["train"])
    num_steps = max(1, round(config.epochs * count / config.batch_size))
    say(f"seed {seed}: {num_params:,} parameters, {num_steps:,} steps")

    def logits_of(params: Any, networks: Any, key: jax.Array | None = None) -> jax.Array:
        return classifier.apply({"params": params, **variables}, networks, key)

    augmentation = dataclasses.replace(AUGMENTATIONS[config.augmentation], permutation=config.permutation)

    def loss_fn(params: Any, batch: Networks, key: jax.Array) -> tuple[jax.Array, dict]:
        augment_key, dropout_key = jax.random.split(key)
        keys = jax.random.split(augment_key, len(batch.labels))
        networks = jax.vmap(lambda key, params: augment(key, data.spec, params, augmentation))(keys, batch.params)
        logits = logits_of(params, networks, dropout_key)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return losses.mean(), {"accuracy": (logits.argmax(-1) == batch.labels).astype(losses.dtype).mean()}

    predict = make_predict(config, data, mesh, logits_of)
    validation = data.rows["validation"]
    bests = BestModels(
        folder, lambda path, params, metadata: classifier.save(path, {"params": params, **variables}, metadata)
    )
    rows_at = train.epoch_batches(count, config.batch_size, seed=seed)
    local = train.local_rows(config.batch_size)
    first, done = None, 0

    # `fit` evaluates right after the step of the last batch it asked for, and asks first for that of the step it
    # starts at: 0, or where a killed run is taken up.
    def batch_at(step: int) -> Networks:
        nonlocal first, done
        if first is None:
            first = step
            bests.go_back(step)
        done = step + 1
        return data.read(data.rows["train"][rows_at(step)[local]])

    def evaluate(params: Any) -> dict[str, float]:
        accuracy = float(np.mean(predict(params, validation).argmax(-1) == data.labels[validation]))
        bests.offer(done, accuracy, params)
        return {"accuracy": accuracy}

    optimizer = train.make_optimizer(
        config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_steps,
        total_steps=num_steps if config.cosine else None,
        clip_norm=config.clip_norm,
    )
    if jax.process_index() == 0:
        write_json(folder / "settings.json", settings)
    start = time.perf_counter()
    train.fit(
        loss_fn,
        initial,
        batch_at,
        optimizer=optimizer,
        num_steps=num_steps,
        key=step_key,
        mesh=mesh,
        micro_batch=micro_batch_of(config, mesh),
        evaluate=evaluate,
        eval_every=config.eval_every,
        log_every=min(100, config.eval_every),
        directory=folder,
        if_exists="resume",
        save_every_seconds=config.save_every_seconds,
    )
    seconds = time.perf_counter() - start

    multihost_utils.sync_global_devices("train_inr_classifier.best")  # process 0 has written it
    metadata, best = read_metadata(bests.path), read_variables(bests.path)["params"]
    test = data.rows["test"]
    truth = data.labels[test]
    say(f"seed {seed}: testing on {len(test):,} networks, as they are and with shuffled neurons")
    logits, shuffled_logits = predict(best, test), predict(best, test, shuffle_key)
    predictions, shuffled_predictions = logits.argmax(-1), shuffled_logits.argmax(-1)
    confusion = np.zeros((len(data.classes), len(data.classes)), np.int64)
    np.add.at(confusion, (truth, predictions), 1)
    outcome = Outcome(
        seed=seed,
        best_step=int(metadata["step"]),
        validation_accuracy=float(metadata["accuracy"]),
        test_accuracy=float(np.mean(predictions == truth)),
        shuffled_test_accuracy=float(np.mean(shuffled_predictions == truth)),
        changed_predictions=float(np.mean(predictions != shuffled_predictions)),
        largest_logit_change=float(np.abs(logits - shuffled_logits).max()),
        largest_logit=float(np.abs(logits).max()),
        confusion=confusion.tolist(),
        steps=num_steps,
        resumed_from=num_steps if first is None else first,
        seconds=round(seconds, 1),
        num_params=num_params,
    )
    if jax.process_index() == 0:
        write_json(result_path, outcome._asdict())
    say(f"seed {seed}: test accuracy {outcome.test_accuracy:.2%}, of the model of step {outcome.best_step:,}")
    return outcome


def make_predict(
    config: Config, data: Data, mesh: Mesh, logits_of: Callable[[Any, Any], jax.Array]
) -> Callable[..., np.ndarray]:
    """`predict(params, rows, shuffle_key=None) -> logits` of any number of networks, on all devices.

    With a key, the hidden neurons of each network are put into a random order of its own first.
    """
    everywhere, shared = NamedSharding(mesh, jax.P()), NamedSharding(mesh, jax.P(train.DATA_AXIS))
    apply = jax.jit(logits_of, out_shardings=everywhere)
    size = config.batch_size  # fits into memory in training, so here too

    @functools.partial(jax.jit, out_shardings=shared)
    def shuffle(params: Any, numbers: jax.Array, key: jax.Array) -> Any:
        def one(params: Any, number: jax.Array) -> Any:
            perms = ngjax.random_permutations(jax.random.fold_in(key, number), data.spec)
            return ngjax.permute_params(data.spec, perms, params)

        return jax.vmap(one)(params, numbers)

    def predict(params: Any, rows: np.ndarray, shuffle_key: jax.Array | None = None) -> np.ndarray:
        params = train.replicate(params, mesh)
        parts = []
        for start in range(0, len(rows), size):
            # The last chunk is filled up, so that all have one shape.
            places = np.arange(start, start + size).clip(max=len(rows) - 1)[train.local_rows(size)]
            networks = train.shard_batch(data.zoo.read(rows[places]), mesh)
            if shuffle_key is not None:
                numbers = train.shard_batch(places.astype(np.int32), mesh)
                networks = shuffle(networks, numbers, train.replicate(shuffle_key, mesh))
            parts.append(np.asarray(apply(params, networks)))
        return np.concatenate(parts)[: len(rows)]

    return predict


# -- what is reported -------------------------------------------------------------------------------------------------


def summarize(config: Config, data: Data, mesh: Mesh, outcomes: list[Outcome]) -> dict[str, Any]:
    """What results.json holds after these seeds."""
    numbers = ("validation_accuracy", "test_accuracy", "shuffled_test_accuracy", "changed_predictions")
    mean, deviation = {}, {}
    for name in numbers:
        values = [getattr(outcome, name) for outcome in outcomes]
        mean[name] = float(np.mean(values))
        deviation[name] = deviation_of(values)
    confusion = np.sum([outcome.confusion for outcome in outcomes], axis=0)
    table = format_table(TITLES[type(config)], outcomes, mean, deviation)
    return {
        "model": TITLES[type(config)],
        "mean": mean,
        "deviation": deviation,  # between seeds, with Bessel's correction
        "class_accuracy": dict(zip(data.classes, class_accuracies(confusion), strict=True)),
        "seeds": [outcome._asdict() for outcome in outcomes],
        "networks": {part: len(rows) for part, rows in data.rows.items()},
        "zoo": {
            "path": str(config.zoo),
            "networks": len(data.zoo),
            "metadata": dict(data.zoo.metadata),
            "provenance": list(data.zoo.provenance),
        },
        "machine": {
            **describe_machine(),
            "devices": mesh.size,
            "processes": jax.process_count(),
        },
        "versions": describe_versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "table": table.splitlines(),
    }


def class_accuracies(confusion: np.ndarray) -> list[float | None]:
    """Share of the networks of each class that were read rightly; None for a class without networks."""
    totals = confusion.sum(axis=1)
    return [float(confusion[i, i] / total) if total else None for i, total in enumerate(totals)]


def format_table(title: str, outcomes: list[Outcome], mean: dict[str, Any], deviation: dict[str, Any]) -> str:
    """The results as a table in Markdown."""
    columns = ("validation_accuracy", "test_accuracy", "shuffled_test_accuracy", "changed_predictions")
    header = (title, "best step", "validation", "test", "neurons shuffled", "predictions changed", "time")
    rows = [
        (
            f"seed {outcome.seed}",
            f"{outcome.best_step:,} of {outcome.steps:,}",
            *(f"{getattr(outcome, name):.2%}" for name in columns),
            f"{outcome.seconds:,.0f} s" + (f" from step {outcome.resumed_from:,}" if outcome.resumed_from else ""),
        )
        for outcome in outcomes
    ]
    if len(outcomes) > 1:
        rows.append(("mean", "", *(f"{100 * mean[name]:.2f} ± {100 * deviation[name]:.2f}%" for name in columns), ""))
    return markdown_table(header, rows)


def say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def write_json(path: pathlib.Path, value: Any) -> None:
    with write_atomically(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=2) + "\n")


# -- pictures ---------------------------------------------------------------------------------------------------------


def draw_learning_curves(config: Config, data: Data, curves: dict[int, list[train.metrics.Row]]) -> Figure:
    """Training loss and validation accuracy against the number of networks seen, a line for each seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for number, (seed, rows) in enumerate(curves.items()):
        for axis, name, marker in ((left, "loss", ""), (right, "eval/accuracy", "o")):
            points = [(row["step"] * config.batch_size, row[name]) for row in rows if row.get(name) is not None]
            axis.plot(*zip(*points, strict=True), f"C{number}", marker=marker, markersize=3, label=f"seed {seed}")
    right.axhline(1 / len(data.classes), color="gray", linestyle=":", label="guessing")
    left.set(ylabel="training loss, at single batches", ylim=(0, None))
    right.set(ylabel="accuracy on validation networks", ylim=(0, 1))
    right.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    for axis in (left, right):
        axis.set_xlabel("training networks seen")
        axis.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep=""))
        axis.grid(alpha=0.3)
    right.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.suptitle(f"{TITLES[type(config)]}, {len(data.rows['train']):,} training networks")
    return figure


def draw_confusion(config: Config, data: Data, outcomes: list[Outcome]) -> Figure:
    """Which class was read as which, in shares of the networks of each true class, over all seeds."""
    counts = np.sum([outcome.confusion for outcome in outcomes], axis=0)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = 2.2 + 0.45 * len(data.classes)
    figure, axis = plt.subplots(figsize=(size + 1, size))
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (i, j), share in np.ndenumerate(shares):
        if counts[i, j]:
            axis.text(j, i, f"{100 * share:.0f}", ha="center", va="center", color="white" if share > 0.5 else "black")
    places = range(len(data.classes))
    rotation = 90 if max(map(len, data.classes)) > 2 else 0
    axis.set_xticks(places, data.classes, rotation=rotation)
    axis.set_yticks(places, data.classes)
    accuracy = np.trace(counts) / counts.sum()
    axis.set(xlabel="read as", ylabel="class", title=f"{TITLES[type(config)]}: {accuracy:.1%} of the test networks")
    figure.colorbar(image, ax=axis, format=mpl.ticker.PercentFormatter(1), label="share of the class", shrink=0.8)
    return figure


if __name__ == "__main__":
    mpl.use("agg")
    train.use_cpu_cores()
    main(parse())
