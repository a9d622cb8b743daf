"""Choose the kernels of operations."""

import pytest

from structvit_jax.ops import kernels

NAMED = {row.name: row for row in reversed(kernels.TABLE)}


@pytest.fixture
def only(monkeypatch):
    """Replace the table by these kernels, for this process's CPUs."""

    def use(*rows):
        rows = (NAMED[row] if isinstance(row, str) else row for row in rows)
        table = tuple(row._replace(platform="cpu", supports=lambda *args, **options: True) for row in rows)
        monkeypatch.setattr(kernels, "TABLE", table)

    return use
