"""A JupyterLab and a headless Chromium to look at pages with: what a test sees here is what a reader sees."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import nbformat
from nbformat.v4.rwbase import rejoin_lines

TOP = Path(__file__).resolve().parent.parent
CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
DRIVER = shutil.which("chromedriver")
MISSING = "no Chromium with its driver here: `make test-browser` installs both" if not (CHROMIUM and DRIVER) else ""

SETTINGS = {  # what would change a page or ask the network
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none", "recordTiming": False},
    "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
    "@jupyterlab/apputils-extension/notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
}
RUN_PAGE = """
const [path, done] = arguments;
(async () => {
  while (!window.jupyterapp) await new Promise(r => setTimeout(r, 100));
  const app = window.jupyterapp;
  await app.restored;
  const page = await app.commands.execute('docmanager:open', {path: path});
  await page.context.ready; await page.sessionContext.ready;
  app.shell.activateById(page.id);
  while (app.shell.currentWidget !== page) await new Promise(r => setTimeout(r, 20));
  if (page.sessionContext.session?.kernel == null) throw new Error("the page has no kernel");
  // lessons are started in the top folder here, and in their own by nbdev_test
  const kernel = page.sessionContext.session.kernel;
  if (path.split('/').length === 2)
    await kernel.requestExecute({code: "import os; os.chdir('..'); del os", silent: true}).done;
  window.ran = '';
  app.commands.execute('notebook:run-all-cells')
    .then(() => { window.ran = 'ran'; }, e => { window.ran = 'failed: ' + e; });
  return 'started';
})().then(done, e => done('failed: ' + e));
"""
STILL = """
const style = document.createElement('style');
style.textContent = '* { animation: none !important; transition: none !important; }';
document.head.append(style);
"""
WAIT = """
const [picture, address, seconds, done] = arguments, begun = performance.now();
(function look() {
  if (picture.src !== address) done(true);
  else if (performance.now() - begun > 1000*seconds) done(false);
  else setTimeout(look, 4);
})();
"""
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"  # not to be had without a network
LOOK = f"const BADGE = {json.dumps(BADGE)};" + """
const cells = window.jupyterapp.shell.currentWidget.content.widgets;
const shown = (n) => n && n.offsetParent !== null;
return {
  errors: [...document.querySelectorAll('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"],' +
           ' .jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]')]
          .map(n => n.innerText.slice(0, 400)),
  unrun: cells.filter(c => c.model.type === 'code' && c.model.sharedModel.getSource().trim()
                           && !c.model.executionCount).length,
  unfolded: cells.filter(c => c.model.type === 'code' && !c.inputHidden).map(c => c.model.sharedModel.getSource())
                 .filter(s => /^(#\\| (hide|default_exp|echo: false)|# Solution|# Check)/.test(s))
                 .map(s => s.slice(0, 80)),
  brokenTables: [...document.querySelectorAll('.jp-RenderedMarkdown p, .jp-RenderedHTMLCommon p')]
                 .map(n => n.innerText.trim()).filter(s => /^\\|.*\\|/.test(s)).map(s => s.slice(0, 120)),
  brokenMath: [...document.querySelectorAll('mjx-merror, [data-mjx-error], .MathJax_Error')]
                 .map(n => n.innerText.slice(0, 120)),
  brokenImages: [...document.querySelectorAll('.jp-Notebook img')]
                 .filter(n => n.complete && n.naturalWidth === 0 && n.src && n.src !== BADGE)
                 .map(n => n.src.slice(0, 120)),
  deadLinks: [...document.querySelectorAll('.jp-Notebook a.jp-mod-broken')].map(n => n.href)
};
"""


def free_port():
    "A port that nobody uses now."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Lab:
    "JupyterLab over a copy of the notebooks, and a browser that looks at it; `with Lab() as lab:`."

    def __enter__(self):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        self.folder = Path(tempfile.mkdtemp(prefix="lab-"))
        shutil.copytree(TOP / "nbs", self.folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        shutil.copytree(TOP / "research_docs", self.folder / "research_docs")
        for name, settings in SETTINGS.items():
            path = self.folder / f"settings/{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        own = {
            f"JUPYTER{k}_DIR": str(self.folder / v)
            for k, v in (
                ("LAB_SETTINGS", "settings"),
                ("LAB_WORKSPACES", "workspaces"),
                ("_CONFIG", "config"),
                ("_RUNTIME", "runtime"),
            )
        }
        env = os.environ | own | {"PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"}
        self.log = (self.folder / "lab.log").open("w")
        self.server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--allow-root",
                f"--port={port}",
                f"--ServerApp.root_dir={self.folder}",
                "--IdentityProvider.token=",
                "--LabApp.expose_app_in_browser=True",
                "--LabApp.news_url=None",
            ],
            env=env,
            stdout=self.log,
            stderr=self.log,
            cwd=self.folder,
        )
        self.wait_for_server()
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for arg in (
            "headless",
            "no-sandbox",
            "disable-gpu",
            "disable-quic",
            "no-first-run",
            "disable-background-networking",
            "disable-component-update",
            "disable-sync",
            "disable-dev-shm-usage",
            "window-size=1400,1400",
            f"user-data-dir={self.folder / 'chromium'}",
        ):
            options.add_argument(f"--{arg}")
        self.browser = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.browser.set_script_timeout(600)
        self.browser.get(f"{self.url}/lab?reset")
        self.browser.execute_script(STILL)
        return self

    def __exit__(self, *_):
        if hasattr(self, "browser"):
            self.browser.quit()
        self.server.terminate()
        try:
            self.server.wait(20)
        except subprocess.TimeoutExpired:  # seen on a busy machine; nothing of it is needed any more
            self.server.kill()
            self.server.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait_for_server(self, seconds=300):
        for _ in range(seconds * 4):
            try:
                urllib.request.urlopen(f"{self.url}/api", timeout=5)
                return
            except OSError:
                assert self.server.poll() is None, (self.folder / "lab.log").read_text()[-2000:]
                time.sleep(0.25)
        raise TimeoutError("JupyterLab did not start")

    def begin(self, path):
        "Open a page (path below the top folder) in place of the one before it, and begin to run it."
        self.close_page()
        said = self.browser.execute_async_script(RUN_PAGE, path)
        assert said == "started", said

    def run(self, path, seconds=600):
        "Open a page, run it from top to bottom; what is wrong to look at, by kind."
        self.begin(path)
        until = time.monotonic() + seconds
        while not (said := self.browser.execute_script("return window.ran")):
            assert time.monotonic() < until, f"{path} did not end in {seconds} s"
            time.sleep(0.25)
        assert said == "ran", said
        time.sleep(1.0)
        return {k: v for k, v in self.browser.execute_script(LOOK).items() if v}

    def page(self):
        "The page as it is now, with its outputs."
        now = self.browser.execute_script("return window.jupyterapp.shell.currentWidget.content.model.toJSON()")
        for cell in now["cells"]:
            cell.pop("attachments", None)  # JupyterLab writes null where there are none
        return rejoin_lines(nbformat.from_dict(now))

    def figures(self):
        "The live figures of the page: (picture, handles of its sliders)."
        boxes = self.browser.find_elements("css selector", ".widget-vbox")
        out = []
        for box in boxes:
            pictures = box.find_elements("css selector", "img.widget-image")
            handles = box.find_elements("css selector", ".noUi-handle, .ui-slider-handle")
            if len(pictures) == 1:
                out.append((pictures[0], handles))
        return out

    def see(self, picture):
        "The pixels of a picture as the browser shows them, now."
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
        return picture.screenshot_as_png

    def changed(self, picture, act, seconds=5.0):
        "Does an action change what is seen? Seconds from its end until the new picture was there, or None."
        before, address = self.see(picture), picture.get_attribute("src")
        act()
        start = time.perf_counter()
        while (left := seconds - (time.perf_counter() - start)) > 0:
            if not self.browser.execute_async_script(WAIT, picture, address, left):
                return None
            waited = time.perf_counter() - start
            time.sleep(0.05)
            if self.see(picture) != before:
                return waited
            address = picture.get_attribute("src")
        return None

    def close_page(self):
        "End the kernel of the page, if one is open, and close it as it is."
        self.browser.execute_async_script(
            "const done = arguments[0], p = window.jupyterapp?.shell.currentWidget;"
            "if (!p?.sessionContext) done(2);"
            "else p.sessionContext.shutdown().catch(() => 0).then(() => { p.dispose(); done(1); });"
        )
