"""--mode=report: the tables, figures and page of a sweep, from the results that --mode=sweep has written so far.

    python -m madformer_jax.main --mode=report --workdir=runs/depth

Writes to workdir/report: index.html, which holds everything, tables.md, results.csv, and figures/, each as SVG and PNG. The
same results give the same bytes.
"""

import os
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from madformer_jax.reports import html, report_sections, results, tables
from madformer_jax.reports.report_sections import Figures
from madformer_jax.runtime import storage


def run(c: ConfigDict, workdir: str) -> dict[str, Any]:
    """Writes the report; returns its path, and how many runs it has and lacks. The config is that of no run and not read.

    Raises:
      ConfigError: there are no results, or they do not compare; nothing is written then.
    """
    found = results.load_results(workdir)
    sections = report_sections.build_sections(found)
    files: dict[str, bytes] = {
        "index.html": html.render(found, sections).encode(),
        "tables.md": report_sections.to_markdown(found, sections).encode(),
        "results.csv": tables.to_csv(found).encode(),
    }
    for panel in (
        p for section in sections for item in section.items if isinstance(item, Figures) for p in item.panels
    ):
        files[f"figures/{panel.name}.svg"], files[f"figures/{panel.name}.png"] = panel.svg, panel.png
    folder = os.path.join(workdir, "report")
    for name, content in files.items():
        storage.write_bytes(os.path.join(folder, name), content)
    path = os.path.join(folder, "index.html")
    logging.info("wrote %s: %s", path, report_sections.status(found))
    return {"report": path, "runs": len(found.runs), "missing": len(found.missing)}
