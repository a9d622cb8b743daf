"""Read the same files by the same recipe with PyTorch, to compare the speed of reading.

A DataLoader decodes and augments in worker processes, each with one thread. Clips are decoded with PyAV,
torchcodec or decord, and images with Pillow or torchvision. They are augmented with torchvision, or with
Pillow and timm. Like here, copies of an example share their frames, frames are chosen by the rule of the
recipe, and batches are uint8 [rows, [time,] size, size, 3].

Where the libraries leave a choice, the faster one is taken: torchvision interpolates RandAugment bilinearly
rather than bicubically, torchcodec does not scan files before decoding, and tensors are channels last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import multiprocessing
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, cast

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from structvit_jax.data import sampling
from structvit_jax.data.augment import RandAugment
from structvit_jax.data.index import Index
from structvit_jax.data.reader import Reader
from structvit_jax.data.types import AugmentOptions, DataOptions
from structvit_jax.runtime.processes import log
from structvit_jax.utils.errors import UserError

Pick = Callable[[int], Sequence[int]]  # number of frames of a video -> the frames of a clip
_TORCHVISION_LEVELS = 30  # RandAugment's largest magnitude in torchvision; timm's is 10
_TRIES = 10  # examples to try before giving up
Tensor = Any  # torch.Tensor, which cannot be named here because torch is imported on use


@contextlib.contextmanager
def open_loaders(reader: Reader, rows: int, workers: int) -> Iterator[dict[str, Iterator[Tensor]]]:
    """Yield an endless iterator over batches for each combination of libraries that is installed.

    Combinations that fail are reported and left out.

    Args:
      reader: the data, in files, and the recipe.
      rows: rows of a batch.
      workers: number of worker processes; 0 reads in this process.

    Raises:
      UserError: PyTorch or torchvision is not installed, or the data are not in whole files.
    """
    if not (_is_installed("torch") and _is_installed("torchvision")):
        raise UserError("--peer=torch needs PyTorch and torchvision: pip install torch torchvision")
    paths = _paths(reader)
    with contextlib.ExitStack() as stack:
        loaders: dict[str, Iterator[Tensor]] = {}
        for decoder, augmenter in _combinations(reader):
            name = f"torch: {decoder} + {augmenter}"
            files = TorchFiles(paths, reader.data, reader.augment, decoder, augmenter)
            batches = stack.enter_context(contextlib.closing(_load(files, rows, workers)))
            try:
                shape = tuple(next(batches).shape)
            except Exception as error:  # libraries raise many types
                log(f"note: {name} is left out, because it fails with {type(error).__name__}: {_line(error)}")
                continue
            if shape != (rows, *reader.shape):
                raise RuntimeError(f"{name} makes batches of {shape} instead of {(rows, *reader.shape)}")
            loaders[name] = batches
        yield loaders


def _paths(reader: Reader) -> tuple[str, ...]:
    source = reader.source
    if isinstance(source, Index):
        numbers = range(len(source))
        if not any(source.entry(number).is_part for number in numbers):
            return tuple(map(source.path, numbers))
    raise UserError(
        "--peer=torch reads whole files: it needs data in folders, or lists without start and end"
    )


def _combinations(reader: Reader) -> list[tuple[str, str]]:
    """Return the pairs of decoder and augmenter that are installed."""
    if reader.is_image:
        pairs = [("Pillow", "torchvision"), ("torchvision", "torchvision"), ("Pillow", "timm")]
    else:
        decoders = ("PyAV", "torchcodec", "decord")
        pairs = [(decoder, augmenter) for decoder in decoders for augmenter in ("torchvision", "timm")]
    if not reader.augment.randaugment:  # the only part that is timm's
        pairs = [pair for pair in pairs if pair[1] != "timm"]
    return [pair for pair in pairs if all(map(_is_installed, pair))]


@functools.cache
def _is_installed(name: str) -> bool:
    """Return whether a library can be imported; report why not."""
    try:
        importlib.import_module({"PyAV": "av", "Pillow": "PIL"}.get(name, name))
    except Exception as error:  # a library without its shared libraries raises many types
        log(f"note: {name} is left out, because it cannot be imported: {_line(error)}")
        return False
    return True


def _line(error: Exception) -> str:
    """Return the last line of the message of an exception."""
    return (str(error).strip().splitlines() or [""])[-1].strip()


def _load(files: TorchFiles, rows: int, workers: int) -> Generator[Tensor]:
    """Yield batches in random order forever."""
    from torch.utils.data import DataLoader

    context, more = None, {}
    if workers:
        context = multiprocessing.get_context("forkserver")  # a fork of a process with JAX may deadlock
        context.set_forkserver_preload([__name__, "torch", "torchvision.transforms.v2"])
        more = {"prefetch_factor": 2}
    yield from DataLoader(
        files,
        batch_size=rows // files.augment.repeated_augmentation,
        sampler=_Endless(len(files)),
        num_workers=workers,
        collate_fn=_collate,
        multiprocessing_context=context,
        **more,
    )


class _Endless:
    """The numbers of all examples in random order, again and again."""

    def __init__(self, examples: int):
        self._examples = examples

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from np.random.permutation(self._examples).tolist()


def _collate(examples: list[Tensor]) -> Tensor:
    """Join [copies, ...] of several examples; in a worker, directly in shared memory."""
    from torch.utils.data import default_collate

    return default_collate(examples).flatten(0, 1)


@dataclasses.dataclass(frozen=True)
class TorchFiles:
    """A data set for a DataLoader.

    Attributes:
      paths: a video or an image for each example.
      data, augment: the recipe.
      decoder, augmenter: names of libraries, see `_combinations`.
    """

    paths: tuple[str, ...]
    data: DataOptions
    augment: AugmentOptions
    decoder: str
    augmenter: str

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Return the augmented copies of an example: uint8 [copies, [time,] size, size, 3]."""
        import torch

        decoded = self.decode_any(index)
        return torch.stack([self._transform(decoded) for _ in range(self.augment.repeated_augmentation)])

    def decode_any(self, index: int) -> Any:
        """Decode an example, or a random one in the place of one that cannot be decoded."""
        for tries in range(_TRIES, 0, -1):
            try:
                return self.decode(index, np.random.default_rng(random.getrandbits(64)))
            except Exception:  # libraries raise many types
                if tries == 1:
                    raise
                index = random.randrange(len(self))

    def decode(self, index: int, rng: np.random.Generator) -> Any:
        """Return an image as a PIL image or uint8 [3, height, width]; or a clip, [time, 3, height, width]."""
        options, path = self.data, self.paths[index]
        if options.frames == 0:
            return _IMAGE_DECODERS[self.decoder](path)
        rule = sampling.rule(options.sampling)
        return _CLIP_DECODERS[self.decoder](
            path, lambda count: rule(count, options.frames, options.stride, rng).tolist(), options.short_side
        )

    @functools.cached_property
    def _transform(self) -> Callable[[Any], Tensor]:
        """The augmentation: RandAugment before the crop of clips, as in UniFormer; after that of images."""
        from torchvision.transforms import v2

        data, augment, is_image = self.data, self.augment, self.data.frames == 0
        policy = _POLICIES[self.augmenter](self) if augment.randaugment else []
        if augment.color_jitter:
            policy.append(v2.ColorJitter(*[augment.color_jitter] * 3))
        modes = v2.InterpolationMode
        crop = [
            v2.RandomResizedCrop(
                data.size,
                augment.crop_area,
                augment.crop_aspect,
                interpolation=modes.BICUBIC if is_image else modes.BILINEAR,
                antialias=is_image,
            ),
            v2.RandomHorizontalFlip(augment.flip),
        ]
        steps = [*crop, *policy] if is_image else [*policy, _to_channels_last, *crop]
        return v2.Compose([*steps, _with_channels_last])


