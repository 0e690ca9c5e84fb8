"""The real app.py in a process of its own, on a free port, with a store of its own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def serve(store: Path, module: str = "app", port: str = "", **environment: str):
    """Yield the page's address."""
    port = port or free_port()
    settings = {"ECODIFF_HOME": str(store), "GRADIO_SERVER_PORT": str(port)} | environment
    log = (store / "server.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        cwd=ROOT,
        env=os.environ | settings,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url, timeout=5)
                break
            if process.poll() is not None:
                break
            time.sleep(0.5)
        else:
            raise TimeoutError("the page did not come up in two minutes")
        assert process.poll() is None, (store / "server.log").read_text()
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()
