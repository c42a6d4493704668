"""What the builder of the site does to its pages."""

from typing import Any


def on_page_content(html: str, **unused: Any) -> str:
    """Docstrings announce a block of code by two colons, of which Markdown shows both."""
    return html.replace("::</p>", ":</p>")
