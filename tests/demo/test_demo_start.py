"""The demo is started: as a Space starts it, and from Python."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import yaml
from browser import PHONE, WAIT_S, demo, fits, needs_browser, visit
from helpers import ROOT
from run_folders import make_run

from mm_agrae import __version__
from mm_agrae.errors import ConfigError
from mm_agrae.view.demo_settings import embedded_models

gradio = pytest.importorskip("gradio")


def read(address, end):
    """The page, once it is there; the server is given until `end`."""
    while True:
        try:
            with urllib.request.urlopen(address) as reply:
                return reply.read().decode()
        except urllib.error.URLError:
            assert time.monotonic() < end, "the server does not answer"
            time.sleep(0.2)


def test_the_folder_is_a_space(tmp_path):
    """A copy of demo/, and nothing else, in an empty folder: `python app.py` without arguments serves it."""
    space = tmp_path / "space"
    shutil.copytree(ROOT / "demo", space, ignore=shutil.ignore_patterns("__pycache__"))
    front = yaml.safe_load((space / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert front["sdk"] == "gradio"
    assert front["sdk_version"].split(".")[0] == gradio.__version__.split(".")[0]
    assert f"mm-agrae[demo]=={__version__}" in (space / "requirements.txt").read_text().splitlines()
    (space / "demo.css").write_text("/* of the copy */")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, front["app_file"]], cwd=space, env=environment) as server:
        try:
            page = read(f"http://127.0.0.1:{port}/", time.monotonic() + WAIT_S)
        finally:
            server.terminate()
    assert "/* of the copy */" in page  # it is the copy that runs
    assert all(name in page for name in embedded_models())


@needs_browser
def test_from_python_with_a_run_of_ones_own_on_a_phone(browser, tmp_path):
    run = make_run(tmp_path / "mine", [1, 2])
    shutil.copytree(ROOT / "data" / "warm_start" / "text", run.path / "checkpoints" / "step_000002")
    (run.path / "checkpoints" / "step_000002" / "mm_agrae.json").write_text('{"sha256": {}}')
    launch = sys.modules[demo("app").__package__].launch
    app = launch(str(run.path), device="cpu")
    try:
        page = visit(browser, app.local_url, size=PHONE)
        assert page.locator("#pg-models label").first.inner_text().strip() == "mine"
        assert page.locator("#pg-models input").first.is_checked()
        tabs = page.get_by_role("tab")
        assert tabs.all_inner_texts() == ["Playground", "Runs", "Compare", "Advantage lab"]
        assert all(tab.is_visible() for tab in tabs.all())
        for tab in tabs.all():
            tab.click()
            assert fits(page)
            page.evaluate("scrollTo(0, 0)")
            page.mouse.move(PHONE["width"] / 2, PHONE["height"] / 2)
            page.mouse.wheel(0, 300)
            page.wait_for_function("() => scrollY > 200")
        tabs.nth(1).click()
        assert page.get_by_label("Run", exact=True).input_value() == "mine"
        assert page.errors == []
        page.context.close()
    finally:
        app.close()
    for options, message in (({"port": 70_000}, "from 1 to 65535"), ({"host": "192.0.2.1"}, "cannot listen")):
        with pytest.raises(ConfigError, match=message):
            launch(str(run.path), **options)
