"""The benchmark page: what ``make bench`` recorded in ``book/results/benchmarks.json``, as tables."""

import json
from pathlib import Path

from docutils import nodes
from nodes_kit import paragraph, section, table
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

RESULTS = Path("book/results/benchmarks.json")


def _number(value: float | None, unit: str = "") -> str:
    """Three significant digits and the unit, or a dash where nothing was measured."""
    return "–" if value is None else f"{value:,.3g}{unit}" if abs(value) < 1000 else f"{value:,.0f}{unit}"


class Benchmarks(SphinxDirective):
    """``{benchmarks}``: the recorded comparison with peers, and the measured slopes."""

    def run(self) -> list[nodes.Node]:
        """Make the tables, or say that nothing was recorded yet."""
        path = Path(self.env.srcdir) / RESULTS
        if not path.exists():
            return [paragraph("No benchmark is recorded yet. Run ", nodes.literal("", "make bench"), " to record one.")]
        self.env.note_dependency(str(path))
        results = json.loads(path.read_text(encoding="utf-8"))
        peers = table(
            ["what", "peer", "size", "ours", "peer's", "ratio", "memory", "note"],
            [
                [
                    f"{row['part']}/{row['slug']}: {row['name']}",
                    row.get("peer") or "–",
                    str(row["size"]),
                    _number(row.get("time_ours_ms"), " ms"),
                    _number(row.get("time_peer_ms"), " ms"),
                    _number(row.get("ratio")),
                    _number(row.get("memory_mb"), " MB"),
                    row.get("note") or "",
                ]
                for row in results["rows"]
            ],
        )
        slopes = table(
            ["what", "quantity", "range", "measured slope", "claimed"],
            [
                [row["name"], row["quantity"], str(row["range"]), _number(row["slope"]), str(row["claim"])]
                for row in results.get("slopes", [])
            ],
        )
        made = paragraph(f"Measured on {results['machine']}, {results['date']}.")
        return [
            made,
            section("Against peers", "bench-peers", peers),
            section("Slopes", "bench-slopes", slopes),
        ]


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("benchmarks", Benchmarks)
