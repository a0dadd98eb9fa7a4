"""Networks that see: vision transformers, mixers, U-Nets, networks of coordinates, and those of `convnets`."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .base import Architecture, Network, chain, linen, normal
from .convnets import CONV, CONVNETS

LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-6)


class MLP(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        features = x.shape[-1]
        return nn.Dense(features, name="down")(nn.gelu(nn.Dense(self.hidden, name="up")(x)))


def patches(x: jax.Array, size: int, width: int) -> jax.Array:
    """One token per patch of an image; called inside a module."""
    x = nn.Conv(width, (size, size), size, name="patches")(x)
    return x.reshape(x.shape[0], -1, width)


# -- transformers and mixers ------------------------------------------------------------------------------------------


class ViT(nn.Module):
    """ViT (Dosovitskiy et al. 2021), with a class token and learned positions."""

    patch: int
    width: int
    layers: int
    heads: int
    hidden: int
    classes: int

    @nn.compact
    def __call__(self, x):
        x = patches(x, self.patch, self.width)
        token = self.param("class", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], 1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for i in range(self.layers):
            attention = nn.MultiHeadDotProductAttention(self.heads, name=f"layer{i}_attention")
            x = x + attention(LayerNorm(name=f"layer{i}_norm0")(x))
            x = x + MLP(self.hidden, name=f"layer{i}_mlp")(LayerNorm(name=f"layer{i}_norm1")(x))
        return nn.Dense(self.classes, name="head")(LayerNorm(name="norm")(x)[:, 0])


class WindowAttention(nn.Module):
    """Attention inside windows, with a learned bias for each head and each offset between two pixels."""

    heads: int
    window: int
    shift: int

    @nn.compact
    def __call__(self, x):
        batch, height, width, features = x.shape
        window, n, dim = self.window, self.window**2, features // self.heads
        x = jnp.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        grid = (height // window, width // window)
        x = x.reshape(batch, grid[0], window, grid[1], window, features).swapaxes(2, 3).reshape(-1, n, features)
        qkv = nn.Dense(3 * features, name="qkv")(x).reshape(-1, n, 3, self.heads, dim)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(dim)
        table = self.param("offsets", nn.initializers.normal(0.02), ((2 * window - 1) ** 2, self.heads))
        scores = scores + table[_offsets(window)].transpose(2, 0, 1)
        if self.shift:
            mask = _shifted_mask(height, width, window, self.shift)
            scores = (scores.reshape(batch, -1, self.heads, n, n) + mask[:, None]).reshape(scores.shape)
        x = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(-1, n, features)
        x = nn.Dense(features, name="out")(x)
        x = x.reshape(batch, *grid, window, window, features).swapaxes(2, 3).reshape(batch, height, width, features)
        return jnp.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x


def _offsets(window: int) -> np.ndarray:
    """`[window ** 2, window ** 2]`, the number of the offset between two pixels."""
    places = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij"), -1).reshape(-1, 2)
    offsets = places[:, None] - places[None] + window - 1
    return (offsets[..., 0] * (2 * window - 1) + offsets[..., 1]).astype(np.int32)


def _shifted_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """`[windows, window ** 2, window ** 2]`: after the shift, pixels that are no neighbours do not see one another."""
    regions = np.zeros((height, width), np.int32)
    bands = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for i, rows in enumerate(bands):
        for j, columns in enumerate(bands):
            regions[rows, columns] = 3 * i + j
    regions = regions.reshape(height // window, window, width // window, window).swapaxes(1, 2).reshape(-1, window**2)
    return np.where(regions[:, :, None] == regions[:, None], 0, -100).astype(np.float32)


class Swin(nn.Module):
    """Swin transformer (Liu et al. 2021)."""

    patch: int
    window: int
    width: int
    layers: Sequence[int]
    heads: Sequence[int]
    expansion: int
    classes: int

    @nn.compact
    def __call__(self, x):
        x = LayerNorm(name="patches_norm")(nn.Conv(self.width, (self.patch,) * 2, self.patch, name="patches")(x))
        for stage, (layers, heads) in enumerate(zip(self.layers, self.heads, strict=True)):
            if stage > 0:  # four neighbouring pixels become one
                parts = [x[:, i::2, j::2] for j in range(2) for i in range(2)]
                x = LayerNorm(name=f"merge{stage}_norm")(jnp.concatenate(parts, -1))
                x = nn.Dense(x.shape[-1] // 2, use_bias=False, name=f"merge{stage}")(x)
            for i in range(layers):
                shift = self.window // 2 if i % 2 and x.shape[1] > self.window else 0
                name = f"stage{stage}_layer{i}"
                y = LayerNorm(name=f"{name}_norm0")(x)
                x = x + WindowAttention(heads, self.window, shift, name=f"{name}_attention")(y)
                y = LayerNorm(name=f"{name}_norm1")(x)
                x = x + MLP(self.expansion * x.shape[-1], name=f"{name}_mlp")(y)
        return nn.Dense(self.classes, name="head")(LayerNorm(name="norm")(x).mean((1, 2)))


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021)."""

    patch: int
    width: int
    layers: int
    tokens_hidden: int
    hidden: int
    classes: int

    @nn.compact
    def __call__(self, x):
        x = patches(x, self.patch, self.width)
        for i in range(self.layers):
            tokens = LayerNorm(name=f"layer{i}_norm0")(x).swapaxes(1, 2)
            x = x + MLP(self.tokens_hidden, name=f"layer{i}_tokens")(tokens).swapaxes(1, 2)
            x = x + MLP(self.hidden, name=f"layer{i}_channels")(LayerNorm(name=f"layer{i}_norm1")(x))
        return nn.Dense(self.classes, name="head")(LayerNorm(name="norm")(x).mean(1))


