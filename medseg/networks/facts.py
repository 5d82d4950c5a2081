"""What is known about each architecture beside its code: paper, public code, input rule, size, published results.

The facts stand in the architecture's own file as ``FACTS = Facts(...)``, with literal arguments only. They are read
from its source without importing it, so that listing all architectures loads neither torch nor MONAI.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg.networks.registry import names

COUNTED = (
    "multiply-accumulates of convolutions and matrix products, attention and the selective scan's products included; "
    "norms, activations and the scan's recurrence are not counted"
)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about an architecture; figures are those of `default` at `default_input`, and a test measures them again.

    Attributes:
        title: the name as the paper spells it.
        paper: authors, title, year, arXiv number.
        code: the public repository.
        code_license: its licence, "none" where it carries none.
        spatial_dims: 2, 3 or both, the default first.
        input_rule: legal channels and sizes.
        default: constructor arguments of the published configuration.
        default_input: shape (B, C, ...) of an input of that configuration.
        parameters: their number.
        gmacs: billions of multiply-accumulates of one forward pass, see `COUNTED`.
        weights: where the authors publish trained weights, or that they do not.
        results: what the authors report, (data set, figures).
    """

    title: str
    paper: str
    code: str
    code_license: str
    spatial_dims: tuple[int, ...]
    input_rule: str
    default: Mapping[str, Any] = field(default_factory=dict)
    default_input: tuple[int, ...]
    parameters: int
    gmacs: float
    weights: str
    results: tuple[tuple[str, str], ...] = ()


def read_facts(name: str) -> Facts:
    """The facts of an architecture, from the source of its file.

    Raises:
        ValueError: the name is not registered, or its file holds no facts made of literals.
    """
    if name not in names():
        raise ValueError(f"unknown architecture {name!r}; known: {', '.join(names())}")
    path = Path(__file__).with_name(f"{name}.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "FACTS" for t in node.targets):
            if not isinstance(node.value, ast.Call):
                break
            return Facts(**{word.arg: ast.literal_eval(word.value) for word in node.value.keywords if word.arg})
    raise ValueError(f"{path.name} holds no FACTS = Facts(...)")
