"""`cost` against the table of the specification, and against the products of the traced program."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

from structvit_jax import cost, create_model
from structvit_jax.ops import use_kernels

# Parameters (millions) and multiply-accumulates (billions) that the paper's description implies, counted
# independently; video rows have 400 classes, DeiT's video rows 174. L's layer scale adds 0.04 %.
IMPLIED = """
uniformer_s               224x224     21.55    3.63
uniformer_b               224x224     49.78    8.25
structvit_s_4_2           224x224     21.84    3.64
structvit_s_4_1           224x224     21.84    4.29
structvit_s_8_1           224x224     22.14    5.14
structvit_s_4_1           384x384     21.84   17.24
structvit_b_4_2           224x224     50.50    8.28
structvit_b_4_1           224x224     50.50    9.88
structvit_b_8_1           224x224     51.21   12.02
structvit_b_4_1           384x384     50.50   40.63
structvit_l_4_1           224x224    100.52   22.39
structvit_l_4_1           384x384    100.52   85.13
uniformer_s_video         16x224x224  21.40   41.66
structvit_s_4_2_video     16x224x224  22.29   42.07
structvit_s_4_1_video     16x224x224  22.29   81.84
structvit_s_8_1_video     16x224x224  23.17  135.08
uniformer_b_video         32x224x224  49.81  258.25
structvit_b_4_2_video     32x224x224  51.97  260.88
structvit_b_4_1_video     32x224x224  51.97  654.06
deit_s                    224x224     22.05    4.57
deit_s_struct_1           224x224     22.13    4.59
deit_s_struct_4           224x224     22.38    5.70
deit_s_struct_1_video     16x224x224  22.80   57.27
deit_s_struct_2_video     16x224x224  23.05   80.32
deit_s_struct_4_video     16x224x224  23.55  126.41
"""


def documented_table():
    """(model, input) -> the counted parameters and multiply-accumulates of docs/models.md."""
    text = (ROOT / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| (\w+) \| ([\dx]+) \|(.*)\|$", text, re.MULTILINE)
    cells = {(name, size): rest.split("|") for name, size, rest in rows}
    return {key: (row[1].strip(), row[3].strip()) for key, row in cells.items()}


PRINTED = documented_table()


@pytest.mark.parametrize("row", IMPLIED.strip().splitlines(), ids=lambda row: "-".join(row.split()[:2]))
def test_agrees_with_the_specification(row):
    name, size, params, macs = row.split()
    classes = 1000 if "video" not in name else 174 if "deit" in name else 400
    counted = cost(name, (*map(int, size.split("x")), 3), classes)
    assert PRINTED[name, size] == (f"{counted.params / 1e6:.2f}", f"{counted.macs / 1e9:.2f}")
    assert counted.params / 1e6 == pytest.approx(float(params), rel=0.0011)
    assert counted.macs / 1e9 == pytest.approx(float(macs), rel=0.0026)
    assert counted.params == sum(part.params for part in counted.parts.values())
    assert counted.macs == sum(part.macs for part in counted.parts.values()) == sum(counted.kinds.values())


def test_the_documentation_lists_these_rows_and_no_others():
    assert [*PRINTED] == [tuple(row.split()[:2]) for row in IMPLIED.strip().splitlines()]


def test_the_released_models_exact_sizes():
    assert cost("uniformer_s", (224, 224, 3), 1000).params == 21_545_256
    assert cost("uniformer_s_plus", (224, 224, 3), 1000).params == 24_032_552
    assert cost("uniformer_b_ls", (224, 224, 3), 1000).params == 49_796_520
    assert cost("uniformer_s_video", (8, 224, 224, 3), 400).params == 21_400_400
    # Token labelling's L, less its auxiliary head and with our vectors for its (1, C, 1, 1) scales.
    assert cost("uniformer_l", (224, 224, 3), 1000).params == 100_103_888 - 641_000


@pytest.mark.parametrize(
    ("name", "shape", "overrides"),
    [
        ("structvit_tiny_3_2", (33, 26, 3), {"key_window": (3, 5), "value_window": 1}),
        ("structvit_tiny_2_1_video", (4, 24, 24, 3), {}),
        (
            "uniformer_s_plus",
            (40, 40, 3),
            {"depths": (1, 1, 1, 1), "widths": (8, 8, 16, 16), "head_width": 8},
        ),
        ("deit_tiny_video", (8, 24, 24, 3), {}),
    ],
)
def test_agrees_with_a_count_of_the_whole_program(name, shape, overrides):
    """`cost` traces one block of each stage; here every product of the full model counts."""
    model = create_model(name, num_classes=5, **overrides)
    with use_kernels("reference"):
        program = jax.make_jaxpr(lambda x: model(x))(jnp.zeros((1, *shape)))
    assert _macs(program.jaxpr) == cost(name, shape, 5, **overrides).macs


def _macs(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        out = math.prod(equation.outvars[0].aval.shape)
        params = equation.params
        if equation.primitive.name == "dot_general":
            contracted = params["dimension_numbers"][0][0]
            total += out * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            total += out * math.prod(equation.invars[1].aval.shape[:-1])
        elif equation.primitive.name == "cond":  # by platform; the default is the definition
            total += _macs(params["branches"][params["branches_platforms"].index(None)].jaxpr)
        for value in params.values():
            inner = getattr(value, "jaxpr", value if hasattr(value, "eqns") else None)
            total += _macs(inner) if inner is not None else 0
    return total
