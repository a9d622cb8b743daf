"""The model family: names, overrides, shapes, modes, and implementations of attention in a whole model."""

import dataclasses
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import COMPILED_SOON
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import structvit_jax
from structvit_jax import create_model, list_models
from structvit_jax.models import get_variant, weights
from structvit_jax.models import struct_attention as struct_attention_layer
from structvit_jax.models.layers import BatchNorm, DropPath
from structvit_jax.models.variants import OVERRIDES, Variant
from structvit_jax.ops import kernels, struct_attention_maps, use_kernels
from structvit_jax.utils.errors import UserError

SMALL = {"depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16), "head_width": 8}


def call(model, x, **kwargs):
    """The model's logits through one compiled function."""
    structure, arrays = weights.split(model)
    return jax.jit(lambda arrays, x: structure.model(arrays)(x, **kwargs))(arrays, x)


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class VariantsTest(chex.TestCase):
    """A small model of each network gives the same logits with and without jit."""

    @chex.all_variants(with_pmap=False, without_device=False, with_device=False)
    def test_logits(self):
        for name, shape in (("deit_tiny_struct_2", (2, 24, 24, 3)), ("deit_tiny_video", (1, 8, 24, 24, 3))):
            model, x = create_model(name, num_classes=5), pixels(*shape)
            structure, arrays = weights.split(model)
            logits = self.variant(lambda a, x, s=structure: s.model(a)(x))(arrays, x)
            chex.assert_shape(logits, (shape[0], 5))
            pooled = model.norm(model.features(x)[-1]).reshape(shape[0], -1, 32).mean(axis=1)
            by_hand = pooled @ model.head.kernel[...] + model.head.bias[...]
            chex.assert_trees_all_close(logits, by_hand, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "overrides", "grids"),
    [
        ("structvit_tiny_4_1", (2, 27, 33, 3), SMALL, [(13, 16), (6, 8), (3, 4), (1, 2)]),  # floors
        (
            "structvit_tiny_2_2_video",
            (1, 5, 24, 24, 3),
            SMALL,
            [(3, 12, 12), (3, 6, 6), (3, 3, 3), (3, 1, 1)],
        ),
        ("uniformer_s_plus", (1, 40, 40, 3), SMALL, [(10, 10), (5, 5), (3, 3), (2, 2)]),
        ("deit_tiny_struct_2_video", (1, 8, 24, 32, 3), {"depths": (4,)}, [(8, 3, 4)] * 4),  # other positions
    ],
)
def test_shapes(name, shape, overrides, grids):
    model = create_model(name, num_classes=0, **overrides)
    structure, arrays = weights.split(model)
    run = jax.eval_shape(
        lambda a, x: (structure.model(a)(x), structure.model(a).features(x)), arrays, pixels(*shape)
    )
    chex.assert_shape(run[0], (shape[0], model.variant.widths[-1]))
    assert [feature.shape[1:-1] for feature in run[1]] == grids
    assert len(run[1]) == 4


