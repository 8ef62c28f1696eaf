"""The table of models that are really smaller: what is left of them, how good that is, and how much faster."""

from collections.abc import Sequence
from statistics import mean

from tests.bench.quality.plan import Amount, spelled
from tests.bench.quality.tables import Board, Row, footer, markdown
from tests.bench.quality.weighing import Weight


def smaller_section(board: Board) -> str:
    """Return all tables, with what they were made of."""
    tables = [smaller_table(board, sparsity) for sparsity in board.sparsities]
    return "\n\n".join(part for part in (*tables, footer(board)) if part)


def smaller_table(board: Board, sparsity: Amount) -> str:
    """Return the table of one part of the blocks' parameters that was to go, the best recipe first."""
    rows = [row for row in board.rows(board.bench.sizes[0], sparsity) if weights_of(row)]
    header = [
        "recipe", "of the blocks gone", "parameters", "on disk", *board.bench.evaluate, "reading", "writing", "pruning",
        "memory",
    ]  # fmt: skip
    lines = [smaller_line(list(board.bench.evaluate), row) for row in rows]
    title = f"**{spelled(sparsity)} of the blocks' parameters** (reading and writing: tokens a second, dense = 1):"
    return f"{title}\n\n{markdown(header, lines)}" if rows else ""


def smaller_line(texts: Sequence[str], row: Row) -> list[str]:
    """Return the cells of one recipe."""
    weights = weights_of(row)
    idle = mean(w.part_idle for w in weights)
    return [
        row.recipe,
        f"{mean(w.part_removed for w in weights):.1%}" + (f", {idle:.1%} idle" if idle else ""),
        f"{weights[0].parameters:,}",
        f"{weights[0].num_bytes / 1e6:.1f} MB",
        *(row.over_seeds(text) for text in texts),
        f"{mean(w.reading for w in weights):.2f}",
        f"{mean(w.writing for w in weights):.2f}",
        f"{row.mean(lambda figures: figures.elapsed or 0.0):.0f} s",
        f"{max(figures.peak for figures in row.by_seed.values()) / 1e9:.2f} GB",
    ]


def weights_of(row: Row) -> list[Weight]:
    """Return what was weighed, seed by seed."""
    return [figures.weight for figures in row.by_seed.values() if figures.weight is not None]
