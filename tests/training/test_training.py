"""Schedule, weight decay, losses, sharding, evaluation, and train steps on several devices."""

import contextlib
import re
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import COMPILED_SOON
from small import setup, small_config

from structvit_jax import create_model, data
from structvit_jax.config import Durations, default_config, durations, steps_in
from structvit_jax.models import weights
from structvit_jax.ops.kernels.target import Device
from structvit_jax.runtime import mesh
from structvit_jax.training import losses, optim, step
from structvit_jax.training.evaluation import StepRunner, evaluate
from structvit_jax.training.learner import check_train_batch
from structvit_jax.utils.errors import UserError


def test_one_device_eight_data_parallel_eight_fsdp_have_the_same_losses():
    config = small_config()
    digits = data.load(config.data, config.augment)
    curves = {}
    for data_axis, fsdp in ((1, 1), (8, 1), (1, 8)):
        grid, _, state, step_fn = setup(config, data_axis, fsdp)
        stream, curve, compiled = digits.train_batches(16, start_step=0), [], None
        for _ in range(5):
            batch = mesh.put_batch(grid, next(stream))
            compiled = compiled or step_fn.lower(state, batch).compile(COMPILED_SOON)
            state, metrics = compiled(state, batch)
            curve.append([float(metrics[key]) for key in ("loss", "grad_norm")])
        stream.close()
        gathered = re.findall(r"= \(?u8\S* all-gather", compiled.as_text())
        assert not gathered, "each device gets its own images only"
        curves[data_axis, fsdp] = np.array(curve)
        split_arrays = [a for a in jax.tree.leaves(state) if not a.sharding.is_fully_replicated]
        assert bool(split_arrays) == (fsdp > 1)
    for curve in curves.values():
        np.testing.assert_allclose(curve[:, 0], curves[1, 1][:, 0], rtol=1e-5)
    assert curves[1, 1][-1, 0] < curves[1, 1][0, 0]


def test_large_arrays_are_split_over_fsdp():
    grid = mesh.make_mesh(2, 4, jax.devices())
    shapes = {
        "blocks1.0.mlp.fc1.kernel": (4, 8192),
        "blocks3.0.attn.qkv.kernel": (64, 64),  # small
        "head.kernel": (129, 129),  # odd
        "head.bias": (65536,),
        "blocks3.0.attn.key_kernels": (3, 3, 3, 5, 64, 4),
        "blocks1.0.attn.depthwise.kernel": (5, 5, 5, 1, 256),
        "pos_embed": (8, 14, 14, 384),
    }
    arrays = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in shapes.items()}
    found = {key: tuple(one.spec) for key, one in mesh.state_sharding(grid, arrays).items()}
    split_axes = (1, None, None, 0, 4, 4, 3)
    expected = [() if axis is None else (None,) * axis + ("fsdp",) for axis in split_axes]
    assert found == dict(zip(shapes, expected, strict=True))


@pytest.mark.parametrize(
    "name", ["structvit_b_4_1_video", "uniformer_s_plus", "structvit_l_4_1", "deit_s_struct_4"]
)
def test_sharding_rules_cover_every_parameter(name):
    """Large arrays of weights and optimizer state are split evenly: each device holds its fraction."""
    model = create_model(name, num_classes=174, depths=(1,) if name.startswith("deit") else (1, 1, 1, 1))
    params = weights.split(model)[1].params
    optimizer = optim.make_optimizer(default_config().optimizer)
    state = jax.eval_shape(optimizer.transform.init, params)
    large = [a for a in jax.tree.leaves((params, state)) if a.size * 4 >= 2**16]
    for ways in (2, 4, 8):
        grid = mesh.make_mesh(-1, ways)
        shardings = jax.tree.leaves(mesh.state_sharding(grid, (params, state)))
        held = [
            int(np.prod(one.shard_shape(a.shape)))
            for a, one in zip(jax.tree.leaves((params, state)), shardings, strict=True)
            if a.size * 4 >= 2**16
        ]
        assert sum(held) / sum(a.size for a in large) <= 1.1 / ways


def runner(model, config, grid):
    """Return the evaluation step of a model."""
    structure, arrays = weights.split(model)
    return StepRunner(step.make_eval_step(structure, config, grid, arrays), grid)


