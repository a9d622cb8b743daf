"""The paper's ablations (tables 1, 6 and 7): DeiT-S with every attention layer replaced.

    structvit train --config=ablations:imagenet,structure_dim=8 --config.data.root=DIR
    structvit train --config=ablations:something_v1,structure_dim=8 --config.data.root=DIR \
        --config.init_from=RUN

The argument is imagenet or something_v1 (16 frames, from the ImageNet weights), followed by any of

    structure_dim=D                             table 1; 0 is plain attention, 1 is ConvSA; default 4
    window=M, key_window=M, value_window=M      tables 1 and 6b, sides of the kernels; default 3
    aggregation=element                         table 6a; default context
    key_kernels=shared, value_kernels=shared    table 6a; default channel
    width=W, depth=N                            table 7: wider or deeper models of the same cost with
                                                plain attention (structure_dim=0)

The paper reports this top-1:

    structure_dim               0     1     2     4     8
    ImageNet                 80.5  80.8  80.9  81.1  81.3
    Something-Something V1   48.3  49.7  50.1  50.4  50.6

These configurations have not been trained here.
"""

import ml_collections

from structvit_jax.config import recipes
from structvit_jax.utils.errors import check_choice


def get_config(argument: str = "imagenet") -> ml_collections.ConfigDict:
    data, *pairs = argument.split(",")
    check_choice("data set", data, ("imagenet", "something_v1"))
    settings = {key: value for key, _, value in (pair.partition("=") for pair in pairs)}
    dim = int(settings.pop("structure_dim", 4))
    name = f"deit_s_struct_{dim}" if dim else "deit_s"
    config = recipes.images(name) if data == "imagenet" else recipes.ablation_video(f"{name}_video")
    if "window" in settings:
        config.model.key_window = config.model.value_window = int(settings.pop("window"))
    if "width" in settings:
        width = int(settings.pop("width"))
        config.model.widths, config.model.head_width = (width,), width // 6
    if "depth" in settings:
        config.model.depths = (int(settings.pop("depth")),)
    for key, value in settings.items():
        config.model[key] = int(value) if value.isdecimal() else value
    return config
