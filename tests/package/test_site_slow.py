"""The site as a browser lays it out: no page is wider than a telephone, a tablet or a laptop."""

import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = (390, 768, 1280)
# Each page in one frame, of each width in turn; what is wider by itself must scroll by itself.
MEASURE = """
<!doctype html><title>measure</title><iframe id="frame" height="900"></iframe><pre id="found"></pre>
<script>
const pages = PAGES, widths = WIDTHS, found = {};
const frame = document.getElementById("frame");
const clipped = node => node && (getComputedStyle(node).overflowX != "visible"
  || getComputedStyle(node).position == "fixed" || clipped(node.parentElement));
const culprits = (page, width) => [...page.querySelectorAll("body *")]
  .filter(node => node.getBoundingClientRect().right > width + 1 && !clipped(node.parentElement))
  .slice(0, 3).map(node => node.tagName + ": " + node.textContent.trim().slice(0, 60));
const load = page => new Promise(done => { frame.onload = done; frame.src = page; });
(async () => {
  for (const page of pages) {
    await load("/" + page);
    const inner = frame.contentDocument;
    inner.head.insertAdjacentHTML("beforeend", "<style>* { transition: none !important }</style>");
    await new Promise(done => setTimeout(done, 50));  // the theme wraps tables
    for (const width of widths) {
      frame.style.width = width + "px";
      const wide = inner.documentElement.scrollWidth;
      if (wide > width + 4) found[page + " at " + width] = [wide, culprits(inner, width)];
    }
  }
  document.getElementById("found").textContent = JSON.stringify([pages.length, found]);
})();
</script>
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, and no word on them; none to search in, which every page would read."""

    def do_GET(self):
        if "/search" in self.path:
            self.send_error(404)
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


def measured(folder, pages):
    """`{page at width: (its width, what is wide)}` of those that overflow."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)}")
    script = MEASURE.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS))
    (folder / "measure.html").write_text(script)
    serve = partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/measure.html"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=600000"]
        command = [browser, *options, "--window-size=1400,1000", "--dump-dom", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        server.shutdown()
    told = re.search(r'<pre id="found">(.+?)</pre>', done.stdout)
    assert told, done.stderr[-2000:]
    number, found = json.loads(told[1])
    assert number == len(pages)
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("l2m4m")  # of the extra that builds the site
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def test_no_page_is_wider_than_its_window(site):
    pages = sorted(str(page.relative_to(site)) for page in site.rglob("index.html"))
    assert len(pages) > 40
    assert measured(site, pages) == {}


def test_an_overflow_is_found(tmp_path):
    for name, width in (("narrow", 300), ("wide", 1000)):
        box = f'<div class="box" style="width: {width}px">x</div>'
        (tmp_path / f"{name}.html").write_text(f"<body style='margin: 0'>{box}")
    found = measured(tmp_path, ["narrow.html", "wide.html"])
    assert found == {f"wide.html at {width}": [1000, ["DIV: x"]] for width in WIDTHS[:2]}