def test_evaluation_counts_every_example_once():
    config = small_config()
    digits = data.load(config.data, config.augment)
    grid, model, state, _ = setup(config, 8, 1)
    scores, eval_runner = [], runner(model, config, grid)
    for config.eval.batch_size in (16, 56, 56):  # 360 is a multiple of neither
        evaluation = evaluate(eval_runner, state.weights, digits, config.eval)
        assert len(set(evaluation.ids)) == 360 and evaluation.scores.shape == (360, 10)
        scores.append(evaluation.summary())
    assert scores[0] == scores[1] == scores[2]
    assert len(eval_runner._compiled) == 2, "the step is compiled once for each shape"
    assert scores[0]["examples"] == 360 and scores[0]["missing"] == 0
    assert 0 <= scores[0]["top1"] <= scores[0]["top5"] <= 1
    more = types.SimpleNamespace(test_examples=361, test_ids=(), test_batches=digits.test_batches)
    with pytest.raises(RuntimeError, match="360 examples of 361"):
        evaluate(eval_runner, state.weights, more, config.eval)


@pytest.mark.parametrize("average", ["logits", "softmax"])
def test_scores_are_averaged_over_views(average):
    """Scores equal the mean over views that are scored one at a time."""
    config = small_config()
    config.data.test_crops, config.eval.average, config.eval.batch_size = 3, average, 360
    digits = data.load(config.data, config.augment)
    views = np.random.default_rng(0).integers(0, 255, (360, 3, 32, 32, 3), np.uint8)
    labels = np.arange(360, dtype=np.int32) % 10
    mask = np.arange(360) != 7
    batch = {"inputs": views, "labels": labels, "mask": mask, "index": np.arange(360, dtype=np.int32)}
    batch["problems"] = (data.Problem("7", "torn"),)
    source = types.SimpleNamespace(
        test_examples=360, test_ids=digits.test_ids, test_batches=lambda size, shard: (b for b in [batch])
    )
    grid, model, state, _ = setup(config, 1, 1)
    evaluation = evaluate(runner(model, config, grid), state.weights, source, config.eval)
    one_view = jax.jit(lambda inputs: model(step.normalize(inputs, config)), compiler_options=COMPILED_SOON)
    logits = [np.asarray(one_view(views[:, view])) for view in range(3)]
    expected = np.mean([jax.nn.softmax(one) if average == "softmax" else one for one in logits], axis=0)
    np.testing.assert_allclose(evaluation.scores, expected, rtol=2e-4, atol=2e-5)
    with pytest.raises(
        UserError, match=r"1 of 360 test examples cannot be read \(7: torn\).*max_unreadable=1"
    ):
        evaluation.summary()
    scores = evaluation._replace(max_unreadable=1).summary()
    hits = (expected.argmax(1) == labels)[mask]
    assert (scores["examples"], scores["missing"]) == (359, 1)
    assert scores["top1"] == pytest.approx(hits.mean())
    classes = [hits[labels[mask] == c].mean() for c in range(10)]
    assert scores["mean_class"] == pytest.approx(np.mean(classes))


def test_masked_rows_repeat_a_real_row():
    """They repeat an unmasked row, so that batch statistics and mixing see real examples."""
    batch = {
        "inputs": jnp.arange(5)[:, None] * jnp.ones((5, 3), jnp.int32),
        "labels": jnp.arange(5),
        "mask": jnp.array([False, True, False, True, True]),
    }
    filled = step.fill_masked_rows(batch)
    assert filled["labels"].tolist() == filled["inputs"][:, 0].tolist() == [1, 1, 1, 3, 4]
    assert filled["mask"].tolist() == batch["mask"].tolist()


def test_masked_examples_do_not_count():
    logits = jnp.array(np.random.default_rng(0).standard_normal((6, 4)))
    labels, mask = jnp.array([0, 1, 2, 3, 0, 1]), jnp.array([True, True, False, True, False, True])
    kept = np.flatnonzero(mask)
    smooth = losses.smooth_targets(labels, 4, 0.1)
    masked = losses.cross_entropy(logits, smooth, mask)
    alone = losses.cross_entropy(logits[kept], smooth[kept], jnp.ones(4, bool))
    np.testing.assert_allclose(masked, alone, rtol=1e-6)
    # Label smoothing by its definition.
    targets = np.full((4, 4), 0.1 / 4) + 0.9 * np.eye(4)[np.asarray(labels)[kept]]
    log_probabilities = np.log(np.exp(logits[kept]) / np.exp(logits[kept]).sum(-1, keepdims=True))
    np.testing.assert_allclose(alone, -(targets * log_probabilities).sum(-1).mean(), rtol=1e-5)


