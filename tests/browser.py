"""Look at a page in a real browser: headless Chromium, spoken to through two pipes."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic",
           "--disable-background-networking", "--disable-component-update", "--disable-sync",
           "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe")
SILENCE_S = 120  # a browser that hangs must not hang the tests


class Page:
    """One open page.

    Attributes
    ----------
    complaints : uncaught exceptions, and errors in the console
    requests : addresses that were asked for, whoever asked
    """

    def __init__(self, send, session):
        self._send, self._session = send, session
        self.complaints, self.requests = [], []

    def run(self, script):
        """Evaluate an expression in the page, awaiting promises; its value."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True,
                          returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, condition, seconds=20):
        """Wait until an expression is true."""
        assert self.run(f"""new Promise(done => {{
            const until = Date.now() + {1000 * seconds};
            const look = () => ({condition}) ? done(true)
                : Date.now() > until ? done(false) : setTimeout(look, 20);
            look(); }})"""), f"never: {condition}"

    def set(self, name, value):
        """Move a control as a user does."""
        self.run(f"""(() => {{ const it = document.getElementById({name!r});
            it.value = {value!r};
            it.dispatchEvent(new Event('input', {{bubbles: true}}));
            it.dispatchEvent(new Event('change', {{bubbles: true}})); }})()""")

    def press(self, name, key, code):
        """Press a key on a control, by its name and its Windows key code."""
        self.run(f"document.getElementById({name!r}).focus()")
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode=code)

    def pixels(self, name):
        """A canvas as rows of [red, green, blue]."""
        width, values = self.run(f"""(() => {{ const it = document.getElementById({name!r});
            const found = it.getContext('2d').getImageData(0, 0, it.width, it.height).data;
            return [it.width, Array.from(found)]; }})()""")
        colours = [values[i:i + 3] for i in range(0, len(values), 4)]
        return [colours[i:i + width] for i in range(0, len(colours), width)]

    def screenshot(self):
        """The whole page as PNG bytes."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(found["data"])

    def call(self, method, **options):
        """One command of the DevTools protocol; notes what the page complains about."""
        result, events = self._send(method, options, self._session)
        for event in events:
            what = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                self.complaints.append(what["exceptionDetails"]["exception"]["description"])
            if event["method"] == "Log.entryAdded" and what["entry"]["level"] == "error":
                self.complaints.append(what["entry"]["text"])
            if event["method"] == "Runtime.consoleAPICalled" and what["type"] == "error":
                self.complaints.append(str(what["args"]))
            if event["method"] == "Network.requestWillBeSent":
                self.requests.append(what["request"]["url"])
        return result


@contextlib.contextmanager
def open_page(path, profile, width=1100, height=900):
    """Open a file in a browser of its own, whose settings go into the folder `profile`."""
    to_browser, from_browser = os.pipe(), os.pipe()

    def connect():  # the browser reads from 3 and writes to 4
        ends = os.dup(to_browser[0]), os.dup(from_browser[1])  # neither may be 3 or 4 yet
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    process = subprocess.Popen(
        [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", f"--window-size={width},{height}"],
        preexec_fn=connect, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(to_browser[0])
    os.close(from_browser[1])
    answers = _messages(from_browser[0])
    count = 0

    def send(method, options, session=None):
        nonlocal count
        count += 1
        message = {"id": count, "method": method, "params": options}
        if session:
            message["sessionId"] = session
        os.write(to_browser[1], json.dumps(message).encode() + b"\0")
        events = []
        while True:
            found = json.loads(next(answers))
            if found.get("id") == count:
                assert "error" not in found, found["error"]
                return found["result"], events
            events.append(found)

    try:
        target, _ = send("Target.createTarget", {"url": "about:blank"})
        session, _ = send("Target.attachToTarget", {"targetId": target["targetId"],
                                                    "flatten": True})
        page = Page(send, session["sessionId"])
        for domain in ("Runtime", "Log", "Page", "Network"):
            page.call(f"{domain}.enable")
        page.call("Page.navigate", url=path.resolve().as_uri())
        page.wait_for("document.readyState === 'complete'")
        yield page
    finally:
        process.kill()
        process.wait()
        os.close(to_browser[1])
        os.close(from_browser[0])


def _messages(handle):
    """What the browser says, message by message; each ends with a zero byte."""
    pending = b""
    while True:
        assert select.select([handle], [], [], SILENCE_S)[0], "the browser says nothing any more"
        block = os.read(handle, 1 << 20)
        assert block, "the browser has ended"
        *whole, pending = (pending + block).split(b"\0")
        yield from whole
