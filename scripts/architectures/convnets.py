"""Convolutional networks for images. Numbers of parameters are those of the papers' or torchvision's models."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .base import Architecture, Network, chain, linen, normal

BatchNorm = functools.partial(nn.BatchNorm, use_running_average=True, epsilon=1e-5)
CONV = "conv_general_dilated"


def pool(x: jax.Array, size: int = 3, stride: int = 2) -> jax.Array:
    pad = (size - 1) // 2
    return nn.max_pool(x, (size, size), (stride, stride), ((pad, pad), (pad, pad)))


def halve(x: jax.Array) -> jax.Array:
    """Means of two by two pixels."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


class ConvNorm(nn.Module):
    """A convolution without bias, then batch normalization."""

    features: int
    size: int = 1
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x):
        pad = (self.size - 1) // 2
        x = nn.Conv(
            self.features,
            (self.size, self.size),
            self.stride,
            [(pad, pad)] * 2,
            feature_group_count=self.groups,
            use_bias=False,
            name="conv",
        )(x)
        return BatchNorm(name="norm")(x)


# -- residual networks ------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two convolutions, or three with a narrow one in the middle."""

    features: int
    stride: int = 1
    bottleneck: bool = False
    groups: int = 1
    inner: int = 0

    @nn.compact
    def __call__(self, x):
        inner = self.inner or self.features
        if self.bottleneck:
            y = nn.relu(ConvNorm(inner, name="reduce")(x))
            y = nn.relu(ConvNorm(inner, 3, self.stride, self.groups, name="middle")(y))
            y = ConvNorm(self.features, name="expand")(y)
        else:
            y = nn.relu(ConvNorm(inner, 3, self.stride, name="first")(x))
            y = ConvNorm(self.features, 3, name="second")(y)
        if x.shape[-1] != self.features or self.stride != 1:
            x = ConvNorm(self.features, 1, self.stride, name="shortcut")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet (He et al. 2016) and ResNeXt (Xie et al. 2017)."""

    blocks: Sequence[int]
    width: int = 64
    bottleneck: bool = False
    expansion: int = 4
    groups: int = 1
    group_width: int = 64  # inner channels per group in the first stage
    classes: int = 1000

    @nn.compact
    def __call__(self, x):
        x = pool(nn.relu(ConvNorm(self.width, 7, 2, name="stem")(x)))
        for stage, blocks in enumerate(self.blocks):
            width = self.width * 2**stage
            inner = self.groups * self.group_width * 2**stage if self.bottleneck else width
            features = width * self.expansion if self.bottleneck else width
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"stage{stage}_block{block}"
                x = ResidualBlock(features, stride, self.bottleneck, self.groups, inner, name=name)(x)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


class EquinoxConvNorm(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm

    def __init__(self, n_in, n_out, size, stride, key):
        self.conv = eqx.nn.Conv2d(n_in, n_out, size, stride, (size - 1) // 2, use_bias=False, key=key)
        self.norm = eqx.nn.BatchNorm(n_out, "batch", inference=True, mode="ema")

    def __call__(self, x, state):
        return self.norm(self.conv(x), state)


class EquinoxBlock(eqx.Module):
    first: EquinoxConvNorm
    second: EquinoxConvNorm
    shortcut: EquinoxConvNorm | None

    def __init__(self, n_in, n_out, stride, key):
        keys = jax.random.split(key, 3)
        self.first = EquinoxConvNorm(n_in, n_out, 3, stride, keys[0])
        self.second = EquinoxConvNorm(n_out, n_out, 3, 1, keys[1])
        self.shortcut = EquinoxConvNorm(n_in, n_out, 1, stride, keys[2]) if stride != 1 or n_in != n_out else None

    def __call__(self, x, state):
        y, state = self.first(x, state)
        y, state = self.second(jax.nn.relu(y), state)
        if self.shortcut is not None:
            x, state = self.shortcut(x, state)
        return jax.nn.relu(x + y), state


class EquinoxResNet(eqx.Module):
    stem: EquinoxConvNorm
    blocks: list[EquinoxBlock]
    head: eqx.nn.Linear

    def __init__(self, blocks, width, classes, key):
        keys = iter(jax.random.split(key, sum(blocks) + 2))
        self.stem = EquinoxConvNorm(3, width, 7, 2, next(keys))
        self.blocks = []
        n_in = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                self.blocks.append(EquinoxBlock(n_in, width * 2**stage, stride, next(keys)))
                n_in = width * 2**stage
        self.head = eqx.nn.Linear(n_in, classes, key=next(keys))

    def __call__(self, x, state):
        x, state = self.stem(x, state)
        x = eqx.nn.MaxPool2d(3, 2, 1)(jax.nn.relu(x))
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(x.mean((1, 2)))


def equinox_resnet(blocks: Sequence[int], width: int, classes: int, images: np.ndarray) -> Network:
    make = eqx.nn.make_with_state(functools.partial(EquinoxResNet, blocks, width, classes))
    static = eqx.filter(eqx.filter_eval_shape(make, jax.random.key(0))[0], _is_array, inverse=True)

    def init(key: jax.Array) -> Any:
        model, state = make(key)
        return eqx.filter(model, eqx.is_array), state

    def apply(params: Any, images: Any) -> Any:
        model = eqx.combine(params[0], static)
        return jax.vmap(lambda x: model(x, params[1]), axis_name="batch")(images)

    return Network(apply, init, (images,))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


# -- plain chains and concatenations ----------------------------------------------------------------------------------


class VGG(nn.Module):
    """VGG (Simonyan and Zisserman 2015): all pixels of the last layer are inputs of the first dense one."""

    layers: Sequence[int]  # channels; 0 halves the image
    hidden: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, x):
        for width in self.layers:
            x = nn.relu(nn.Conv(width, (3, 3))(x)) if width else nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


class DenseNet(nn.Module):
    """DenseNet (Huang et al. 2017): every layer reads those before it, side by side."""

    blocks: Sequence[int]
    width: int
    growth: int
    classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (7, 7), 2, [(3, 3)] * 2, use_bias=False, name="stem")(x)
        x = pool(nn.relu(BatchNorm(name="stem_norm")(x)))
        for stage, layers in enumerate(self.blocks):
            if stage > 0:
                x = self.activate_conv(x, x.shape[-1] // 2, 1, f"transition{stage}")
                x = halve(x)
            for layer in range(layers):
                y = self.activate_conv(x, 4 * self.growth, 1, f"stage{stage}_layer{layer}_reduce")
                y = self.activate_conv(y, self.growth, 3, f"stage{stage}_layer{layer}")
                x = jnp.concatenate([x, y], -1)
        x = nn.relu(BatchNorm(name="norm")(x)).mean((1, 2))
        return nn.Dense(self.classes, name="head")(x)

    def activate_conv(self, x, features, size, name):
        x = nn.relu(BatchNorm(name=f"{name}_norm")(x))
        return nn.Conv(features, (size, size), use_bias=False, name=name)(x)


class Inception(nn.Module):
    """Four branches side by side."""

    widths: Sequence[int]  # 1x1; 1x1 then 3x3; 1x1 then 3x3; pooled then 1x1

    @nn.compact
    def __call__(self, x):
        def conv(x, branch, size=1):
            return nn.relu(ConvNorm(self.widths[branch], size, name=f"conv{branch}")(x))

        pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME")
        branches = [conv(x, 0), conv(conv(x, 1), 2, 3), conv(conv(x, 3), 4, 3), conv(pooled, 5)]
        return jnp.concatenate(branches, -1)


class GoogLeNet(nn.Module):
    """GoogLeNet (Szegedy et al. 2015) with batch normalization, as in torchvision, without the extra classifiers."""

    stem: Sequence[int]
    stages: Sequence[Sequence[Sequence[int]]]
    classes: int

    @nn.compact
    def __call__(self, x):
        first, second, third = self.stem
        x = nn.max_pool(nn.relu(ConvNorm(first, 7, 2, name="stem0")(x)), (3, 3), (2, 2), "SAME")
        x = nn.relu(ConvNorm(second, 1, name="stem1")(x))
        x = nn.relu(ConvNorm(third, 3, name="stem2")(x))
        for i, stage in enumerate(self.stages):
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
            for j, widths in enumerate(stage):
                x = Inception(widths, name=f"stage{i}_block{j}")(x)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


GOOGLENET = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


# -- depthwise convolutions -------------------------------------------------------------------------------------------


class InvertedResidual(nn.Module):
    expansion: int
    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        hidden = x.shape[-1] * self.expansion
        y = nn.relu6(ConvNorm(hidden, name="expand")(x)) if self.expansion > 1 else x
        y = nn.relu6(ConvNorm(hidden, 3, self.stride, hidden, name="depthwise")(y))
        y = ConvNorm(self.features, name="project")(y)
        return x + y if self.stride == 1 and x.shape[-1] == self.features else y


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018)."""

    stem: int
    blocks: Sequence[tuple[int, int, int, int]]  # expansion, channels, how many, stride of the first
    last: int
    classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(ConvNorm(self.stem, 3, 2, name="stem")(x))
        for i, (expansion, features, count, stride) in enumerate(self.blocks):
            for j in range(count):
                name = f"stage{i}_block{j}"
                x = InvertedResidual(expansion, features, stride if j == 0 else 1, name=name)(x)
        x = nn.relu6(ConvNorm(self.last, name="last")(x))
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


