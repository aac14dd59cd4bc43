"""A headless Chromium, steered by its DevTools protocol over two pipes: nothing but the standard library."""

import json
import os
import select
import shutil
import subprocess
import time

import pytest


class Browser:
    """One page of a headless Chromium. ``problems`` are console errors, exceptions, requests beyond the disk."""

    def __init__(self, executable, profile):
        (read, to_us), (from_us, write) = os.pipe(), os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
                 "--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}"]  # fmt: skip
        script = f'exec "$0" "$@" 3<&{from_us} 4>&{to_us}'  # the two pipes are expected as 3 and 4
        self.process = subprocess.Popen(["bash", "-c", script, executable, *flags], pass_fds=(from_us, to_us),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        os.close(from_us)
        os.close(to_us)
        self.read, self.write, self.buffer, self.number, self.session = read, write, b"", 0, None
        self.problems, self.events = [], []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def receive(self):
        end = time.monotonic() + 60
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(0, end - time.monotonic()))
            chunk = os.read(self.read, 2**20) if ready else b""
            assert chunk, "Chromium says nothing"
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        method, params = message.get("method", ""), message.get("params", {})
        self.events.append(method)
        url = params.get("request", {}).get("url", "")
        if (method == "Runtime.exceptionThrown"
                or (method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"))
                or (method == "Log.entryAdded" and params["entry"]["level"] == "error")
                or (method == "Network.requestWillBeSent" and not url.startswith(("file:", "data:")))):  # fmt: skip
            self.problems.append((method, str(params)[:500]))
        return message

    def open(self, path):
        self.events.clear()
        self.ask("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self.events:
            self.receive()

    def run(self, expression):
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def pixels(self, number=0):
        """How many pixels of a canvas are not the background, and a hash of all of them, after the next frame."""
        return self.run(f"""new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => {{
            const canvas = document.querySelectorAll("canvas")[{number}];
            const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            let drawn = 0, hash = 0;
            for (let i = 0; i < data.length; i += 4) {{
                drawn += data[i] + data[i + 1] + data[i + 2] < 740;
                hash = (hash * 31 + data[i] + 7 * data[i + 1] + 13 * data[i + 2]) % 1000000007;
            }}
            done([drawn, hash, canvas.width]);
        }})))""")

    def middle(self, number=0):
        return self.run(f"""(() => {{ const box = document.querySelectorAll("canvas")[{number}].getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2]; }})()""")

    def drag(self, dx, dy, number=0):
        x, y = self.middle(number)
        for kind, i in (("mousePressed", 0), ("mouseMoved", 1), ("mouseMoved", 2), ("mouseReleased", 2)):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x + i * dx / 2, y=y + i * dy / 2, button="left",
                     buttons=1, clickCount=1)  # fmt: skip

    def wheel(self, delta, number=0):
        x, y = self.middle(number)
        self.ask("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=delta)

    def close(self):
        os.close(self.write)
        self.process.terminate()
        self.process.wait(30)
        os.close(self.read)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not executable:
        pytest.skip("no chromium here: apt-get install chromium")
    found = Browser(executable, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()
