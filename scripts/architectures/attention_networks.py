"""Transformers with other attention, other streams and other hidden layers than those of GPT-2."""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .base import Architecture, Network, linen
from .builders import flax_nnx, haiku, tokens
from .gpt import causal_attention

# -- grouped queries, rotary positions, gated units --------------------------------------------------------------------


class LlamaSizes(NamedTuple):
    vocabulary: int
    width: int
    key_heads: int
    queries: int  # heads of queries that share one of keys and values
    dim: int
    hidden: int
    depth: int


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions for an array `[batch, places, heads, dimensions]`."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class LlamaBlock(nnx.Module):
    def __init__(self, sizes: LlamaSizes, rngs: nnx.Rngs):
        def linear(n_in: int, n_out: int) -> nnx.Linear:
            return nnx.Linear(n_in, n_out, use_bias=False, rngs=rngs)

        keys = sizes.key_heads * sizes.dim
        self.dim, self.queries = sizes.dim, sizes.queries
        self.norm_1 = nnx.RMSNorm(sizes.width, epsilon=1e-5, rngs=rngs)
        self.q = linear(sizes.width, keys * sizes.queries)
        self.k, self.v = linear(sizes.width, keys), linear(sizes.width, keys)
        self.o = linear(keys * sizes.queries, sizes.width)
        self.norm_2 = nnx.RMSNorm(sizes.width, epsilon=1e-5, rngs=rngs)
        self.gate, self.up = linear(sizes.width, sizes.hidden), linear(sizes.width, sizes.hidden)
        self.down = linear(sizes.hidden, sizes.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.norm_1(x)
        q, k, v = (layer(h).reshape(*x.shape[:2], -1, self.dim) for layer in (self.q, self.k, self.v))
        q, k = rotate(q), rotate(k)
        k, v = (jnp.repeat(part, self.queries, axis=2) for part in (k, v))
        x = x + self.o(causal_attention(q, k, v).reshape(*x.shape[:2], -1))
        h = self.norm_2(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class Llama(nnx.Module):
    def __init__(self, sizes: LlamaSizes, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(sizes.vocabulary, sizes.width, rngs=rngs)
        self.layers = nnx.List([LlamaBlock(sizes, rngs) for _ in range(sizes.depth)])
        self.norm = nnx.RMSNorm(sizes.width, epsilon=1e-5, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.embedding.attend(self.norm(x))


def llama(sizes: LlamaSizes, batch: int, length: int) -> Network:
    return flax_nnx(lambda rngs: Llama(sizes, rngs), tokens(batch, length, sizes.vocabulary))


SMOL = LlamaSizes(vocabulary=49152, width=576, key_heads=3, queries=3, dim=64, hidden=1536, depth=30)
NARROW_LLAMA = LlamaSizes(vocabulary=17, width=10, key_heads=2, queries=3, dim=4, hidden=7, depth=2)


# -- attention of the framework ----------------------------------------------------------------------------------------


class CharBlock(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.norm_1 = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, use_bias=False, decode=False, keep_rngs=False, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm_1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class CharGPT(nnx.Module):
    """The character model of nanoGPT."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, depth: int, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([CharBlock(width, heads, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embedding(ids) + self.positions(jnp.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x, nnx.make_causal_mask(ids))
        return self.embedding.attend(self.norm(x))


def char_gpt(vocabulary: int, length: int, width: int, heads: int, depth: int, *, batch: int, used: int) -> Network:
    ids = tokens(batch, used, vocabulary)
    return flax_nnx(lambda rngs: CharGPT(vocabulary, length, width, heads, depth, rngs), ids)


# -- encoders ----------------------------------------------------------------------------------------------------------


class BertSizes(NamedTuple):
    vocabulary: int
    length: int
    types: int
    width: int
    heads: int
    hidden: int
    depth: int


def bert_logits(sizes: BertSizes, ids: jax.Array, types: jax.Array, mask: jax.Array) -> jax.Array:
    """Logits of the masked words."""
    width, init = sizes.width, hk.initializers.TruncatedNormal(0.02)

    def norm(x: jax.Array, name: str) -> jax.Array:
        return hk.LayerNorm(-1, create_scale=True, create_offset=True, eps=1e-12, name=name)(x)

    words = hk.Embed(sizes.vocabulary, width, w_init=init, name="words")
    positions = hk.get_parameter("positions", (sizes.length, width), init=init)
    x = words(ids) + hk.Embed(sizes.types, width, w_init=init, name="types")(types) + positions[: ids.shape[1]]
    x = norm(x, "embeddings_norm")
    for i in range(sizes.depth):
        attention = hk.MultiHeadAttention(
            sizes.heads, width // sizes.heads, model_size=width, w_init=init, name=f"layer_{i}_attention"
        )
        x = norm(x + attention(x, x, x, mask=mask[:, None, None, :]), f"layer_{i}_norm_1")
        h = jax.nn.gelu(hk.Linear(sizes.hidden, w_init=init, name=f"layer_{i}_up")(x), approximate=False)
        x = norm(x + hk.Linear(width, w_init=init, name=f"layer_{i}_down")(h), f"layer_{i}_norm_2")
    x = norm(jax.nn.gelu(hk.Linear(width, w_init=init, name="transform")(x), approximate=False), "transform_norm")
    return x @ words.embeddings.T + hk.get_parameter("bias", (sizes.vocabulary,), init=jnp.zeros)


def bert(sizes: BertSizes, batch: int, length: int) -> Network:
    ids = tokens(batch, length, sizes.vocabulary)
    mask = jnp.arange(length)[None, :] < length - jnp.arange(batch)[:, None]
    return haiku(lambda *inputs: bert_logits(sizes, *inputs), ids, ids % sizes.types, mask)


BERT = BertSizes(vocabulary=30522, length=512, types=2, width=768, heads=12, hidden=3072, depth=12)
NARROW_BERT = BertSizes(vocabulary=17, length=6, types=2, width=12, heads=3, hidden=10, depth=2)


# -- encoder and decoder -----------------------------------------------------------------------------------------------


class T5Sizes(NamedTuple):
    vocabulary: int
    width: int
    heads: int
    dim: int
    hidden: int
    depth: int
    buckets: int
    max_distance: int
    experts: int = 0  # in every second layer


def relative_buckets(queries: int, keys: int, count: int, max_distance: int, causal: bool) -> np.ndarray:
    """Numbers of buckets for all pairs of places: one each for near ones, logarithmically wider for far ones."""
    offset = np.arange(keys)[None, :] - np.arange(queries)[:, None]
    side = 0 if causal else count // 2 * (offset > 0)
    count = count if causal else count // 2
    distance = np.maximum(-offset, 0) if causal else np.abs(offset)
    exact = count // 2
    far = np.log(np.maximum(distance, 1) / exact) / math.log(max_distance / exact) * (count - exact)
    return side + np.where(distance < exact, distance, np.minimum(exact + far.astype(np.int64), count - 1))


class RelativePositions(nn.Module):
    """What is added to the scores, `[1, heads, queries, keys]`, the same in all layers."""

    sizes: T5Sizes
    causal: bool

    @nn.compact
    def __call__(self, length: int) -> jax.Array:
        sizes = self.sizes
        table = self.param("table", nn.initializers.normal(1.0), (sizes.buckets, sizes.heads))
        buckets = relative_buckets(length, length, sizes.buckets, sizes.max_distance, self.causal)
        scores = table[jnp.asarray(buckets, jnp.int32)].transpose(2, 0, 1)[None]
        return scores + jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0.0, -1e9) if self.causal else scores


class T5Attention(nn.Module):
    sizes: T5Sizes

    @nn.compact
    def __call__(self, x: jax.Array, source: jax.Array, bias: jax.Array | None) -> jax.Array:
        heads, dim = self.sizes.heads, self.sizes.dim

        def project(name: str, x: jax.Array) -> jax.Array:
            return nn.Dense(heads * dim, use_bias=False, name=name)(x).reshape(*x.shape[:2], heads, dim)

        scores = jnp.einsum("bthd,bshd->bhts", project("q", x), project("k", source))
        weights = nn.softmax(scores if bias is None else scores + bias)
        mixed = jnp.einsum("bhts,bshd->bthd", weights, project("v", source))
        return nn.Dense(x.shape[-1], use_bias=False, name="o")(mixed.reshape(*x.shape[:2], -1))


class Experts(nn.Module):
    """Hidden layers of which the router chooses one for each token."""

    count: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.lecun_normal(batch_axis=0)
        up = self.param("wi", init, (self.count, x.shape[-1], self.hidden))
        down = self.param("wo", init, (self.count, self.hidden, x.shape[-1]))
        weights = nn.softmax(nn.Dense(self.count, use_bias=False, name="router")(x))
        weights = weights * jax.nn.one_hot(jnp.argmax(weights, -1), self.count)
        hidden = nn.relu(jnp.einsum("btd,edf->btef", x, up)) * weights[..., None]
        return jnp.einsum("btef,efd->btd", hidden, down)


class T5Layer(nn.Module):
    sizes: T5Sizes
    number: int

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, source: jax.Array | None = None) -> jax.Array:
        sizes = self.sizes
        h = nn.RMSNorm(1e-6, name="norm_1")(x)
        x = x + T5Attention(sizes, name="attention")(h, h, bias)
        if source is not None:
            x = x + T5Attention(sizes, name="cross")(nn.RMSNorm(1e-6, name="norm_2")(x), source, None)
        h = nn.RMSNorm(1e-6, name="norm_3")(x)
        if sizes.experts and self.number % 2:
            return x + Experts(sizes.experts, sizes.hidden, name="experts")(h)
        h = nn.relu(nn.Dense(sizes.hidden, use_bias=False, name="wi")(h))
        return x + nn.Dense(x.shape[-1], use_bias=False, name="wo")(h)


class T5(nn.Module):
    sizes: T5Sizes

    @nn.compact
    def __call__(self, ids: jax.Array, targets: jax.Array) -> jax.Array:
        sizes = self.sizes
        embed = nn.Embed(sizes.vocabulary, sizes.width, embedding_init=nn.initializers.normal(1.0), name="shared")
        bias = RelativePositions(sizes, causal=False, name="encoder_positions")(ids.shape[1])
        x = embed(ids)
        for i in range(sizes.depth):
            x = T5Layer(sizes, i, name=f"encoder_{i}")(x, bias)
        source = nn.RMSNorm(1e-6, name="encoder_norm")(x)
        bias = RelativePositions(sizes, causal=True, name="decoder_positions")(targets.shape[1])
        x = embed(targets)
        for i in range(sizes.depth):
            x = T5Layer(sizes, i, name=f"decoder_{i}")(x, bias, source)
        return embed.attend(nn.RMSNorm(1e-6, name="decoder_norm")(x) * sizes.width**-0.5)


def t5(sizes: T5Sizes, batch: int, length: int) -> Network:
    return linen(T5(sizes), tokens(batch, length, sizes.vocabulary), tokens(batch, length - 2, sizes.vocabulary))


T5_SMALL = T5Sizes(32128, width=512, heads=8, dim=64, hidden=2048, depth=6, buckets=32, max_distance=128)
SWITCH = T5Sizes(32128, width=768, heads=12, dim=64, hidden=3072, depth=12, buckets=32, max_distance=128, experts=8)
NARROW_T5 = T5Sizes(17, width=8, heads=2, dim=3, hidden=10, depth=2, buckets=8, max_distance=7)

# The stream that encoder and decoder share, as they do their embedding; heads of the encoder and of the decoder, each
# the same in both layers since they share relative positions, and those of each layer's cross attention; for each of
# the six attentions three dimensions of queries and keys and three of values in each of two heads.
T5_FREE = [(8, 1), *[(2, 1)] * 4, *[(3, 2)] * 12]

ATTENTION_NETWORKS = (
    Architecture(
        "SmolLM-135M",
        "Flax NNX",
        lambda: llama(SMOL, 1, 64),
        lambda: llama(NARROW_LLAMA, 2, 6),
        # In each layer the heads of keys, the queries of each, dimensions of values, hidden neurons; and the stream.
        ((2, 1), (2, 1), (3, 2), (3, 2), (4, 2), (4, 2), (7, 1), (7, 1), (10, 1)),
        (("embedding/embedding", 0, "gather"), ("layers/0/q/kernel", 1, "iota"), ("layers/0/k/kernel", 1, "iota")),
    ),
    Architecture(
        "nanoGPT (characters)",
        "Flax NNX",
        lambda: char_gpt(65, 256, 384, 6, 6, batch=1, used=256),
        lambda: char_gpt(17, 7, 12, 3, 2, batch=2, used=7),
        ((3, 1), (3, 1), (4, 3), (4, 3), (4, 3), (4, 3), (12, 1), (48, 1), (48, 1)),
        (("embedding/embedding", 0, "gather"), ("positions/embedding", 0, "gather")),
    ),
    Architecture(
        "BERT (base)",
        "Haiku",
        lambda: bert(BERT, 1, 64),
        lambda: bert(NARROW_BERT, 2, 6),
        ((3, 1), (3, 1), (4, 3), (4, 3), (4, 3), (4, 3), (10, 1), (10, 1), (12, 1)),
        (("words/embeddings", 0, "gather"), ("types/embeddings", 0, "gather"), ("~/positions", 0, "input")),
    ),
    Architecture(
        "T5 (small)",
        "Flax Linen",
        lambda: t5(T5_SMALL, 1, 64),
        lambda: t5(NARROW_T5, 2, 6),
        tuple(sorted([*T5_FREE, *[(10, 1)] * 4])),
        (("params/shared/embedding", 0, "gather"), ("params/encoder_positions/table", 0, "gather")),
    ),
    Architecture(
        "Switch Transformer (base, 8 experts)",
        "Flax Linen",
        lambda: t5(SWITCH, 1, 64),
        lambda: t5(NARROW_T5._replace(experts=4), 2, 6),
        # In the second layer of encoder and decoder the hidden neurons are those of four experts.
        tuple(sorted([*T5_FREE, *[(10, 1)] * 2, *[(4, 1)] * 2, *[(10, 4)] * 2])),
        (("params/shared/embedding", 0, "gather"), ("params/decoder_positions/table", 0, "gather")),
        missed=((4, 1), (4, 1)),  # the experts, whose numbers are told by argmax
    ),
)
