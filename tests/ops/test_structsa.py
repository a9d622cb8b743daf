"""StructSA: the factored form against the equations, computed by the package and transcribed into NumPy."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from structvit_jax.ops import kernels, struct_attention, struct_attention_maps


def factored(*operands, stride=1):
    return struct_attention(*operands, stride=stride)


def volume(query, *operands, stride=1):
    """The equations as they are written."""
    queries = np.arange(np.prod(query.shape[1:-2]))
    return struct_attention_maps(query, *operands, stride=stride, queries=queries).output.reshape(query.shape)


def transcription(query, key, value, key_kernels, value_kernels, stride):
    """Equations 2 to 5 and appendix A word by word, in NumPy float64, position by position."""
    batch, *grid, heads, channels = query.shape
    strides = [1] * (len(grid) - 2) + [stride, stride]
    centres = list(itertools.product(*(range(0, n, s) for n, s in zip(grid, strides, strict=True))))

    def at(x, b, h, position):
        inside = all(0 <= p < n for p, n in zip(position, grid, strict=True))
        return x[(b, *position, h)] if inside else np.zeros(channels)

    def window_of(kernels, b, h, x, centre):
        """The window M around a centre: its kernels [M, channels, D] and vectors [M, channels]."""
        sides, found = kernels.shape[:-3], []
        for offset in itertools.product(*map(range, sides)):
            position = [c + o - (k - 1) // 2 for c, o, k in zip(centre, offset, sides, strict=True)]
            kernel = kernels[(*offset, min(h, kernels.shape[-3] - 1))]
            found.append((np.broadcast_to(kernel, (channels, kernel.shape[-1])), at(x, b, h, position)))
        return tuple(map(np.array, zip(*found, strict=True)))

    output = np.zeros_like(query)
    for b, h in itertools.product(range(batch), range(heads)):
        keys = [window_of(key_kernels, b, h, key, j) for j in centres]
        values = [window_of(value_kernels, b, h, value, j) for j in centres]
        for i in itertools.product(*map(range, grid)):
            q = query[(b, *i, h)]
            logits = np.array([np.einsum("c,mc,mcd->d", q, k, u) for u, k in keys])  # [centre, D]
            logits /= np.sqrt(channels)
            a = np.exp(logits - logits.max())
            a /= a.sum()
            for (u, v), a_j in zip(values, a, strict=True):
                kappa = u @ a_j  # [M, channels]: kappa_ij at each place of the window, times V_j
                output[(b, *i, h)] += (kappa * v).sum(axis=0)
    return output


@st.composite
def cases(draw):
    axes = draw(st.sampled_from([2, 3]))
    grid = tuple(draw(st.integers(1, 4 if axes == 3 else 6)) for _ in range(axes))
    windows = [tuple(draw(st.sampled_from([1, 3, 5])) for _ in range(axes)) for _ in range(2)]
    heads, channels, patterns = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    stride = draw(st.integers(1, 3))
    kernel_shapes = [
        (*window, draw(st.sampled_from([1, heads])), draw(st.sampled_from([1, channels])), patterns)
        for window in windows
    ]
    return (draw(st.integers(1, 2)), *grid, heads, channels), kernel_shapes, stride, draw(st.integers(0, 99))


def operands(shape, kernel_shapes, seed, dtype):
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(s), dtype) for s in [shape] * 3 + list(kernel_shapes)]


def output_and_grads(function, arrays, stride):
    def loss(*arrays):
        out = function(*arrays, stride=stride)
        return jnp.sum(jnp.sin(out)), out

    grads, out = jax.jit(jax.grad(loss, tuple(range(len(arrays))), has_aux=True))(*map(jnp.array, arrays))
    return [out, *grads]


# The paper's own form and its neighbours, which a few random draws may miss: (q, k, v shape), (shapes of
# key and value kernels), stride.
CHOSEN = {
    "image, D=4, channel-wise": ((2, 4, 5, 2, 3), [(3, 3, 2, 3, 4)] * 2, 1),
    "image, D=8, stride 2, 7x7": ((1, 7, 7, 2, 2), [(3, 3, 2, 2, 8), (5, 3, 2, 2, 8)], 2),
    "image, D=4, shared": ((2, 4, 4, 2, 3), [(3, 5, 2, 1, 4), (3, 3, 1, 1, 4)], 1),
    "video, D=4, channel-wise": ((1, 3, 3, 4, 2, 2), [(3, 3, 3, 2, 2, 4)] * 2, 1),
    "video, D=2, element": ((1, 2, 4, 3, 2, 2), [(3, 3, 3, 2, 2, 2), (1, 1, 1, 2, 1, 2)], 2),
}


@pytest.mark.parametrize("case", CHOSEN.values(), ids=CHOSEN)
def test_chosen_cases(case):
    check_both_forms(*case, seed=0)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(cases())
def test_volume_factored_and_transcription_agree(case):
    check_both_forms(*case)


def check_both_forms(shape, kernel_shapes, stride, seed):
    with jax.enable_x64(True):
        arrays = operands(shape, kernel_shapes, seed, np.float64)
        ours = output_and_grads(factored, arrays, stride)
        exact = output_and_grads(volume, arrays, stride)
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10, rtol=0)
    for a in (ours[0], exact[0]):
        np.testing.assert_allclose(a, transcription(*arrays, stride), atol=1e-10, rtol=0)

    arrays = operands(shape, kernel_shapes, seed, np.float32)
    ours, exact = (output_and_grads(function, arrays, stride) for function in (factored, volume))
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1e-3, np.abs(b).max()), rtol=0)


def test_gradients_are_the_transcription_s(x64):
    """Central differences of the NumPy transcription along random directions."""
    arrays = operands((1, 3, 4, 2, 2), [(3, 3, 2, 2, 3), (3, 1, 2, 1, 3)], 5, np.float64)
    directions = operands((1, 3, 4, 2, 2), [(3, 3, 2, 2, 3), (3, 1, 2, 1, 3)], 6, np.float64)
    grads = output_and_grads(factored, arrays, 2)[1:]
    for i, (grad, direction) in enumerate(zip(grads, directions, strict=True)):
        moved = [
            [x + sign * 1e-5 * direction if j == i else x for j, x in enumerate(arrays)] for sign in (1, -1)
        ]
        up, down = (np.sin(transcription(*m, 2)).sum() for m in moved)
        np.testing.assert_allclose((up - down) / 2e-5, np.sum(grad * direction), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("grid", [(4, 5), (2, 3, 4)])
def test_special_cases_are_plain_attention(x64, grid):
    q, k, v = operands((2, *grid, 2, 3), [], 0, np.float64)
    flat = [x.reshape(2, -1, 2, 3) for x in (q, k, v)]
    weights = np.exp(np.einsum("bqnc,bknc->bnqk", *flat[:2]) / np.sqrt(3))
    weights /= weights.sum(axis=-1, keepdims=True)
    plain = np.einsum("bnqk,bknc->bqnc", weights, flat[2]).reshape(q.shape)
    for function in (factored, volume):
        np.testing.assert_allclose(function(q, k, v), plain, atol=1e-12)
        for patterns in (1, 4):  # D equal centre taps, jointly normalised, are plain attention again
            delta = np.zeros((*[3] * len(grid), 2, 3, patterns))
            delta[tuple([1] * len(grid))] = 1.0
            out = function(q, k, v, delta, delta)
            np.testing.assert_allclose(out, plain, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_maps_are_what_the_operation_computes(x64, channels, stride):
    arrays = operands(
        (2, 2, 5, 4, 2, 3), [(3, 3, 3, 2, channels, 4), (1, 3, 5, 2, channels, 4)], 1, np.float64
    )
    queries = [0, 7, 39]
    maps = struct_attention_maps(*arrays, stride=stride, queries=queries)
    strided = (2, -(-5 // stride), -(-4 // stride))
    assert maps.attention.shape == (2, 3, 2, 4, *strided)
    assert maps.kappa.shape == (2, 3, 2, *strided, 1, 3, 5, channels)
    assert maps.final.shape == (2, 3, 2, 2, 5, 4, channels)

    np.testing.assert_allclose(maps.attention.sum(axis=(3, 4, 5, 6)), 1.0, atol=1e-12)
    expected = struct_attention(*arrays, stride=stride).reshape(2, -1, 2, 3)[:, jnp.array(queries)]
    np.testing.assert_allclose(maps.output, expected, atol=1e-12)
    final = jnp.broadcast_to(maps.final, (*maps.final.shape[:-1], 3))
    applied = jnp.einsum("bqnthwc,bthwnc->bqnc", final, arrays[2])
    np.testing.assert_allclose(applied, expected, atol=1e-12)
    # kappa has rank at most D over positions (here 4 of 15 taps)
    rows = np.asarray(maps.kappa)[0, 0, 0, ..., 0].reshape(-1, 15)
    assert np.linalg.matrix_rank(rows, tol=1e-9) <= 4


def test_one_pattern_is_attention_over_convolved_keys_and_values(x64):
    """ConvSA (D = 1), by an independent route: scipy's correlation, then softmax."""
    from scipy.ndimage import correlate

    q, k, v, u_k, u_v = operands((1, 5, 6, 1, 2), [(3, 5, 1, 2, 1), (3, 3, 1, 2, 1)], 2, np.float64)
    convolved = [
        np.stack(
            [correlate(x[0, :, :, 0, c], u[:, :, 0, c, 0], mode="constant") for c in range(2)], -1
        ).reshape(-1, 2)
        for x, u in ((k, u_k), (v, u_v))
    ]
    weights = jax.nn.softmax(q.reshape(-1, 2) @ convolved[0].T / np.sqrt(2), axis=-1)
    out = struct_attention(q, k, v, u_k, u_v).reshape(-1, 2)
    np.testing.assert_allclose(out, weights @ convolved[1], atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 2, "key_kernels": None, "value_kernels": None}, "stride 2 without kernels"),
        ({"value_kernels": jnp.ones((3, 3, 1, 1, 2))}, "D=4 and value_kernels D=2"),
        ({"key_kernels": jnp.ones((2, 3, 1, 1, 4))}, "even window"),
        ({"key_kernels": None}, "both or neither"),
        ({"value_kernels": None}, "both or neither"),
        ({"key_kernels": jnp.ones((3, 3, 3, 1, 4))}, r"should be \[\*window, 2 or 1, 3 or 1, D\]"),
        ({"key_kernels": jnp.ones((3, 3, 1, 4))}, "window should have 2 axes"),
        ({"stride": 0}, "stride 0"),
        ({"stride": 1.5}, "stride 1.5"),
        ({"key": jnp.ones((1, 4, 4, 2, 3), jnp.bfloat16)}, "use one"),
        ({"key_kernels": jnp.ones((3, 3, 1, 1, 0)), "value_kernels": jnp.ones((3, 3, 1, 1, 0))}, "D=0"),
        ({"key": jnp.ones((1, 5, 4, 2, 3))}, "should be equal"),
        ({"query": jnp.ones((1, 4, 2, 3))}, "2-D or 3-D grid"),
    ],
)
def test_bad_arguments_are_one_line(change, message):
    x, weights = jnp.ones((1, 4, 4, 2, 3)), jnp.ones((3, 3, 1, 1, 4))
    arguments = {"query": x, "key": x, "value": x, "key_kernels": weights, "value_kernels": weights} | change
    with pytest.raises(ValueError, match=message) as error:
        struct_attention(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("queries", [[16], [-1], 3])
def test_queries_outside_the_grid_are_refused(queries):
    x = jnp.ones((1, 4, 4, 1, 2))
    with pytest.raises(ValueError, match="queries"):
        struct_attention_maps(x, x, x, queries=queries)


def test_bfloat16_operands_with_float32_kernels():
    x = jnp.array(operands((1, 3, 3, 1, 4), [], 0, np.float32)[0], jnp.bfloat16)
    weights = jnp.array(operands((1,), [(3, 3, 1, 4, 2)], 1, np.float32)[3])
    outputs = [function(x, x, x, weights, weights) for function in (factored, volume)]
    assert {out.dtype for out in outputs} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(*(np.asarray(out, np.float32) for out in outputs), atol=0.05)


def test_convolved_keys_and_values_are_recomputed():
    """The backward pass keeps queries, keys, values, the output and a number per query."""
    arrays = [jnp.array(x) for x in operands((2, 5, 6, 2, 8), [(3, 3, 2, 8, 4)] * 2, 0, np.float32)]
    _, pull = jax.vjp(factored, *arrays)
    kept = sum(x.size for x in jax.tree.leaves(pull) if isinstance(x, jax.Array))
    rows = arrays[0].size
    assert kept <= 4 * rows + 2 * arrays[3].size + 2 * 2 * 30  # convolved keys alone are 4 times their inputs
    recomputed = output_and_grads(kernels.recompute_convolved, arrays, 1)
    for a, b in zip(recomputed, output_and_grads(struct_attention.definition, arrays, 1), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max(), rtol=1e-6)


_COMPILED = """
import jax, jax.numpy as jnp, numpy as np
from structvit_jax.data.digits import MovingDigits
from structvit_jax.ops import struct_attention_maps

clip = MovingDigits("test", 2, seed=0).open(1)[0].frames(range(8))[..., 0].astype(np.float32) / 255
kernels = np.zeros((3, 3, 3, 1, 1, 8), np.float32)
for d, angle in enumerate(np.deg2rad(45 * np.arange(8))):
    for t in (-1, 0, 1):
        kernels[1 + t, 1 - t * round(np.sin(angle)), 1 + t * round(np.cos(angle)), 0, 0, d] = 1
ones, queries = np.ones((1, 1, 1, 1, 1, 8), np.float32), 2304 + 24 * np.arange(24)


def attention(clip):
    padded = jnp.pad(clip, [(0, 0), (2, 2), (2, 2)], mode="edge")
    x = jnp.stack([padded[:, y : y + 24, x : x + 24] for y in range(5) for x in range(5)], -1)
    x = x - x.mean(-1, keepdims=True)
    x = (x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-4))[None, ..., None, :]
    return struct_attention_maps(100 * x, x, x, kernels, ones, queries=queries).attention


np.testing.assert_allclose(jax.jit(attention)(clip), attention(clip), rtol=1e-2, atol=1e-5)
"""


def test_maps_of_a_compiled_program_are_those_of_single_operations():
    """Shared kernels that are lines, on patches of a clip, with XLA's default options, as it once compiled
    wrong sums on CPUs."""
    environment = os.environ | {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    subprocess.run([sys.executable, "-c", _COMPILED], cwd=ROOT, env=environment, check=True)