def test_in_top():
    logits = jnp.array(
        [[3.0, 2.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [jnp.nan, 1.0, 0.0], [jnp.nan] * 3]
    )
    labels = jnp.array([1, 0, 1, 1, 0])
    assert losses.in_top(logits, labels, 1).tolist() == [False, True, False, False, False]
    assert losses.in_top(logits, labels, 2).tolist() == [True, True, True, False, False]
    assert losses.in_top(logits, labels, 5).tolist() == [True, True, True, False, False]


def test_schedule():
    config = default_config().optimizer
    config.lr, config.warmup_lr, config.end_lr = 1.0, 0.1, 0.01
    schedule = optim.learning_rate(config, Durations(100, 10))
    np.testing.assert_allclose([schedule(s) for s in (0, 5, 10, 100)], [0.1, 0.55, 1.0, 0.01], rtol=1e-5)
    np.testing.assert_allclose(schedule(55), 0.01 + 0.99 * 0.5, rtol=1e-5)  # half of the cosine


def test_schedule_as_the_released_programs_run_it():
    """timm's schedule: updates once an epoch, one epoch late; the cosine counts the warm-up; a cool-down."""
    config = default_config().optimizer
    config.lr, config.warmup_lr, config.end_lr = 1e-3, 1e-6, 1e-5
    config.lr_update_delay, config.schedule_origin = 1, "start"
    total, warm = 300, 5
    lengths = Durations(310 * 4, warmup=warm * 4, cooldown=10 * 4, lr_update_every=4)
    schedule = optim.learning_rate(config, lengths)
    for epoch in (0, 1, 2, 5, 6, 150, 300, 301, 309):
        t = max(epoch - 1, 0)
        cosine = 1e-5 + (1e-3 - 1e-5) * (1 + np.cos(np.pi * min(t, total) / total)) / 2
        expected = 1e-6 + t * (1e-3 - 1e-6) / warm if t < warm else cosine
        np.testing.assert_allclose([schedule(4 * epoch), schedule(4 * epoch + 3)], expected, rtol=1e-4)


def run_steps(config, steps=3):
    """Return the states before and after each of a few steps."""
    digits = data.load(config.data, config.augment)
    grid, _, state, step_fn = setup(config, 1, 1)
    states, compiled = [jax.tree.map(np.asarray, state)], None
    as_users = dict.fromkeys(COMPILED_SOON, True)  # other options round the moving average differently
    with contextlib.closing(digits.train_batches(16, start_step=0)) as stream:
        for _ in range(steps):
            batch = mesh.put_batch(grid, next(stream))
            compiled = compiled or step_fn.lower(state, batch).compile(as_users)
            state, _ = compiled(state, batch)
            states.append(jax.tree.map(np.asarray, state))
    return states


def test_frozen_weights_stay_and_normalise_with_their_running_statistics():
    config = small_config()
    trained_parts = ("blocks4.", "norm.", "head.")
    config.optimizer.freeze = ",".join(["*", *(f"!{part}*" for part in trained_parts)])
    config.optimizer.ema = 0.5
    states = run_steps(config)
    first, last = states[0], states[-1]
    for name, array in last.weights.params.items():
        trained = name.startswith(trained_parts)
        assert np.array_equal(array, first.weights.params[name]) != trained, name
    for name, array in last.weights.batch_stats.items():
        assert np.array_equal(array, first.weights.batch_stats[name]) != name.startswith("norm."), name
    moments = {
        str(path[-1].key) for path, _ in jax.tree_util.tree_leaves_with_path(last.optimizer) if len(path) > 2
    }
    assert moments and all(name.startswith(("blocks4.", "norm.", "head.")) for name in moments)
    average = first.weights
    for state in states[1:]:
        average = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, average, state.weights)
    chex.assert_trees_all_close(last.average, average, rtol=1e-6)


def test_frozen_names():
    names = ["patch_embed1.proj.kernel", "blocks1.0.norm1.scale", "blocks3.0.norm1.scale", "head.kernel"]
    assert optim.frozen_names("", names) == set()
    assert optim.frozen_names("*, !head.*", names) == set(names[:3])
    assert optim.frozen_names("patch*,blocks*,!blocks3.*", names) == set(names[:2])
    with pytest.raises(UserError, match=r"'block1\.\*' matches no weights\. Known: blocks1\.\*, blocks3"):
        optim.frozen_names("block1.*", names)
    with pytest.raises(UserError, match="leaves nothing to train"):
        optim.frozen_names("*", names)


