"""Methods as the contract needs them: of any name in the configuration, for the budget and the model of a check."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save

from zipeval.config.compose import compose
from zipeval.contract.checks import Candidate
from zipeval.contract.subjects import Subject
from zipeval.engine import hf_names
from zipeval.methods import build


@dataclass
class Projectors:
    """Files with projectors, for methods that have a tuned one."""

    directory: TemporaryDirectory = field(default_factory=TemporaryDirectory)

    def drawn(self, subject: Subject, noise: float) -> Path:
        """Return a file with the model's projector, and so much noise on it."""
        state = hf_names.projector(subject.model()).state_dict()
        generator = torch.Generator().manual_seed(0)
        weights = {}
        for name, tensor in state.items():
            tensor = tensor.float()
            weights[name] = tensor + noise * torch.randn(
                tensor.shape, generator=generator
            )
        content = save(weights)
        path = Path(
            self.directory.name, f"{hashlib.sha256(content).hexdigest()}.safetensors"
        )
        path.write_bytes(content)
        return path


def candidate(
    name: str, overrides: tuple[str, ...] = (), config_dir: str | None = None
) -> Candidate:
    """Return a method by its name.

    Args:
        overrides: method.OPTION=VALUE, for options that it needs.
        config_dir: directory of further configurations, as --config-dir names it.

    Raises:
        UsageError: if there is no such method.
    """
    node = compose([f"method={name}", *overrides], config_dir).method
    projectors = Projectors() if "projector" in node else None

    def make(subject: Subject, tokens: int, budget: str):
        chosen = [f"method={name}", f"tokens={tokens}", f"budget={budget}"]
        if (
            "first" in node and node.get("of") is None
        ):  # a chain: its first part leaves the half of what it can
            chosen.append(f"method.first.tokens={(subject.shape.image + tokens) // 2}")
        if projectors is not None:
            noise = 0.0 if tokens == subject.shape.image else 0.1
            chosen.append(f"projector={projectors.drawn(subject, noise)}")
        return build(
            compose([*chosen, *overrides], config_dir).method, budget, subject.shape
        )

    return Candidate(make, has_budget="tokens" in node)
