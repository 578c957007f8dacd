"""`mm-agrae variants`: the page, and what is kept of the wordings and steps that a chat model gives."""

import json
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import TEXT, VL, examples, run_config
from PIL import Image

from mm_agrae import cli
from mm_agrae import config as configs
from mm_agrae.evaluation import prepare
from mm_agrae.evaluation.prepare import kept_steps, kept_wordings
from mm_agrae.tasks import load_all
from mm_agrae.tasks.variants import read_prepared
from mm_agrae.types import Example

APPLES = Example("a", "Ann has 3 apples and buys 4. How many?", "7")


def versions(*texts):
    return "\n".join(f"<version>{text}</version>" for text in texts)


def steps(*texts, boxed):
    return "\n".join(f"<step>{text}</step>" for text in texts) + rf" So \boxed{{{boxed}}}."


def test_wordings_that_are_kept():
    good = ["4 apples are added to Ann's 3. What is their number?", "Ann buys 4 apples. 3 she has. What is the sum?"]
    bad = [
        "Ann has 3 apples and buys 5. How many?",  # another number
        "Ann has 3 apples. How many?",
        "ANN has 3 apples and buys 4. how many?",  # the question
        "Ann has 3 and buys 4 apples, 7 in all. How many?",  # the answer
        "<image> Ann has 3 apples, then 4 more. How many?",
        " ",
    ]
    assert kept_wordings(APPLES, versions(*good, *bad, good[0])) == good
    assert kept_wordings(APPLES, good[0]) == []
    many = [f"{'Well, ' * n}Ann has 3 apples; she buys 4. How many?" for n in range(7)]
    assert kept_wordings(APPLES, versions(*many)) == many[:5]


def test_wordings_keep_pictures_and_choices():
    pictured = replace(APPLES, question=f"<image>\n{APPLES.question}")
    assert kept_wordings(pictured, versions("3 and 4 <image> make?", "3 and 4 make?")) == [
        "3 and 4 <image> make?",
        "<image>\n3 and 4 make?",  # as a model writes that sees a picture in the marker's place
    ]
    choice = Example("c", "3 + 4? A. 6 B. 7", "B", grading={"kind": "choice", "choices": ["6", "7"]})
    assert kept_wordings(choice, versions("What is 3 + 4? A. 6 B. 7")) == ["What is 3 + 4? A. 6 B. 7"]


def test_steps_that_are_kept():
    given, add, answer = "Given are 3 and 4.", "Add them.", "That is 7."
    assert kept_steps(APPLES, steps(given, add, boxed=7)) == [given, add]
    assert kept_steps(APPLES, steps(given, answer, add, boxed=7)) == [given]
    assert kept_steps(APPLES, steps(answer, add, boxed=7)) == []
    assert kept_steps(APPLES, steps(given, add, boxed=8)) == []
    assert kept_steps(APPLES, r"The answer is \boxed{7}") == []
    assert kept_steps(APPLES, "<step>Add.</step> The answer is 7") == []  # not in a box
    strict = replace(APPLES, grading={"kind": "number", "answer_in": ["tag"], "grader": "some:grader"})
    assert kept_steps(strict, steps(given, add, boxed=7)) == [given, add]


class Handler(BaseHTTPRequestHandler):
    """The first request fails with the server's status; replies are right for the first problem alone."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, asked, self.headers["Authorization"]))
        if len(self.server.asked) == 1:
            self.send_error(self.server.first)
            return
        content = asked["messages"][0]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        right = "3 + 4" in text
        if "versions" in text:
            reply = versions("What do 3 and 4 make?" if right else "What is 1 + 2?")
        else:
            reply = steps("Add the numbers.", boxed=7 if right else 1)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}]}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(prepare, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(prepare, "AT_ONCE", 1)
    monkeypatch.setenv(prepare.KEY_VARIABLE, "a-key")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.first = [], 500
        server.address = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def rows_file(tmp_path, path=TEXT):
    """A config of a text, a picture, and a text."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    rows = [
        {"id": "right", "question": "3 + 4?", "answer": "7"},
        {"id": "picture", "question": "Which colour?", "answer": "red", "images": ["red.png"]},
        {"id": "wrong", "question": "5 + 6?", "answer": "11"},
    ]
    rows = [row for row in rows if path == VL or "images" not in row]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [{"task": "files", "path": str(tmp_path / "rows.jsonl")}], "evaluate": []}
    config = run_config(tmp_path / "run", path, data=data)
    (tmp_path / "config.yaml").write_text(configs.dump(config))
    return str(tmp_path / "config.yaml")


