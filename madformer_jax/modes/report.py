"""--mode=report: tables, figures and a page from the finished runs of a sweep.

    python -m madformer_jax.main --mode=report --workdir=runs/depth

Writes index.html (self-contained), tables.md, results.csv and figures/ (SVG and PNG) to
workdir/report. Equal results give equal bytes. To add to the report, see
`reports.report_sections`.
"""

import os
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from madformer_jax.reports import html, report_sections, results, tables
from madformer_jax.reports.report_sections import Figures
from madformer_jax.runtime import storage


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Writes the report of a sweep. `c` is not used: each result holds its own config.

    Returns:
      The path of the page and the numbers of finished and of missing runs.

    Raises:
      ConfigError: There are no results, or they are not comparable. Nothing is written.
    """
    loaded = results.load_results(workdir)
    sections = report_sections.build_sections(loaded)
    files: dict[str, bytes] = {
        "index.html": html.render(loaded, sections).encode(),
        "tables.md": report_sections.to_markdown(loaded, sections).encode(),
        "results.csv": tables.to_csv(loaded).encode(),
    }
    for panel in (p for section in sections for x in section.items if isinstance(x, Figures) for p in x.panels):
        files[f"figures/{panel.name}.svg"], files[f"figures/{panel.name}.png"] = panel.svg, panel.png
    folder = os.path.join(workdir, "report")
    for name, content in files.items():
        storage.write_bytes(os.path.join(folder, name), content)
    path = os.path.join(folder, "index.html")
    logging.info("wrote %s: %s", path, report_sections.status(loaded))
    return {"report": path, "runs": len(loaded.runs), "missing": len(loaded.missing)}