def test_layer_wise_learning_rates():
    names = ["patch_embed1.proj.kernel", "blocks1.0.a", "blocks1.1.a", "patch_embed2.a", "blocks2.0.a"]
    names += ["norm.a", "head.a"]
    rates = optim.layer_rates(names, (2, 1), 0.5)
    assert [rates[name] for name in names] == [0.5**4, 0.5**3, 0.5**2, 0.5, 0.5, 1, 1]
    deit_names = ["pos_embed", "patch_embed.a", "blocks.0.a", "blocks.11.a", "head.a"]
    deit = optim.layer_rates(deit_names, (12,), 0.5)
    assert list(deit.values()) == [0.5**13, 0.5**13, 0.5**12, 0.5, 1]
    config = default_config().optimizer
    config.layer_decay, config.weight_decay = 0.5, 0.1
    params = {name: jnp.ones((2, 2)) for name in names}
    slow = optim.make_optimizer(config, names, (2, 1)).transform
    config.layer_decay = 1.0
    plain = optim.make_optimizer(config, names, (2, 1)).transform
    (a, _), (b, _) = (o.update(params, o.init(params), params) for o in (slow, plain))
    for name in names:
        np.testing.assert_allclose(a[name], rates[name] * b[name], rtol=1e-6)


def test_adamw_decays_matrices_only():
    config = default_config().optimizer
    config.weight_decay = 0.5
    optimizer = optim.make_optimizer(config).transform
    names = ["blocks1.0.pos_embed.kernel", "blocks3.0.attn.key_kernels", "head.kernel"]
    spared = ["head.bias", "norm.scale", "blocks3.0.gamma_1"]
    params = {name: jnp.ones((3, 3)) for name in names} | {name: jnp.ones(3) for name in spared}
    params["pos_embed"] = jnp.ones((2, 2, 3))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    decayed = {name for name, update in updates.items() if float(update.max()) > 0}
    assert decayed == set(names)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_adam_equals_that_of_optax(platform, monkeypatch):
    """Updates and moments agree over several steps; a step that is not finite keeps the moments."""
    monkeypatch.setattr(optim, "current_device", lambda: Device(platform, ""))
    config = default_config().optimizer
    config.weight_decay = 0.0
    adam = optim.make_optimizer(config).transform
    reference = optax.scale_by_adam(config.b1, config.b2, config.eps)
    rng = np.random.default_rng(0)
    params = {"a": jnp.ones((3, 5)), "b": jnp.ones(7)}
    state, expected_state = adam.init(params), reference.init(params)
    update, expected_update = jax.jit(adam.update), jax.jit(reference.update)
    for scale in (1.0, 1e-6, 0.0, 1e3):
        grads = {name: scale * rng.standard_normal(x.shape, np.float32) for name, x in params.items()}
        updates, state = update(grads, state, params, finite=True)
        expected, expected_state = expected_update(grads, expected_state)
        chex.assert_trees_all_close((updates, state[0]), (expected, expected_state), rtol=1e-6)
        not_finite = jax.tree.map(lambda x: x * jnp.nan, grads)
        chex.assert_trees_all_equal(update(not_finite, state, params, finite=False)[1], state)


def orthogonalised(matrix):
    """Five Newton-Schulz iterations with the coefficients of Jordan et al. (2024), in float64."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_muon_orthogonalises_the_momentum_of_matrices():
    """All others get Adam's updates; a step that is not finite keeps the state."""
    config = default_config().optimizer
    config.weight_decay = 0.0
    rng = np.random.default_rng(0)
    shapes = {"blocks1.0.mlp.fc1.kernel": (5, 12), "patch_embed1.proj.kernel": (2, 2, 3, 7)}
    others = {"head.kernel": (7, 3), "blocks1.0.attn.depthwise.kernel": (3, 3, 1, 5), "norm.scale": (5,)}
    others["blocks3.0.attn.key_kernels"] = (3, 3, 2, 4, 4)
    params = {name: jnp.ones(shape) for name, shape in (shapes | others).items()}
    adam = optim.make_optimizer(config).transform
    config.name = "muon"
    muon = optim.make_optimizer(config).transform
    state, adam_state = muon.init(params), adam.init(params)
    momentum = {name: np.zeros(shape) for name, shape in shapes.items()}
    update = jax.jit(muon.update)
    for count in range(1, 4):
        grads = {name: rng.standard_normal(x.shape, np.float32) for name, x in params.items()}
        updates, state = update(grads, state, params, finite=True)
        expected, adam_state = adam.update(grads, adam_state, params)
        for name, shape in shapes.items():
            momentum[name] = 0.95 * momentum[name] + 0.05 * grads[name]
            ahead = 0.95 * momentum[name] / (1 - 0.95 ** (count + 1))  # both without their bias to zero
            nesterov = ahead + 0.05 * grads[name] / (1 - 0.95**count)
            matrix = orthogonalised(nesterov.reshape(-1, shape[-1]))
            singular = np.linalg.svd(matrix, compute_uv=False)
            assert singular.min() > 0.5 and singular.max() < 1.3
            wanted = 0.2 * max(matrix.shape) ** 0.5 * matrix.reshape(shape)
            np.testing.assert_allclose(updates[name], wanted, atol=2e-4)
        for name in others:
            np.testing.assert_allclose(updates[name], expected[name], rtol=1e-6)
        not_finite = jax.tree.map(lambda x: x * jnp.nan, grads)
        chex.assert_trees_all_equal(update(not_finite, state, params, finite=False)[1], state)


