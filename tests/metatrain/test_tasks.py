"""Tasks: parameters, losses, gradients, symmetries, data, and draws from it."""

import functools
import itertools
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngjax
from ngjax.metatrain import TASKS, Batch, draw_scales, find_task, load_task_data, rescale, sample_batch
from ngjax.metatrain.networks import ConvNet, Transformer, mean_over_chunks
from ngjax.metatrain.tasks import CHARACTERS, CONTEXT, Task, standard_library_text, text_data, unscale

SMALL = {
    "fashion-cnn-4-6": find_task("fashion-cnn-4-6"),
    "cifar-cnn-2-3-4": find_task("cifar-cnn-2-3-4"),
    "digits-mlp-8-tanh": find_task("digits-mlp-8-tanh"),
    "transformer": Task("transformer", "stdlib", Transformer(len(CHARACTERS), CONTEXT, width=8, heads=2, layers=1)),
}
KINDS = [name for name in SMALL if name != "fashion-cnn-4-6"]
SHAPES = {"fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3), "digits": (8, 8, 1)}


def random_batch(task, rows, seed=0):
    rng = np.random.default_rng(seed)
    if task.data == "stdlib":
        tokens = rng.integers(0, len(CHARACTERS), (rows, CONTEXT + 1))
        return Batch(jnp.asarray(tokens[:, :-1], jnp.uint8), jnp.asarray(tokens[:, 1:], jnp.int32))
    levels = 17 if task.data == "digits" else 256
    images = rng.integers(0, levels, (rows, *SHAPES[task.data]))
    return Batch(jnp.asarray(images, jnp.uint8), jnp.asarray(rng.integers(0, 10, rows), jnp.int32))


@functools.cache
def init(task):
    return jax.jit(task.init)(jax.random.key(0))


def num_params(task):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))))


# -- networks ----------------------------------------------------------------------------------------------------------


def test_the_convnets_of_the_paper_have_its_numbers_of_parameters():
    assert num_params(find_task("fashion-cnn-16-32-32")) == 14_378
    assert num_params(find_task("cifar-cnn-32-64-64")) == 56_970


@pytest.mark.parametrize("name", KINDS)
def test_specs_describe_the_parameters(name):
    task = SMALL[name]
    spec = task.spec()
    assert spec is task.spec()
    pairs = jax.tree_util.tree_flatten_with_path(init(task))[0]
    assert [(spec_path(param), param.shape) for param in spec.params] == [
        (tuple(step.key for step in path), leaf.shape) for path, leaf in pairs
    ]


def spec_path(param):
    return tuple(step.key for step in param.path)


def test_tasks_are_equal_by_name():
    for name, task in TASKS.items():
        assert find_task(name) == task
        assert hash(find_task(name)) == hash(task)
    assert len(set(TASKS.values())) == len(TASKS)


@pytest.mark.parametrize("name", KINDS)
def test_neurons_may_be_put_in_any_order(name):
    task = SMALL[name]
    spec = task.spec()
    report = ngjax.check_symmetry(
        task.apply, init(task), spec, random_batch(task, 3).inputs, key=jax.random.key(1), tolerance=2e-5
    )
    assert report.deviation < 2e-5
    assert not report.unused
    assert sum(spec.is_free(action.id) for action in spec.actions) >= 1


