"""The same network in PyTorch (extras/structvit_torch.py), to compare its speed."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
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
    """A PyTorch model with the same weights on the same device, in up to three variants.

    The first two variants have the memory formats contiguous and channels last. The third is the faster of
    these, compiled with `torch.compile`. It is left out if compiling fails, or if TORCHDYNAMO_DISABLE=1 is
    set. bfloat16 models run under autocast.

    Raises:
      UserError: PyTorch or the file is missing, or the file does not implement this model.
    """

    def __init__(self, model: Network):
        try:
            import torch
        except ImportError as error:
            raise UserError("--peer=torch needs PyTorch: pip install torch") from error
        on_gpu = jax.default_backend() == "gpu"
        if on_gpu and not torch.cuda.is_available():
            raise UserError("--peer=torch: PyTorch finds no GPU; set --config.mesh.device=cpu to use the CPU")
        variant, weights = model.variant, split(model)[1]
        arrays = convert.to_torch({k: np.asarray(x) for part in weights for k, x in part.items()})
        network = _load_module().StructViT(
            variant.depths, variant.widths, patterns=variant.structure_dim, stride=variant.stride,
            video=variant.video, classes=weights.params["head.bias"].size, head_width=variant.head_width,
            patch=variant.patch, mixer_window=variant.mixer_window, drop_path=variant.drop_path,
            layer_scale=variant.layer_scale,
        )  # fmt: skip
        try:
            network.load_state_dict({k: torch.from_numpy(np.array(x)) for k, x in arrays.items()})
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--peer=torch: {_FILE.name} does not implement this model: {reason}") from error
        torch.backends.cudnn.benchmark = True  # let cuDNN choose its fastest algorithms by timing them
        self._torch, self._bfloat16 = torch, variant.dtype == "bfloat16"
        self._device = torch.device("cuda" if on_gpu else "cpu")
        network = network.to(self._device)
        self._networks = {"contiguous": network, "channels last": copy.deepcopy(network).channels_last()}
        channels_last = torch.channels_last_3d if variant.video else torch.channels_last
        self._formats = {"contiguous": torch.contiguous_format, "channels last": channels_last}

    def forward(self, inputs: jax.Array) -> dict[str, Call]:
        """Return a call for each variant that computes logits in evaluation mode."""

        def make_run(network: Any, apply: Callable, x: Any) -> Callable[[], Any]:
            network.eval()
            return lambda: apply(x)

        return self._variants(make_run, inputs, self._torch.inference_mode)

    def train(self, inputs: jax.Array) -> dict[str, Call]:
        """Return a call for each variant that takes a train step.

        The inputs are normalised, all labels are class 0, and the optimizer is the fused AdamW.
        """
        torch = self._torch
        labels = torch.zeros(len(inputs), dtype=torch.long, device=self._device)

        def make_run(network: Any, apply: Callable, x: Any) -> Callable[[], None]:
            optimizer = torch.optim.AdamW(network.train().parameters(), lr=1e-4, fused=True)

            def run() -> None:
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(apply(x), labels)
                loss.backward()
                optimizer.step()

            return run

        return self._variants(make_run, inputs, torch.enable_grad)

    def part(self, part: Part, *, backward: bool) -> dict[str, Call]:
        """Return a call for each variant that computes a part, and with `backward` also its gradients."""
        torch, calls = self._torch, {}
        for variant, network in self._networks.items():
            function, arrange = self._function(network.train(), part)
            dtype = torch.bfloat16 if self._bfloat16 else torch.float32
            inputs = [arrange(self._tensor(x).to(dtype)).contiguous() for x in part.inputs()]
            if inputs[0].ndim > 3 and not part.name.endswith("attend"):
                inputs = [x.contiguous(memory_format=self._formats[variant]) for x in inputs]
            if backward:
                inputs = [x.requires_grad_() for x in inputs]
                run = functools.partial(self._gradients, function, inputs, [*inputs, *network.parameters()])
                calls[variant] = self._call(run, torch.enable_grad)
            else:
                calls[variant] = self._call(functools.partial(function, *inputs), torch.inference_mode)
        return calls

    def _gradients(self, function: Callable, inputs: list[Any], wanted: list[Any]) -> Any:
        output = function(*inputs)
        return self._torch.autograd.grad(output, wanted, self._torch.ones_like(output), allow_unused=True)

    def _function(self, network: Any, part: Part) -> tuple[Callable, Callable]:
        """Return the function of a part, and a function that arranges the axes of its inputs for PyTorch."""
        stage, _, name = part.name.partition(".")
        if not name:
            return getattr(network, stage), _channels_first
        block = getattr(network, stage)[0]
        if name == "mixer.attend":
            attend = self._torch.nn.functional.scaled_dot_product_attention
            return attend, lambda x: x.transpose(1, 2)
        if name == "mixer.patterns":
            grid, kernels = list(part.shapes[0][1:-2]), block.attn.key_kernels
            return lambda x: block.attn.convolve(x, grid, kernels), lambda x: x.flatten(-2).flatten(1, -2)
        functions = {
            "position": block.add_position,
            "position.depthwise": block.pos_embed,
            "mixer": block.add_mixer,
            "mixer.depthwise": block.attn,
            "mlp": block.add_mlp,
        }
        return functions[name], _channels_first

    def _variants(self, make_run: Callable, inputs: jax.Array, mode: Callable) -> dict[str, Call]:
        x = _channels_first(self._tensor(inputs))
        tensors = {variant: x.contiguous(memory_format=format_) for variant, format_ in self._formats.items()}
        calls = {
            variant: self._call(make_run(network, network, tensors[variant]), mode)
            for variant, network in self._networks.items()
        }
        if os.environ.get("TORCHDYNAMO_DISABLE") == "1":  # torch.compile would not compile
            return calls
        faster = min(calls, key=lambda variant: calls[variant].seconds(1))
        network = copy.deepcopy(self._networks[faster])
        compiled = self._call(make_run(network, self._torch.compile(network), tensors[faster]), mode)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                compiled.run()
        except Exception as error:  # torch.compile may raise any type
            log(f"note: torch.compile failed ({type(error).__name__}); the compiled variant is skipped")
            return calls
        return {**calls, "compiled": compiled}

    def _call(self, run: Callable[[], Any], mode: Callable) -> Call:
        def run_in_mode() -> Any:
            with (
                mode(),
                self._torch.autocast(self._device.type, self._torch.bfloat16, enabled=self._bfloat16),
            ):
                return run()

        return Call(run_in_mode, self._wait)

    def _wait(self, _: Any) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()

    def _tensor(self, x: jax.Array) -> Any:
        return self._torch.from_numpy(np.array(x, np.float32)).to(self._device)


def _channels_first(x: Any) -> Any:
    return x.movedim(-1, 1)


def _load_module() -> Any:
    if not _FILE.exists():
        raise UserError(f"--peer=torch needs {_FILE}, which is only in a clone of the repository")
    spec: Any = importlib.util.spec_from_file_location(_FILE.stem, _FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
