"""report.html: one self-contained file that opens from disk, without a server and without a network.

Everything that comes from records is escaped by the template engine; the page's own rules (Content-Security-Policy)
allow no script but the one in page.js and no address outside the file.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vopd.report.comparison import Comparison
from vopd.report.curves import Picture
from vopd.report.gallery import OUTCOMES, Gallery
from vopd.report.tables import broken_notes, mixed_notes, verdict
from vopd.report.text_table import Sheet

HERE = Path(__file__).parent


def html(c: Comparison, sheets: Sequence[Sheet], pictures: Sequence[Picture], gallery: Gallery) -> str:
    """The page's text."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    profiles = ", ".join(sorted({str(run.facts["profile"]) for run in c.runs}))
    template = environment.get_template("page.html.jinja")
    return template.render(
        title=f"Comparison of {len(c.groups)} methods on {profiles}",
        verdict=verdict(c),
        warnings=[*mixed_notes(c), *broken_notes(c)],
        script=script,
        script_hash=digest,
        main=sheets[0],
        others=[sheet for sheet in sheets[1:] if not sheet.published and sheet.key != "runs"],
        published=[sheet for sheet in sheets if sheet.published],
        runs=next(sheet for sheet in sheets if sheet.key == "runs"),
        pictures=pictures,
        gallery=gallery,
        outcomes=OUTCOMES,
        methods=list(dict.fromkeys([row.name for table in c.tables for row in table.rows])),
        splits=sorted({card.split for card in gallery.cards}),
        families=sorted({card.family for card in gallery.cards}),
        totals={f"{method}\0{outcome}": n for (method, outcome), n in gallery.totals.items()},
    )