class GMLP(nn.Module):
    """gMLP (Liu et al. 2021): half of the channels, mixed over tokens, gate the other half."""

    patch: int
    width: int
    layers: int
    hidden: int
    classes: int

    @nn.compact
    def __call__(self, x):
        x = patches(x, self.patch, self.width)
        for i in range(self.layers):
            y = nn.gelu(nn.Dense(self.hidden, name=f"layer{i}_up")(LayerNorm(name=f"layer{i}_norm")(x)))
            y, gate = jnp.split(y, 2, -1)
            gate = LayerNorm(name=f"layer{i}_gate_norm")(gate).swapaxes(1, 2)
            mix = nn.Dense(
                gate.shape[-1],
                kernel_init=nn.initializers.normal(1e-3),
                bias_init=nn.initializers.ones,
                name=f"layer{i}_mix",
            )
            x = x + nn.Dense(self.width, name=f"layer{i}_down")(y * mix(gate).swapaxes(1, 2))
        return nn.Dense(self.classes, name="head")(LayerNorm(name="norm")(x).mean(1))


# -- U-Nets -----------------------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) with padding and group normalization."""

    widths: Sequence[int]
    groups: int
    classes: int

    @nn.compact
    def __call__(self, x):
        skips = []
        for i, width in enumerate(self.widths):
            x = nn.max_pool(x, (2, 2), (2, 2)) if i else x
            x = self.double(x, width, f"down{i}")
            skips.append(x)
        for i, width in reversed(list(enumerate(self.widths[:-1]))):
            x = nn.ConvTranspose(width, (2, 2), (2, 2), name=f"widen{i}")(x)
            x = self.double(jnp.concatenate([skips[i], x], -1), width, f"up{i}")
        return nn.Conv(self.classes, (1, 1), name="head")(x)

    def double(self, x, width, name):
        for j in range(2):
            x = nn.Conv(width, (3, 3), name=f"{name}_conv{j}")(x)
            x = nn.relu(nn.GroupNorm(self.groups, name=f"{name}_norm{j}")(x))
        return x


class UNet3D(nn.Module):
    """nnU-Net for volumes (Isensee et al. 2021): instance normalization, steps instead of pooling."""

    widths: Sequence[int]
    classes: int

    @nn.compact
    def __call__(self, x):
        skips = []
        for i, width in enumerate(self.widths):
            x = self.conv(x, width, 2 if i else 1, f"down{i}_0")
            x = self.conv(x, width, 1, f"down{i}_1")
            skips.append(x)
        for i, width in reversed(list(enumerate(self.widths[:-1]))):
            x = nn.ConvTranspose(width, (2, 2, 2), (2, 2, 2), use_bias=False, name=f"widen{i}")(x)
            x = jnp.concatenate([x, skips[i]], -1)
            x = self.conv(x, width, 1, f"up{i}_0")
            x = self.conv(x, width, 1, f"up{i}_1")
        return nn.Conv(self.classes, (1, 1, 1), name="head")(x)

    def conv(self, x, width, stride, name):
        x = nn.Conv(width, (3, 3, 3), stride, name=f"{name}_conv")(x)
        return nn.leaky_relu(nn.InstanceNorm(name=f"{name}_norm")(x))


