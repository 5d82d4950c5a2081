"""The registry: every name leads to a class, a bundle's target and back; wrong names are refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch import nn

import medseg.networks
from medseg.networks import create, name_of, names, network_class, target_of


@pytest.mark.parametrize("name", names())
def test_a_name_leads_to_its_class_and_to_the_target_of_a_bundle(name: str) -> None:
    cls = network_class(name)
    assert issubclass(cls, nn.Module)
    assert name_of(target_of(name)) == name
    assert getattr(medseg.networks, target_of(name).rpartition(".")[2]) is cls


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown architecture 'unet'; known: dformer, "):
        create("unet")


@pytest.mark.parametrize("name", names())
def test_an_unknown_argument_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: .*no_such_argument"):
        create(name, no_such_argument=1)


@pytest.mark.parametrize("target", ["medseg.networks.NoSuch", "monai.networks.nets.SwinUNETR", "os.system", ""])
def test_a_target_outside_the_registry_has_no_name(target: str) -> None:
    assert name_of(target) is None


def test_a_name_outside_the_registry_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'NoSuch'"):
        _ = medseg.networks.NoSuch


@pytest.mark.parametrize("module", ["medseg.networks", "medseg.checkpoints"])
def test_importing_the_package_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; raise SystemExit(any(name in sys.modules for name in ('torch', 'monai', 'numba')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
