"""What the built pages need beyond the configuration: links that lead out of docs/.

Pages are read in the repository too, where `../runtime/api.py` is the file. The site has no such page: with a
`repo_url` in mkdocs.yml the link leads to the repository, and without one its text stays.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Rewrites the links of a page; a target that is not in the repository fails the build."""
    root = Path(config.config_file_path).parent

    def rewritten(link: re.Match[str]) -> str:
        text, target = link.groups()
        if not (root / target.partition("#")[0]).exists():
            raise ValueError(f"{page.file.src_path}: no such file: {target}")
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{target})" if config.repo_url else text

    return OUTSIDE.sub(rewritten, markdown)
