"""The same network in PyTorch, from extras/structvit_torch.py, to compare with."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from structvit_jax import convert
from structvit_jax.models import Network
from structvit_jax.models.weights import split
from structvit_jax.performance.bench.parts import Part
from structvit_jax.performance.bench.timing import Call
from structvit_jax.runtime.processes import log
from structvit_jax.utils.errors import UserError

_FILE = Path(__file__).parents[3] / "extras" / "structvit_torch.py"


class TorchPeer:
    """A PyTorch model with the same weights on the same device, in several variants.

    Variants are contiguous, channels last, and the faster of the two compiled, if torch.compile works and
    TORCHDYNAMO_DISABLE=1 does not switch it off. bfloat16 runs under autocast.

    Raises:
      UserError: PyTorch or the file is missing, or the file has no such model.
    """

    def __init__(self, model: Network):
        try:
            import torch
        except ImportError as error:
            raise UserError("--peer=torch needs PyTorch: pip install torch") from error
        on_gpu = jax.default_backend() == "gpu"
        if on_gpu and not torch.cuda.is_available():
            raise UserError("--peer=torch: PyTorch sees no GPU; --config.mesh.device=cpu compares on the CPU")
        v, weights = model.variant, split(model)[1]
        arrays = convert.to_torch({k: np.asarray(x) for part in weights for k, x in part.items()})
        network = _load_module().StructViT(
            v.depths, v.widths, patterns=v.structure_dim, stride=v.stride, video=v.video,
            classes=weights.params["head.bias"].size, head_width=v.head_width, patch=v.patch,
            mixer_window=v.mixer_window, drop_path=v.drop_path, layer_scale=v.layer_scale,
        )  # fmt: skip
        try:
            network.load_state_dict({k: torch.from_numpy(np.array(x)) for k, x in arrays.items()})
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--peer=torch: {_FILE.name} has no such model: {reason}") from error
        torch.backends.cudnn.benchmark = True  # let cuDNN search for its fastest algorithms, as trainers do
        self._torch, self._half = torch, v.dtype == "bfloat16"
        self._device = torch.device("cuda" if on_gpu else "cpu")
        last = torch.channels_last_3d if v.video else torch.channels_last
        network = network.to(self._device)
        self._networks = {"contiguous": network, "channels last": copy.deepcopy(network).channels_last()}
        self._layouts = {"contiguous": torch.contiguous_format, "channels last": last}

    def forward(self, inputs: jax.Array) -> dict[str, Call]:
        """Return calls that compute logits in evaluation mode, by variant."""

        def make(network: Any, apply: Callable, x: Any) -> Callable[[], Any]:
            network.eval()
            return lambda: apply(x)

        return self._variants(make, inputs, self._torch.inference_mode)

    def train(self, inputs: jax.Array) -> dict[str, Call]:
        """Return calls that take a step of fused AdamW on normalised inputs of one class, by variant."""
        torch = self._torch
        labels = torch.zeros(len(inputs), dtype=torch.long, device=self._device)

        def make(network: Any, apply: Callable, x: Any) -> Callable[[], None]:
            optimizer = torch.optim.AdamW(network.train().parameters(), lr=1e-4, fused=True)

            def run() -> None:
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(apply(x), labels)
                loss.backward()
                optimizer.step()

            return run

        return self._variants(make, inputs, torch.enable_grad)

    def part(self, part: Part, *, backward: bool) -> dict[str, Call]:
        """Return calls of one part of the model, by variant."""
        calls = {}
        for variant, network in self._networks.items():
            function, arrange = self._function(network.train(), part)
            dtype = self._torch.bfloat16 if self._half else self._torch.float32
            inputs = [arrange(self._tensor(x).to(dtype)).contiguous() for x in part.inputs()]
            if inputs[0].ndim > 3 and not part.name.endswith("attend"):
                inputs = [x.contiguous(memory_format=self._layouts[variant]) for x in inputs]
            if backward:
                calls[variant] = self._with_gradients(network, function, inputs)
            else:
                calls[variant] = self._call(functools.partial(function, *inputs), self._torch.inference_mode)
        return calls

    def _with_gradients(self, network: Any, function: Callable, inputs: Sequence[Any]) -> Call:
        inputs = [x.requires_grad_() for x in inputs]
        wanted = [*inputs, *network.parameters()]

        def run() -> Any:
            output = function(*inputs)
            return self._torch.autograd.grad(output, wanted, self._torch.ones_like(output), allow_unused=True)

        return self._call(run, self._torch.enable_grad)

    def _function(self, network: Any, part: Part) -> tuple[Callable, Callable]:
        """Return the part of this network, and the function that arranges its inputs."""
        row, _, name = part.name.partition(".")
        if not name:
            return getattr(network, row), _channels_first
        block = getattr(network, row)[0]
        if name == "mixer.attend":
            attend = self._torch.nn.functional.scaled_dot_product_attention
            return attend, lambda x: x.transpose(1, 2)
        if name == "mixer.patterns":
            grid = list(part.shapes[0][1:-2])
            convolve, kernels = block.attn.convolve, block.attn.key_kernels
            return lambda x: convolve(x, grid, kernels), lambda x: x.flatten(-2).flatten(1, -2)
        functions = {
            "position": block.add_position,
            "position.depthwise": block.pos_embed,
            "mixer": block.add_mixer,
            "mixer.depthwise": block.attn,
            "mlp": block.add_mlp,
        }
        return functions[name], _channels_first

    def _variants(self, make: Callable, inputs: jax.Array, mode: Callable) -> dict[str, Call]:
        x = _channels_first(self._tensor(inputs))
        calls = {}
        laid = {variant: x.contiguous(memory_format=layout) for variant, layout in self._layouts.items()}
        for variant, network in self._networks.items():
            calls[variant] = self._call(make(network, network, laid[variant]), mode)
        if os.environ.get("TORCHDYNAMO_DISABLE") == "1":  # torch.compile would do nothing
            return calls
        faster = min(calls, key=lambda variant: calls[variant].seconds(1))
        copied = copy.deepcopy(self._networks[faster])
        compiled = self._call(make(copied, self._torch.compile(copied), laid[faster]), mode)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compiled.run()
        except Exception as error:  # of any type
            log(f"note: torch.compile fails here ({type(error).__name__}) and is skipped")
            return calls
        return {**calls, "compiled": compiled}

    def _call(self, run: Callable, mode: Callable) -> Call:
        def in_mode() -> Any:
            with mode(), self._torch.autocast(self._device.type, self._torch.bfloat16, enabled=self._half):
                return run()

        return Call(in_mode, self._wait)

    def _wait(self, _: Any) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()

    def _tensor(self, x: jax.Array) -> Any:
        return self._torch.from_numpy(np.array(x, np.float32)).to(self._device)


def _channels_first(x: Any) -> Any:
    return x.movedim(-1, 1)


def _load_module() -> Any:
    if not _FILE.exists():
        raise UserError(f"--peer=torch needs {_FILE}: run it in a clone of the repository")
    spec: Any = importlib.util.spec_from_file_location(_FILE.stem, _FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
