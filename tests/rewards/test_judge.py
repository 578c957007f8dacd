"""The example of a judge model, against a local server that is slow, breaks down and talks nonsense."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mm_agrae.config import RewardSection
from mm_agrae.rewards import Rewarder
from mm_agrae.types import Completion, Example

JUDGE = Path(__file__).parent.parent.parent / "examples" / "judge.py"


class Server(ThreadingHTTPServer):
    """Replies to the completion "a b c" with a, then b, then c; a status code is an error, "slow" a long wait."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = asked["messages"][0]["content"].split("-" * 20)[1].strip()
        count = sum(given == text for given, *_ in self.server.asked)
        self.server.asked.append((text, asked["model"], self.headers["Authorization"]))
        reply = text.split()[min(count, len(text.split()) - 1)]
        if reply == "slow":
            time.sleep(1.5)
        if reply in ("500", "429", "400"):
            self.send_error(int(reply))
            return
        body = {"choices": [{"message": {"content": reply}}]} if reply != "nothing" else {}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        monkeypatch.setenv("JUDGE_MODEL", "some-judge")
        monkeypatch.setenv("JUDGE_KEY", "k")
        yield server
        server.shutdown()


@pytest.fixture
def quick(tmp_path):
    """The example with short waits."""
    text = JUDGE.read_text().replace("WAIT_S = 1.0", "WAIT_S = 0.05").replace("TIMEOUT_S = 20.0", "TIMEOUT_S = 0.5")
    (tmp_path / "judge.py").write_text(text)
    return f"{tmp_path / 'judge.py'}:judge"


def test_marks_retries_and_failures(server, quick):
    replies = {
        "7": 0.7,
        "10/10": 1.0,
        "500 429 3": 0.3,
        "slow 4": 0.4,
        "nonsense nothing 5": 0.5,
        "500": "the judge gave no mark in 3 tries; the last: HTTP Error 500",
        "11": "the last: ValueError: not a mark from 0 to 10: '11'",
        "400 7": "the judge refuses the request: HTTP Error 400",
        "slow": "the judge gave no mark in 3 tries; the last: TimeoutError: timed out",
    }
    example = Example("e", "How many?", "5")
    completions = [Completion((1,), (0.0,), text, "stop", 0) for text in replies]
    config = RewardSection(parts={"accuracy": 0.0, quick: 1.0}, time_limit_s=1.0, workers=3)
    with Rewarder(config, 16) as rewarder:
        scores = rewarder.score([example] * len(completions), completions)
    for score, (text, expected) in zip(scores, replies.items(), strict=True):
        if isinstance(expected, str):
            assert score.parts[quick] == 0.0
            assert expected in score.error, text
        else:
            assert (score.parts[quick], score.error) == (expected, ""), text
    tries = {text: sum(given == text for given, *_ in server.asked) for text in replies}
    assert tries == {"7": 1, "10/10": 1, "500 429 3": 3, "slow 4": 2, "nonsense nothing 5": 3} | {
        "500": 3,
        "11": 3,
        "400 7": 1,
        "slow": 3,
    }
    assert {asked[1:] for asked in server.asked} == {("some-judge", "Bearer k")}


def test_no_server_at_all(monkeypatch, quick):
    monkeypatch.setenv("JUDGE_URL", "http://127.0.0.1:9/v1")
    with Rewarder(RewardSection(parts={"accuracy": 1.0, quick: 1.0}), 16) as rewarder:
        (score,) = rewarder.score([Example("e", "?", "5")], [Completion((1,), (0.0,), r"\boxed{5}", "stop", 0)])
    assert (score.success, score.reward) == (True, 1.0)
    assert "the last: URLError: <urlopen error [Errno 111] Connection refused>" in score.error
