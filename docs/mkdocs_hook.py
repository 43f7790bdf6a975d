"""A hook of MkDocs: the site has all Markdown files of the repository, at the same paths as in the repository.

The hook does not change links between Markdown files and links to pictures. A link to another file points to the repository's web
address from galaxy.yml.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = yaml.safe_load((ROOT / "galaxy.yml").read_text())["repository"]
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "*.md", "docs/pictures"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    # A symbolic link, such as molecule/default, would add a page twice.
    paths = sorted({path for path in listed.split("\0") if path and (ROOT / path).is_file() and not (ROOT / path).is_symlink()})
    theme = [
        file for file in files if not file.is_documentation_page() and not Path(file.abs_src_path).is_relative_to(ROOT / "docs")
    ]
    return Files([*theme, *(File.generated(config, path, abs_src_path=str(ROOT / path)) for path in paths)])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def address(found: re.Match[str]) -> str:
        path = os.path.normpath(os.path.join(os.path.dirname(page.file.src_uri), found[1]))
        # MkDocs reports a link to a file that does not exist.
        if files.get_file_from_path(path) or not (ROOT / path).exists():
            return found[0]
        return f"]({REPOSITORY}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}{found[2] or ''})"

    # MkDocs takes the title from a heading only if nothing precedes it.
    return LINK.sub(address, re.sub(r"\A<!--.*?-->\n", "", markdown))
