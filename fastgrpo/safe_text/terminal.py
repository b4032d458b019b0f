"""A terminal that shows texts of models, data sets and users, and does nothing of what they say."""

from typing import Any

from rich.console import Console
from rich.text import Text

from fastgrpo.safe_text.inert import inert


class Terminal(Console):
    """A console that takes texts as they are: no markup, no control characters."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"markup": False, "highlight": False, "emoji": False} | settings)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every text goes through here, cells of tables and titles too; `Text` objects do not."""
        return super().render_str(inert(text), **options)
