"""What MkDocs does beside building pages: links out of docs/ lead to the repository, and tutorials are notebooks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from website.tutorials import notebook, read_page

LINK = re.compile(r"(?<=\]\()(\.\.?/[^)\s#]+)(#[^)\s]+)?(?=\))")


def on_config(config: Any) -> Any:
    """Make anchors as code forges do, so that one link is right in both places."""
    # It comes with the theme, and what else is in this file needs neither.
    from pymdownx.slugs import slugify

    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links that leave the documentation into links to the repository, and offer tutorials as notebooks."""
    if page.file.src_uri == "index.md":
        # It shows two ways in side by side, for which it takes the whole width.
        page.meta["hide"] = ["navigation", "toc"]
    if page.file.src_uri.startswith("tutorials/"):
        title, _, rest = markdown.partition("\n\n")
        offer = f'<a class="notebook" href="{page.file.name}.ipynb" download>This page as a notebook</a>'
        markdown = f"{title}\n\n{offer}\n\n{rest}"
    docs = Path(config.docs_dir).resolve()
    root = Path(config.config_file_path).parent.resolve()

    def to_repository(link: re.Match[str]) -> str:
        target = (docs / page.file.src_uri).parent.joinpath(link[1]).resolve()
        if target.is_relative_to(docs) or not target.exists():
            return link[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"{config.repo_url}/{kind}/main/{target.relative_to(root).as_posix()}{link[2] or ''}"

    return LINK.sub(to_repository, markdown)


def on_post_build(config: Any) -> None:
    """Put each tutorial beside its page as a notebook."""
    for page in sorted(Path(config.docs_dir, "tutorials").glob("*.md")):
        target = Path(config.site_dir, "tutorials", page.stem + ".ipynb")
        target.write_text(notebook(read_page(page)), encoding="utf-8")