def test_wordings_and_steps_from_an_address(tmp_path, server, capsys):
    config, out = rows_file(tmp_path, VL), tmp_path / "new" / "prepared.jsonl"
    command = ["variants", config, "--prepare", str(out), "--model", "some-model", "--address", server.address]
    assert cli.main(command) == 0
    assert "3 problems asked for (0 were there): kept 1 wordings, and the steps of 1" in " ".join(
        capsys.readouterr().out.split()
    )
    (line,) = out.read_text().splitlines()
    assert json.loads(line) == {"id": "right", "wordings": ["What do 3 and 4 make?"], "steps": ["Add the numbers."]}
    path, body, key = server.asked[0]
    assert (path, body["model"], key) == ("/v1/chat/completions", "some-model", "Bearer a-key")
    assert server.asked[1][1] == body  # tried again
    pictures = [body for _, body, _ in server.asked if isinstance(body["messages"][0]["content"], list)]
    assert len(pictures) == 2
    assert pictures[0]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    # Goes on: what is there is not asked for again, nor changed.
    before = len(server.asked)
    assert cli.main(command) == 0
    assert "(1 were there)" in " ".join(capsys.readouterr().out.split())
    assert len(server.asked) - before == 4
    assert out.read_text().splitlines() == [line]
    task = load_all(configs.load(config).data.train)
    assert read_prepared(str(out), task)["right"].steps == ("Add the numbers.",)


def test_an_address_that_refuses(tmp_path, server, capsys):
    server.first = 401
    command = ["variants", rows_file(tmp_path), "--prepare", str(tmp_path / "out.jsonl")]
    assert cli.main([*command, "--model", "m", "--address", server.address]) == 2
    assert f"{server.address}/chat/completions: status 401" in capsys.readouterr().err
    assert cli.main([*command, "--address", server.address]) == 2
    assert "--prepare needs a chat model" in capsys.readouterr().err
    secret = server.address.replace("://", "://me:secret@").replace("/v1", "/v2")
    server.asked.clear()
    assert cli.main([*command, "--model", "m", "--address", secret]) == 2
    assert "secret" not in (said := capsys.readouterr().err)
    assert "/v2/chat/completions: status 401" in said
    assert cli.main([*command[:2], "--model", "m"]) == 2
    assert "say by --prepare FILE" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    there = ["--prepare", str(tmp_path / "file" / "out.jsonl"), "--model", "m", "--address", server.address]
    assert cli.main([*command[:2], *there]) == 2
    assert "writing out.jsonl failed" in capsys.readouterr().err
    (tmp_path / "out.jsonl").write_text("not JSON\n")
    assert cli.main([*command, "--model", "m", "--address", server.address]) == 2
    assert "out.jsonl, line 1: JSONDecodeError" in capsys.readouterr().err


def test_a_model_of_ones_own(tmp_path, capsys):
    """The small one finds nothing, which is no error."""
    out = tmp_path / "prepared.jsonl"
    command = ["variants", rows_file(tmp_path), "--prepare", str(out), "--model", TEXT, "-n", "1"]
    assert cli.main([*command, "evaluate.max_new_tokens=8", "prompt.max_tokens=512"]) == 0
    assert "1 problems asked for (0 were there): kept 0 wordings" in " ".join(capsys.readouterr().out.split())
    assert not out.exists()


@pytest.mark.parametrize("path", [VL, TEXT], ids=["vl", "text"])
def test_every_problem_is_put_to_the_model(path):
    """With or without markers in the question."""
    config = run_config("run", path, evaluate={"max_new_tokens": 4}, prompt={"instruction": "Be short."})
    (example,) = examples(path, 1)
    asked = [example, replace(example, question="<image>\n" * len(example.images) + example.question)]
    with prepare._asking(config, path, "") as ask:
        for text in (prepare._WORDINGS, prepare._STEPS):
            assert all(ask([replace(each, question=text.format(question=each.question)) for each in asked]))


@pytest.mark.parametrize("path", [VL, TEXT], ids=["vl", "text"])
def test_the_page_and_the_table(tmp_path, path, capsys):
    config, out = tmp_path / "config.yaml", tmp_path / "pages" / "variants.html"
    config.write_text(configs.dump(run_config(tmp_path / "run", path, rollout={"variants": {"count": 3}})))
    assert cli.main(["variants", str(config), "-n", "4", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert str(out) in printed
    found = re.findall(r"(\w+) +│ +([+-]\d) +│ +(\d) of 4", printed)
    table, page = {name: (delta, int(count)) for name, delta, count in found}, out.read_text()
    assert table["hint_1"][1] > table["hint_all"][1] == 0
    assert table["blur"] == ("+1", 4 if path == VL else 0)
    assert table.get("words") == (("-2", 4) if path == VL else None)
    for name, (delta, count) in table.items():
        assert page.count(f"{name}, D {delta}") == count
    assert page.count("as it is, D = 5; goes with: ") == 4
    assert (page.count("<img") > 4 * 7) if path == VL else ("<img" not in page)
    assert cli.main(["variants", str(config), "--out", str(tmp_path / "page.png")]) == 2
    assert ".html" in capsys.readouterr().err
