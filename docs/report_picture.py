"""Draws docs/report.png, the README's picture of a report, with a headless Chromium.

make demo
.venv/bin/python docs/report_picture.py runs/demo/report.html docs/report.png

It shows the verdicts, the two accuracies and the question types; the rest of the page is left out.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

LEFT_OUT = "header, aside, footer, .card:not(.wide), section:not(:first-of-type), details { display: none !important; }"
WIDTH, HEIGHT = 1100, 1600
COLOURS = 160


def draw(page: Path, picture: Path) -> None:
    """Raises FileNotFoundError where no Chromium is installed."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise FileNotFoundError("no chromium found: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        part, whole = Path(folder) / "part.html", Path(folder) / "whole.png"
        part.write_text(page.read_text().replace("</style>", f"{LEFT_OUT} body {{ padding: 0 1.5rem; }}</style>", 1))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/user"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
        flags += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={whole}", part.as_uri()]
        subprocess.run([browser, *flags], check=True, capture_output=True)
        image = Image.open(whole).convert("RGB")
    box = ImageChops.difference(image, Image.new("RGB", image.size, image.getpixel((0, 0)))).getbbox()
    bottom = min(box[3] + 24, image.height) if box else image.height
    cropped = image.crop((0, 0, image.width, bottom))
    few = cropped.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(picture, optimize=True)


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:3]))
