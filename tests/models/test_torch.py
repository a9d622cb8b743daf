"""extras/structvit_torch.py beside ours: the same weights give the same logits, gradients and statistics."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import ROOT

from structvit_jax import convert
from structvit_jax.models import create_model
from structvit_jax.models.weights import Weights, batch_stats, split, training_structure

CLASSES = 7


@pytest.fixture(scope="module")
def peer():
    """The file is meant to be copied, so it is no package."""
    spec = importlib.util.spec_from_file_location("structvit_torch", ROOT / "extras/structvit_torch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pair(peer, kind, **options):
    """Our model of some random weights, these weights, and the PyTorch model with the same."""
    video, patterns = options.get("video", False), options.get("patterns", 4)
    name = f"structvit_{kind}_{patterns}_{options.get('stride', 1)}" if patterns else f"uniformer_{kind}"
    model = create_model(name + "_video" * video, num_classes=CLASSES, drop_path=0.0)
    rng = np.random.default_rng(0)

    def random(name, array):
        if name.endswith(".var"):
            return jnp.asarray(rng.uniform(0.5, 2.0, array.shape), jnp.float32)
        return array + jnp.asarray(0.1 * rng.normal(size=array.shape), jnp.float32)

    weights = split(model)[1]
    weights = Weights(*({name: random(name, array) for name, array in part.items()} for part in weights))
    theirs = peer.structvit(kind, classes=CLASSES, **options)
    for part in theirs.modules():
        if isinstance(part, peer.DropPath):
            part.rate = 0.0
    theirs.load_state_dict(as_tensors(weights.params | weights.batch_stats))
    return model, weights, theirs


def as_tensors(arrays):
    arrays = convert.to_torch({name: np.asarray(array) for name, array in arrays.items()})
    return {key: torch.from_numpy(np.array(array)) for key, array in arrays.items()}


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 33, 50, 3)),
        ({"patterns": 8, "stride": 2}, (2, 56, 40, 3)),
        ({"patterns": 0}, (2, 32, 32, 3)),
        ({"patterns": 3, "stride": 2, "video": True}, (2, 5, 40, 50, 3)),
    ],
)
def test_a_training_step_agrees(peer, options, shape):
    model, weights, theirs = pair(peer, "tiny", **options)
    rng = np.random.default_rng(1)
    x = rng.normal(size=shape).astype(np.float32)
    slope = rng.normal(size=(shape[0], CLASSES)).astype(np.float32)
    structure = training_structure(model)

    def loss(params):
        network = structure.model(Weights(params, weights.batch_stats))
        logits = network(x)
        return (logits * slope).sum(), (logits, batch_stats(network))

    (_, (logits, stats)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights.params)
    theirs.train()
    their_logits = theirs(torch.from_numpy(np.moveaxis(x, -1, 1)))
    (their_logits * torch.from_numpy(slope)).sum().backward()
    close(logits, their_logits.detach())
    their_grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    largest = max(float(grad.abs().max()) for grad in their_grads.values())
    for name, array in as_tensors(grads | stats).items():
        if name in their_grads:
            close(array, their_grads[name], name, least=0.01 * largest)  # a bias before a BatchNorm has none
        elif not name.endswith("num_batches_tracked"):
            close(array, theirs.state_dict()[name], name)

    theirs.load_state_dict(as_tensors(weights.params | stats))
    evaluated = split(model)[0]
    ours = jax.jit(lambda weights: evaluated.model(weights)(x))(Weights(weights.params, stats))
    with torch.inference_mode():
        close(ours, theirs.eval()(torch.from_numpy(np.moveaxis(x, -1, 1))))


def close(ours, theirs, name="", least=0.0):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert np.abs(ours - theirs).max() <= 1e-4 * max(np.abs(theirs).max(), least), name


@pytest.mark.parametrize("kind", ["s", "b", "l"])
@pytest.mark.parametrize("video", [False, True])
def test_every_size_has_our_parameters(peer, kind, video):
    name = f"structvit_{kind}_4_1" + "_video" * video
    model = jax.eval_shape(lambda: split(create_model(name, num_classes=CLASSES, seed=None))[1])
    arrays = {name: np.zeros(array.shape, np.float32) for part in model for name, array in part.items()}
    with torch.device("meta"):
        theirs = peer.structvit(kind, video=video, classes=CLASSES).state_dict()
    expected = {key: array.shape for key, array in convert.to_torch(arrays).items()}
    assert {key: tuple(tensor.shape) for key, tensor in theirs.items()} == expected
