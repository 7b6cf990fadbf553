"""Build methods as the contract needs them: by name, for the budget and the model of a check."""

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

    def write(self, subject: Subject, noise: float) -> Path:
        """Write a file with the model's projector, and so much noise on it."""
        state = hf_names.projector(subject.model()).state_dict()
        generator = torch.Generator().manual_seed(0)
        weights = {}
        for name, tensor in state.items():
            tensor = tensor.float()
            weights[name] = tensor + noise * torch.randn(
                tensor.shape, generator=generator
            )
        content = save(weights)
        # Equal weights are one file.
        name = f"{hashlib.sha256(content).hexdigest()}.safetensors"
        path = Path(self.directory.name, name)
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
        is_chain = "first" in node and node.get("of") is None
        if is_chain:
            # Its first part leaves the half of what it can.
            first_tokens = (subject.shape.image + tokens) // 2
            chosen.append(f"method.first.tokens={first_tokens}")
        if projectors is not None:
            # Untouched where everything is kept, which has to be the stock model.
            noise = 0.0 if tokens == subject.shape.image else 0.1
            chosen.append(f"projector={projectors.write(subject, noise)}")
        # The user's own options come last, and so win.
        config = compose([*chosen, *overrides], config_dir)
        return build(config.method, budget, subject.shape)

    return Candidate(make, has_budget="tokens" in node)