def test_names():
    names = list_models()
    assert {"uniformer_s_plus", "structvit_b_8_1_video", "deit_s_struct_4", "uniformer_tiny"} <= set(names)
    assert "uniformer_s_plus_video" not in names
    assert list_models("structvit_s_*") == [
        f"structvit_s_{ds}{v}" for ds in ("4_1", "4_2", "8_1") for v in ("", "_video")
    ]
    for name in names:
        get_variant(name)
    assert get_variant("structvit_b_3_2").structure_dim == 3
    assert get_variant("structvit_l_4_1").layer_scale == 1e-6
    assert get_variant("structvit_s_4_1", stride=2, structure_dim=8) == get_variant("structvit_s_8_2")
    assert {field.name for field in dataclasses.fields(Variant)} == {*OVERRIDES, "network", "video"}


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("structvit_s_4", {}, "Did you mean 'structvit_s_4_"),
        ("strutvit_s_4_1", {}, "'structvit_s_4_1'"),
        ("uniformer_s_plus_video", {}, "no video variant"),
        ("uniformer_b_ls_video", {}, "no video variant"),
        ("uniformer_s", {"drop_pth": 0.1}, "'drop_path'"),
        ("uniformer_s", {"stride": 2}, "no window to stride"),
        ("structvit_s_4_1", {"key_window": 4}, "odd"),
        ("structvit_s_4_1", {"key_window": (3, 3, 3)}, "2 of them"),
        ("structvit_s_4_1", {"head_width": 48}, "multiple of head_width"),
        ("structvit_s_4_1", {"aggregation": "elements"}, "'context', 'element'"),
        ("structvit_s_4_1", {"depths": (1, 2)}, "4 positive integers"),
        ("structvit_s_4_1_video", {"stem": "conv"}, "images"),
        ("structvit_s_4_1", {"video": True}, "unknown override 'video'"),
        ("structvit_s_4_1", {"image_size": 32}, "only in a deit"),
        ("deit_s", {"mixer_window": 3}, "only in a uniformer"),
        ("structvit_s_4_1", {"aggregation": "element", "value_window": 5}, "leave value_window out"),
        ("structvit_s_4_1", {"mixer_window": 4}, "odd side"),
        ("structvit_s_4_1", {"seed": -1}, "negative"),
        ("structvit_s_4_1", {"drop_path": 1.0}, "below 1"),
    ],
)
def test_a_wrong_name_or_override_says_what_is_near(name, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        create_model(name, num_classes=2, **overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("structvit_tiny_4_1", (1, 8, 24, 24, 3), r"takes \[batch, height, width, 3\]"),
        ("structvit_tiny_4_1_video", (1, 24, 24, 3), r"takes \[batch, time, height, width, 3\]"),
        ("structvit_tiny_4_1", (1, 24, 24, 1), "shape"),
        ("structvit_tiny_4_1", (1, 15, 24, 3), "needs 16x16 at least"),
        ("deit_tiny_video", (1, 8, 7, 8, 3), "needs 1x8x8 at least"),
    ],
)
def test_a_wrong_input_is_one_line(name, shape, message):
    with pytest.raises(UserError, match=message):
        create_model(name, num_classes=2)(jnp.zeros(shape))


def test_every_override_reaches_the_model():
    """Each field changes the abstract model, its computation, or both."""
    changes = {
        "depths": (1, 1, 2, 1),
        "widths": (8, 8, 16, 32),
        "head_width": 4,
        "patch": 4,
        "stem": "conv",
        "mixer_window": 5,
        "structure_dim": 3,
        "stride": 2,
        "key_window": 1,
        "value_window": (3, 5),
        "key_kernels": "shared",
        "value_kernels": "shared",
        "aggregation": "element",
        "kernel_init": "delta",
        "drop_path": 0.5,
        "layer_scale": 0.1,
        "token_labels": True,
        "remat": "full",
        "kernels": "reference",
        "dtype": "bfloat16",
    }
    elsewhere = {"image_size", "num_frames", "tubelet"}  # DeiT's, see test_deit_positions
    base = {"patch": 2, "mixer_window": 3, **SMALL}

    def program(**overrides):
        options = base | overrides
        if overrides.get("stem") == "conv":
            options |= {"patch": 4}
        model = create_model("structvit_tiny_2_1", num_classes=2, **options)
        model.train()
        structure, arrays = weights.split(model)
        x = jnp.zeros((1, 40, 32, 3))
        run = lambda a, x, key: structure.model(a)(x, key=key)  # noqa: E731
        return str(jax.make_jaxpr(run)(arrays, x, jax.random.key(0))), weights.sha256(arrays)

    reference, tested = program(), set()
    assert program() == reference
    for key, value in changes.items():
        assert program(**{key: value}) != reference, key
        tested.add(key)
    assert program(layer_scale=0.0) == reference
    # conv_layer_scale speaks only where there is layer scale
    assert program(layer_scale=0.1, conv_layer_scale=False) != program(layer_scale=0.1)
    assert tested | elsewhere | {"conv_layer_scale"} == set(OVERRIDES)


