"""A hook of the site: decisions, and pages that nobody has put into mkdocs.yml, find their place by themselves."""

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def on_config(config: Any) -> Any:
    """The configuration with every page of the documentation in its navigation."""
    decisions = {"Decisions": [f"decisions/{page.name}" for page in sorted((HERE / "decisions").glob("*.md"))]}
    known = set(named(config["nav"]))
    more = [page.name for page in sorted(HERE.glob("*.md")) if page.name not in known]
    config["nav"] = [*config["nav"], decisions, *([{"More": more}] if more else [])]
    return config


def named(entries: Any) -> list[str]:
    """Every page that a navigation names."""
    if isinstance(entries, str):
        return [entries]
    values = entries.values() if isinstance(entries, dict) else entries
    return [page for entry in values for page in named(entry)]
