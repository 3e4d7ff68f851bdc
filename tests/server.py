"""An MLflow server on loopback, and a proxy before it that is late or dies."""

import contextlib
import http.client
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import told


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """``mlflow server`` with a database and artifacts of its own in ``folder``."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        self.process = subprocess.Popen(
            command,
            env=told.ENVIRONMENT | {"MLFLOW_DISABLE_TELEMETRY": "true"},
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / "server.out").open("ab"),
            start_new_session=True,
        )
        until = time.monotonic() + 120
        while not self._answers():
            assert self.process.poll() is None and time.monotonic() < until, (
                self.folder / "server.out"
            ).read_text()
            time.sleep(0.2)

    def kill(self):
        """With its workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    def _answers(self):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
            return True
        return False


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    found = Server(tmp_path_factory.mktemp("server"))
    yield found
    found.kill()


class Late(http.server.ThreadingHTTPServer):
    """Passes requests on to a server ``delay_s`` later."""

    daemon_threads = True

    def __init__(self, port, delay_s):
        super().__init__(("127.0.0.1", 0), _Passing)
        self.to, self.delay_s, self.requests = port, delay_s, 0
        self.uri = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_):
        pass  # those who ask give up


class _Passing(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests += 1
        time.sleep(self.server.delay_s)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        passed = http.client.HTTPConnection("127.0.0.1", self.server.to, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
        passed.request(self.command, self.path, body, headers)
        answer = passed.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def log_message(self, *_):
        pass
