"""What the `spaces` package asks ZeroGPU's device API: /startup-report, /schedule, /allow, /release.

    python -m tests.zerogpu.scheduler PORT

REUSE=0 gives every call a fresh worker. ENFORCE=1 kills a worker that is over its time. QUOTA is how many
calls are granted before they are refused. Every call is printed as a line of JSON.
"""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlparse

REUSE, ENFORCE = os.environ.get("REUSE", "1") == "1", os.environ.get("ENFORCE") == "1"
QUOTA = int(os.environ.get("QUOTA", "1000000"))


@dataclass
class Call:
    """One granted call: which task, for how long, in which process."""

    task: str
    seconds: float
    pid: int | None = None
    over: bool = False


calls: list[Call] = []
idle: dict[str, int] = {}  # task: process of its last worker


def say(line: dict) -> None:
    sys.stdout.write(json.dumps(line) + "\n")  # one write: threads do not mix their lines
    sys.stdout.flush()


def enforce(call: Call) -> None:
    time.sleep(call.seconds)
    if call.pid and not call.over:
        say({"killed": call.pid})
        os.kill(call.pid, signal.SIGKILL)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        url = urlparse(self.path)
        asked = dict(parse_qsl(url.query))
        self.rfile.read(int(self.headers.get("content-length") or 0))
        say({"path": url.path, **{k: v[:40] for k, v in asked.items()}})
        self.answer(*getattr(self, url.path.strip("/").replace("-", "_"))(asked))

    def answer(self, status: int, body: dict | None = None) -> None:
        data = json.dumps(body).encode() if body is not None else b""
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def startup_report(self, asked):
        return (200,)

    def schedule(self, asked):
        if len(calls) >= QUOTA:
            return 429, {"left": 3, "wait": "0:10:00"}
        call = Call(asked["taskId"], float(asked.get("durationSeconds", 60)))
        calls.append(call)
        warm = idle.pop(call.task, None) if REUSE else None
        call.pid = warm
        if ENFORCE:
            threading.Thread(target=enforce, args=(call,), daemon=True).start()
        token = str(len(calls) - 1)
        return 200, {"idle": warm is not None, "nvidiaIndex": 0, "nvidiaUUID": "GPU-0", "allowToken": token}

    def allow(self, asked):
        calls[int(asked["allowToken"])].pid = int(asked["pid"])
        return (200,)

    def release(self, asked):
        call = calls[int(asked["allowToken"])]
        call.over = True
        if asked.get("fail", "false").lower() != "true" and call.pid:
            idle[call.task] = call.pid
        return (200,)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
