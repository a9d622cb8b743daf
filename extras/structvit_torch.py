"""StructViT (Kim, Seo, Schmid, Cho, CVPR 2024) in PyTorch, images and video, in one file.

    model = structvit("s", patterns=4)                       # StructViT-S-4-1, images [batch, 3, 224, 224]
    model = structvit("b", patterns=4, video=True, classes=400)     # clips [batch, 3, 32, 224, 224]
    model.load_state_dict(safetensors.torch.load_file("weights.safetensors"))

Needs only torch. `structvit convert RUN weights.safetensors` writes the weights; with patterns=0 the model is
UniFormer and loads its released weights. The tests of the project compare the two implementations, gradients
included.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIZES = {  # blocks and channels of the four stages, stochastic depth, layer scale
    "tiny": ((1, 1, 2, 1), (16, 32, 48, 64), 0.0, None),
    "s": ((3, 4, 8, 3), (64, 128, 320, 512), 0.1, None),
    "b": ((5, 8, 20, 7), (64, 128, 320, 512), 0.3, None),
    "l": ((5, 10, 24, 7), (128, 192, 448, 640), 0.4, 1e-6),
}


class StructSA(nn.Module):
    """Structural self-attention over a grid (section 3; channel-wise, appendix A).

    The correlations of a query with all keys are a map, which is convolved with D kernels. Convolution and
    dot product commute, so the keys are convolved instead, and likewise the values. What remains is attention
    of N queries over N'·D keys, with one softmax over all positions and patterns.
    """

    def __init__(
        self,
        width: int,
        head_width: int = 64,
        axes: int = 2,
        patterns: int = 4,
        window: int = 3,
        stride: int = 1,
    ):
        super().__init__()
        self.heads, self.stride = width // head_width, stride
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.key_kernels = self.value_kernels = None
        if patterns:
            shape = (*[window] * axes, self.heads, head_width, patterns)
            deviation = window ** (-axes / 2)  # preserves the variance of uncorrelated features
            self.key_kernels = nn.Parameter(deviation * torch.randn(shape))
            self.value_kernels = nn.Parameter(deviation * torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, *grid] -> the same."""
        batch, channels, *grid = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)
        query = query.view(batch, -1, self.heads, channels // self.heads).transpose(1, 2)
        key = self.convolve(key, grid, self.key_kernels)
        value = self.convolve(value, grid, self.value_kernels)
        y = nn.functional.scaled_dot_product_attention(
            query, key, value
        )  # [batch, heads, N, channels of a head]
        y = self.proj(y.transpose(1, 2).reshape(batch, -1, channels))
        return y.transpose(1, 2).unflatten(2, grid)

    def convolve(self, tokens: Tensor, grid: list[int], kernels: Tensor | None) -> Tensor:
        """[batch, N, channels] -> [batch, heads, N'·D, channels of a head]."""
        batch, _, channels = tokens.shape
        if kernels is None:
            return tokens.view(batch, -1, self.heads, channels // self.heads).transpose(1, 2)
        *window, heads, head_width, _ = kernels.shape
        weight = kernels.flatten(-3).movedim(-1, 0).unsqueeze(1)  # [channels·D, 1, *window]
        convolve = nn.functional.conv2d if len(grid) == 2 else nn.functional.conv3d
        x = tokens.transpose(1, 2).unflatten(2, grid)
        if x.is_cuda:  # channels last is up to 15 times slower with several kernels per channel
            x = x.contiguous()
        x = convolve(
            x,
            weight,
            stride=(1,) * (len(grid) - 2) + (self.stride, self.stride),  # in space only
            padding=[side // 2 for side in window],
            groups=channels,
        )
        x = x.flatten(2).unflatten(1, (heads, head_width, -1))  # [batch, heads, channels of a head, D, N']
        return x.permute(0, 1, 3, 4, 2).flatten(2, 3).contiguous()  # for the fused attention


class DropPath(nn.Module):
    """Stochastic depth: drop the branch of an example, and divide the others by the keep rate."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.rate):
            return x
        keep = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (keep / (1 - self.rate))


class Mlp(nn.Module):
    def __init__(self, fc1: nn.Module, fc2: nn.Module):
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """x += position(x); x += mixer(norm(x)); x += mlp(norm(x)), the last two with optional layer scale."""

    def __init__(self, width: int, axes: int, drop: float, scale: float | None, scale_shape: tuple[int, ...]):
        super().__init__()
        conv = nn.Conv2d if axes == 2 else nn.Conv3d
        self.pos_embed = conv(width, width, 3, padding=1, groups=width)
        self.drop_path = DropPath(drop)
        self.gamma_1 = nn.Parameter(torch.full(scale_shape, scale)) if scale else None
        self.gamma_2 = nn.Parameter(torch.full(scale_shape, scale)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, *grid] -> the same."""
        return self.add_mlp(self.add_mixer(self.add_position(x)))

    def add_position(self, x: Tensor) -> Tensor:
        return x + self.pos_embed(x)

    def add_mixer(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def add_mlp(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _add(self, x: Tensor, branch: Tensor, gamma: Tensor | None) -> Tensor:
        if gamma is not None:
            branch = branch * gamma.view(-1, *[1] * (x.ndim - 2))
        return x + self.drop_path(branch)


class ConvBlock(Block):
    """A block with BatchNorm whose mixer is 1x1, depthwise 5x5(x5) and 1x1 convolutions."""

    def __init__(self, width: int, axes: int, drop: float, scale: float | None, window: int):
        super().__init__(width, axes, drop, scale, (1, width, *[1] * axes))
        conv = nn.Conv2d if axes == 2 else nn.Conv3d
        norm = nn.BatchNorm2d if axes == 2 else nn.BatchNorm3d
        self.norm1 = norm(width)
        self.conv1 = conv(width, width, 1)
        self.attn = conv(width, width, window, padding=window // 2, groups=width)
        self.conv2 = conv(width, width, 1)
        self.norm2 = norm(width)
        self.mlp = Mlp(conv(width, 4 * width, 1), conv(4 * width, width, 1))

    def add_mixer(self, x: Tensor) -> Tensor:
        return self._add(x, self.conv2(self.attn(self.conv1(self.norm1(x)))), self.gamma_1)

    def add_mlp(self, x: Tensor) -> Tensor:
        return self._add(x, self.mlp(self.norm2(x)), self.gamma_2)


class StructBlock(Block):
    """A block with LayerNorm whose mixer is StructSA."""

    def __init__(
        self,
        width: int,
        axes: int,
        drop: float,
        scale: float | None,
        head_width: int,
        patterns: int,
        stride: int,
    ):
        super().__init__(width, axes, drop, scale, (width,))
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = StructSA(width, head_width, axes, patterns=patterns, stride=stride)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(nn.Linear(width, 4 * width), nn.Linear(4 * width, width))

    def add_mixer(self, x: Tensor) -> Tensor:
        return self._add(x, self.attn(_over_channels(self.norm1, x)), self.gamma_1)

    def add_mlp(self, x: Tensor) -> Tensor:
        return self._add(x, _over_channels(self.mlp, _over_channels(self.norm2, x)), self.gamma_2)


def _over_channels(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer for the last axis to the channels of [batch, channels, *grid]."""
    return layer(x.movedim(1, -1)).movedim(-1, 1)


class PatchEmbed(nn.Module):
    """A strided convolution, then LayerNorm with eps 1e-5. For video the first overlaps in time."""

    def __init__(self, inputs: int, width: int, side: int, axes: int, first: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        if axes == 2:
            self.proj = nn.Conv2d(inputs, width, side, side)
        elif first:
            self.proj = nn.Conv3d(inputs, width, (3, side, side), (2, side, side), (1, 0, 0))
        else:
            self.proj = nn.Conv3d(inputs, width, (1, side, side), (1, side, side))

    def forward(self, x: Tensor) -> Tensor:
        return _over_channels(self.norm, self.proj(x))


class StructViT(nn.Module):
    """Two stages of convolution blocks, two of structural self-attention, BatchNorm, mean, a linear head.

    Weights have the names of the released UniFormer; with patterns=0 it is a UniFormer.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        *,
        patterns: int = 4,
        stride: int = 1,
        video: bool = False,
        classes: int = 1000,
        head_width: int = 64,
        patch: int = 4,
        mixer_window: int = 5,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ):
        super().__init__()
        axes = 3 if video else 2
        drops = (drop_path * i / (sum(depths) - 1) for i in range(sum(depths)))
        for i, (depth, inputs, width) in enumerate(zip(depths, (3, *widths[:-1]), widths, strict=True)):
            blocks = [
                ConvBlock(width, axes, next(drops), layer_scale, mixer_window)
                if i < 2
                else StructBlock(width, axes, next(drops), layer_scale, head_width, patterns, stride)
                for _ in range(depth)
            ]
            setattr(self, f"patch_embed{i + 1}", PatchEmbed(inputs, width, 2 if i else patch, axes, i == 0))
            setattr(self, f"blocks{i + 1}", nn.Sequential(*blocks))
        self.norm = nn.BatchNorm3d(widths[-1]) if video else nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, height, width], for video [batch, 3, time, height, width] -> [batch, classes]."""
        for i in range(1, 5):
            x = getattr(self, f"patch_embed{i}")(x)
            x = getattr(self, f"blocks{i}")(x)
        return self.head(self.norm(x).flatten(2).mean(2))

    def channels_last(self) -> StructViT:
        """Convert convolutions to channels last, for such inputs.

        `to(memory_format=...)` fails, since it converts the structure kernels too.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
            elif isinstance(module, nn.Conv3d):
                module.to(memory_format=torch.channels_last_3d)
        return self


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def structvit(
    size: str, *, patterns: int = 4, stride: int = 1, video: bool = False, classes: int = 1000
) -> StructViT:
    """Return StructViT-SIZE-D-S: size "s", "b", "l" or, for tests, "tiny"; `patterns` is D, `stride` S."""
    depths, widths, drop_path, layer_scale = SIZES[size]
    more = {"head_width": 16, "patch": 2, "mixer_window": 3} if size == "tiny" else {}
    return StructViT(
        depths, widths, patterns=patterns, stride=stride, video=video, classes=classes,
        drop_path=drop_path, layer_scale=layer_scale, **more,
    )  # fmt: skip