def _torchvision_policy(files: TorchFiles) -> list[Callable[[Any], Any]]:
    """Return RandAugment with torchvision's operations, each applied with probability one half as in timm."""
    from torchvision.transforms import v2

    policy = cast(RandAugment, RandAugment.parse(files.augment.randaugment))
    operation = v2.RandAugment(
        1,
        round(_TORCHVISION_LEVELS * policy.magnitude / 10),
        num_magnitude_bins=_TORCHVISION_LEVELS + 1,
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    return [v2.RandomApply([operation], p=0.5)] * policy.layers


def _timm_policy(files: TorchFiles) -> list[Callable[[Any], Any]]:
    """Return timm's RandAugment, for an image or for all frames of a clip."""
    from timm.data.auto_augment import rand_augment_transform

    mean = tuple(round(255 * value) for value in files.data.mean or (0.5, 0.5, 0.5))
    options = {"translate_pct": 0.45, "img_mean": mean, "interpolation": Image.Resampling.BICUBIC}
    policy = rand_augment_transform(files.augment.randaugment, options)
    return [policy if files.data.frames == 0 else functools.partial(_apply_to_frames, policy)]


def _apply_to_frames(policy: Callable[[Image.Image], Image.Image], clip: Tensor) -> Tensor:
    """Apply timm's policy to all frames of a clip with the same random draws."""
    import torch

    seed, frames = random.getrandbits(32), []
    for frame in clip.permute(0, 2, 3, 1).numpy():
        random.seed(seed)
        np.random.seed(seed)
        frames.append(np.asarray(policy(Image.fromarray(frame))))
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def _to_channels_last(clip: Tensor) -> Tensor:
    """Store the channels of a clip last, as decoders do; RandAugment may not. Crops are then much faster."""
    import torch

    return clip.contiguous(memory_format=torch.channels_last)


def _with_channels_last(pixels: Any) -> Tensor:
    """Return a PIL image or a tensor [..., 3, height, width] as a tensor [..., height, width, 3]."""
    import torch

    if isinstance(pixels, Image.Image):
        return torch.from_numpy(np.array(pixels))
    return pixels.movedim(-3, -1)


def _threads() -> int:
    """Return the number of threads for decoding: one in a worker, else 0, which lets FFmpeg choose."""
    from torch.utils.data import get_worker_info

    return 1 if get_worker_info() else 0


def _scaled(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Return the size of frames whose short side is scaled down to `short_side`; 0 never scales."""
    scale = min(short_side / min(height, width), 1) if short_side else 1
    return round(scale * height), round(scale * width)


def _decode_with_pyav(path: str, pick: Pick, short_side: int) -> Tensor:
    """Decode from the key frame before a clip to its last frame, and convert only the frames of the clip."""
    import torch

    convert, pictures = VideoReformatter(), list[np.ndarray]()
    with av.open(path) as container:
        stream: Any = container.streams.video[0]
        stream.codec_context.thread_count = _threads()
        rate, base, start = stream.average_rate, stream.time_base, stream.start_time or 0
        wanted = pick(stream.frames or int(container.duration * rate / av.time_base))
        height, width = _scaled(stream.height, stream.width, short_side)
        container.seek(start + int(wanted[0] / rate / base), stream=stream)
        for frame in container.decode(stream):
            number = round((frame.pts - start) * base * rate)
            if number < wanted[len(pictures)]:
                continue
            picture = convert.reformat(
                frame, width, height, "rgb24", interpolation="BILINEAR", threads=1
            ).to_ndarray()
            while len(pictures) < len(wanted) and number >= wanted[len(pictures)]:
                pictures.append(picture)
            if len(pictures) == len(wanted):
                break
    pictures += pictures[-1:] * (len(wanted) - len(pictures))  # the video is shorter than it states
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _decode_with_torchcodec(path: str, pick: Pick, short_side: int) -> Tensor:
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    options = {"dimension_order": "NHWC", "seek_mode": "approximate", "num_ffmpeg_threads": _threads()}
    decoder = VideoDecoder(path, **options)
    size = decoder.metadata.height, decoder.metadata.width
    scaled = _scaled(*size, short_side)
    if scaled != size:
        decoder = VideoDecoder(path, **options, transforms=[Resize(scaled)])
    return decoder.get_frames_at(pick(len(decoder))).data.permute(0, 3, 1, 2)


def _decode_with_decord(path: str, pick: Pick, short_side: int) -> Tensor:
    import decord
    import torch
    from torchvision.transforms.v2.functional import resize

    video = decord.VideoReader(path, num_threads=_threads())
    clip = torch.from_numpy(video.get_batch(pick(len(video))).asnumpy()).permute(0, 3, 1, 2)
    height, width = clip.shape[-2:]
    scaled = _scaled(height, width, short_side)
    return clip if scaled == (height, width) else resize(clip, list(scaled), antialias=False)


def _decode_with_pillow(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _decode_with_torchvision(path: str) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(path, ImageReadMode.RGB)


_CLIP_DECODERS: dict[str, Callable[[str, Pick, int], Tensor]] = {
    "PyAV": _decode_with_pyav,
    "torchcodec": _decode_with_torchcodec,
    "decord": _decode_with_decord,
}
_IMAGE_DECODERS: dict[str, Callable[[str], Any]] = {
    "Pillow": _decode_with_pillow,
    "torchvision": _decode_with_torchvision,
}
_POLICIES = {"torchvision": _torchvision_policy, "timm": _timm_policy}
