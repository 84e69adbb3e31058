"""The benchmark page: what ``make bench`` recorded under ``book/benchmarks``, as tables."""

import json
from pathlib import Path

import registry
from docutils import nodes
from nodes_kit import paragraph, section, table
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

RESULTS = Path("book/benchmarks")


def _number(value: float | None, unit: str = "") -> str:
    """Three significant digits and the unit, or a dash where nothing was measured."""
    return "–" if value is None else f"{value:,.3g}{unit}" if abs(value) < 1000 else f"{value:,.0f}{unit}"


def _memory(row: dict) -> str:
    """Ours, and the peer's in brackets where it was measured."""
    peer = row.get("memory_peer_mb")
    return _number(row.get("memory_mb"), " MB") + ("" if peer is None else f" ({_number(peer, ' MB')})")


def _peers(records: dict[str, dict]) -> nodes.table:
    """The comparisons with peers of these records."""
    return table(
        ["what", "peer", "size", "ours", "peer's", "ratio", "memory (peer's)", "note"],
        [
            [
                f"{row['slug']}: {row['name']}",
                row.get("peer") or "–",
                str(row["size"]),
                _number(row.get("time_ours_ms"), " ms"),
                _number(row.get("time_peer_ms"), " ms"),
                _number(row.get("ratio")),
                _memory(row),
                row.get("note") or "",
            ]
            for record in records.values()
            for row in record["rows"]
        ],
    )


def _slopes(records: dict[str, dict]) -> nodes.table:
    """The measured slopes of these records."""
    return table(
        ["what", "quantity", "range", "measured slope", "claimed"],
        [
            [f"{name}: {row['name']}", row["quantity"], str(row["range"]), _number(row["slope"]), str(row["claim"])]
            for name, record in records.items()
            for row in record["slopes"]
        ],
    )


def _made(records: dict[str, dict]) -> nodes.paragraph:
    """Where and when; which of them, if not all were measured there and then."""
    places: dict[str, list[str]] = {}
    for name, record in records.items():
        places.setdefault(f"{record['machine']}, {record['date']}", []).append(name)
    if len(places) == 1:
        return paragraph(f"Measured on {next(iter(places))}.")
    return paragraph(
        "Measured on " + "; ".join(f"{place} ({', '.join(names)})" for place, names in places.items()) + "."
    )


class Benchmarks(SphinxDirective):
    """``{benchmarks}``: part by part, the recorded comparison with peers and the measured slopes."""

    def run(self) -> list[nodes.Node]:
        """Make the tables, or say that nothing was recorded yet."""
        paths = sorted((Path(self.env.srcdir) / RESULTS).glob("*/*.json"))
        if not paths:
            return [paragraph("No benchmark is recorded yet. Run ", nodes.literal("", "make bench"), " to record one.")]
        parts: dict[str, dict[str, dict]] = {}
        for path in paths:
            self.env.note_dependency(str(path))
            record = json.loads(path.read_text(encoding="utf-8"))
            parts.setdefault(path.parent.name, {})[path.stem] = record
        order = ["ops", *(entry.part for entry in registry.load(Path(self.env.srcdir)))]
        made = []
        for part in sorted(parts, key=order.index):
            records = parts[part]
            body = [_made(records), _peers(records)]
            if any(record["slopes"] for record in records.values()):
                body.append(_slopes(records))
            made.append(section(part.capitalize(), f"bench-{part}", *body))
        return made


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("benchmarks", Benchmarks)
