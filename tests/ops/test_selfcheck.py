"""Kernels are compared with definitions before their first use; here on CPUs, too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structvit_jax.ops import kernels
from structvit_jax.ops.attention import attention
from structvit_jax.ops.dispatch import OPERATIONS
from structvit_jax.ops.kernels import selfcheck
from structvit_jax.ops.kernels.target import current_device


def exact(query, key, value):
    return attention.definition(query, key, value)


def wrong(query, key, value):
    return attention.definition(query, key, value) * 1.01


@jax.custom_vjp
def wrong_gradient(query, key, value):
    return attention.definition(query, key, value)


wrong_gradient.defvjp(
    lambda *args: (attention.definition(*args), args),
    lambda args, cotangent: tuple(1.01 * d for d in jax.vjp(attention.definition, *args)[1](cotangent)),
)


def raising(query, key, value):
    raise NotImplementedError("no such instruction\non this device")


def not_a_number(query, key, value):
    return attention.definition(query, key, value) * jnp.nan


@pytest.fixture
def checked(monkeypatch, tmp_path, only):
    """Check kernels of attention on CPUs, with an empty cache; returns a function that adds one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selfcheck, "CHECKED", {"cpu"})
    forget()
    runs = []

    def use(run):
        def counted(*args):
            runs.append(args[0].shape)
            return run(*args)

        only(kernels.Kernel(run.__name__, "attention", "cpu", counted, "here", "for a test"))
        return runs

    yield use
    forget()


def forget():
    """Forget verdicts, as a new process does."""
    selfcheck._problem.cache_clear()


def arrays(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((2, 11, 2, 4)), dtype) for _ in range(3)]


def call(args):
    """Use attention inside a function that is traced and differentiated."""
    return jax.jit(jax.value_and_grad(lambda *qkv: attention(*qkv).astype(jnp.float32).sum()))(*args)


def test_a_kernel_that_agrees_is_used(checked, capfd, tmp_path):
    runs, args = checked(exact), arrays()
    loss, _ = call(args)
    np.testing.assert_allclose(loss, attention.definition(*args).sum(), rtol=1e-5)
    assert args[0].shape in runs and len(set(runs)) > 1  # it was used here, and at the shapes of the check
    assert capfd.readouterr().err == ""
    (path,) = tmp_path.rglob("exact-float32-*")
    assert path.read_text() == "ok"

    forget()  # another process
    runs.clear()
    call(args)
    assert set(runs) == {args[0].shape}  # without a check
    call(arrays(jnp.bfloat16))
    assert len(set(runs)) > 1  # another type is checked


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (wrong, "differs from the definition by 1.0e-02"),
        (wrong_gradient, "gradients 1.0e-02"),
        (not_a_number, "differs from the definition by inf"),
        (raising, "NotImplementedError: no such instruction on this device"),
    ],
)
def test_a_kernel_that_is_wrong_or_raises_is_replaced_with_one_line(checked, capfd, run, reason):
    runs, args = checked(run), arrays()
    expected = jax.value_and_grad(lambda *qkv: attention.definition(*qkv).sum())(*args)
    for _ in range(2):  # in this process, and in another
        for a, b in zip(call(args), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert args[0].shape not in runs
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("warning: ") and run.__name__ in line and reason in line
        call(args)
        assert capfd.readouterr().err == ""  # once is enough
        checked(run)  # which changes what functions are traced with
        forget()
        runs.clear()


def test_other_versions_check_again(checked, monkeypatch):
    runs, args = checked(exact), arrays()
    call(args)
    forget()
    monkeypatch.setattr(selfcheck, "_versions", lambda: "others")
    runs.clear()
    call(args)
    assert len(set(runs)) > 1


def test_without_a_cache_folder_every_process_checks(checked, monkeypatch):
    monkeypatch.setattr(selfcheck.user_cache, "user_folder", lambda name: (None, "no home"))
    runs, args = checked(exact), arrays()
    call(args)
    assert len(set(runs)) > 1


@pytest.mark.parametrize("content", [b"", b"\xff"])
def test_a_damaged_verdict_is_made_again(checked, tmp_path, content):
    checked(exact)
    call(arrays())
    (path,) = tmp_path.rglob("exact-float32-*")
    path.write_bytes(content)
    forget()
    call(arrays())
    assert path.read_text() == "ok"


def test_the_check_does_not_see_the_contexts_of_the_caller(checked):
    """It runs while an outer function is traced, under a mesh of several devices and another precision."""
    checked(exact)
    mesh = jax.make_mesh(
        (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:8]
    )
    args = [jnp.concatenate([x] * 4) for x in arrays()]
    with jax.set_mesh(mesh), jax.default_matmul_precision("bfloat16"):
        loss, _ = call(args)
    np.testing.assert_allclose(loss, attention.definition(*args).sum(), rtol=1e-2)


RUNNABLE = [kernel for kernel in kernels.TABLE if kernel.name != "attention_cudnn"]


@pytest.mark.parametrize("kernel", RUNNABLE, ids=lambda kernel: f"{kernel.name}-{kernel.platform}")
def test_every_kernel_passes_its_check(kernel):
    """All but cuDNN's attention run on CPUs, those for TPUs interpreted."""
    if kernel.name.endswith("_cpp") and not kernels.native.available():
        pytest.skip("needs a C++ compiler")
    dtype = "bfloat16" if "bands" in kernel.name else "float32"
    examples = selfcheck.examples_of(kernel, selfcheck.SMALL[kernel.operation], dtype)
    assert examples, "an example that the kernel supports"
    for example in examples[:2]:
        found = selfcheck.compare(kernel, example, dtype)
        assert not found.problem
        assert max(found.output_error, found.gradient_error) < (4e-2 if dtype == "bfloat16" else 1e-4)


def test_every_operation_has_examples_at_full_shapes():
    assert all(set(full) == set(selfcheck.SMALL) == set(OPERATIONS) for full in selfcheck.FULL.values())
    for kernel in RUNNABLE:  # cuDNN's wants a GPU
        dtypes = ("float32", "bfloat16", "float64")
        assert any(
            selfcheck.examples_of(kernel, selfcheck.FULL["gpu"][kernel.operation], d) for d in dtypes
        ), kernel


def test_compare_all_yields_every_kernel_with_times(checked, monkeypatch):
    checked(exact)
    example = selfcheck.Example(((2, 5, 2, 4), (2, 7, 2, 4), (2, 7, 2, 4)), {})
    monkeypatch.setitem(selfcheck.FULL, "cpu", {"attention": [example]})
    (found,) = selfcheck.compare_all(current_device())
    assert found.kernel.name == "exact" and not found.problem
    assert found.seconds > 0 and found.definition_seconds > 0 and found.output_error < 1e-6
