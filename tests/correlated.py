"""Weights and correlated inputs for tests of methods that use the Gram matrix."""

import torch

from pipeline.statistics import ColumnSquares, Gram

DEAD = [3, 17]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(num_features: int, num_tokens: int = 600) -> torch.Tensor:
    """Tokens of a few hidden causes, seen by all features, noise of their own, and features of unequal power."""
    causes = normal(num_tokens, max(1, num_features // 4), seed=1)
    x_TD = causes @ normal(causes.shape[1], num_features, seed=2) + normal(num_tokens, num_features, seed=3)
    return x_TD * torch.logspace(-1, 1, num_features)


def with_dead_features(x_TD: torch.Tensor) -> torch.Tensor:
    return x_TD.index_fill(1, torch.tensor(DEAD), 0)


def gram_of(x_TD: torch.Tensor) -> Gram:
    gram = Gram.empty(x_TD.shape[1], x_TD.device)
    gram.update(x_TD)
    return gram


def squares_of(x_TD: torch.Tensor) -> ColumnSquares:
    squares = ColumnSquares.empty(x_TD.shape[1], x_TD.device)
    squares.update(x_TD)
    return squares


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.double() - right.double()).norm() / right.double().norm())