def reference_logits(task, params, inputs, mean, deviation):
    x = (inputs.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(deviation)
    for i in range(len(task.network.channels) - 1):
        layer = params[f"conv_{i}"]
        x = jax.lax.conv_general_dilated(
            x,
            layer["kernel"],
            window_strides=(2, 2) if i == 0 else (1, 1),
            padding="VALID" if i == 0 else "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jnp.maximum(x + layer["bias"], 0)
    return x.mean((1, 2)) @ params["dense_0"]["kernel"] + params["dense_0"]["bias"]


def cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()


def reference_gradient(task, mean, deviation):
    def loss(params, batch):
        logits = reference_logits(task, params, batch.inputs, np.float32(mean), np.float32(deviation))
        return cross_entropy(logits, batch.labels)

    return jax.jit(jax.value_and_grad(loss))


assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)


def test_loss_and_gradient_are_those_of_convolutions():
    task = SMALL["fashion-cnn-4-6"]
    params, batch = init(task), random_batch(task, 20)  # in chunks of five
    ours = jax.jit(jax.value_and_grad(task.loss))(params, batch)
    assert ours[1]["conv_0"]["kernel"].dtype == jnp.float32
    jax.tree.map(assert_close, ours, reference_gradient(task, [0.1307], [0.3081])(params, batch))


def test_two_networks_at_once_are_each_by_itself():
    task = SMALL["cifar-cnn-2-3-4"]
    # The other one is not a number, and does not touch the one that is looked at.
    params = jax.tree.map(lambda leaf: np.stack([leaf * np.float32(np.nan), leaf]), init(task))
    batch = random_batch(task, 6)
    both = jax.jit(jax.vmap(jax.value_and_grad(task.loss), (0, None)))(params, batch)
    reference = reference_gradient(task, [0.49139968, 0.48215827, 0.44653124], [0.24703233, 0.24348505, 0.26158768])
    jax.tree.map(lambda ours, expected: assert_close(ours[1], expected), both, reference(init(task), batch))


def test_chunks_are_all_rows_and_gradients_have_gradients():
    def square(x, rows):
        return (x**3 * rows.mean()) * rows.mean()

    rows = jnp.arange(1.0, 7.0)
    mean = functools.partial(mean_over_chunks, square, 2)
    of_chunks = np.mean([1.5**2, 3.5**2, 5.5**2])
    x = jnp.float32(2)
    for value, factor in ((mean, 8), (jax.grad(mean), 12), (jax.grad(jax.grad(mean)), 12)):
        assert float(value(x, rows)) == pytest.approx(factor * of_chunks, rel=1e-6)
    # Seven rows are seven chunks.
    assert float(mean(x, jnp.arange(7.0))) == pytest.approx(8 * np.mean(np.arange(7.0) ** 2), rel=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_fresh_networks_know_nothing_and_learn(name):
    task = SMALL[name]
    random = random_batch(task, 16, seed=2)
    # What is learned: the answer is the same everywhere.
    batch = random._replace(labels=jnp.full_like(random.labels, 3))

    @jax.jit
    def train(params):
        def step(params, _):
            loss, gradient = jax.value_and_grad(task.loss)(params, batch)
            return jax.tree.map(lambda p, g: p - np.float32(0.1) * g, params, gradient), loss

        trained, losses = jax.lax.scan(step, params, length=20)
        return task.loss(params, random), losses, task.accuracy(trained, batch)

    fresh, losses, accuracy = train(init(task))
    assert float(fresh) == pytest.approx(math.log(len(CHARACTERS) if task.data == "stdlib" else 10), abs=0.3)
    assert float(losses[-1]) < 0.5 * float(losses[0])
    assert float(accuracy) > 0.95


def test_the_transformer_does_not_look_ahead():
    task = SMALL["transformer"]
    tokens = random_batch(task, 1).inputs
    apply = jax.jit(task.apply)
    before, after = (np.asarray(apply(init(task), t)) for t in (tokens, tokens.at[0, 40:].set(7)))
    np.testing.assert_allclose(before[0, :40], after[0, :40], atol=1e-6)
    assert np.abs(before[0, 41:] - after[0, 41:]).max() > 1e-3


@pytest.mark.parametrize(
    "name",
    ["fashion-cnn", "fashion-cnn-", "fashion-cnn-0", "svhn-cnn-4", "digits-mlp-4", "digits-mlp-4-sinus", "x", ""],
)
def test_unknown_names_raise(name):
    with pytest.raises(ValueError, match=r"unknown task|activation 'sinus'"):
        find_task(name)


# -- data --------------------------------------------------------------------------------------------------------------


def test_text_is_split_without_overlap():
    text = "".join(itertools.islice(itertools.cycle(CHARACTERS), 10 * CONTEXT * 7 + 5))
    data = text_data(text)
    rows = jnp.concatenate([data.train.inputs, data.test.inputs])
    assert rows.dtype == jnp.uint8
    assert rows.shape[1] == CONTEXT
    # Every label is what follows; no label of the training split reaches into the test split.
    decode = np.array(list(CHARACTERS))
    end = round(0.9 * len(text))
    for batch, part in ((data.train, text[:end]), (data.test, text[end:])):
        used = batch.inputs.size
        assert "".join(decode[np.asarray(batch.inputs).ravel()]) == part[:used]
        assert "".join(decode[np.asarray(batch.labels).ravel()]) == part[1 : used + 1]
        assert len(part) - used <= CONTEXT


def test_text_of_the_standard_library():
    text = standard_library_text()
    assert len(text) == 1_500_000
    assert set(text) == set(CHARACTERS)
    assert "import" in text
    assert "def " in text[-20_000:]


def test_digits_are_normalized():
    data = load_task_data("digits")
    assert data.train.inputs.shape == (1437, 8, 8, 1)
    assert data.test.inputs.shape == (360, 8, 8, 1)
    assert data.train.inputs.dtype == jnp.uint8
    assert int(data.train.inputs.max()) == 16
    seen = SMALL["digits-mlp-8-tanh"].normalized(data.train.inputs)
    assert float(seen.mean()) == pytest.approx(0, abs=0.01)
    assert float(seen.std()) == pytest.approx(1, abs=0.01)


def test_images_keep_their_pixels(tmp_path):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (5, 28, 28), np.uint8), np.arange(5, dtype=np.uint8)
    pixels[0].flat[:256] = range(256)
    for prefix, rows in (("train", slice(None)), ("t10k", slice(2))):
        for kind, array in (("images-idx3", pixels[rows]), ("labels-idx1", labels[rows])):
            header = struct.pack(f">{array.ndim + 1}I", 0x0800 + array.ndim, *array.shape)
            (tmp_path / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())
    data = load_task_data("fashion_mnist", data_dir=tmp_path)
    assert data.train.inputs.dtype == jnp.uint8
    np.testing.assert_array_equal(data.train.inputs[..., 0], pixels)
    np.testing.assert_array_equal(data.test.inputs[..., 0], pixels[:2])
    np.testing.assert_array_equal(data.test.labels, [0, 1])


def test_smaller_images_are_means_of_squares():
    small, data = load_task_data("digits-2").test.inputs, load_task_data("digits").test.inputs
    squares = np.asarray(data, np.float32).reshape(len(data), 2, 4, 2, 4, 1).mean((2, 4))
    np.testing.assert_array_equal(small, np.rint(squares))
    task = find_task("digits2-mlp-3-relu")
    assert (task.data, task.network.sizes) == ("digits-2", (4, 3, 10))
    expected = (np.asarray(small, np.float32) / 16 - 0.3053) / 0.376
    np.testing.assert_allclose(task.normalized(small), expected, atol=1e-5)
    with pytest.raises(ValueError, match="side=3, expected a divisor of the images' 8 x 8 pixels"):
        load_task_data("digits-3")


def test_unknown_data_raises():
    with pytest.raises(ValueError, match="svhn"):
        load_task_data("svhn")


# -- draws -------------------------------------------------------------------------------------------------------------

ROWS = Batch(jnp.arange(10)[:, None], jnp.arange(10))


def test_batches_depend_on_the_key_alone():
    draw = jax.jit(jax.vmap(lambda key: sample_batch(key, ROWS, 50)))
    keys = jax.random.split(jax.random.key(0), 3)
    first, again = draw(keys), draw(keys)
    assert first.inputs.shape == (3, 50, 1)
    np.testing.assert_array_equal(first.labels, again.labels)
    np.testing.assert_array_equal(first.inputs[..., 0], first.labels)
    assert not np.array_equal(first.labels[0], first.labels[1])
    assert set(np.asarray(first.labels).ravel().tolist()) == set(range(10))


def test_scales_are_within_their_bounds_and_undone():
    params = {"a": jnp.ones((2, 3)), "b": [jnp.full(4, 2.0), jnp.float32(3)]}
    draw = jax.jit(jax.vmap(lambda key: draw_scales(key, params, 10.0)))
    scales = draw(jax.random.split(jax.random.key(0), 200))
    logs = np.log10(np.stack(jax.tree.leaves(scales)))
    assert logs.shape == (3, 200)
    assert np.abs(logs).max() <= 1 + 1e-6
    # Uniform in the logarithm, one independent of the other.
    assert np.std(logs) == pytest.approx(1 / math.sqrt(3), abs=0.05)
    assert np.abs(np.corrcoef(logs)[np.triu_indices(3, 1)]).max() < 0.25
    one = jax.tree.map(lambda leaf: leaf[0], scales)
    back = rescale(one, unscale(one, params))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), back, params)
    assert not np.allclose(unscale(one, params)["a"], params["a"])


def test_sweeps_of_the_convnet():
    # Widths 8 to 128, and one to five convolutions.
    widths = [find_task(f"cifar-cnn-{w // 2}-{w}-{w}").network for w in (8, 16, 32, 64, 128)]
    assert [network.channels[-1] for network in widths] == [8, 16, 32, 64, 128]
    deepest = find_task("fashion-cnn-16-32-32-32-32")
    assert isinstance(deepest.network, ConvNet)
    assert num_params(deepest) == 14_378 + 2 * (9 * 32 * 32 + 32)
