"""A page as a real browser lays it out: what it measures is written into the page and read back."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

MEASURE = """
<script>
addEventListener("load", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  const inside = (box, around) => box.left > around.left - 1 && box.right < around.right + 1 &&
    box.top > around.top - 1 && box.bottom < around.bottom + 1;
  const height = document.documentElement.scrollHeight;
  const whole = {left: 0, top: 0, right: innerWidth, bottom: height};
  const said = element => element.tagName + " " + element.textContent.trim().slice(0, 40);
  const shown = [...document.body.querySelectorAll("*")].filter(
    e => !e.closest("script") && !e.parentElement.closest(".scroll") && !e.closest("svg g"));
  const found = {width: innerWidth, scroll: document.documentElement.scrollWidth, cut: [], met: [],
    outside: shown.filter(e => !inside(e.getBoundingClientRect(), whole)).map(said), fonts: []};
  for (const svg of document.querySelectorAll("figure svg")) {
    const texts = [...svg.querySelectorAll("text")], around = svg.getBoundingClientRect();
    const boxes = texts.map(text => text.getBoundingClientRect());
    found.fonts.push(...texts.map(text => parseFloat(getComputedStyle(text).fontSize) *
      around.width / svg.viewBox.baseVal.width));
    boxes.forEach((a, i) => {
      if (!inside(a, around)) found.cut.push(said(texts[i]));
      boxes.slice(0, i).forEach((b, j) => {
        if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 &&
          b.top < a.bottom - 3) found.met.push([said(texts[j]), said(texts[i])]);
      });
    });
  }
  parent.document.querySelector("output").textContent = JSON.stringify(found);
});
</script>
"""


def measure(page: str, width: int, folder: Path) -> dict:
    """A page's layout in a window so wide, all its tables open: window and scroll width, elements
    outside of the window (but for what scrolls by itself), labels cut or met by others, font sizes
    of figures.

    A window of a headless browser has at least 500 pixels, so the page stands in a frame.
    """
    inner = html.escape(page.replace("</body>", MEASURE + "</body>"), quote=True)
    outer = folder / f"frame_{width}.html"
    outer.write_text(
        f'<meta charset="utf-8"><iframe style="width: {width}px; height: 900px; border: 0"'
        f' srcdoc="{inner}"></iframe><output></output>'
    )
    settings = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"]
    settings += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000"]
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, *settings, "--dump-dom", outer.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r"<output>(.*?)</output>", done.stdout, re.DOTALL)
    assert found, "the browser laid nothing out"
    return json.loads(html.unescape(found[1]))
