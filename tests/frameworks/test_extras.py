"""Without a framework, its module says what to install."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("torch", "torch", "torch"),
        ("jax", "jax", "jax"),
        ("tensordict", "torch", "torch"),
        ("tensordict", "tensordict", "tensordict"),
        ("gymnasium", "gymnasium", "gymnasium"),
        ("sb3", "stable_baselines3", "sb3"),
    ],
)
def test_missing_framework_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, missing: str, extra: str
) -> None:
    for needed in ("torch", "gymnasium"):
        if needed != missing and module in ("tensordict", "sb3"):
            pytest.importorskip(needed)
    for name in [name for name in sys.modules if name.startswith(("aionpredis.frameworks.", f"{missing}."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf'{missing} is missing: pip install "aionpredis\[{extra}\]"'
    ) as caught:
        importlib.import_module(f"aionpredis.frameworks.{module}")
    assert caught.value.name == missing