@pytest.mark.parametrize(
    ("name", "depths", "remat"),
    [("structvit_tiny_2_1", (1, 2, 2, 1), "full"), ("deit_tiny_struct_2_video", (5,), "dots")],
)
def test_rematerialised_blocks_are_the_same_model(name, depths, remat):
    """Values, statistics and gradients; and there is more to compute."""
    x = jnp.array(pixels(3, 4, 16, 16, 3) if "video" in name else pixels(3, 16, 16, 3))
    small = {} if "video" in name else {"widths": (8, 8, 16, 16), "head_width": 8}

    def train(**overrides):
        model = create_model(name, num_classes=4, depths=depths, drop_path=0.4, **small, **overrides)
        model.train()
        structure, arrays = weights.split(model)

        def loss(params, stats, key):
            network = structure.model(weights.Weights(params, stats))
            logits = network(x, key=key)
            return jnp.sum(logits**2), (logits, weights.batch_stats(network))

        given = (*arrays, jax.random.key(0))
        traced = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(*given)
        return traced.lower().compile(COMPILED_SOON)(*given), str(traced.jaxpr)

    plain, program = train()
    model = create_model(name, num_classes=4, depths=depths, **small, remat=remat)
    closed = jax.jit(lambda x: model(x), compiler_options=COMPILED_SOON)  # over its weights
    assert closed(x).shape == (3, 4)
    other, its_program = train(remat=remat)
    assert its_program.count("rsqrt") > program.count("rsqrt")  # norms are recomputed
    # gradients that are zero but for rounding (biases before a norm) are held by the scale of all
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(plain[1]))
    chex.assert_trees_all_close(other[0], plain[0], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(other[1], plain[1], rtol=1e-4, atol=1e-6 * scale)


def test_deit_positions():
    table = create_model("deit_s_video", num_classes=0, depths=(1,), widths=(64,)).pos_embed
    assert table.shape == (8, 14, 14, 64)
    other = create_model("deit_tiny_video", num_classes=0, image_size=32, num_frames=4, tubelet=2).pos_embed
    assert other.shape == (2, 4, 4, 32)


def test_seed_decides_the_weights():
    digests = [
        weights.sha256(weights.split(create_model("uniformer_tiny", num_classes=3, seed=s))[1])
        for s in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("name", ["structvit_tiny_4_1", "deit_tiny_struct_2_video"])
def test_without_a_seed_a_model_has_its_shapes(name):
    drawn, blank = (weights.split(create_model(name, num_classes=3, seed=seed)) for seed in (0, None))
    chex.assert_trees_all_equal_shapes_and_dtypes(drawn[1], blank[1])
    assert drawn[0] == blank[0]
    assert not blank[1].params["head.kernel"].any() and drawn[1].params["head.kernel"].any()


def test_initialisation_is_the_reference_s():
    model = create_model("structvit_s_8_1", num_classes=50)
    conv, attention = model.blocks1[0], model.blocks3[0].attn
    for kernel, fan_in in (
        (conv.attn.depthwise.kernel, 25),
        (conv.mlp.fc1.kernel, 64),
        (conv.pos_embed.bias, 9),
    ):
        assert 0.9 < float(jnp.abs(kernel[...]).max()) * fan_in**0.5 <= 1.0  # uniform within 1 / sqrt(fan_in)
    for kernel in (attention.qkv.kernel, model.head.kernel):
        assert abs(float(kernel[...].std()) / 0.02 - 1) < 0.02
        assert float(jnp.abs(kernel[...]).max()) > 0.05  # not cut at two deviations
    assert float(jnp.abs(attention.qkv.bias[...]).max()) == 0.0
    assert abs(float(attention.key_kernels[...].std()) * 3 - 1) < 0.03
    assert model.norm.epsilon == conv.norm1.epsilon == 1e-5
    assert model.blocks3[0].norm1.epsilon == 1e-6
    assert model.patch_embed2.norm.epsilon == 1e-5
    rates = model.drop_rates
    np.testing.assert_allclose(rates, np.linspace(0, 0.1, 18))


def test_drop_path_drops_whole_branches_per_example():
    drop = DropPath()
    x = jnp.ones((4000, 2, 3))
    assert (drop(x, 0.25, None) == x).all()  # evaluation mode
    drop.train()
    y = np.asarray(drop(x, 0.25, jax.random.key(0)))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert (y == y[:, :1, :1]).all()
    assert abs((y[:, 0, 0] > 0).mean() - 0.75) < 0.03
    with pytest.raises(ValueError, match="needs a key"):
        drop(x, 0.25, None)


def test_batch_norm_is_torch_s():
    """Two-pass statistics, and an unbiased running variance that evaluation leaves alone."""
    norm = BatchNorm(4, dtype=None, rngs=nnx.Rngs(0))
    x = jnp.array(1000 + 0.1 * pixels(6, 4))
    reference = np.asarray(x, np.float64)
    norm.train()
    y = norm(x)
    np.testing.assert_allclose(
        y, (reference - reference.mean(0)) / np.sqrt(reference.var(0) + 1e-5), atol=2e-2
    )
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * reference.var(0, ddof=1), rtol=1e-5)
    before = np.asarray(norm.var[...])
    norm.eval()
    norm(x)
    assert (norm.var[...] == before).all()


def test_bfloat16_computes_in_bfloat16_with_float32_weights():
    x = pixels(2, 32, 32, 3)
    exact = call(create_model("structvit_tiny_4_1", num_classes=7, **SMALL), x)
    model = create_model("structvit_tiny_4_1", num_classes=7, dtype="bfloat16", **SMALL)
    arrays = weights.split(model)[1]
    assert {array.dtype for array in (arrays.params | arrays.batch_stats).values()} == {jnp.dtype("float32")}
    structure = weights.split(model)[0]
    assert jax.eval_shape(lambda a: structure.model(a).features(x)[-1], arrays).dtype == jnp.bfloat16
    logits = call(model, x)
    assert logits.dtype == jnp.float32
    assert 0 < float(jnp.abs(logits - exact).max() / jnp.abs(exact).max()) < 0.05


def losses_of_training(name, **overrides):
    """Of three AdamW steps from the same weights."""
    x = pixels(4, *([4] if "video" in name else []), 24, 24, 3)
    labels = jnp.array([0, 1, 2, 0])
    model = create_model(name, num_classes=3, **overrides)
    model.train()
    structure, arrays = weights.split(model)
    optimizer = optax.adamw(1e-2)

    @partial(jax.jit, compiler_options=COMPILED_SOON)
    def step(arrays, state):
        def loss_fn(params):
            model = structure.model(arrays._replace(params=params))
            loss = optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()
            return loss, weights.batch_stats(model)

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(arrays.params)
        updates, state = optimizer.update(grads, state, arrays.params)
        return weights.Weights(optax.apply_updates(arrays.params, updates), stats), state, loss

    state, values = optimizer.init(arrays.params), []
    for _ in range(3):
        arrays, state, loss = step(arrays, state)
        values.append(float(loss))
    assert values[-1] < values[0]
    return values


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("structvit_tiny_3_2", SMALL),
        ("deit_tiny_struct_2_video", {"depths": (1,), "widths": (16,), "num_frames": 4}),
    ],
)
def test_the_equations_and_the_factored_form_train_alike(name, overrides, monkeypatch):
    """A network whose attention is computed as the equations are written, and one in plain JAX."""
    factored = losses_of_training(name, **overrides)
    reference = losses_of_training(name, kernels="reference", **overrides)
    np.testing.assert_allclose(reference, factored, rtol=1e-4)

    def volume(query, *operands, stride):
        queries = np.arange(np.prod(query.shape[1:-2]))
        maps = struct_attention_maps(query, *operands, stride=stride, queries=queries)
        return maps.output.reshape(query.shape)

    monkeypatch.setattr(struct_attention_layer, "struct_attention", volume)
    np.testing.assert_allclose(losses_of_training(name, **overrides), factored, rtol=1e-4)