def test_gradients_are_clipped_by_their_global_norm():
    config = default_config().optimizer
    config.clip_norm = 1.0
    clip = optim.make_optimizer(config).transform
    plain = optim.make_optimizer(default_config().optimizer).transform
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
    grads = {"a": jnp.full((2, 2), 30.0), "b": jnp.full(2, 40.0)}
    norm = float(np.sqrt(4 * 30**2 + 2 * 40**2))
    clipped = clip.update(grads, clip.init(params), params)[1]
    expected = plain.update(jax.tree.map(lambda g: g / norm, grads), plain.init(params), params)[1]
    chex.assert_trees_all_close(clipped[1].mu, expected[0].mu, rtol=1e-6)


def test_durations():
    texts = ["7 steps", "2 epochs", "0.5 epoch", "640 examples", "", "0 steps", "0.001 epochs"]
    assert [steps_in(text, "key", 64, 1600) for text in texts] == [7, 50, 12, 10, 0, 0, 1]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.duration", "3 weeks", "is '3 weeks'; write 'N steps'"),
        ("train.duration", "", "at least one step"),
        ("train.duration", "9" * 400 + " steps", r"use fewer than 2\*\*31 steps"),
        ("checkpoint.every", "99999999999999999999 steps", r"use fewer than 2\*\*31 steps"),
        ("train.duration", "0 epochs", "at least one step"),
        ("optimizer.warmup", "101 steps", "too long for a run of 100"),
        ("eval.every", "often", r"config\.eval\.every is 'often'"),
    ],
)
def test_invalid_durations_name_their_key(key, value, message):
    config = default_config()
    assert durations(config, 640) == Durations(total=100, warmup=0, eval_every=0, save_every=10, keep_every=0)
    section, name = key.split(".")
    config[section][name] = value
    with pytest.raises(UserError, match=message):
        durations(config, 640)


def test_mesh_and_batch_must_fit_the_devices():
    with pytest.raises(UserError, match="data=3 x fsdp=2 devices; there are 8"):
        mesh.make_mesh(3, 2)
    with pytest.raises(UserError, match="fsdp is 3, which does not divide 8"):
        mesh.make_mesh(-1, 3)
    with pytest.raises(UserError, match=r"config\.data\.batch_size is 12, not divisible by 8 devices"):
        mesh.check_batch(mesh.make_mesh(-1, 1), "data.batch_size", 12)


def test_digest_covers_names_types_shapes_and_bytes():
    def digest(**arrays):
        return weights.sha256(weights.Weights(arrays, {}))

    a = jnp.arange(6, dtype=jnp.float32)
    different = [a, a.reshape(2, 3), a.astype(jnp.int32), a + 1]
    assert len({digest(b=a), *(digest(a=array) for array in different)}) == 5
    swapped = weights.Weights({"a": a}, {"b": a}), weights.Weights({"b": a}, {"a": a})
    assert weights.sha256(swapped[0]) == weights.sha256(swapped[1])


@pytest.mark.parametrize(("name", "batch", "parts", "warns"), [
    ("uniformer_tiny", 1, 1, True),
    ("uniformer_tiny", 4, 4, True),
    ("uniformer_tiny", 4, 2, False),
    ("deit_tiny", 1, 1, False),
])  # fmt: skip
def test_warning_about_steps_on_single_examples(name, batch, parts, warns, capsys):
    """BatchNorm subtracts the mean that the head reads: training on one example learns nothing."""
    config = default_config()
    config.data.batch_size, config.train.grad_accum_steps = batch, parts
    small = {"depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16), "head_width": 8} if name != "deit_tiny" else {}
    model = create_model(name, num_classes=3, **small)
    learner = types.SimpleNamespace(config=config, model=model, mesh=mesh.single_device_mesh())
    check_train_batch(learner)
    assert ("normalises a single example" in capsys.readouterr().out) == warns
    if warns and batch == 1:
        model.train()
        logits = [model(jax.random.normal(jax.random.key(seed), (1, 32, 32, 3))) for seed in range(2)]
        np.testing.assert_allclose(*logits, atol=1e-5)