MOBILENET = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class ConvNormNNX(nnx.Module):
    def __init__(self, n_in, n_out, size, stride, groups, rngs):
        pad = (size - 1) // 2
        self.conv = nnx.Conv(
            n_in,
            n_out,
            (size, size),
            stride,
            padding=[(pad, pad)] * 2,
            feature_group_count=groups,
            use_bias=False,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(n_out, use_running_average=True, epsilon=1e-3, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.conv(x))


class MBConv(nnx.Module):
    """Expanded, depthwise, gated by what all pixels have on average, and projected."""

    def __init__(self, n_in, n_out, size, stride, expansion, squeezed, rngs):
        hidden = n_in * expansion
        self.expand = ConvNormNNX(n_in, hidden, 1, 1, 1, rngs) if expansion > 1 else None
        self.depthwise = ConvNormNNX(hidden, hidden, size, stride, hidden, rngs)
        self.squeeze = nnx.Linear(hidden, squeezed, rngs=rngs)
        self.excite = nnx.Linear(squeezed, hidden, rngs=rngs)
        self.project = ConvNormNNX(hidden, n_out, 1, 1, 1, rngs)
        self.residual = stride == 1 and n_in == n_out

    def __call__(self, x):
        y = nnx.silu(self.expand(x)) if self.expand is not None else x
        y = nnx.silu(self.depthwise(y))
        gate = nnx.sigmoid(self.excite(nnx.silu(self.squeeze(y.mean((1, 2), keepdims=True)))))
        y = self.project(y * gate)
        return x + y if self.residual else y


class EfficientNet(nnx.Module):
    """EfficientNet (Tan and Le 2019)."""

    def __init__(self, stem, blocks, squeeze, last, classes, rngs):
        self.stem = ConvNormNNX(3, stem, 3, 2, 1, rngs)
        made, n_in = [], stem
        for expansion, size, stride, n_out, count in blocks:
            for i in range(count):
                squeezed = int(n_in * squeeze)
                made.append(MBConv(n_in, n_out, size, stride if i == 0 else 1, expansion, squeezed, rngs))
                n_in = n_out
        self.blocks = nnx.List(made)
        self.last = ConvNormNNX(n_in, last, 1, 1, 1, rngs)
        self.head = nnx.Linear(last, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.silu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(nnx.silu(self.last(x)).mean((1, 2)))


EFFICIENTNET = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


def efficientnet(images: np.ndarray, *sizes: Any) -> Network:
    graph, _ = nnx.split(nnx.eval_shape(lambda: EfficientNet(*sizes, nnx.Rngs(0))))

    def init(key: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.split(EfficientNet(*sizes, nnx.Rngs(key)))[1])

    return Network(lambda params, images: nnx.merge(graph, params)(images), init, (images,))


class ConvNeXt(nn.Module):
    """ConvNeXt (Liu et al. 2022)."""

    blocks: Sequence[int]
    widths: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.LayerNorm, epsilon=1e-6)
        for stage, (width, blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
            if stage == 0:
                x = norm(name="stem_norm")(nn.Conv(width, (4, 4), 4, name="stem")(x))
            else:
                x = nn.Conv(width, (2, 2), 2, name=f"down{stage}")(norm(name=f"down{stage}_norm")(x))
            for block in range(blocks):
                name = f"stage{stage}_block{block}"
                y = nn.Conv(width, (7, 7), feature_group_count=width, name=f"{name}_depthwise")(x)
                y = nn.gelu(nn.Dense(4 * width, name=f"{name}_up")(norm(name=f"{name}_norm")(y)))
                scale = self.param(f"{name}_scale", nn.initializers.constant(1e-6), (width,))
                x = x + nn.Dense(width, name=f"{name}_down")(y) * scale
        return nn.Dense(self.classes, name="head")(norm(name="norm")(x.mean((1, 2))))


# -- model zoos -------------------------------------------------------------------------------------------------------


def small_cnn(widths: Sequence[int], images: np.ndarray) -> Network:
    """The small CNN zoo (Unterthiner et al. 2020)."""

    def network(x):
        for width in widths:
            x = jax.nn.relu(hk.Conv2D(width, 3, stride=2)(x))
        return hk.Linear(10)(x.mean((1, 2)))

    model = hk.without_apply_rng(hk.transform(network))
    return Network(model.apply, lambda key: model.init(key, images), (images,))


def wild_park(
    widths: Sequence[int],
    sizes: Sequence[int],
    activations: Sequence[str],
    residuals: Sequence[int | None],
    images: np.ndarray,
) -> Network:
    """A network of the CNN Wild Park (Kofinas et al. 2024).

    To what layer `i` computes, that of layer `residuals[i]` is added before the activation, to as many channels as both
    of them have. Images and kernels are laid out as in PyTorch.
    """

    def apply(params: Any, x: Any) -> Any:
        saved = []
        for layer, size, activation, residual in zip(params["convs"], sizes, activations, residuals, strict=True):
            x = jax.lax.conv_general_dilated(x, layer["weight"], (1, 1), [(size // 2,) * 2] * 2)
            x = x + layer["bias"][:, None, None]
            if residual is not None:
                shared = min(x.shape[1], saved[residual].shape[1])
                x = x.at[:, :shared].add(saved[residual][:, :shared])
            x = getattr(jax.nn, activation)(x)
            saved.append(x)
        return x.mean((2, 3)) @ params["head"]["weight"].T + params["head"]["bias"]

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(widths) + 1)
        shapes = [(n_out, n_in, size, size) for n_in, n_out, size in zip((3, *widths), widths, sizes, strict=False)]
        convs = [_torch_layer(key, shape) for key, shape in zip(keys, shapes, strict=False)]
        return {"convs": convs, "head": _torch_layer(keys[-1], (10, widths[-1]))}

    return Network(apply, init, (images,))


def _torch_layer(key: jax.Array, shape: tuple[int, ...]) -> dict[str, jax.Array]:
    scale = float(np.prod(shape[1:])) ** -0.5
    weight = jax.random.uniform(key, shape, minval=-scale, maxval=scale)
    return {"weight": weight, "bias": jnp.zeros(shape[0])}


# -- the rows ---------------------------------------------------------------------------------------------------------

IMAGE, SMALL = (1, 224, 224, 3), (2, 16, 16, 3)

CONVNETS = (
    Architecture(
        "ResNet-18",
        "Flax Linen",
        full=lambda: linen(ResNet((2, 2, 2, 2)), normal(*IMAGE)),  # 11,689,512 and 9,600 statistics
        narrow=lambda: linen(ResNet((2, 1), width=4, classes=3), normal(*SMALL)),
        # Two streams; one layer inside each block.
        free=chain(4, 4, 4, 8, 8),
        pinned=(
            ("params/stem/conv/kernel", 0, CONV),
            ("params/stem/conv/kernel", 2, "input"),
            ("params/stage1_block0/first/conv/kernel", 1, CONV),
            ("params/head/kernel", 1, "output"),
        ),
    ),
    Architecture(
        "ResNet-50",
        "Flax Linen",
        full=lambda: linen(ResNet((3, 4, 6, 3), bottleneck=True), normal(*IMAGE)),  # 25,557,032 and 53,120 statistics
        narrow=lambda: linen(
            ResNet((1, 1), width=4, bottleneck=True, group_width=3, expansion=2, classes=3), normal(*SMALL)
        ),
        # The stem; a stream of each stage, and two layers inside its block.
        free=chain(3, 3, 4, 6, 6, 8, 16),
        pinned=(
            ("params/stage0_block0/middle/conv/kernel", 0, CONV),
            ("params/stage0_block0/middle/conv/kernel", 1, CONV),
            ("params/head/bias", 0, "output"),
        ),
    ),
    Architecture(
        "ResNeXt-50 32x4d",
        "Flax Linen",
        # 25,028,904 and 68,224 statistics
        full=lambda: linen(ResNet((3, 4, 6, 3), bottleneck=True, groups=32, group_width=4), normal(*IMAGE)),
        narrow=lambda: linen(
            ResNet((1, 1), width=5, bottleneck=True, groups=2, group_width=3, expansion=2, classes=3), normal(*SMALL)
        ),
        # The stem and both streams; in a block: the groups, and in each of them the channels before and after.
        free=((2, 1), (2, 1), (3, 2), (3, 2), (5, 1), (6, 2), (6, 2), (10, 1), (20, 1)),
        pinned=(("params/stage0_block0/middle/conv/kernel", 0, CONV), ("params/head/kernel", 1, "output")),
    ),
    Architecture(
        "ResNet-18 (Equinox)",
        "Equinox",
        full=lambda: equinox_resnet((2, 2, 2, 2), 64, 1000, normal(1, 3, 224, 224)),  # as above
        narrow=lambda: equinox_resnet((2, 1), 4, 3, normal(2, 3, 16, 16)),
        free=chain(4, 4, 4, 8, 8),
        pinned=(("0/stem/conv/weight", 1, "input"), ("0/stem/conv/weight", 2, CONV), ("0/head/weight", 0, "output")),
    ),
    Architecture(
        "VGG-16",
        "Flax Linen",
        full=lambda: linen(  # 138,357,544
            VGG(
                (64, 64, 0, 128, 128, 0, *(256,) * 3, 0, *(512,) * 3, 0, *(512,) * 3, 0),
                hidden=(4096,) * 2,
                classes=1000,
            ),
            normal(*IMAGE),
        ),
        narrow=lambda: linen(VGG((4, 5, 0, 6, 0), hidden=(8, 7), classes=3), normal(2, 8, 8, 3)),
        free=chain(4, 5, 6, 7, 8),
        # Of the flattened axis, the pixels keep their order and the channels do not.
        pinned=(
            ("params/Conv_2/kernel", 1, CONV),
            ("params/Dense_0/kernel", 0, "reduce_window_max"),
            ("params/Dense_2/bias", 0, "output"),
        ),
    ),
    Architecture(
        "DenseNet-121",
        "Flax Linen",
        # 7,978,856 and 83,648 statistics
        full=lambda: linen(DenseNet((6, 12, 24, 16), width=64, growth=32, classes=1000), normal(*IMAGE)),
        narrow=lambda: linen(DenseNet((2, 2), width=4, growth=3, classes=3), normal(*SMALL)),
        # The stem, four times a narrow layer and what it appends, the transition.
        free=chain(3, 3, 3, 3, 4, 5, 12, 12, 12, 12),
        pinned=(("params/stage0_layer1/kernel", 1, CONV), ("params/stem/kernel", 2, "input")),
    ),
    Architecture(
        "GoogLeNet",
        "Flax Linen",
        full=lambda: linen(
            GoogLeNet((64, 64, 192), GOOGLENET, 1000), normal(*IMAGE)
        ),  # 6,624,904 and 15,328 statistics
        narrow=lambda: linen(GoogLeNet((3, 4, 5), (((2, 3, 4, 2, 3, 2), (3, 2, 5, 2, 4, 2)),), 3), normal(*SMALL)),
        free=chain(2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 5, 5),
        pinned=(("params/stage0_block1/conv2/conv/kernel", 0, CONV), ("params/head/kernel", 1, "output")),
    ),
    Architecture(
        "MobileNetV2",
        "Flax Linen",
        full=lambda: linen(MobileNetV2(32, MOBILENET, 1280, 1000), normal(*IMAGE)),  # 3,504,872 and 34,112 statistics
        narrow=lambda: linen(MobileNetV2(4, ((1, 3, 1, 1), (2, 5, 2, 2)), 7, 3), normal(*SMALL)),
        # Depthwise convolutions keep the channels of the stem (4) and of the expanded ones (6, 10).
        free=chain(3, 4, 5, 6, 7, 10),
        pinned=(("params/stage1_block0/depthwise/conv/kernel", 0, CONV), ("params/head/kernel", 1, "output")),
    ),
    Architecture(
        "EfficientNet-B0",
        "Flax NNX",
        # 5,288,548 and 42,016 statistics
        full=lambda: efficientnet(normal(*IMAGE), 32, EFFICIENTNET, 0.25, 1280, 1000),
        narrow=lambda: efficientnet(normal(*SMALL), 4, ((1, 3, 1, 6, 1), (2, 5, 2, 5, 2)), 0.5, 7, 3),
        # The stem, the stream of each stage; per block: expanded channels (not in the first), the squeezed ones.
        free=chain(2, 2, 3, 4, 5, 6, 7, 10, 12),
        pinned=(("blocks/1/depthwise/conv/kernel", 1, CONV), ("head/kernel", 1, "output")),
    ),
    Architecture(
        "ConvNeXt-T",
        "Flax Linen",
        full=lambda: linen(ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), 1000), normal(*IMAGE)),  # 28,589,128
        narrow=lambda: linen(ConvNeXt((2, 1), (3, 5), 3), normal(*SMALL)),
        free=chain(3, 5, 12, 12, 20),
        pinned=(
            ("params/stem/kernel", 1, CONV),
            ("params/stage0_block0_depthwise/kernel", 0, CONV),
            ("params/head/bias", 0, "output"),
        ),
    ),
    Architecture(
        "small CNN zoo",
        "Haiku",
        full=lambda: small_cnn((16, 16, 16), normal(8, 32, 32, 1)),  # 4,970
        narrow=lambda: small_cnn((3, 4, 5), normal(2, 9, 9, 1)),
        free=chain(3, 4, 5),
        pinned=(("conv2_d/w", 0, CONV), ("linear/w", 1, "output")),
    ),
    Architecture(
        "CNN Wild Park",
        "plain JAX",
        full=lambda: wild_park(
            (16, 32, 8, 32, 16),
            (3, 5, 7, 3, 5),
            ("relu", "gelu", "silu", "tanh", "leaky_relu"),
            (None, None, 0, 1, 2),
            normal(8, 3, 32, 32),
        ),
        narrow=lambda: wild_park(
            (7, 6, 5, 10), (3, 5, 3, 7), ("relu", "gelu", "tanh", "silu"), (None, None, 0, 1), normal(2, 3, 9, 9)
        ),
        # The third layer moves with five channels of the first, six channels of the fourth with the second.
        free=chain(2, 4, 5, 6),
        pinned=(("convs/3/weight", 2, CONV), ("convs/0/weight", 1, "input"), ("head/weight", 0, "output")),
    ),
)