def test_the_kernels_for_tpus_train_alike(monkeypatch):
    """All of them in a whole network, interpreted."""
    expected, ran = losses_of_training("structvit_tiny_2_1", **SMALL), set()

    def recorded(kernel):
        def run(*args, **options):
            ran.add(kernel.name)
            return kernel.run(*args, **options)

        return kernel._replace(platform="cpu", run=run)

    rows = tuple(recorded(kernel) for kernel in kernels.TABLE if kernel.platform == "tpu")
    monkeypatch.setattr(kernels, "TABLE", rows)
    np.testing.assert_allclose(losses_of_training("structvit_tiny_2_1", **SMALL), expected, rtol=1e-4)
    assert ran == {kernel.name for kernel in rows} - {
        "attention_blocks", "depthwise_grouped", "mlp_recomputing_gelu",
    }  # fmt: skip


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_kernels_of_a_model_and_of_the_context(choice, monkeypatch):
    """The model's own choice holds, and "auto" leaves that of the context."""
    seen = []
    row = kernels.named("linear_of_rows")
    spy = row._replace(run=lambda *args: seen.append(1) or row.run(*args))
    monkeypatch.setattr(kernels, "TABLE", (spy,))
    model = create_model("deit_tiny_struct_2", num_classes=2, depths=(1,), kernels=choice)
    x = jnp.zeros((1, 24, 24, 3))
    model(x)
    assert bool(seen) == (choice == "auto")
    seen.clear()
    with use_kernels("reference"):
        model(x)
    assert not seen


