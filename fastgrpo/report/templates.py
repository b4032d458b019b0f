"""Templates of pages, apart from what draws plots, which takes half a second to import."""

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fastgrpo.report import formats
from fastgrpo.report.markup import completion_html, picture_uri, question_of
from fastgrpo.safe_text.inert import inert
from fastgrpo.scoring.reflection import count_reflections


def template(name: str, folder: Path = Path(__file__).parent) -> jinja2.Template:
    """A page's template in `folder`, with the forms of figures and of text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        finalize=_inert,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    forms = {"percent": formats.percent, "count": formats.count, "duration": formats.duration}
    environment.globals.update(forms)
    environment.filters.update(
        **forms,
        signed=formats.signed,
        question=question_of,
        completion=completion_html,
        picture=picture_uri,
        reflections=count_reflections,
    )
    return environment.get_template(name)


def _inert(value: Any) -> Any:
    """Texts of models, files and users without control characters; markup was made by this package, of such texts."""
    return inert(value) if isinstance(value, str) and not isinstance(value, Markup) else value