class DiffusionBlock(nn.Module):
    """A residual block that is told the time."""

    features: int
    groups: int

    @nn.compact
    def __call__(self, x, time):
        y = nn.Conv(self.features, (3, 3), name="first")(nn.silu(nn.GroupNorm(self.groups, name="norm0")(x)))
        y = y + nn.Dense(self.features, name="time")(nn.silu(time))[:, None, None]
        y = nn.Conv(self.features, (3, 3), name="second")(nn.silu(nn.GroupNorm(self.groups, name="norm1")(y)))
        return y + (x if x.shape[-1] == self.features else nn.Dense(self.features, name="shortcut")(x))


class PixelAttention(nn.Module):
    groups: int

    @nn.compact
    def __call__(self, x):
        features = x.shape[-1]
        y = nn.GroupNorm(self.groups, name="norm")(x).reshape(x.shape[0], -1, features)
        q, k, v = (nn.Dense(features, name=name)(y) for name in ("query", "key", "value"))
        weights = jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", q, k) / math.sqrt(features))
        return x + nn.Dense(features, name="out")(jnp.einsum("bqk,bkc->bqc", weights, v)).reshape(x.shape)


class DiffusionUNet(nn.Module):
    """The U-Net of DDPM (Ho et al. 2020): group normalization of what is concatenated, attention, resizing, time."""

    width: int
    multipliers: Sequence[int]
    blocks: int
    attention: int  # resolution that has it
    groups: int

    @nn.compact
    def __call__(self, x, time):
        channels = x.shape[-1]
        width = self.width
        angles = time[:, None] * np.exp(-np.linspace(0, math.log(1e4), width // 2)).astype(np.float32)
        time = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        time = nn.Dense(4 * width, name="time1")(nn.silu(nn.Dense(4 * width, name="time0")(time)))
        x = nn.Conv(width, (3, 3), name="stem")(x)
        skips = [x]
        for i, multiplier in enumerate(self.multipliers):
            for j in range(self.blocks):
                x = self.block(x, time, multiplier * width, f"down{i}_{j}")
                skips.append(x)
            if i < len(self.multipliers) - 1:
                x = nn.Conv(x.shape[-1], (3, 3), 2, name=f"down{i}")(x)
                skips.append(x)
        x = DiffusionBlock(x.shape[-1], self.groups, name="middle0")(x, time)
        x = PixelAttention(self.groups, name="middle_attention")(x)
        x = DiffusionBlock(x.shape[-1], self.groups, name="middle1")(x, time)
        for i, multiplier in reversed(list(enumerate(self.multipliers))):
            for j in range(self.blocks + 1):
                x = self.block(jnp.concatenate([x, skips.pop()], -1), time, multiplier * width, f"up{i}_{j}")
            if i > 0:
                batch, height, breadth, features = x.shape
                x = jax.image.resize(x, (batch, 2 * height, 2 * breadth, features), "nearest")
                x = nn.Conv(features, (3, 3), name=f"up{i}")(x)
        return nn.Conv(channels, (3, 3), name="head")(nn.silu(nn.GroupNorm(self.groups, name="norm")(x)))

    def block(self, x, time, features, name):
        x = DiffusionBlock(features, self.groups, name=name)(x, time)
        return PixelAttention(self.groups, name=f"{name}_attention")(x) if x.shape[1] == self.attention else x


def diffusion(model: DiffusionUNet, images: np.ndarray) -> Network:
    return linen(model, images, np.linspace(10, 500, len(images), dtype=np.float32))


# -- networks of coordinates ------------------------------------------------------------------------------------------


def siren(sizes: Sequence[int], points: int) -> Network:
    """SIREN (Sitzmann et al. 2020)."""

    def apply(params: Any, x: Any) -> Any:
        *hidden, last = params
        for layer in hidden:
            x = jnp.sin(30 * (x @ layer["w"] + layer["b"]))
        return x @ last["w"] + last["b"]

    def init(key: jax.Array) -> Any:
        layers = []
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
            scale = 1 / n_in if i == 0 else math.sqrt(6 / n_in) / 30
            key, weights, biases = jax.random.split(key, 3)
            layers.append(
                {
                    "w": jax.random.uniform(weights, (n_in, n_out), minval=-scale, maxval=scale),
                    "b": jax.random.uniform(biases, (n_out,), minval=-scale, maxval=scale),
                }
            )
        return layers

    return Network(apply, init, (np.tanh(normal(points, sizes[0])),))


class NeRF(nn.Module):
    """NeRF (Mildenhall et al. 2020): density from the place, color from the direction as well."""

    width: int
    layers: int
    skip: int  # the layer after which the place is read again
    frequencies: tuple[int, int]

    @nn.compact
    def __call__(self, places, directions):
        place, direction = (_waves(x, n) for x, n in zip((places, directions), self.frequencies, strict=True))
        x = place
        for i in range(self.layers):
            x = nn.relu(nn.Dense(self.width, name=f"layer{i}")(x))
            x = jnp.concatenate([place, x], -1) if i == self.skip else x
        density = nn.Dense(1, name="density")(x)
        x = jnp.concatenate([nn.Dense(self.width, name="features")(x), direction], -1)
        return nn.Dense(3, name="color")(nn.relu(nn.Dense(self.width // 2, name="last")(x))), density


def _waves(x: jax.Array, frequencies: int) -> jax.Array:
    angles = [np.float32(2**i) * x for i in range(frequencies)]
    return jnp.concatenate([x, *(wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos))], -1)


# -- the rows ---------------------------------------------------------------------------------------------------------

IMAGE, SMALL = (1, 224, 224, 3), (2, 8, 8, 3)


def head_groups(heads: int, dim: int) -> tuple[tuple[int, int], ...]:
    """Of one attention: its heads, inside each head what queries and keys share, and what values are."""
    return (heads, 1), (dim, heads), (dim, heads)


VISION = (
    *CONVNETS,
    Architecture(
        "ViT-S/16",
        "Flax Linen",
        full=lambda: linen(ViT(16, 384, 12, 6, 1536, 1000), normal(*IMAGE)),  # 22,050,664
        narrow=lambda: linen(ViT(4, 8, 2, 2, 12, 3), normal(*SMALL)),
        free=tuple(sorted((*chain(8, 12, 12), *head_groups(2, 4), *head_groups(2, 4)))),
        pinned=(
            ("params/positions", 1, CONV),
            ("params/patches/kernel", 2, "input"),
            ("params/head/kernel", 1, "output"),
        ),
    ),
    Architecture(
        "Swin-T",
        "Flax Linen",
        full=lambda: linen(Swin(4, 7, 96, (2, 2, 6, 2), (3, 6, 12, 24), 4, 1000), normal(*IMAGE)),  # 28,288,354
        narrow=lambda: linen(Swin(2, 2, 4, (2, 1), (2, 2), 3, 3), normal(*SMALL)),
        # Two layers of width 4 and one of width 8; the tables of offsets move with the heads.
        free=tuple(sorted((*chain(4, 8, 12, 12, 24), *head_groups(2, 2) * 2, *head_groups(2, 4)))),
        pinned=(
            ("params/stage0_layer1_attention/offsets", 0, "gather"),
            ("params/patches/kernel", 0, CONV),
            ("params/head/kernel", 1, "output"),
        ),
    ),
    Architecture(
        "MLP-Mixer-S/16",
        "Flax Linen",
        full=lambda: linen(Mixer(16, 512, 8, 256, 2048, 1000), normal(*IMAGE)),  # 18,528,264
        narrow=lambda: linen(Mixer(4, 6, 2, 10, 7, 3), normal(*SMALL)),
        free=chain(6, 7, 7, 10, 10),
        pinned=(
            ("params/layer0_tokens/up/kernel", 0, CONV),
            ("params/layer1_tokens/down/kernel", 1, CONV),
            ("params/head/bias", 0, "output"),
        ),
    ),
    Architecture(
        "gMLP-S",
        "Flax Linen",
        full=lambda: linen(GMLP(16, 256, 30, 1536, 1000), normal(*IMAGE)),  # 19,422,656
        narrow=lambda: linen(GMLP(4, 6, 2, 10, 3), normal(*SMALL)),
        # The gates move with what they gate.
        free=chain(5, 5, 6),
        pinned=(
            ("params/layer0_mix/kernel", 0, CONV),
            ("params/layer1_mix/bias", 0, CONV),
            ("params/head/bias", 0, "output"),
        ),
    ),
    Architecture(
        "U-Net",
        "Flax Linen",
        # 31,043,521: the paper's 31.0 million, and what normalizes
        full=lambda: linen(UNet((64, 128, 256, 512, 1024), 32, 1), normal(1, 128, 128, 3)),
        narrow=lambda: linen(UNet((4, 6), 2, 3), normal(*SMALL)),
        # Six normalized layers: the groups, and the channels of each group; one that is widened.
        free=tuple(sorted((*chain(*(2,) * 6, 4), *((2, 2),) * 4, *((3, 2),) * 2))),
        pinned=(
            ("params/widen0/kernel", 0, CONV),
            ("params/up0_conv0/kernel", 1, CONV),
            ("params/head/bias", 0, "output"),
        ),
    ),
    Architecture(
        "nnU-Net 3-D",
        "Flax Linen",
        # 31,193,283; the paper's networks have up to 31.2 million
        full=lambda: linen(UNet3D((32, 64, 128, 256, 320, 320), 3), normal(1, 64, 64, 64, 1)),
        narrow=lambda: linen(UNet3D((3, 5), 2), normal(2, 4, 4, 4, 1)),
        free=chain(3, 3, 3, 3, 3, 5, 5),
        pinned=(
            ("params/down0_0_conv/kernel", 2, CONV),
            ("params/widen0/kernel", 0, CONV),
            ("params/head/kernel", 4, "output"),
        ),
    ),
    Architecture(
        "DDPM U-Net",
        "Flax Linen",
        # 35,746,307
        full=lambda: diffusion(DiffusionUNet(128, (1, 2, 2, 2), 2, 16, 32), normal(1, 32, 32, 3)),
        narrow=lambda: diffusion(DiffusionUNet(8, (1, 1), 1, 2, 4), normal(2, 4, 4, 3)),
        # Time twice; queries with keys and values four times. Four groups of two channels: inside each of the eight
        # blocks, the two streams that are normalized alone. Two groups of four: the two that are normalized beside
        # others. Two of two of two: three streams that are normalized both alone and beside others.
        free=tuple(
            sorted(
                (
                    *chain(32, 32, *(8,) * 8),
                    *((4, 1), (2, 4)) * 10,
                    *((2, 1), (4, 2)) * 2,
                    *((2, 1), (2, 2), (2, 4)) * 3,
                )
            )
        ),
        # Where a concatenation is normalized in groups, what is inside the groups moves alike in all of them.
        missed=(*[(2, 4)] * 3, *[(4, 2)] * 2, (2, 2)),
        tied=((2, 1), (2, 1)),
        pinned=(("params/stem/kernel", 2, "input"), ("params/head/kernel", 3, "output")),
    ),
    Architecture(
        "SIREN 2-256x3-1",
        "plain JAX",
        full=lambda: siren((2, 256, 256, 256, 1), 1024),  # 132,609
        narrow=lambda: siren((2, 6, 5, 3), 16),
        free=chain(5, 6),
        pinned=(("0/w", 0, "input"), ("2/b", 0, "output")),
    ),
    Architecture(
        "NeRF",
        "Flax Linen",
        full=lambda: linen(NeRF(256, 8, 4, (10, 4)), normal(64, 3), normal(64, 3)),  # 595,844
        narrow=lambda: linen(NeRF(6, 3, 1, (3, 2)), normal(16, 3), normal(16, 3)),
        # Three layers, the features, the last one.
        free=chain(3, 6, 6, 6, 6),
        pinned=(
            ("params/layer0/kernel", 0, "input"),
            ("params/layer2/kernel", 0, "input"),  # in part: the place, read again
            ("params/color/kernel", 1, "output"),
        ),
    ),
)