def test_a_program_can_be_traced_with_the_definitions_alone():
    """As for the operation counts of `structvit plan`; also after it was traced with kernels."""
    structure, arrays = weights.split(create_model("structvit_tiny_2_1", num_classes=2, **SMALL))
    x = jnp.zeros((2, 32, 32, 3))
    gradients = jax.jit(jax.grad(lambda params: structure.model(arrays._replace(params=params))(x).sum()))
    traces = [str(gradients.trace(arrays.params).jaxpr)]
    with use_kernels("reference"):
        traces.append(str(gradients.trace(arrays.params).jaxpr))
    assert "custom_vjp" in traces[0] or "ffi_call" in traces[0]
    assert "conv_general_dilated" in traces[1]
    assert not re.search("custom_vjp|ffi_call|pallas_call|optimization_barrier", traces[1])


class Transformer(nnx.Module):
    """A user's module with one StructAttention layer."""

    def __init__(self, rngs):
        self.inputs = nnx.Linear(3, 16, rngs=rngs)
        self.attention = structvit_jax.StructAttention(16, heads=2, structure_dim=2, rngs=rngs)
        self.head = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        x = self.inputs(x)
        return self.head((x + self.attention(x)).mean(axis=(1, 2)))


@pytest.mark.parametrize("split", ["data", "fsdp"])
def test_struct_attention_on_eight_devices_needs_only_a_mesh(split):
    """Losses and gradients are those of one device, with whole parameters and with parameters in parts."""
    x = jnp.asarray(pixels(8, 6, 6, 3))
    graphdef, weights_ = nnx.split(Transformer(nnx.Rngs(0)))

    def loss(weights_, x):
        return (nnx.merge(graphdef, weights_)(x) ** 2).sum()

    expected = jax.jit(jax.value_and_grad(loss))(weights_, x)
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:8])

    def place(array):
        axes = [axis for axis, n in enumerate(array.shape) if n % 8 == 0] if split == "fsdp" else []
        return NamedSharding(mesh, PartitionSpec(*[None] * axes[0], "devices") if axes else PartitionSpec())

    with jax.set_mesh(mesh):
        places = jax.tree.map(place, weights_)
        weights_ = jax.device_put(weights_, places)
        batch = jax.device_put(x, PartitionSpec("devices"))
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, places))
        traced = step.trace(weights_, batch)
        assert str(traced.jaxpr).count("shard_map") >= 3  # keys, values, attention
        found = traced.lower().compile()(weights_, batch)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_struct_attention_fits_into_another_transformer():
    class Residual(nnx.Module):
        def __init__(self, rngs):
            self.attention = structvit_jax.StructAttention(
                12, heads=3, structure_dim=2, key_window=(3, 5), rngs=rngs
            )

        def __call__(self, x):
            return x + self.attention(x)

    model = Residual(nnx.Rngs(0))
    x = jnp.array(pixels(2, 5, 6, 12))
    assert nnx.jit(lambda m, x: m(x))(model, x).shape == x.shape
    assert model.attention.key_kernels.shape == (3, 5, 3, 4, 2)
    maps = model.attention.maps(x, jnp.array([0, 29]))
    chex.assert_shape(maps.final, (2, 2, 3, 5, 6, 4))
    nnx.eval_shape(lambda: Residual(nnx.Rngs(0)))  # builds abstractly, too
