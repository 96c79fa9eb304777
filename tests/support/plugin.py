"""A third party's backend, installed as pip would leave it: a module, and the entry point beside it."""

from __future__ import annotations

from pathlib import Path


def install_plugin(site: Path, kind: str, source: str, factory: str = "Backend") -> Path:
    """Write module ``{kind}_plugin`` with its entry point ``kind`` into ``site``, which must be on ``sys.path``."""
    site.mkdir(parents=True, exist_ok=True)
    (site / f"{kind}_plugin.py").write_text(source)
    info = site / f"{kind}_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {kind}-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[promptmill.backends]\n{kind} = {kind}_plugin:{factory}\n")
    return site
