"""The page of `dvn eval --report` in a real browser, a telephone's width and a desk's; skipped where there is none."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OFFLINE = ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"]
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", *OFFLINE]

FRAMED = """<iframe src="page.html" width="{width}" height="500" onload="
  const page = this.contentDocument.documentElement; document.title = [page.scrollWidth, page.clientWidth].join()
"></iframe>"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]


def browse(folder: Path, file: str, *options: str) -> str:
    """Opens a file, and returns what the browser printed; fails where its console said anything."""
    words = [CHROMIUM, *QUIET, f"--user-data-dir={folder / 'profile'}", *options, (folder / file).as_uri()]
    done = subprocess.run(map(str, words), capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    return done.stdout


@pytest.fixture
def page(dvn, made: Path, tmp_path: Path) -> Path:
    assert dvn("--report", str(tmp_path / "page.html"))[0] == 0
    return tmp_path


def requests(folder: Path, width: int) -> list[str]:
    """Takes a picture of the page, `a.png`, and returns what it asked the network for."""
    log = folder / "net.json"
    shot = f"--screenshot={folder / 'a.png'}"
    browse(folder, "page.html", f"--window-size={width},2000", shot, f"--log-net-log={log}")
    urls = (event.get("params", {}).get("url", "") for event in json.loads(log.read_text())["events"])
    own = ("google.com/", "gvt1.com/")  # what the browser itself would like to know
    return [url for url in urls if url.startswith("http") and not any(host in url for host in own)]


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_asks_for_nothing(page: Path, width: int) -> None:
    assert requests(page, width) == []
    with Image.open(page / "a.png") as picture:
        assert picture.size == (width, 2000)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100  # there are charts and images
    (page / "framed.html").write_text(FRAMED.format(width=width))
    text = browse(page, "framed.html", "--allow-file-access-from-files", "--dump-dom")
    assert f"<title>{width},{width}</title>" in text  # tables scroll, the page does not


def test_the_page_is_printed(page: Path) -> None:
    browse(page, "page.html", f"--print-to-pdf={page / 'page.pdf'}")
    assert (page / "page.pdf").read_bytes().startswith(b"%PDF")


def test_an_error_and_a_request_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<script>undefined_name()</script>")
    with pytest.raises(AssertionError, match="CONSOLE"):
        requests(tmp_path, 390)
    (tmp_path / "page.html").write_text("<img src='http://a.example/b'>")
    assert set(requests(tmp_path, 390)) == {"http://a.example/b"}
